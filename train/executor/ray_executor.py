"""The executor on Ray: a local one, or a cluster that grows and loses machines.

A stage hands over a worker, a picklable callable that takes a shard's number, does the shard and
writes its files; what it needs, a model or an index, it opens at its first call and keeps. One
with `gpu = True` gets a GPU to itself, where there are any. The processes of the training run the
loop together; when one is lost, all begin again at the last checkpoint, fewer if need be.
"""

import math
import os
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.executor.ray_crew import TRIES, Crew, Process, alike, reason, slots
from vllm_memdec.train.executor.ray_folder import ensure_token, short_folder
from vllm_memdec.train.executor.worker import Parted, World
from vllm_memdec.train.trust import VARIABLE, code_allowed

CONNECT_SECONDS = 10.0  # seconds until a cluster has to answer
OBJECT_STORE_BYTES = 128 * 2**20  # small: data goes through files, results are numbers
LOOK_SECONDS = 5.0  # seconds between looks for machines that came or went
GATHER_SECONDS = 60.0  # seconds that the training waits for a process which starts late
GROWN = "there are more machines"  # why a training begins again, though no process is lost
BLAME_SECONDS = 10.0  # seconds until a process that lost contact is blamed for the loss itself

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no call leaves the machine
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # 15 starves the work wherever something else runs
    # Under `uv run` Ray would upload the working folder and start its workers by uv once more.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


@dataclass(frozen=True)
class Called:
    """A function and its arguments, as a worker with one item."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    gpu: bool = True

    def __call__(self, _: int) -> Any:
        return self.function(*self.args)


@dataclass(frozen=True)
class Lost:
    """A process of the training that was lost, or is to be one of more."""

    process: Process
    why: str


class RayExecutor:
    """Runs work on Ray: by default a local one of this machine, started when it is first needed."""

    def __init__(
        self, address: str | None = None, shared: Path | None = None, option: str = "--output"
    ) -> None:
        """address: HOST:PORT of a cluster, or "auto".

        shared: a folder that all nodes must see; option: of the command, that names it.
        """
        self.address, self.shared, self.option = address, shared, option
        self.started = False
        self.crew = Crew()
        self.maps = 0

    def start(self) -> None:
        """Start or join Ray, once; MemdecError in one sentence if it does not answer."""
        if self.started:
            return
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        folder = None
        if self.address is None:
            folder = short_folder()
            ensure_token()
        try:
            import ray
        except ModuleNotFoundError:
            raise MemdecError(
                "Ray is not installed: pip install 'vllm-memdec[train]', or use --ray-address none."
            ) from None
        options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if code_allowed() and self.address:  # another machine's workers inherit nothing from us
            options["runtime_env"] = {"env_vars": {VARIABLE: "1"}}
        if not ray.is_initialized():
            if self.address is None:
                # address="local": never join a cluster by chance, as RAY_ADDRESS would have it.
                with _muted():
                    ray.init(
                        address="local",
                        include_dashboard=False,
                        object_store_memory=OBJECT_STORE_BYTES,
                        _temp_dir=folder,
                        **options,
                    )
            else:
                _check_answers(self.address)
                try:
                    with _muted():
                        ray.init(address=self.address, **options)
                except Exception as error:
                    what = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    raise MemdecError(
                        f"no Ray cluster at {self.address} ({what}): check --ray-address."
                    ) from error
        if not slots():
            raise MemdecError("the Ray cluster has no CPU: add a node to it.")
        self.started = True

    def workers(self) -> int:
        self.start()
        return len(slots())

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        [result] = self._do(Called(function, args), [0], function.__qualname__)
        return result

    def map(self, worker: Callable[[int], int], items: Iterable[int]) -> Iterator[int]:
        return self._do(worker, items, type(worker).__name__)

    def _do(self, worker: Callable[[int], Any], items: Iterable[int], name: str) -> Iterator[Any]:
        """Yield the worker's results, as they come; an item whose process is lost is done again."""
        todo, losses = deque(items), Counter[int]()
        if not todo:
            return
        self.start()
        from ray import cloudpickle

        self.maps += 1
        crew, work = self.crew, (self.maps, cloudpickle.dumps(worker))
        alone, looked = len(todo) == 1, -LOOK_SECONDS
        with crew.working(self.shared, self.option):
            busy: set[Process] = set()
            while todo or busy:
                if time.monotonic() - looked >= LOOK_SECONDS:
                    places = slots(getattr(worker, "gpu", False))
                    crew.staff(places, len(todo) + len(busy))
                    looked = time.monotonic()
                largest = max((process.slot.cpus for process in crew.processes), default=0)
                for process in crew.idle():
                    # What is done once, by one, is done by the largest.
                    if todo and not (alone and process.slot.cpus < largest):
                        item = todo.popleft()
                        crew.give(process, item, process.actor.work.remote(*work, item))
                        busy.add(process)
                for answer in crew.answers(LOOK_SECONDS):
                    busy.discard(answer.process)
                    if answer.outcome is not None:
                        yield answer.outcome.open()
                        continue
                    todo.appendleft(answer.item)
                    losses[answer.item] += 1
                    looked = -LOOK_SECONDS
                    if losses[answer.item] == TRIES:
                        what = name if isinstance(worker, Called) else f"{name} {answer.item}"
                        raise MemdecError(
                            f"{what} was tried {TRIES} times and its process ended each time, "
                            f"most likely because {crew.cause(answer.process)}"
                        )

    def train(self, loop: Callable[[World], None], work: Path) -> None:
        self.start()
        from ray import cloudpickle

        pickled, losses = cloudpickle.dumps(loop), 0
        with self.crew.working(self.shared, self.option):
            while True:
                before = checkpoints_of(work)
                lost = self._train(pickled, self._gathered(), work)
                if lost is None:
                    return
                if checkpoints_of(work) != before:
                    losses = 0
                losses += lost.why != GROWN
                if losses == TRIES:
                    raise MemdecError(
                        f"processes of the training were lost {TRIES} times without a checkpoint "
                        f"in between (lastly: {lost.why}), most likely because "
                        f"{self.crew.cause(lost.process)}"
                    )

    def _gathered(self) -> list[Process]:
        """Return the processes of the training: all that are ready, once one has waited enough."""
        crew, until = self.crew, math.inf
        while True:
            places = alike(slots())
            crew.staff(places, len(places))
            crew.answers(LOOK_SECONDS)
            ready = crew.idle()
            if ready:  # the first time: later ones are no earlier
                until = min(until, time.monotonic() + GATHER_SECONDS)
            if ready and (len(ready) == len(crew.processes) or time.monotonic() > until):
                return ready

    def _train(self, pickled: bytes, group: list[Process], work: Path) -> "Lost | None":
        """Run the loop; return None at its end, else why it has to begin again.

        What one process raises is raised at once, and the others are ended.
        """
        import ray

        crew, left, finished = self.crew, set(group), False
        parted, until, seen = None, float("inf"), None
        try:
            meeting = (group[0].slot.address, ray.get(group[0].actor.free_port.remote()))
            for rank, process in enumerate(group):
                mine = World(rank, len(group)), meeting, process.slot.address
                crew.give(process, rank, process.actor.train.remote(pickled, *mine))
            while left:
                for answer in crew.answers(LOOK_SECONDS):
                    left.discard(answer.process)
                    if answer.outcome is None:
                        return Lost(answer.process, answer.lost)
                    try:
                        answer.outcome.open()
                    except Parted as error:  # Ray tells more of the process that ended
                        parted = parted or Lost(answer.process, str(error).strip().split("\n")[0])
                        until = min(until, time.monotonic() + BLAME_SECONDS)
                if parted and (not left or time.monotonic() > until):
                    return parted
                # A machine that came is used from the next checkpoint on.
                places = alike(slots())
                crew.staff(places, len(places))
                if not set(crew.idle()) - set(group):
                    seen = checkpoints_of(work)
                elif checkpoints_of(work) != seen:
                    return Lost(group[0], GROWN)
            finished = True
            return None
        except ray.exceptions.RayActorError as error:
            return Lost(group[0], reason(error))
        finally:
            if not finished:  # the others wait for one that will not answer
                for process in group:
                    crew.end(process)


def checkpoints_of(work: Path) -> dict[str, int]:
    """Return when each checkpoint of a working folder was written: another one is progress."""
    written = {}
    for path in work.glob("checkpoint*"):
        with suppress(FileNotFoundError):
            if path.suffix != ".tmp":
                written[path.name] = path.stat().st_mtime_ns
    return written


@contextmanager
def _muted() -> Iterator[None]:
    """Drop what Ray's C++ side prints as it starts; what goes wrong is raised."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _check_answers(address: str) -> None:
    """Raise MemdecError unless something listens at HOST:PORT; "auto" is Ray's to find."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit():
        raise MemdecError(f"--ray-address must be HOST:PORT, auto, local or none, got {address!r}.")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise MemdecError(
            f"no Ray cluster answers at {address} ({error}): check --ray-address."
        ) from None


@contextmanager
def followed(path: Path, advance: Callable[[int], None], seconds: float = 0.5) -> Iterator[None]:
    """Call advance(lines added) now and then while another process appends lines to a file."""
    stop = threading.Event()
    seen = path.read_bytes().count(b"\n") if path.exists() else 0

    def look() -> None:
        nonlocal seen
        lines = path.read_bytes().count(b"\n") if path.exists() else 0
        if lines > seen:  # fewer after a restart from a checkpoint: wait until they are done again
            advance(lines - seen)
            seen = lines

    def watch() -> None:
        while not stop.wait(seconds):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()
