"""The processes that torchrun started, as a cluster: they train, rank 0 does all else.

    torchrun --nproc-per-node 8 -m vllm_memdec.train.cli build ... --ray-address none

Rank 0 runs the stages one after the other; the others wait until it trains, and train with it. On
several machines the output lies on storage that all of them see. An error ends its process, and
torchrun the others.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from vllm_memdec.train.executor.executor import LocalExecutor
from vllm_memdec.train.executor.ray_executor import World
from vllm_memdec.train.executor.worker import leave

PATIENCE = timedelta(days=30)  # how long the stages before the training may take
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started() -> bool:
    """Return whether this process is one of several that a launcher started."""
    return all(name in os.environ for name in VARIABLES)


class Torchrun(LocalExecutor):
    """Everything in rank 0's process but the training, which all processes run."""

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist
        import torch.distributed.nn.functional  # see worker.leave()

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        self.world = World(dist.get_rank(), dist.get_world_size())
        self.together = False  # whether the others are inside the training

    def workers(self) -> int:
        return self.world.size

    def train(self, loop: Callable[[World], None], work: Path) -> None:
        _told(loop)
        self._together(loop)

    def follow(self) -> None:
        """Train with rank 0, each time it does, until it lets go."""
        if threading.current_thread() is threading.main_thread():
            # A launcher tells all of them to stop: rank 0 does, with a checkpoint, and then they.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while (loop := _told(None)) is not None:
            self._together(loop)

    def _together(self, loop: Callable[[World], None]) -> None:
        self.together = True  # stays True after an error: the launcher ends the others
        loop(self.world)
        self.together = False

    def close(self) -> None:
        """Let the others go. Where one failed inside the training, the launcher ends them."""
        if not self.together:
            if self.world.rank == 0:
                with contextlib.suppress(RuntimeError):  # another process has ended: not the cause
                    _told(None)
            leave()


def _told(value: Any) -> Any:
    """Return rank 0's value on every process."""
    import torch
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]
