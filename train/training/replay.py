"""Batches of an update: what is new or to be forgotten, and old blocks beside it.

A memory that learns new text alone forgets the old (arXiv 1612.00796), so a share of each step is
old text, with the targets that it has now. What is gone is unlearnt towards the kNN targets that
its contexts have in the corpus that is left, by KL alone: its own tokens are no labels any more.
That is what a memory would say there that had never read it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_memdec.train.settings import MemorySettings
from vllm_memdec.train.training.batches import Batches


@dataclass(frozen=True)
class Replay:
    """What an update trains on beside its corpus's new blocks."""

    first_new: int  # the first block that is new
    share: float  # of a step's blocks that are old ones
    gone: Path | None  # a corpus/ and targets/ of the rows to be forgotten


class ReplayBatches(Batches):
    """Batches of an update; what is gone is numbered after the corpus's own blocks."""

    def __init__(
        self, settings: MemorySettings, corpus: Path, targets: Path, replay: Replay
    ) -> None:
        super().__init__(settings, corpus, targets)
        self.of_corpus, self.first_new = len(self.tokens), replay.first_new
        self.gone = None
        if replay.gone is not None:
            self.gone = Batches(settings, replay.gone / "corpus", replay.gone / "targets")
            self.rows = np.r_[self.rows, self.gone.rows]
            # Every label has a column, also one whose weight is 0.
            self.used = np.union1d(self.used, np.unique(self.gone.tokens[:]))
        fresh = len(self.rows) - self.first_new
        self.fresh = min(fresh, max(1, round(self.size * (1 - replay.share))))
        old = round(self.fresh * replay.share / (1 - replay.share)) if fresh else self.size
        self.old = min(self.first_new, old)
        self.size = self.fresh + self.old
        # Where nothing is new, and no row is gone, one step of replay.
        self.steps = max(1, round(settings.epochs * fresh / max(1, self.fresh)))

    def blocks(self, step: int) -> np.ndarray:
        """Return the block numbers of a step, ascending."""
        fresh = self.cycled(len(self.rows) - self.first_new, self.fresh, step, 3)
        return np.sort(
            np.r_[self.first_new + fresh, self.cycled(self.first_new, self.old, step, 4)]
        )

    def cycled(self, count: int, each: int, step: int, stream: int) -> np.ndarray:
        """Return so many of the numbers below count, one permutation of them after another."""
        first, taken = step * each, np.zeros(0, np.int64)
        while len(taken) < each:
            turn, place = divmod(first + len(taken), count)
            order = np.random.default_rng([self.seed, stream, turn]).permutation(count)
            taken = np.r_[taken, order[place : place + each - len(taken)]]
        return taken

    def alike(self, blocks: np.ndarray) -> list[np.ndarray]:
        cut = np.searchsorted(blocks, self.of_corpus)
        return [part for part in (blocks[:cut], blocks[cut:]) if len(part)]

    def beta(self, blocks: np.ndarray, beta: float) -> float:
        return 1.0 if blocks[0] >= self.of_corpus else beta

    def arrays(self, blocks: np.ndarray) -> tuple[np.ndarray, ...]:
        if self.gone is None or blocks[0] < self.of_corpus:
            return super().arrays(blocks)
        return self.gone.arrays(blocks - self.of_corpus)


def new_batches(
    settings: MemorySettings, corpus: Path, targets: Path, replay: Replay | None
) -> Batches:
    """Return the batches of a training; replay: of one that updates a memory."""
    if replay is None:
        return Batches(settings, corpus, targets)
    return ReplayBatches(settings, corpus, targets, replay)
