"""Targets stage: each row's nearest neighbours, without itself -> sparse next-token targets.

    p_kNN(y | x) ~ sum over the k nearest (key_i, y_i) of [y = y_i] exp(-d_i / temperature)

d is the squared L2 distance (arXiv 2508.09874, section 3). Stored as compressed sparse rows, one
set of files a shard of the datastore: offsets [rows+1] int64, ids int32, probs fp16, and
labels [rows] int32, which training checks against its batches.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from vllm_memdec.train.artifacts import write_json
from vllm_memdec.train.config import TargetSettings
from vllm_memdec.train.datastore import save_array, shards
from vllm_memdec.train.index import load_index
from vllm_memdec.train.progress import Progress

SEARCH_ROWS = 2048  # queries a faiss call
SMALLEST = float(np.finfo(np.float16).smallest_subnormal)  # that fp16 stores, as more than 0
FIT_ROWS = 2048  # rows the temperature is fitted on
FLOOR = 1e-3  # mass spread evenly when a temperature is judged: no row may cost infinitely much


def search(index: Any, keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (squared distances, row ids), both [rows, k], of the k nearest keys; -1 where none."""
    return index.search(np.ascontiguousarray(keys, dtype=np.float32), k)


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


def build_targets(
    settings: TargetSettings,
    probes: int,
    datastore: Path,
    index_folder: Path,
    work: Path,
    progress: Progress,
) -> None:
    """Write offsets-N.npy, ids-N.npy, probs-N.npy for each datastore shard, and targets.json."""
    keys = shards(datastore, "keys")
    labels = np.concatenate(shards(datastore, "labels"))
    index = load_index(index_folder, probes)
    k = min(settings.neighbours, len(labels) - 1)

    def neighbours(part: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return neighbours_without_self(*search(index, part, k + 1), rows)

    temperature = settings.temperature
    if (work / "targets.json").exists():  # the shards before a kill were made with it
        temperature = json.loads((work / "targets.json").read_text())["temperature"]
    elif temperature is None:
        chosen = np.linspace(0, len(labels) - 1, min(FIT_ROWS, len(labels))).astype(np.int64)
        starts = np.cumsum([0] + [len(s) for s in keys])
        sample = np.concatenate(
            [
                s[chosen[(chosen >= a) & (chosen < a + len(s))] - a]
                for s, a in zip(keys, starts, strict=False)
            ]
        )
        distances, ids = neighbours(sample, chosen)
        temperature = fit_temperature(distances, ids, labels[ids] == labels[chosen][:, None])
    write_json(work / "targets.json", {"temperature": temperature, "neighbours": k})

    first = 0
    with progress.task("targets", len(labels), "rows") as advance:
        for shard, part in enumerate(keys):
            probs_file = work / f"probs-{shard:05d}.npy"
            if probs_file.exists():  # the last of its shard to be written
                advance(len(part), done_before=True)
                first += len(part)
                continue
            pieces = []
            for start in range(0, len(part), SEARCH_ROWS):
                queries = part[start : start + SEARCH_ROWS]
                rows = np.arange(first + start, first + start + len(queries))
                distances, ids = neighbours(queries, rows)
                weights = neighbour_weights(distances, ids, temperature)
                pieces.append(aggregate(weights, labels[ids], settings.min_probability))
                advance(len(queries))
            lengths = np.concatenate([np.diff(offsets) for offsets, _, _ in pieces])
            save_array(work / f"offsets-{shard:05d}.npy", np.r_[0, np.cumsum(lengths)])
            rows = np.arange(first, first + len(part))
            save_array(work / f"labels-{shard:05d}.npy", labels[rows])
            save_array(work / f"ids-{shard:05d}.npy", np.concatenate([p[1] for p in pieces]))
            save_array(probs_file, np.concatenate([p[2] for p in pieces]).astype(np.float16))
            first += len(part)
