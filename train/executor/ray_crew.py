"""The processes that do our work on a Ray cluster: started where there is room, replaced if lost.

One scheduler for one process and for many. Ray is asked for no restarts and no retries of its own:
it would repeat without end and tell nobody what kills its processes.
"""

import math
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.executor.worker import Outcome, Proof, Worker

LARGEST_WORKER = 8  # CPUs: a worker scales no further
TRIES = 3  # attempts at an item whose process is lost, and at a node where no process starts
WAITING_SECONDS = 60.0  # seconds without a first process until a line says so
EMPTY_SECONDS = 600.0  # seconds without any machine until the build ends with an error
PROVING = object()  # stands for the item of a process that proves that it can work


@dataclass(frozen=True)
class Slot:
    """Room for one process on a machine."""

    node: str  # Ray's name for it
    address: str
    cpus: int
    gpus: int  # 1 or 0


@dataclass(eq=False)
class Process:
    """An actor of Ray's, and what it does."""

    slot: Slot
    actor: Any
    task: Any = None  # the call whose answer is awaited
    item: Any = None


@dataclass(frozen=True)
class Answer:
    """What a process made of an item, or how it was lost over it."""

    process: Process
    item: Any
    outcome: Outcome | None
    lost: str


def slots(use_gpus: bool = True) -> list[Slot]:
    """Return the places for workers on the machines that are alive now, the largest first.

    Where there are GPUs, each has a worker, which gets its share of its machine's CPUs: Ray has
    one without any compute with one thread what is left to CPUs. Elsewhere a worker gets
    LARGEST_WORKER CPUs, or all of a machine that has fewer.
    """
    import ray

    by_gpu: dict[bool, list[Slot]] = {True: [], False: []}
    for node in ray.nodes():
        cpus, gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
        if not node["Alive"]:
            continue
        place = node["NodeID"], node["NodeManagerAddress"]
        if gpus:
            by_gpu[True] += [Slot(*place, min(cpus // gpus, LARGEST_WORKER), 1)] * gpus
        if cpus:
            each = min(cpus, LARGEST_WORKER)
            by_gpu[False] += [Slot(*place, each, 0)] * (cpus // each)
    return sorted(by_gpu[use_gpus] or by_gpu[False], key=lambda slot: -slot.cpus)


def alike(places: list[Slot]) -> list[Slot]:
    """Return the places that keep step: a training step takes as long as its slowest process."""
    return [slot for slot in places if 2 * slot.cpus >= places[0].cpus]


class Crew:
    """Processes that are kept through the stages, since each takes seconds to start."""

    def __init__(self) -> None:
        self.processes: list[Process] = []
        self.failed_starts: Counter[str] = Counter()  # failures in a row, by node
        self.killed: dict[str, int] = {}  # processes the kernel ended for lack of RAM, by node
        self.out_of_memory: set[str] = set()  # nodes on which that happened while we ran
        self.proof: Proof | None = None
        self.seen = time.monotonic()  # when there was a machine last
        self.worked = self.seen  # when there was a process last that had started

    @contextmanager
    def working(self, shared: Path | None, option: str) -> Iterator[None]:
        """Have every process prove that it lives and sees the shared folder; release all after."""
        if shared is not None:
            for old in shared.glob(".memdec-proof-*"):  # a killed run left it
                old.unlink(missing_ok=True)
            content = uuid.uuid4().hex
            self.proof = Proof(shared / f".memdec-proof-{content[:8]}", content, option)
            self.proof.path.write_text(content)
        self.seen = self.worked = time.monotonic()
        try:
            for process in self.processes:
                self.give(process, PROVING)
            yield
        finally:
            for process in list(self.processes):
                if process.item in (None, PROVING):
                    process.actor.let_go.remote()
                else:  # ctrl-C, or another's error: nobody waits for it
                    self.end(process)
            if self.proof is not None:
                self.proof.path.unlink(missing_ok=True)
                self.proof = None

    def staff(self, places: list[Slot], max_processes: int) -> None:
        """End idle processes of other places; start missing ones, `max_processes` in all."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        now = time.monotonic()
        self.seen = now if places else self.seen
        if now - self.seen > EMPTY_SECONDS:
            raise MemdecError(
                "the Ray cluster has lost all its nodes: start some and run again, finished parts "
                "are kept."
            )
        missing = Counter(places)
        for process in list(self.processes):
            if missing[process.slot] > 0:
                missing[process.slot] -= 1
            elif process.item in (None, PROVING):
                self.end(process)
        for slot in missing.elements():
            if len(self.processes) >= max_processes:
                return
            if self.failed_starts[slot.node] < TRIES:
                actor = ray.remote(Worker).options(
                    num_cpus=slot.cpus,
                    num_gpus=slot.gpus,
                    # Without a node, Ray would start it where room is left, and never elsewhere.
                    scheduling_strategy=NodeAffinitySchedulingStrategy(slot.node, soft=False),
                )
                self.processes.append(Process(slot, actor.remote()))
                self.give(self.processes[-1], PROVING)

    def idle(self) -> list[Process]:
        """Return the processes that wait for work, the largest first."""
        waiting = [process for process in self.processes if process.task is None]
        return sorted(waiting, key=lambda process: -process.slot.cpus)

    def give(self, process: Process, item: Any, task: Any = None) -> None:
        """Note that a process has got a task, by default that of proving that it can work."""
        process.item = item
        process.task = process.actor.prove.remote(self.proof) if item is PROVING else task

    def answers(self, seconds: float) -> list[Answer]:
        """Wait so long, or until a process answers; return what it says of an item, if it has one.

        Raises MemdecError if a machine cannot work, or if no process can be started.
        """
        import ray

        self._say_if_waiting()
        asked = {process.task: process for process in self.processes if process.task is not None}
        if not asked:
            time.sleep(min(seconds, 1.0))
        received = []
        for task in ray.wait(list(asked), num_returns=1, timeout=seconds)[0] if asked else []:
            process, item, outcome, lost = asked[task], asked[task].item, None, ""
            try:
                outcome = ray.get(task)
                process.task = process.item = None
            except ray.exceptions.RayTaskError:
                raise  # Ray's own call failed, no worker's
            except ray.exceptions.RayError as error:
                lost = reason(error)
                self._lost(process, lost, error)
            if item is not PROVING:
                received.append(Answer(process, item, outcome, lost))
            elif outcome is not None:
                node, killed = process.slot.node, outcome.open()
                self.failed_starts[node] = 0
                if killed > self.killed.setdefault(node, killed):
                    self.out_of_memory.add(node)
        return received

    def _say_if_waiting(self) -> None:
        """Say once that there is no room, which other jobs of the cluster may have taken."""
        if any(process.item is not PROVING for process in self.processes):
            self.worked = time.monotonic()
        elif time.monotonic() - self.worked > WAITING_SECONDS:
            self.worked = math.inf
            print(
                "memdec: waiting for a worker to start: are the cluster's CPUs or GPUs taken?",
                file=sys.stderr,
            )

    def _lost(self, process: Process, why: str, error: Exception) -> None:
        """Strike off a process that was lost; ask the others of its machine whether they live."""
        node, starting = process.slot.node, process.item is PROVING
        self.end(process)
        if starting:
            self.failed_starts[node] += 1
            if self.failed_starts[node] == TRIES:
                told = f"no worker starts on {process.slot.address} ({why})"
                if not self.processes:
                    raise MemdecError(
                        f"{told}: check that vllm-memdec is installed there and that memory is "
                        "free."
                    ) from error
                print(f"memdec: {told}: going on without it.", file=sys.stderr)
        for other in self.idle():
            if other.slot.node == node:
                self.give(other, PROVING)

    def cause(self, process: Process) -> str:
        """Return what most likely ends a process again and again, and what to do."""
        address = process.slot.address
        if process.slot.node in self.out_of_memory:
            return (
                f"{address} ran out of memory and the kernel ended it: lower --memory-budget, or "
                "the batches in the settings."
            )
        return (
            f"a library crashed on {address}, or it ran out of memory: see Ray's logs there, lower "
            "--memory-budget, or the batches in the settings."
        )

    def close(self) -> None:
        """End all processes."""
        for process in list(self.processes):
            self.end(process)

    def end(self, process: Process) -> None:
        """End a process at once, whatever it does."""
        import ray

        if process in self.processes:
            self.processes.remove(process)
        with suppress(ray.exceptions.RayError, ValueError):
            ray.kill(process.actor)


def reason(error: Exception) -> str:
    """Return in a few words what Ray says of a process that was lost."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    if getattr(error, "actor_init_failed", False):
        return lines[-1]
    return lines[0] if lines else type(error).__name__
