"""A worker's counts: what is read, when, and that nothing of it is lost or told twice."""

import time

import pytest
import torch

from vllm_memdec import tally
from vllm_memdec.tally import MEMORY, MIXING, ROWS, WEIGHT, Tally

CPU = torch.device("cpu")


def give(counts, number, weight, rows=1.0, is_dummy=False):
    """Add to the buffer as the mixture does."""
    slot = counts.slot(number, is_dummy)
    slot += torch.tensor([weight, rows], dtype=torch.float64, device=slot.device)


def test_each_call_tells_what_is_new():
    counts = Tally(["law", "bio"], CPU)
    assert counts.take() == {}
    give(counts, 0, 0.5)
    give(counts, 1, 0.0, 3)
    give(counts, 1, 7.0, is_dummy=True)
    assert counts.take() == {WEIGHT: {"law": 0.5, "bio": 0.0}, ROWS: {"law": 1, "bio": 3}}
    give(counts, 1, 0.25)
    assert counts.take() == {WEIGHT: {"bio": 0.25}, ROWS: {"bio": 1}}
    assert counts.take() == {}
    give(counts, 1, -5.0)  # a deep sleep may leave anything
    assert counts.take() == {}
    give(counts, 1, torch.nan)
    assert counts.take() == {}
    counts.restart()
    give(counts, 0, 1.0)
    assert counts.take() == {WEIGHT: {"law": 1.0}, ROWS: {"law": 1}}


def test_seconds_of_a_cpu():
    counts = Tally(["law", "bio"], CPU)
    for figure, is_dummy in ((MEMORY, False), (MEMORY, False), (MIXING, False), (MIXING, True)):
        with counts.timed(figure, 1, is_dummy):
            time.sleep(0.01)
    figures = counts.take()
    assert set(figures) == {MEMORY, MIXING} and set(figures[MEMORY]) == {"bio"}
    assert figures[MEMORY]["bio"] >= 0.02 and figures[MIXING]["bio"] >= 0.01
    assert counts.take() == {}


class Late:
    """An event of a device that is done when it is told to be."""

    done = False

    def record(self):
        pass

    def query(self):
        return self.done


def test_a_gpu_is_read_when_it_is_ready(monkeypatch):
    """As a device adds, copies and finishes in this order, without one."""
    counts = Tally(["law"], CPU)
    monkeypatch.setattr(counts, "on_cpu", False)
    monkeypatch.setattr(torch.cuda, "Event", Late)
    clock = iter([10.0, 10.0, 10.5, 11.0, 11.0])
    monkeypatch.setattr(tally.time, "monotonic", lambda: next(clock))
    give(counts, 0, 0.5)
    assert counts.take() == {}  # a copy begins
    give(counts, 0, 0.25)
    assert counts.take() == {}  # it is under way
    monkeypatch.setattr(Late, "done", True)
    assert counts.take() == {WEIGHT: {"law": 0.5}, ROWS: {"law": 1}}
    assert counts.take() == {}  # too early for the next one
    assert counts.take() == {}  # it begins
    assert counts.take() == {WEIGHT: {"law": 0.25}, ROWS: {"law": 1}}
    with counts.timed(MEMORY, 0, False):
        pass
    assert counts.seconds == {}


@pytest.mark.gpu
def test_a_gpu_is_read_without_waiting(monkeypatch):
    monkeypatch.setattr(tally, "INTERVAL", 0.0)
    counts = Tally(["law"], torch.device("cuda"))
    give(counts, 0, 0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert counts.take() == {}
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        assert counts.take() == {WEIGHT: {"law": 0.5}, ROWS: {"law": 1}}
    finally:
        torch.cuda.set_sync_debug_mode("default")
