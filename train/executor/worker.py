"""Inside a process of Ray: it does one piece of work after another and sends the results home.

What is raised goes home as a value with its traceback, so that Ray neither wraps nor repeats it.
"""

import fcntl
import gc
import os
import pickle
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.heap import trim_heap

SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


@dataclass(frozen=True)
class World:
    """A training process among its fellows."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Outcome:
    """What a piece of work returned or, pickled and as text, what it raised."""

    value: Any = None
    error: bytes = b""
    traceback: str = ""

    def open(self) -> Any:
        """Return the value, or raise the error with the traceback of where it was raised."""
        if not self.error:
            return self.value
        error = pickle.loads(self.error)
        error.add_note(self.traceback)
        raise error


class Parted(RuntimeError):
    """A training process lost contact with another: that one ended, or the network did."""


def attempt(function: Callable[..., Any], *args: Any) -> Outcome:
    """Return the outcome of function(*args)."""
    try:
        return Outcome(function(*args))
    except Exception as error:
        told = f"in a worker on {socket.gethostname()}:\n{traceback.format_exc().rstrip()}"
        try:
            carried = pickle.dumps(error)
            pickle.loads(carried)
        except Exception:  # an error that cannot travel
            carried = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
        return Outcome(None, carried, told)


@dataclass(frozen=True)
class Proof:
    """A file in a folder that all nodes must see; another folder of the same name has none."""

    path: Path
    content: str
    option: str  # the command's option that names the folder

    def check(self) -> None:
        """Raise MemdecError unless this machine sees the file."""
        for patience in (1.0, 2.0, 0.0):  # seconds: network file systems may be late
            try:
                if self.path.read_text() == self.content:
                    return
            except (FileNotFoundError, NotADirectoryError):
                pass
            time.sleep(patience)
        raise MemdecError(
            f"a node of the cluster does not see {self.path.parent}: give {self.option} on storage "
            f"that all nodes share (the node is {socket.gethostname()})."
        )


class Worker:
    """The actor: one at a time in a process, kept through the stages."""

    def __init__(self) -> None:
        self.key = -1
        self.worker: Callable[[Any], Any] | None = None  # the one that came with the key

    def prove(self, proof: Proof | None) -> Outcome:
        """Tell that this process lives and sees what is shared; return oom_kills()."""

        def done() -> int:
            if proof is not None:
                proof.check()
            return oom_kills()

        return attempt(done)

    def work(self, key: int, pickled: bytes, item: Any) -> Outcome:
        """Do an item; the worker that came with the key is kept, with all it has opened."""

        def done() -> Any:
            if key != self.key:
                self.let_go()
                self.key, self.worker = key, pickle.loads(pickled)
            assert self.worker is not None
            return self.worker(item)

        return attempt(done)

    def free_port(self) -> int:
        """Return a port that nobody listens on."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return listener.getsockname()[1]

    def train(self, pickled: bytes, world: World, meeting: tuple[str, int], own: str) -> Outcome:
        """Run the training loop as one of its processes.

        meeting: rank 0's address and port; own: this machine's address.
        """

        def done() -> None:
            self.let_go()
            loop = pickle.loads(pickled)
            if world.size == 1:
                loop(world)
                return
            import torch.distributed as dist

            try:
                join(world, meeting, own)
                loop(world)
            except RuntimeError as error:
                # Also where another process ended: gloo raises a plain RuntimeError.
                if isinstance(error, dist.DistError) or any(word in str(error) for word in LOST):
                    raise Parted(str(error)) from error
                raise
            # After an error the group stays: others learn of it from the driver, not from a
            # connection that closes.
            leave()

        return attempt(done)

    def let_go(self) -> None:
        """Give back the RAM of the worker before."""
        self.key, self.worker = -1, None
        trim_heap()
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
            sys.modules["torch"].cuda.empty_cache()


def oom_kills() -> int:
    """Return how many processes the kernel has killed on this machine for lack of RAM."""
    counters = Path("/proc/vmstat").read_text() if Path("/proc/vmstat").exists() else ""
    return sum(int(line.split()[1]) for line in counters.splitlines() if "oom_kill " in line)


def join(world: World, meeting: tuple[str, int], own: str) -> None:
    """Join the training's process group, with the environment variables that torchrun would set."""
    import torch
    import torch.distributed as dist
    import torch.distributed.nn.functional  # see leave()

    address, port = meeting
    environment: dict[str, int | str] = {
        "RANK": world.rank,
        "WORLD_SIZE": world.size,
        "LOCAL_RANK": 0,
    }
    environment |= {"MASTER_ADDR": address, "MASTER_PORT": port}  # each sees one GPU: number 0
    os.environ.update({name: str(value) for name, value in environment.items()})
    if name := interface(own):  # else gloo takes that of the host's name, which may be loopback
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Leave the process group, whose threads have ended then.

    One that still runs when Python ends may abort it. Two things keep the group: a module of DDP's,
    which lies in a circle, and the defaults of torch.distributed.nn.functional's functions, if that
    is first imported, as DDP does, while there is a group: whoever makes one imports it before.
    After sharded training torch's own caches keep it as well.
    """
    import torch.distributed as dist

    gc.collect()
    dist.destroy_process_group()


def interface(address: str) -> str | None:
    """Return the network interface that has an IPv4 address, None if it is not known."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
