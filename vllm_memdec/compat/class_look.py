"""The registry of models: vLLM looks at a class in this process.

_run_in_subprocess imports vLLM again, in a process of its own, for each class that this machine's
vLLM has not seen: nothing is to touch CUDA before workers start. `memdec check` starts none, and a
person waits for it.

May go when vLLM knows of a class what it needs without an import.
Relies on its argument alone, a function that looks.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from vllm.model_executor.models import registry

from vllm_memdec.compat.hooks import wrap

SIGNATURES = {"vllm.model_executor.models.registry:_run_in_subprocess": "fn"}


@contextlib.contextmanager
def in_this_process() -> Iterator[None]:
    """Let vLLM look at classes here."""
    before = registry._run_in_subprocess
    wrap(registry, "_run_in_subprocess", _call)
    try:
        yield
    finally:
        registry._run_in_subprocess = before


def _call(original: Callable) -> Callable:
    def _run_in_subprocess(look: Callable[[], Any]) -> Any:
        return look()

    return _run_in_subprocess
