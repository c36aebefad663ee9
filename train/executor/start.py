"""Where the work of a command runs: in this process, on Ray, or in the processes of torchrun."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.executor.executor import Executor, LocalExecutor
from vllm_memdec.train.executor.ray_executor import RayExecutor


def choose_cluster(address: str, shared: Path, option: str = "--output") -> Executor:
    """Return where the work runs: in this process, on this machine's Ray, or on a cluster.

    shared: the folder that all nodes must see; option: what it is given by.
    """
    if address == "none":
        return LocalExecutor()
    return RayExecutor(None if address == "local" else address, shared.resolve(), option)


@contextlib.contextmanager
def joined(address: str, output: Path) -> Iterator[Executor | None]:
    """Yield where the work runs; None in a process of torchrun that has done what was its to do."""
    from vllm_memdec.train.executor.torchrun import Torchrun, started

    if not started():
        yield choose_cluster(address, output)
        return
    if address != "none":
        raise MemdecError("under torchrun the processes are there already: add --ray-address none.")
    with contextlib.closing(Torchrun()) as processes:
        if processes.world.rank:
            processes.follow()
        yield None if processes.world.rank else processes
