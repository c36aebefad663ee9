"""What every stage is given beside its own: progress, executor, and how much ram it may take."""

from dataclasses import dataclass, field

from vllm_memdec.train.executor.executor import Executor, LocalExecutor
from vllm_memdec.train.progress import Progress

RAM_BUDGET = 4 * 2**30


@dataclass(frozen=True)
class Context:
    """Progress, executor and ram of a build."""

    progress: Progress = field(default_factory=Progress)
    executor: Executor = field(default_factory=LocalExecutor)
    ram_budget: int = RAM_BUDGET  # bytes a process may take for what grows with the corpus
