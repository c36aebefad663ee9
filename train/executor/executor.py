"""Where the work of a build runs: the protocol, and this process."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from vllm_memdec.train.executor.worker import World


class Executor(Protocol):
    """Runs workers over shards, and the training loop."""

    def map(self, worker: Callable[[int], int], items: Iterable[int]) -> Iterator[int]:
        """Yield the worker's result of every item, in any order."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return function(*args), run on one machine of the cluster."""

    def workers(self) -> int:
        """Return how many workers run side by side."""

    def train(self, loop: Callable[[World], None], work: Path) -> None:
        """Run a training loop on one process or several; work is on storage all of them share."""


class LocalExecutor:
    """Everything in this process, one after the other: for tests and debuggers."""

    def map(self, worker: Callable[[int], int], items: Iterable[int]) -> Iterator[int]:
        yield from map(worker, items)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def workers(self) -> int:
        return 1

    def train(self, loop: Callable[[World], None], work: Path) -> None:
        loop(World())
