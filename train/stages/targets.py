"""Targets stage: each row's nearest neighbours, without itself -> sparse next-token targets.

    p_kNN(y | x) ~ sum over the k nearest (key_i, y_i) of [y = y_i] exp(-d_i / temperature)

d is the squared L2 distance (arXiv 2508.09874, section 3). Stored as compressed sparse rows, one
set of files a shard of the datastore: offsets [rows+1] int64, ids int32, probs fp16, and
labels [rows] int32, which training checks against its batches; and where the datastore has the
base's log p of the labels, base [rows] float32.
"""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data import completeness
from vllm_memdec.train.data.artifacts import write_json
from vllm_memdec.train.data.blocks import load_used, shard_rows
from vllm_memdec.train.data.shards import load_shard, save_array, shard_path, unfinished
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model.hidden_states import Keys
from vllm_memdec.train.settings import TargetSettings
from vllm_memdec.train.stages.datastore import BASE, keys_of, sample_rows, scores_labels
from vllm_memdec.train.stages.faiss_gpu import check_width
from vllm_memdec.train.stages.search import Index
from vllm_memdec.train.stages.stage import Build, Stage, less_budget

ARRAYS = ("offsets", "labels", "ids", "probs")  # files of a shard
CACHE_ROWS = 192  # rows whose neighbours stay in a core's cache
SMALLEST = float(np.finfo(np.float16).smallest_subnormal)  # the smallest number fp16 stores
FIT_ROWS = 2048  # rows on which the temperature is fitted
GROUPS_A_WORKER = 4  # groups of shards a worker, so that all end at about the same time
# Temperatures that are tried: multiples, from and to, of a quantile of the rows' largest distances.
SCALE_QUANTILE = 0.9
GRID, GRID_POINTS = (1e-3, 3.0), 29
FLOOR = 1e-3  # probability spread evenly when a temperature is judged: no row's loss is infinite


def neighbours_without_self(
    distances: np.ndarray, ids: np.ndarray, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Drop each row's own id from k+1 neighbours; k are left (the furthest goes if it is absent).

    The query need not be rank 1 of a quantised index, so its id is looked for, not its rank.
    """
    # Mostly it is the first: all but that, and where it is not, those before it moved up by one.
    late = np.flatnonzero(ids[:, 0] != own)
    if not len(late):
        return distances[:, 1:], ids[:, 1:]
    kept_distances, kept_ids = distances[:, 1:].copy(), ids[:, 1:].copy()
    for row in late.tolist():
        place = np.flatnonzero(ids[row] == own[row])
        n = place[0] if len(place) else ids.shape[1] - 1
        kept_distances[row, :n], kept_ids[row, :n] = distances[row, :n], ids[row, :n]
    return kept_distances, kept_ids


def neighbour_weights(distances: np.ndarray, ids: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(-d / temperature) [rows, k] in float32; missing neighbours weigh nothing."""
    d = torch.from_numpy(np.asarray(distances, np.float32))
    if missing := ids.min(initial=0) < 0:
        d = d.masked_fill(torch.from_numpy(ids) < 0, torch.inf)
    # Less the nearest, so that float32 holds differences: those of any weight are small.
    scaled = (d - d.amin(dim=1, keepdim=True)).div_(-temperature)
    weights = scaled.softmax(dim=1)
    return (weights.nan_to_num_(0) if missing else weights).numpy()  # nan: a row without any


def aggregate(
    weights: np.ndarray,
    tokens: np.ndarray,
    min_probability: float,
    table: torch.Tensor | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum weights [rows, k] of equal tokens: returns CSR (offsets int64, ids int32, probs fp32).

    Probabilities below min_probability are dropped and the rest renormalised; within a row ids
    ascend. The weights of a token meet at the place of one of its neighbours, which a table of
    rows x span entries tells. All that is read in it was written just before, so it is never
    cleared: neither are a row's neighbours sorted nor its vocabulary visited.
    """
    rows, k = weights.shape
    span = int(tokens.max(initial=0)) + 1
    if table is None:
        table = torch.empty(rows * span, dtype=torch.int32)
    weights_NK = torch.from_numpy(weights)
    tokens_NK = torch.from_numpy(tokens.astype(np.int32, copy=False))
    table_NS = table[: rows * span].view(rows, span)
    places_NK = torch.arange(k, dtype=torch.int32).expand(rows, k)
    table_NS.scatter_(1, tokens_NK, places_NK)  # any of equal tokens wins
    sums_NK = torch.zeros(rows, k).scatter_add_(1, table_NS.gather(1, tokens_NK), weights_NK)
    sums = sums_NK.numpy().ravel()
    place = np.flatnonzero(sums >= max(min_probability, SMALLEST))  # 0 where no token is summed
    code = place // k * span + tokens_NK.numpy().ravel()[place]
    if rows * span < 1 << 31:
        code = code.astype(np.int32)  # sorts twice as fast
    code.sort()
    row = code // span
    token = code - row * span
    probs = sums[row * np.int64(k) + table.numpy()[code]]
    total = np.bincount(row, weights=probs, minlength=rows)
    offsets = np.r_[0, np.cumsum(np.bincount(row, minlength=rows))].astype(np.int64)
    return offsets, token.astype(np.int32), (probs / total[row]).astype(np.float32)


def sparse_targets(
    distances: np.ndarray,
    ids: np.ndarray,
    own: np.ndarray,
    labels: np.ndarray,
    used: np.ndarray,
    temperature: float,
    min_probability: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the targets of rows `own` as CSR, see aggregate(), from k+1 neighbours of each.

    labels: of all rows; used: the tokens among them, ascending. Tokens are counted by their place
    in `used`, and few rows at a time, so that all that is made of them stays in cache.
    """
    starts = np.arange(0, len(own), CACHE_ROWS)
    rank = np.zeros(int(used[-1]) + 1, np.int32)
    rank[used] = np.arange(len(used), dtype=np.int32)

    def work(starts: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        table, parts = torch.empty(CACHE_ROWS * len(used), dtype=torch.int32), []
        for start in starts.tolist():
            part = slice(start, start + CACHE_ROWS)
            d, i = neighbours_without_self(distances[part], ids[part], own[part])
            weights = neighbour_weights(d, i, temperature)
            parts.append(aggregate(weights, rank[labels[i]], min_probability, table))
        return parts

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(work, np.array_split(starts, threads))
        pieces = [(np.diff(o), used[i], p) for part in results for o, i, p in part]
    lengths, tokens, probs = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    return np.r_[0, np.cumsum(lengths)], tokens.astype(np.int32, copy=False), probs


def fit_temperature(
    distances: np.ndarray, ids: np.ndarray, hit: np.ndarray
) -> tuple[float, str | None]:
    """Return the temperature under which held-out neighbours best predict the true token.

    hit [rows, k] tells which neighbours carry the row's own label. Distances have no natural
    scale across models, so the grid spans multiples of a high quantile of each row's largest: a
    median would be that of exact copies where the text holds many. Beside it comes a warning where
    the best temperature is at an end of the grid, else None.
    """
    furthest = np.where(ids >= 0, distances, 0).max(axis=1)
    scale = float(np.quantile(furthest, SCALE_QUANTILE)) or 1.0
    grid = scale * np.geomspace(*GRID, GRID_POINTS)

    def loss(temperature: float) -> float:
        p_true = (neighbour_weights(distances, ids, temperature) * hit).sum(axis=1)
        return float(-np.log((1 - FLOOR) * p_true + FLOOR / 1000).mean())

    losses = [loss(temperature) for temperature in grid]
    best = int(np.argmin(losses))
    warning = None
    if best in (0, len(grid) - 1):
        why = (
            "most rows have their own text twice: are there duplicates in the corpus?"
            if best == 0
            else "the nearest neighbours predict no better than the furthest: is the key right?"
        )
        warning = f"the temperature {grid[best]:.3g} is the end of what was tried, {why}"
    return float(grid[best]), warning


@dataclass
class Searcher:
    """Writes the targets of a group of shards: their keys' neighbours, weighed, summed by token."""

    gpu: ClassVar[bool] = True
    settings: TargetSettings
    keys: Keys
    index: Index
    work: Path
    groups: list[list[int]] = field(default_factory=list)  # shards that are searched together
    held: tuple[int, Any] = (-1, None)  # the shard whose keys are held, and they

    @property
    def arrays(self) -> tuple[str, ...]:
        """Return the names of a shard's files, the last to be written last."""
        return (BASE,) * self.keys.scored + ARRAYS

    @cached_property
    def starts(self) -> np.ndarray:
        return shard_rows(self.keys.corpus)

    @cached_property
    def temperature(self) -> float:
        return json.loads((self.work / "targets.json").read_text())["temperature"]

    @property
    def neighbours(self) -> int:
        return min(self.settings.neighbours, int(self.starts[-1]) - 1)

    @cached_property
    def used(self) -> np.ndarray:
        """Return the tokens that occur, ascending."""
        return np.asarray(load_used(self.keys.corpus, "train"))

    def fit(self) -> tuple[float, str | None]:
        """Return the temperature that suits rows spread over the corpus, and a warning or None."""
        own, sample = sample_rows(self.keys, self.starts, FIT_ROWS)
        at_once = self.index.rows_at_once(self.neighbours + 1)
        batches = [sample[n : n + at_once] for n in range(0, len(sample), at_once)]
        searched = list(self.index.search_all(batches, self.neighbours + 1))
        distances, ids = (np.concatenate(arrays) for arrays in zip(*searched, strict=True))
        distances, ids = neighbours_without_self(distances, ids, own)
        labels = self.index.labels
        hit = (ids >= 0) & (labels[ids] == labels[own][:, None])
        return fit_temperature(distances, ids, hit)

    def __call__(self, group: int) -> int:
        k = self.neighbours + 1
        at_once, batches = self.index.rows_at_once(k), []
        for shard in self.groups[group]:
            rows = range(self.starts[shard], self.starts[shard + 1])
            if not rows:  # nothing of it is predicted
                self.write(shard, [(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0))])
            batches += [(shard, rows[n : n + at_once]) for n in range(0, len(rows), at_once)]

        def queries() -> Iterator[np.ndarray]:
            for shard, rows in batches:
                first = self.starts[shard]
                part = slice(rows.start - first, rows.stop - first)
                yield np.asarray(self.shard_keys(shard)[part], np.float32)

        # Beside a GPU keys are read and targets summed while it searches.
        meanwhile = iter if self.index.on_cpu(k) else ahead
        results = meanwhile(self.index.search_all(meanwhile(queries()), k))
        done, parts = 0, []
        for (shard, rows), (distances, ids) in zip(batches, results, strict=True):
            own, threshold = self.own(rows), self.settings.min_probability
            neighbours = (distances, ids, own, self.index.labels)
            parts.append(sparse_targets(*neighbours, self.used, self.temperature, threshold))
            if rows.stop == self.starts[shard + 1]:
                self.write(shard, parts)
                parts = []
            done += len(rows)
        return done

    def own(self, rows: range) -> np.ndarray:
        """Return the id in the index of each row, which is no neighbour of itself."""
        return np.arange(rows.start, rows.stop)

    def shard_keys(self, shard: int) -> np.ndarray:
        """Return the keys of a shard [rows, D] fp16; those of one are kept."""
        if self.held[0] != shard:
            labels, keys = load_shard(self.keys.datastore, "labels", shard), self.keys(shard)
            if not len(keys) == len(labels) == self.starts[shard + 1] - self.starts[shard]:
                raise MemdecError(
                    f"shard {shard} of {self.keys.datastore} does not fit the corpus: delete the "
                    f"folder {self.keys.datastore} and build again."
                )
            self.held = shard, keys
        return self.held[1]

    def write(self, shard: int, parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        """Write the targets of a shard, probs last: all of it is whole then."""
        lengths = np.concatenate([np.diff(offsets) for offsets, _, _ in parts])
        files = {
            "offsets": np.r_[0, np.cumsum(lengths)],
            "labels": np.asarray(load_shard(self.keys.datastore, "labels", shard)),
            "ids": np.concatenate([p[1] for p in parts]),
            "probs": np.concatenate([p[2] for p in parts]).astype(np.float16),
        }
        if self.keys.scored:
            files[BASE] = np.asarray(load_shard(self.keys.datastore, BASE, shard))
        for name in self.arrays:
            save_array(shard_path(self.work, name, shard), files[name])


def ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yield what an iterator yields, the next of it made meanwhile, in a thread."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item


def grouped(todo: list[int], starts: np.ndarray, rows: int, max_shards: int) -> list[list[int]]:
    """Return shards in groups of so many rows and shards at most, of one shard at least."""
    groups: list[list[int]] = []
    filled = 0
    for shard in todo:
        size = int(starts[shard + 1] - starts[shard])
        if not groups or filled + size > rows or len(groups[-1]) >= max_shards:
            groups.append([])
            filled = 0
        groups[-1].append(shard)
        filled += size
    return groups


def build_targets(
    settings: TargetSettings,
    keys: Keys,
    index: Index,
    work: Path,
    context: Context,
    kind: type[Searcher] = Searcher,
) -> None:
    """Write offsets-N.npy, ids-N.npy, probs-N.npy, labels-N.npy of each shard, and targets.json."""
    progress, executor = context.progress, context.executor
    searcher = kind(settings, keys, index, work)
    check_width(searcher.neighbours, index.nprobe, executor)
    starts = searcher.starts
    if not (work / "targets.json").exists():  # else shards were made with its temperature
        temperature = settings.temperature
        if temperature is None:
            with progress.task("targets: fitting the temperature", 1, "fit") as advance:
                temperature, warning = executor.call(searcher.fit)
                advance(1)
            if warning:
                progress.say(f"targets: {warning}")
        facts = {"temperature": temperature, "neighbours": searcher.neighbours}
        write_json(work / "targets.json", facts)
    k = searcher.neighbours + 1
    if torch.cuda.is_available() and (why := index.on_cpu(k)):
        progress.say(f"targets: searched on CPUs, {why}")
    n_shards = len(starts) - 1
    todo = unfinished(work, searcher.arrays, n_shards)
    # Parts of an index that does not fit in RAM are read for every group: as many shards as
    # the budget allows. A few groups for each worker, as one may be lost.
    max_shards = 1 if index.fits else max(1, len(todo) // (GROUPS_A_WORKER * executor.workers()))
    searcher = replace(searcher, groups=grouped(todo, starts, index.group_rows(k), max_shards))
    with progress.task("targets", int(starts[-1]), "rows") as advance:
        done = sorted(set(range(n_shards)) - set(todo))
        advance(int(np.diff(starts)[done].sum()), done_before=True)
        for rows in executor.map(searcher, list(range(len(searcher.groups)))):
            advance(rows)


def stage(build: Build) -> Stage:
    """Return how the targets are made."""
    # Another number of lists to visit needs no other index, but finds other neighbours.
    settings = build.settings.targets.model_dump() | {"probes": build.settings.index.probes}

    def make(work: Path) -> None:
        budget = build.context.ram_budget
        searched = Index(build.path("index"), build.settings.index.probes, budget)
        keys = keys_of(build, build.path("datastore"))
        build_targets(build.settings.targets, keys, searched, work, build.context)

    def files(work: Path) -> Iterable[str]:
        count = completeness.n_shards(build.path("corpus"))
        names = (BASE,) * scores_labels(build.settings) + ARRAYS
        return ["targets.json", *completeness.numbered(names, count)]

    return Stage(settings, ("datastore", "index"), make, files, less_budget(build.settings))
