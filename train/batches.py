"""Batches of training: blocks of tokens joined with their kNN targets, labels checked.

Which blocks, candidate columns and random numbers a step sees depends on seed and step alone, so a
resumed run sees what an undisturbed one would have.
"""

from pathlib import Path

import numpy as np
import torch

from vllm_memdec.train.config import MemorySettings
from vllm_memdec.train.corpus import load_blocks, valid_rows
from vllm_memdec.train.datastore import shards
from vllm_memdec.train.head import Candidates
from vllm_memdec.train.loss import SparseRows


class TargetReader:
    """Reads the rows of a block from the target shards, memory-mapped."""

    def __init__(self, targets: Path, valid: np.ndarray) -> None:
        """valid [blocks, T] is the corpus's mask of rows, in block order."""
        self.row_start = np.r_[0, np.cumsum(valid.sum(axis=1))]
        names = ("offsets", "ids", "probs", "labels")
        self.shards = list(zip(*(shards(targets, name) for name in names), strict=True))
        self.shard_start = np.r_[0, np.cumsum([len(labels) for *_, labels in self.shards])]
        if self.shard_start[-1] != self.row_start[-1]:
            raise ValueError(
                f"{targets} holds {self.shard_start[-1]} rows, the corpus {self.row_start[-1]}: "
                "delete the targets folder and build again."
            )

    def read(self, block: int, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (row lengths, ids, probabilities) of a block, its labels checked against ours."""
        shard = int(np.searchsorted(self.shard_start, self.row_start[block], side="right")) - 1
        first = self.row_start[block] - self.shard_start[shard]
        last = self.row_start[block + 1] - self.shard_start[shard]
        offsets, ids, probs, stored = self.shards[shard]
        if not np.array_equal(stored[first:last], labels):
            raise ValueError(
                f"targets shard {shard} is not aligned with block {block} of the corpus: "
                "delete the targets folder and build again."
            )
        bounds = offsets[first : last + 1]
        part = slice(bounds[0], bounds[-1])
        lengths, p = np.diff(bounds), probs[part].astype(np.float32)
        row = np.repeat(np.arange(len(lengths)), lengths)
        total = np.bincount(row, weights=p, minlength=len(lengths))  # 1, but for fp16's rounding
        return lengths, ids[part], (p / total[row]).astype(np.float32)


class Batches:
    """Shuffled batches of blocks: which blocks a step sees depends on seed and step alone."""

    def __init__(self, settings: MemorySettings, corpus: Path, targets: Path) -> None:
        self.tokens, self.positions = load_blocks(corpus, "train")
        self.valid = valid_rows(self.positions)
        self.used = np.unique(self.tokens)  # every label and every kNN target is one of these
        self.reader = TargetReader(targets, self.valid)
        self.seed = settings.seed
        self.size = min(settings.batch_blocks, len(self.tokens))
        self.per_epoch = len(self.tokens) // self.size
        self.steps = max(1, round(settings.epochs * len(self.tokens) / self.size))

    def blocks(self, step: int) -> np.ndarray:
        """Return the block numbers of a step; each epoch is a new permutation."""
        epoch, place = divmod(step, self.per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.tokens))
        return order[place * self.size : (place + 1) * self.size]

    def step_seed(self, step: int) -> int:
        """Return the seed of a step's random numbers, so that a resumed run draws the same."""
        return int(np.random.SeedSequence([self.seed, 2, step]).generate_state(1)[0])

    def candidates(self, step: int, vocabulary: int, sampled: int | None) -> Candidates:
        """Return the vocabulary columns of a step, see head.py."""
        return Candidates.draw(self.used, vocabulary, sampled, [self.seed, 1, step])

    def load(
        self, blocks: np.ndarray, where: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, SparseRows]:
        """Return tokens, positions, mask (all [B, T]), labels [rows] and targets of some blocks."""
        tokens = self.tokens[blocks].astype(np.int64)
        mask = self.valid[blocks]
        pieces = [self.reader.read(int(b), tokens[i, 1:][mask[i]]) for i, b in enumerate(blocks)]
        lengths = np.concatenate([p[0] for p in pieces])
        targets = SparseRows(
            torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(where),
            torch.from_numpy(np.concatenate([p[1] for p in pieces]).astype(np.int64)).to(where),
            torch.from_numpy(np.concatenate([p[2] for p in pieces])).to(where),
        )
        positions = self.positions[blocks][:, :-1].astype(np.int64)
        return (
            torch.from_numpy(tokens[:, :-1]).to(where),
            torch.from_numpy(positions).to(where),
            torch.from_numpy(mask).to(where),
            torch.from_numpy(tokens[:, 1:][mask]).to(where),
            targets,
        )
