"""Blocks of random tokens with random targets, in the place of a build's."""

import numpy as np

from benchmarks.speed.dense import PER_ROW
from vllm_memdec.train.training.batches import Batches


class RandomBatches(Batches):
    """Blocks of random tokens, and targets of PER_ROW tokens a row, in memory."""

    def __init__(self, settings, blocks, tokens, vocabulary):
        rng = np.random.default_rng(settings.seed)
        self.tokens = rng.integers(vocabulary, size=(blocks, tokens + 1), dtype=np.int32)
        self.positions = np.broadcast_to(np.arange(tokens + 1, dtype=np.int32), self.tokens.shape)
        self.rows = np.full(blocks, tokens)
        self.used = np.unique(self.tokens)
        self.reader = self  # the reader of targets
        self.seed, self.size, self.per_epoch = settings.seed, settings.batch_blocks, 1
        self.ahead = {}

    def read(self, block, labels):
        """Return (row lengths, ids, probabilities) of a block; the label is one of a row's ids."""
        places = np.searchsorted(self.used, labels)[:, None] + np.arange(PER_ROW)
        ids = np.sort(self.used[places % len(self.used)], axis=1)  # a row's ids differ, and ascend
        rng = np.random.default_rng([self.seed, int(block)])
        p = rng.random(ids.shape, dtype=np.float32) + 0.01
        return np.full(len(labels), PER_ROW), ids.ravel(), (p / p.sum(1, keepdims=True)).ravel()
