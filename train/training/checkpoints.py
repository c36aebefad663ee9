"""Checkpoints of training: written in a thread while training goes on, the last two are kept.

A checkpoint is whole or absent, and the one before it stays until the next has its name: whatever
happens while one is written, an earlier one is there to go on from.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from vllm_memdec.train.data.artifacts import write_atomic

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
NEXT = "checkpoint.next.pt"  # a whole checkpoint that is about to be renamed
BEST = "best.pt"  # weights of the best evaluation, where training may stop early
STOP = "stop"  # a file that asks the training to end with a checkpoint


class Checkpoints:
    """Writes training states into a folder, one after the other, in a thread of its own."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.pool = ThreadPoolExecutor(1)
        self.pending: list[Future] = []

    def save(self, state: dict[str, Any]) -> None:
        """Write a state, which nobody may change any more, once the one before it is written."""
        self._submit(self._keep_two, state)

    def save_best(self, state: dict[str, Any]) -> None:
        """Write the weights of the best evaluation so far."""
        self._submit(_write, self.work / BEST, state)

    def check(self) -> None:
        """Raise what went wrong while writing, such as a full disk."""
        for future in [f for f in self.pending if f.done()]:
            self.pending.remove(future)
            future.result()

    def wait(self) -> None:
        """Return when all is written; raise what went wrong."""
        while self.pending:
            self.pending.pop(0).result()

    def close(self) -> None:
        """End the thread; what it is writing is finished first."""
        self.pool.shutdown()

    def _submit(self, function: Any, *arguments: Any) -> None:
        self.wait()  # a disk that is too slow is waited for: states must not pile up
        self.pending.append(self.pool.submit(function, *arguments))

    def _keep_two(self, state: dict[str, Any]) -> None:
        _write(self.work / NEXT, state)
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.work / CHECKPOINT, self.work / PREVIOUS)
        os.replace(self.work / NEXT, self.work / CHECKPOINT)


def _write(path: Path, state: dict[str, Any]) -> None:
    write_atomic(path, lambda p: torch.save(state, p))


def newest(work: Path) -> Path | None:
    """Return the file to go on from, None at the beginning."""
    names = (NEXT, CHECKPOINT, PREVIOUS)  # a kill may have left the first without its name
    return next((work / n for n in names if (work / n).exists()), None)


def saved_step(work: Path) -> int:
    """Return how many steps the newest checkpoint has behind it, 0 without one."""
    path = newest(work)
    return 0 if path is None else torch.load(path, weights_only=True, mmap=True)["step"]


@contextlib.contextmanager
def stop_file(work: Path) -> Iterator[Path]:
    """Yield a file that exists as soon as this process got SIGTERM; remove it at the end.

    A file, for the training may run in other processes, which see the folder.
    """
    path = work / STOP
    path.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():  # signals are not ours
        yield path
        return
    before = signal.signal(signal.SIGTERM, lambda *_: path.touch())
    try:
        yield path
    finally:
        signal.signal(signal.SIGTERM, before)
        path.unlink(missing_ok=True)
