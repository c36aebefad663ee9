"""What a stage is, and what the stages of one build have in common."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_memdec.train.data.artifacts import Artifact
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.settings import Settings

OTHERS = "close other programs or take a larger machine"  # the remedy where RAM runs out


@dataclass(frozen=True)
class Stage:
    """How one artifact is made, and all that decides what is in it."""

    settings: dict[str, Any]
    reads: tuple[str, ...]  # the stages before it whose artifacts it reads
    make: Callable[[Path], None]
    files: Callable[[Path], Iterable[str]]  # names of those that make() must leave in its folder
    remedy: str  # what to do where RAM runs out, without losing the work that is done


@dataclass(frozen=True)
class Build:
    """One build: its inputs, its settings, and the artifacts of the stages that are done."""

    base: str
    corpus: Path
    validation: Path | None
    output: Path
    settings: Settings
    context: Context
    done: dict[str, Artifact] = field(default_factory=dict)
    old: dict[str, Artifact] | None = None  # of a build that this one updates, see updating.py

    def path(self, stage: str) -> Path:
        """Return the folder of a finished stage."""
        return self.done[stage].path

    def source(self, stage: str, name: str) -> str:
        """Return the path of what the user gave for an input of a stage, "" for none."""
        if (stage, name) == ("memory", "tokenizer"):
            return self.settings.memory.tokenizer or self.base
        places = {
            "corpus": self.corpus,
            "validation": self.validation,
            "init": self.settings.memory.init,
        }
        return str(places.get(name, self.base) or "")


def lowered(setting: str, value: int | None) -> str:
    """Return the advice to lower a number of blocks, or another one where it cannot be lower."""
    if value is None:
        return f"set {setting} to 2 (unset, it goes by the device)"
    return f"lower {setting} (it is {value})" if value > 1 else OTHERS


def less_budget(settings: Settings) -> str:
    """Return what to do if an index takes too much RAM, or keys that are computed again."""
    kept = settings.datastore.keep_keys
    return "lower --memory-budget" + ("" if kept else " or datastore.batch_blocks")
