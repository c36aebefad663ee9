"""Batches of training: blocks of tokens joined with their kNN targets, labels checked.

Which blocks, candidate columns and random numbers a step sees depends on seed and step alone, so a
resumed run sees what an undisturbed one would have.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_memdec.errors import MemdecError
from vllm_memdec.kernels.sparse_kl import SparseRows
from vllm_memdec.train.data.blocks import (
    load_blocks,
    load_rows,
    load_used,
    unmarked,
    valid_rows,
)
from vllm_memdec.train.data.shards import load_shard
from vllm_memdec.train.model.devices import to_device
from vllm_memdec.train.model.output_head import Candidates
from vllm_memdec.train.settings import MemorySettings

AHEAD = 4  # micro-batches that are read while CUDA works on one, each in a thread of its own


class TargetReader:
    """Reads the rows of a block from the target shards, memory-mapped for the time of a read."""

    def __init__(self, targets: Path, rows: np.ndarray, per_shard: int) -> None:
        """rows [blocks]: the valid rows of each block of the corpus; per_shard: blocks."""
        self.targets, self.per_shard = targets, per_shard
        self.row_start = np.r_[0, np.cumsum(rows, dtype=np.int64)]

    def read(self, block: int, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (row lengths, ids, probabilities) of a block, its labels checked against ours."""
        shard = int(block) // self.per_shard
        start = self.row_start[shard * self.per_shard]
        first, last = self.row_start[block] - start, self.row_start[block + 1] - start
        offsets, ids, probs, stored = (
            load_shard(self.targets, name, shard) for name in ("offsets", "ids", "probs", "labels")
        )
        if len(offsets) != len(stored) + 1 or not np.array_equal(stored[first:last], labels):
            raise MemdecError(
                f"shard {shard} of {self.targets} is not aligned with block {block} of the "
                "corpus: delete the targets folder and build again."
            )
        bounds = np.asarray(offsets[first : last + 1])
        part = slice(bounds[0], bounds[-1])
        lengths, p = np.diff(bounds), probs[part].astype(np.float32)
        if len(p) != bounds[-1] - bounds[0]:
            raise MemdecError(
                f"shard {shard} of {self.targets} is cut off: delete the targets folder and build "
                "again."
            )
        row = np.repeat(np.arange(len(lengths)), lengths)
        total = np.bincount(row, weights=p, minlength=len(lengths))  # 1, but for fp16's rounding
        return lengths, np.asarray(ids[part]), (p / total[row]).astype(np.float32)

    def base(self, block: int) -> np.ndarray:
        """Return the base's log p of a block's labels [rows] float32."""
        shard = int(block) // self.per_shard
        start = self.row_start[shard * self.per_shard]
        part = slice(self.row_start[block] - start, self.row_start[block + 1] - start)
        return np.asarray(load_shard(self.targets, "base", shard)[part])


class Batches:
    """Shuffled batches of blocks: which blocks a step sees depends on seed and step alone."""

    mixture = False  # whether the base's log p of the labels is read, too

    def __init__(self, settings: MemorySettings, corpus: Path, targets: Path) -> None:
        self.tokens, self.positions = load_blocks(corpus, "train")
        self.rows = load_rows(corpus, "train")  # valid ones of each block
        self.used = np.asarray(load_used(corpus, "train"))  # every label and kNN target is one
        self.ahead: dict[bytes, Future] = {}  # what is being read, by its blocks
        self.reader = TargetReader(targets, self.rows, self.tokens.per_shard)
        self.seed, self.mixture = settings.seed, settings.objective == "mixture"
        self.size = min(settings.batch(len(self.tokens)), len(self.tokens))
        self.per_epoch = len(self.tokens) // self.size
        self.steps = max(1, round(settings.epochs * len(self.tokens) / self.size))

    @property
    def block_tokens(self) -> int:
        """Return how many tokens of a block are read, its last one being a label only."""
        return self.tokens.shape[1] - 1

    @functools.cached_property
    def pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(AHEAD)

    def blocks(self, step: int) -> np.ndarray:
        """Return the block numbers of a step; each epoch is a new permutation."""
        epoch, place = divmod(step, self.per_epoch)
        return self.order(epoch)[place * self.size : (place + 1) * self.size]

    @functools.lru_cache(maxsize=1)  # noqa: B019, one object a training
    def order(self, epoch: int) -> np.ndarray:
        """Return the permutation of the blocks of an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.tokens))

    def alike(self, blocks: np.ndarray) -> list[np.ndarray]:
        """Return the blocks of a step in parts, in each of which all are learnt in one way."""
        return [blocks]

    def beta(self, blocks: np.ndarray, beta: float) -> float:
        """Return the weight of KL in the loss of some blocks; beta: as it is set."""
        return beta

    def step_seed(self, step: int) -> int:
        """Return the seed of a step's random numbers, so that a resumed run draws the same."""
        return int(np.random.SeedSequence([self.seed, 2, step]).generate_state(1)[0])

    def candidates(self, step: int, vocabulary: int, sampled: int | None) -> Candidates:
        """Return the vocabulary columns of a step, see output_head.py."""
        return Candidates.draw(self.used, vocabulary, sampled, [self.seed, 1, step])

    def load(self, blocks: np.ndarray, device: torch.device) -> tuple[Any, ...]:
        """Return tokens and positions [B, T], of the valid rows places [N] and labels, targets.

        places: of a row in B x T. With a mixture also the base's log p of the labels [N].
        """
        reading = self.ahead.pop(blocks.tobytes(), None)
        arrays = self.arrays(blocks) if reading is None else reading.result()
        moved = [to_device(x, device) for x in arrays]
        return *moved[:4], SparseRows(*moved[4:7]), *moved[7:]

    def expect(self, following: Sequence[np.ndarray], device: torch.device) -> None:
        """Read the blocks of the next load()s, in their order, while CUDA works on others.

        A block takes about 1 ms to read, and six files more on storage that is far: several
        threads wait for it. A CPU has no core to spare for it.
        """
        if device.type == "cuda":
            self.ahead = {
                blocks.tobytes(): self.ahead.get(blocks.tobytes())
                or self.pool.submit(self.arrays, blocks)
                for blocks in following
            }

    def arrays(self, blocks: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return what load() does, as arrays; targets as offsets, tokens and probabilities."""
        tokens = self.tokens[blocks].astype(np.int64)
        positions = self.positions[blocks].astype(np.int64)
        mask = valid_rows(positions)
        pieces = [self.reader.read(int(b), tokens[i, 1:][mask[i]]) for i, b in enumerate(blocks)]
        lengths = np.concatenate([p[0] for p in pieces])
        base = [np.concatenate([self.reader.base(int(b)) for b in blocks])] if self.mixture else []
        return (
            tokens[:, :-1],
            unmarked(positions[:, :-1]),
            np.flatnonzero(mask),
            tokens[:, 1:][mask],
            np.r_[0, np.cumsum(lengths)],
            np.concatenate([p[1] for p in pieces]).astype(np.int64),
            np.concatenate([p[2] for p in pieces]),
            *base,
        )
