"""Targets stage: each row's nearest neighbours, without itself -> sparse next-token targets.

    p_kNN(y | x) ~ sum over the k nearest (key_i, y_i) of [y = y_i] exp(-d_i / temperature)

d is the squared L2 distance (arXiv 2508.09874, section 3). Stored as compressed sparse rows, one
set of files a shard of the datastore: offsets [rows+1] int64, ids int32, probs fp16, and
labels [rows] int32, which training checks against its batches.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from vllm_memdec.train.artifacts import write_json
from vllm_memdec.train.cluster import Cluster
from vllm_memdec.train.config import TargetSettings
from vllm_memdec.train.corpus import shard_rows
from vllm_memdec.train.datastore import Keys
from vllm_memdec.train.index import Index, sample_rows
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.shards import load_shard, save_array, shard_path

SMALLEST = float(np.finfo(np.float16).smallest_subnormal)  # that fp16 stores, as more than 0
FIT_ROWS = 2048  # rows the temperature is fitted on
FLOOR = 1e-3  # mass spread evenly when a temperature is judged: no row may cost infinitely much


def neighbours_without_self(
    distances: np.ndarray, ids: np.ndarray, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Drop each row's own id from k+1 neighbours; k are left (the furthest goes if it is absent).

    The query need not be rank 1 of a quantised index, so it is found by id, never by rank.
    """
    drop = ids == own[:, None]
    drop[~drop.any(axis=1), -1] = True
    shape = (len(ids), ids.shape[1] - 1)
    return distances[~drop].reshape(shape), ids[~drop].reshape(shape)


def neighbour_weights(distances: np.ndarray, ids: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(-d / temperature) [rows, k] in float32; missing neighbours weigh nothing."""
    scaled = np.where(ids < 0, -np.inf, -distances.astype(np.float64) / temperature)
    top = scaled.max(axis=1, keepdims=True)
    weights = np.exp(scaled - np.where(np.isfinite(top), top, 0))
    total = weights.sum(axis=1, keepdims=True)
    return (weights / np.where(total > 0, total, 1)).astype(np.float32)


def aggregate(
    weights: np.ndarray, tokens: np.ndarray, min_probability: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum weights [rows, k] of equal tokens: returns CSR (offsets int64, ids int32, probs fp32).

    Probabilities below min_probability are dropped and the rest renormalised; within a row ids
    ascend.
    """
    rows, k = weights.shape
    span = int(tokens.max(initial=0)) + 1
    code = (np.arange(rows, dtype=np.int64)[:, None] * span + tokens).ravel()
    order = np.argsort(code, kind="stable")
    code = code[order]
    first = np.flatnonzero(np.r_[True, code[1:] != code[:-1]])
    probs = np.add.reduceat(weights.ravel()[order], first, dtype=np.float32)
    row, token = np.divmod(code[first], span)
    kept = probs >= max(min_probability, SMALLEST)
    row, token, probs = row[kept], token[kept], probs[kept]
    total = np.bincount(row, weights=probs, minlength=rows)
    offsets = np.r_[0, np.cumsum(np.bincount(row, minlength=rows))].astype(np.int64)
    return offsets, token.astype(np.int32), (probs / total[row]).astype(np.float32)


def fit_temperature(distances: np.ndarray, ids: np.ndarray, hit: np.ndarray) -> float:
    """Return the temperature under which held-out neighbours best predict the true token.

    hit [rows, k] tells which neighbours carry the row's own label. Distances have no natural
    scale across models, so the grid spans multiples of their median.
    """
    scale = float(np.median(distances[ids >= 0])) or 1.0
    grid = scale * np.geomspace(0.003, 3, 25)

    def loss(temperature: float) -> float:
        p_true = (neighbour_weights(distances, ids, temperature) * hit).sum(axis=1)
        return float(-np.log((1 - FLOOR) * p_true + FLOOR / 1000).mean())

    return float(min(grid, key=loss))


@dataclass
class Searcher:
    """Writes the targets of one shard: its keys' neighbours, weighed and summed by token."""

    gpu: ClassVar[bool] = True
    settings: TargetSettings
    keys: Keys
    index: Index
    work: Path

    @cached_property
    def starts(self) -> np.ndarray:
        return shard_rows(self.keys.corpus)

    @cached_property
    def temperature(self) -> float:
        return json.loads((self.work / "targets.json").read_text())["temperature"]

    @property
    def neighbours(self) -> int:
        return min(self.settings.neighbours, int(self.starts[-1]) - 1)

    def nearest(
        self, keys: np.ndarray, rows: np.ndarray
    ) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yield (part of the rows, distances, ids) of the nearest rows other than themselves."""
        for part, distances, ids in self.index.blocks(keys, self.neighbours + 1):
            yield part, *neighbours_without_self(distances, ids, rows[part])

    def fit(self) -> float:
        """Return the temperature that suits rows spread over the corpus."""
        numbers, sample = sample_rows(self.keys, self.starts, FIT_ROWS)
        chosen = np.linspace(0, len(numbers) - 1, min(FIT_ROWS, len(numbers))).astype(np.int64)
        found = list(self.nearest(sample[chosen], numbers[chosen]))
        distances, ids = (np.concatenate([f[n] for f in found]) for n in (1, 2))
        labels = self.index.labels
        hit = (ids >= 0) & (labels[ids] == labels[numbers[chosen]][:, None])
        return fit_temperature(distances, ids, hit)

    def __call__(self, shard: int) -> int:
        labels = load_shard(self.keys.datastore, "labels", shard)
        keys, rows = self.keys(shard), np.arange(self.starts[shard], self.starts[shard + 1])
        if not len(keys) == len(labels) == len(rows):
            raise ValueError(
                f"shard {shard} of {self.keys.datastore} does not fit the corpus: delete the "
                f"folder {self.keys.datastore} and build again."
            )
        found = []
        for _, distances, ids in self.nearest(keys, rows):
            weights = neighbour_weights(distances, ids, self.temperature)
            tokens = self.index.labels[ids]
            found.append(aggregate(weights, tokens, self.settings.min_probability))
        lengths = np.concatenate([np.diff(offsets) for offsets, _, _ in found])
        files = {
            "offsets": np.r_[0, np.cumsum(lengths)],
            "labels": np.asarray(labels),
            "ids": np.concatenate([f[1] for f in found]),
            "probs": np.concatenate([f[2] for f in found]).astype(np.float16),
        }
        for name, array in files.items():  # probs last: all are whole then
            save_array(shard_path(self.work, name, shard), array)
        return len(rows)


def build_targets(
    settings: TargetSettings,
    keys: Keys,
    index: Index,
    work: Path,
    progress: Progress,
    cluster: Cluster,
) -> None:
    """Write offsets-N.npy, ids-N.npy, probs-N.npy, labels-N.npy of each shard, and targets.json."""
    searcher = Searcher(settings, keys, index, work)
    starts = searcher.starts
    if not (work / "targets.json").exists():  # else shards were made with its temperature
        temperature = settings.temperature
        if temperature is None:
            with progress.task("targets: fitting the temperature", 1, "fit") as advance:
                temperature = cluster.call(searcher.fit)
                advance(1)
        facts = {"temperature": temperature, "neighbours": searcher.neighbours}
        write_json(work / "targets.json", facts)
    n_shards = len(starts) - 1
    todo = [n for n in range(n_shards) if not shard_path(work, "probs", n).exists()]
    with progress.task("targets", int(starts[-1]), "rows") as advance:
        done = sorted(set(range(n_shards)) - set(todo))
        advance(int(np.diff(starts)[done].sum()), done_before=True)
        for rows in cluster.map(Searcher(settings, keys, index, work), todo):
            advance(rows)
