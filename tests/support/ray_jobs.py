"""What the tests of the cluster have its processes do; imported there by name."""

import ctypes
import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.executor.ray_executor import World

DIE = {
    "exit": lambda: os._exit(1),
    "segmentation fault": lambda: ctypes.string_at(0),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def note(folder: Path, line: str) -> None:
    """Add a line to what has been done."""
    with open(folder / "done", "a") as file:
        file.write(line + "\n")


def noted(folder: Path) -> list[str]:
    """Return what has been done."""
    return (folder / "done").read_text().split()


@dataclass
class Deadly:
    """Does every item but one, which ends the process."""

    folder: Path
    how: str
    deadly: int

    def __call__(self, item: int) -> int:
        note(self.folder, f"{item}")
        if item == self.deadly:
            DIE[self.how]()
        return item


@dataclass
class Slow:
    """Returns the item and the node on which it is, after some time."""

    seconds: float

    def __call__(self, item: int) -> tuple[int, str]:
        import ray

        time.sleep(self.seconds)
        return item, ray.get_runtime_context().get_node_id()


@dataclass
class Loop:
    """A training loop in which one rank raises, or ends its process, and the others wait for it."""

    folder: Path
    what: str
    rank: int = 0
    checkpoints: int = 0  # a new one at each of so many beginnings
    disk: str = ""

    def __call__(self, world: World) -> None:
        import torch
        import torch.distributed as dist

        total = torch.ones(3)
        if world.size > 1:
            dist.all_reduce(total)
        assert total[0] == world.size
        if world.rank == self.rank:
            note(self.folder, f"{world.rank}/{world.size}")
            begun = len(noted(self.folder))
            if begun <= self.checkpoints:
                (self.folder / "work/checkpoint").write_text(str(begun))
            if self.what in DIE and not (self.checkpoints and begun > self.checkpoints):
                DIE[self.what]()
            elif self.what == "full disk":
                write_until_full(Path(self.disk) / "checkpoint.pt")
            elif self.what == "mistake":
                raise MemdecError("the loss is no longer finite: lower memory.learning_rate.")
            elif self.what == "defect":
                return {}["labels"]
        if world.size > 1:
            dist.all_reduce(total)


def write_until_full(path: Path) -> None:
    """Write what a small disk has no room for."""
    with open(path, "wb") as file:
        for _ in range(64):
            file.write(b"x" * 2**20)
    raise OSError(errno.EINVAL, "the disk was not small")


@dataclass
class Growing:
    """A training loop that writes a checkpoint a while, and ends once there are two processes."""

    folder: Path

    def __call__(self, world: World) -> None:
        import torch
        import torch.distributed as dist

        note(self.folder, f"{world.rank}/{world.size}")
        if world.size > 1:
            dist.all_reduce(torch.ones(1))
            return
        for number in range(1000):
            time.sleep(0.1)
            (self.folder / "work/checkpoint").write_text(str(number))


@dataclass
class MakeFolder:
    """Makes a folder on the machine where it runs."""

    folder: str

    def __call__(self, item: int) -> int:
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        return item
