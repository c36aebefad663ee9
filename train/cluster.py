"""Where work runs: in this process, or on Ray. The only module that imports Ray.

A stage hands over a worker, a picklable callable that takes a shard's number, does the shard and
writes its files; what it needs, a model or an index, it opens at its first call and keeps. One
with `gpu = True` gets a GPU to itself, where there are any. Ray
Data runs one actor a worker and gives a lost actor's shards to others; Ray Train starts the
processes of the training, and starts them again, fewer if need be, when one is lost. Where there
is room for one worker only, as on a laptop, one actor does everything, stage after stage: a process
that imports torch and opens a model takes seconds to start.
"""

import logging
import os
import pickle
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.heap import trim_heap
from vllm_memdec.train.trust import VARIABLE, code_allowed

CONNECT_SECONDS = 10.0
OBJECT_STORE_BYTES = 128 * 2**20  # data goes through files, results are numbers
RESTARTS = 8  # of the group of training processes, or of the only worker
LARGEST_WORKER = 8  # CPUs: a worker scales no further

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no call leaves the machine
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # 15 starves the work wherever something else runs
}


@dataclass(frozen=True)
class World:
    """A training process among its fellows."""

    rank: int = 0
    size: int = 1


class Cluster(Protocol):
    """Runs workers over shards, and the training loop."""

    def map(self, worker: Callable[[int], int], items: Iterable[int]) -> Iterator[int]:
        """Yield the worker's result of every item, in any order."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return function(*args), run on one machine of the cluster."""

    def workers(self) -> int:
        """Return how many workers run side by side."""

    def train(self, loop: Callable[[World], None], work: Path) -> None:
        """Run a training loop on one process or several; work is on storage all of them share."""


class Here:
    """Everything in this process, one after the other: for tests and debuggers."""

    def map(self, worker: Callable[[int], int], items: Iterable[int]) -> Iterator[int]:
        yield from map(worker, items)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def workers(self) -> int:
        return 1

    def train(self, loop: Callable[[World], None], work: Path) -> None:
        loop(World())


class _Carried:
    """A worker inside Ray: what it raises travels home as a value, not wrapped and not retried."""

    def __init__(self, worker: Callable[[int], int], shared: str) -> None:
        self.worker, self.shared = worker, shared

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        result, error = _attempt(self.worker, self.shared, row["item"])
        return {"result": -1 if error else result, "error": error}


class _Hand:
    """The only worker of a cluster that has room for no other, kept through all stages."""

    def __init__(self) -> None:
        self.key, self.worker = -1, None

    def work(self, key: int, pickled: bytes, shared: str, item: int) -> tuple[Any, bytes]:
        """Do an item; the worker that came with the key is kept, with all it has opened."""
        if key != self.key:
            self._let_go()
            self.key, self.worker = key, pickle.loads(pickled)
        return _attempt(self.worker, shared, item)

    def call(self, function: Callable[..., Any], shared: str, args: tuple) -> tuple[Any, bytes]:
        self._let_go()
        return _attempt(function, shared, *args)

    def _let_go(self) -> None:
        """Give back what the worker before held."""
        self.key, self.worker = -1, None
        trim_heap()


def _attempt(function: Callable[..., Any], shared: str, *args: Any) -> tuple[Any, bytes]:
    """Return (function(*args), b""), or (None, the pickled error)."""
    try:
        if shared and not Path(shared).exists():
            raise MemdecError(
                f"a node of the cluster does not see {shared}: give an --output on storage that "
                "all nodes share."
            )
        return function(*args), b""
    except Exception as error:
        try:
            carried = pickle.dumps(error)
            pickle.loads(carried)
        except Exception:  # an error that cannot travel
            carried = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
        return None, carried


def _open(error: bytes) -> None:
    if error:
        raise pickle.loads(error)


def _place(cpus: int, gpus: int) -> dict[str, int]:
    """Return what a worker takes of its machine, as Ray's options."""
    return {"num_cpus": cpus} | ({"num_gpus": 1} if gpus else {})


class RayCluster:
    """Runs work on Ray: by default a local one of this machine, started when it is first needed."""

    def __init__(self, address: str | None = None, shared: Path | None = None) -> None:
        """address: HOST:PORT of a cluster, or "auto"; shared: a folder that all nodes must see."""
        self.address = address
        self.shared = str(shared) if shared else ""
        self.started = False
        self.hand: Any = None
        self.maps = 0

    def start(self) -> None:
        """Start or join Ray, once; MemdecError in one sentence if it does not answer."""
        if self.started:
            return
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        try:
            import ray.data
            import ray.train
        except ModuleNotFoundError:
            raise MemdecError(
                "Ray is not installed: pip install 'vllm-memdec[train]', or use --ray-address none."
            ) from None
        ray.data.DataContext.get_current().enable_progress_bars = False
        for name in ("ray.data", "ray.train"):  # we tell the progress
            logging.getLogger(name).setLevel(logging.ERROR)
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
                    ) from None
        self.started = True

    def _resources(self, use_gpus: bool = True) -> tuple[int, int, int]:
        """Return (CPUs a worker, workers, GPUs a worker: 1 or 0) of the machines that are alive.

        Where there are GPUs, each has a worker, which gets its share of the machine's CPUs: Ray
        has one without any compute with one thread what is left to CPUs.
        """
        import ray

        nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
        cpus = [int(n["CPU"]) for n in nodes if n.get("CPU", 0) >= 1]
        if not cpus:
            raise MemdecError("the Ray cluster has no CPU: add a node to it.")
        gpus = [(int(n["GPU"]), int(n.get("CPU", 0))) for n in nodes if n.get("GPU", 0) >= 1]
        if use_gpus and gpus:
            each = min(cpus // n for n, cpus in gpus)
            return min(each, LARGEST_WORKER), sum(n for n, _ in gpus), 1
        each = min(*cpus, LARGEST_WORKER)
        return each, sum(n // each for n in cpus), 0

    def _only_hand(self) -> Any:
        """Return the actor that does everything where one worker finds room, else None."""
        import ray

        if self.hand is None:
            cpus, workers, gpus = self._resources()
            if max(workers, self._resources(use_gpus=False)[1]) == 1:
                place = _place(cpus, gpus)
                lives = {"max_restarts": RESTARTS, "max_task_retries": RESTARTS}
                self.hand = ray.remote(**lives, **place)(_Hand).remote()
        return self.hand

    def _done_by_hand(self, task: Any) -> Any:
        """Return what a task of the only worker did; MemdecError if it died too often."""
        import ray

        try:
            result, error = ray.get(task)
        except ray.exceptions.RayActorError as lost:
            what = str(lost).strip().splitlines()[0]
            raise MemdecError(
                f"the worker was lost more than {RESTARTS} times ({what}): free some memory and "
                "run again, finished parts are kept."
            ) from lost
        _open(error)
        return result

    def map(self, worker: Callable[[int], int], items: Iterable[int]) -> Iterator[int]:
        items = list(items)
        if not items:
            return
        self.start()
        import ray

        if hand := self._only_hand():
            self.maps += 1
            pickled = pickle.dumps(worker)
            for item in items:
                yield self._done_by_hand(hand.work.remote(self.maps, pickled, self.shared, item))
            return
        cpus, workers, gpus = self._resources(getattr(worker, "gpu", False))
        workers = min(workers, len(items))
        rows = ray.data.from_items([{"item": i} for i in items], override_num_blocks=len(items))
        done = rows.map(
            _Carried,
            fn_constructor_args=(worker, self.shared),
            # Two shards in flight hide the scheduling; one at least may stay when nodes are lost.
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=workers,
                initial_size=workers,
                max_tasks_in_flight_per_actor=2,
            ),
            **_place(cpus, gpus),
        )
        for row in done.iter_rows():
            _open(row["error"])
            yield row["result"]

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        self.start()
        import ray

        if hand := self._only_hand():
            return self._done_by_hand(hand.call.remote(function, self.shared, args))
        cpus, _, gpus = self._resources()
        task = ray.remote(**_place(cpus, gpus), max_retries=-1)(_attempt)
        result, error = ray.get(task.remote(function, self.shared, *args))
        _open(error)
        return result

    def workers(self) -> int:
        self.start()
        return self._resources()[1]

    def train(self, loop: Callable[[World], None], work: Path) -> None:
        self.start()
        if hand := self._only_hand():
            self._done_by_hand(hand.call.remote(loop, self.shared, (World(),)))
            return
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer

        cpus, workers, gpus = self._resources()
        storage = work / "ray"
        trainer = TorchTrainer(
            _train,
            train_loop_config={"loop": loop, "shared": self.shared},
            scaling_config=ScalingConfig(
                num_workers=(1, workers) if workers > 1 else 1,
                use_gpu=bool(gpus),
                resources_per_worker={"CPU": cpus} | ({"GPU": 1} if gpus else {}),
            ),
            run_config=RunConfig(
                name=f"memory-{os.getpid()}-{time.time_ns()}",
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=RESTARTS),
            ),
        )
        try:
            result = trainer.fit()
            _open(result.return_value or b"")
        except TrainingFailedError as error:
            failures = list(getattr(error, "worker_failures", {}).values())
            for failure in failures:
                if isinstance(failure, (ValueError, OSError)):
                    raise failure from None
            what = str(failures[0] if failures else error).strip().splitlines()[0]
            raise MemdecError(
                f"training processes were lost more than {RESTARTS} times ({what}): run "
                "again to go on from the last checkpoint."
            ) from error
        finally:
            shutil.rmtree(storage, ignore_errors=True)


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


def _train(config: dict[str, Any]) -> bytes:
    """Run the loop in one of Ray Train's processes; return what rank 0 raised."""
    import ray.train

    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    _, error = _attempt(config["loop"], config["shared"], world)
    if error and world.rank != 0:  # only rank 0's value goes home
        _open(error)
    return error


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
