"""What a worker's memories gave and cost: weights of the rows that were mixed, and time on a CPU.

The mixture itself adds each row's weight to a buffer on the device: no launch more, and a gate's
weight exists nowhere else. take() reads the buffer without waiting for the device. On a CPU that is
at once; elsewhere a copy is begun once in INTERVAL, and read in the first step that finds it done.
Time is measured on a CPU alone: elsewhere the host launches a model long before it runs, and of a
captured graph it sees nothing.

Shapes: M memories, and one row more for rows that nobody asked for.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

INTERVAL = 1.0  # seconds from one reading of a GPU's buffer to the next
ROWS, WEIGHT = "mixed_rows", "mixed_weight"  # figures, by the names of their counters
MEMORY, MIXING = "memory_seconds", "mixing_seconds"
Figures = dict[str, dict[str, float]]  # by figure, then by memory


class Tally:
    """Counts of one worker, by memory."""

    def __init__(self, names: Sequence[str], device: torch.device):
        """names: of the memories, in the order of their numbers."""
        self.names, self.on_cpu = [*names], device.type == "cpu"
        # Sums and rows: at one address for good. A float64 counts rows exactly up to 2^53.
        zeros_M2 = torch.zeros(len(names) + 1, 2, dtype=torch.float64, device="cpu")
        self.given_M2 = zeros_M2.to(device, copy=True)
        self.slots = [self.given_M2[number] for number in range(len(zeros_M2))]
        self.nothing: list[list[float]] = zeros_M2.tolist()
        self.reported = self.nothing  # of the buffer, by the last take()
        # Of a GPU: where the buffer is copied to, the end of the copy that is under way, if one is,
        # and when the next one may begin.
        self.host_M2 = zeros_M2 if self.on_cpu else zeros_M2.pin_memory()
        self.copied: torch.cuda.Event | None = None
        self.next_copy = 0.0
        self.seconds: Figures = {}

    def slot(self, number: int, is_dummy: bool) -> torch.Tensor:
        """Return where the weights of a memory's rows are added up [2]; of dummy runs elsewhere."""
        return self.slots[-1 if is_dummy else number]

    @contextmanager
    def timed(self, figure: str, number: int, is_dummy: bool) -> Iterator[None]:
        """Add the time of a block to a memory's seconds, on a CPU."""
        if not self.on_cpu or is_dummy:
            yield
            return
        began = time.perf_counter()
        yield
        by_memory = self.seconds.setdefault(figure, {})
        name = self.names[number]
        by_memory[name] = by_memory.get(name, 0.0) + time.perf_counter() - began

    def restart(self) -> None:
        """Begin at 0: weights are loaded, and what was on the device may have been dropped."""
        self.given_M2.zero_()
        self.reported, self.copied = self.nothing, None

    def rename(self, number: int, name: str) -> None:
        """Count for another memory from now on; waits for the device."""
        self._add(self.given_M2.tolist(), self.seconds)  # what is left is the memory's before
        self.copied = None  # of a copy that is older
        self.names[number] = name

    def take(self) -> Figures:
        """Return what has been added since the last call, as far as the host knows it."""
        figures, self.seconds = self.seconds, {}
        if (given := self._read()) is not None:
            self._add(given, figures)
        return figures

    def _add(self, given: list[list[float]], figures: Figures) -> None:
        """Add to figures what the buffer has more than at the last call."""
        for name, now, before in zip(self.names, given, self.reported, strict=False):
            # Less, or no number: the device lost the buffer with its weights. Begin from there.
            if now != before and now[0] >= before[0] and now[1] >= before[1]:
                for figure, place in ((WEIGHT, 0), (ROWS, 1)):
                    sums = figures.setdefault(figure, {})
                    sums[name] = sums.get(name, 0.0) + now[place] - before[place]
        self.reported = given

    def _read(self) -> list[list[float]] | None:
        """Return the buffer if the host has it, without waiting."""
        if self.on_cpu:
            return self.given_M2.tolist()
        if self.copied is None:
            if time.monotonic() >= self.next_copy:
                self.next_copy = time.monotonic() + INTERVAL
                self.host_M2.copy_(self.given_M2, non_blocking=True)
                self.copied = torch.cuda.Event()
                self.copied.record()
            return None
        if not self.copied.query():
            return None
        self.copied = None
        return self.host_M2.tolist()
