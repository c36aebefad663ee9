"""Exact search and exact targets: slow, plain numpy in float64.

They share nothing with the index and the targets stage, which are held against them.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vllm_memdec.train.data.shards import Shards, shards

CHUNK = 4096  # keys compared at once
SMALLEST = 2.0**-24  # the smallest number above 0 that fp16 stores


def evenly(count: int, max_count: int) -> np.ndarray:
    """Return up to `max_count` numbers below count, evenly spaced, first and last among them."""
    if count == 0:
        return np.empty(0, np.int64)
    return np.unique(np.linspace(0, count - 1, min(max_count, count)).astype(np.int64))


def take(parts: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Return rows of an array that lies in shards, any number of times, in any order."""
    starts = starts_of(parts)
    shard = np.searchsorted(starts, rows, side="right") - 1
    first = parts[0]
    taken = np.empty((len(rows), *first.shape[1:]), first.dtype)
    for n in np.unique(shard):
        here = shard == n
        taken[here] = parts[n][rows[here] - starts[n]]
    return taken


def starts_of(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the number of each part's first row, and of all rows [parts+1]."""
    if isinstance(parts, Shards):
        return parts.starts  # known without opening every file again
    return np.cumsum([0, *map(len, parts)])


def nearest(
    keys: Sequence[np.ndarray], queries: np.ndarray, k: int, own: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (squared distances, row ids), both [Q, k] by distance, of the k nearest keys.

    own [Q]: the row that each query is, which is left out.
    """
    x_QD = queries.astype(np.float64)
    norm_Q1 = (x_QD**2).sum(axis=1, keepdims=True)
    best, ids = np.empty((len(x_QD), 0)), np.empty((len(x_QD), 0), np.int64)
    first = 0
    for shard in keys:
        for start in range(0, len(shard), CHUNK):
            part_CD = np.asarray(shard[start : start + CHUNK], np.float64)
            here_C = np.arange(first, first + len(part_CD))
            first += len(part_CD)
            # |x - y|^2 = |x|^2 - 2 xy + |y|^2, whose cancellation float64 can afford
            d_QC = norm_Q1 - 2 * (x_QD @ part_CD.T) + (part_CD**2).sum(axis=1)
            if own is not None:
                d_QC[own[:, None] == here_C] = np.inf
            best = np.concatenate([best, np.maximum(d_QC, 0)], axis=1)
            ids = np.concatenate([ids, np.broadcast_to(here_C, d_QC.shape)], axis=1)
            if best.shape[1] > k:
                kept = np.argpartition(best, k - 1, axis=1)[:, :k]
                best = np.take_along_axis(best, kept, axis=1)
                ids = np.take_along_axis(ids, kept, axis=1)
    order = np.argsort(best, axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1), np.take_along_axis(ids, order, axis=1)


def recall(
    keys: Sequence[np.ndarray],
    queries: np.ndarray,
    ids_of_index: np.ndarray,
    true_distances: np.ndarray,
    true_ids: np.ndarray,
) -> float:
    """Return the share of the true neighbours [Q, k] that are among those of an index [Q, k].

    Text repeats itself, so keys do: a neighbour counts if it is no further than the k-th true
    one, whichever of equally distant ones that is; nothing counts twice.
    """
    rows, hits = starts_of(keys)[-1], 0
    neighbours = zip(queries, ids_of_index, true_distances, true_ids, strict=True)
    for query, ids, distances, true in neighbours:
        ids = np.unique(ids[(ids >= 0) & (ids < rows)])
        others = np.setdiff1d(ids, true, assume_unique=True)
        hits += len(ids) - len(others)
        if len(others):
            d = ((take(keys, others).astype(np.float64) - query.astype(np.float64)) ** 2).sum(
                axis=1
            )
            hits += int((d <= distances[-1] * (1 + 1e-9) + 1e-9).sum())
    return hits / true_ids.size


def target(
    distances: np.ndarray, tokens: np.ndarray, temperature: float, min_probability: float
) -> dict[int, float]:
    """Return {token: probability} of one row's neighbours, small ones dropped."""
    if not len(distances):
        return {}
    weights = np.exp(-(distances - distances.min()) / temperature)
    ids, place = np.unique(tokens, return_inverse=True)
    p = np.bincount(place, weights) / weights.sum()
    kept = p >= max(min_probability, SMALLEST)
    return dict(zip(ids[kept].tolist(), (p[kept] / p[kept].sum()).tolist(), strict=True))


class StoredTargets:
    """The rows of a targets artifact, one by one."""

    def __init__(self, folder: Path) -> None:
        names = ("offsets", "ids", "probs")
        self.offsets, self.ids, self.probs = (shards(folder, name) for name in names)
        self.starts = np.r_[0, np.cumsum(self.offsets.lengths - 1)]

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, probabilities float64, summing to 1) of a row."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        first, last = self.offsets[shard][row - self.starts[shard] :][:2].tolist()
        p = self.probs[shard][first:last].astype(np.float64)
        return np.asarray(self.ids[shard][first:last]), p / (p.sum() or 1)
