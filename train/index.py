"""Index stage: datastore keys -> faiss indices over runs of rows, and the label of every row.

Squared L2 distance, as in the paper. Small datastores are searched exactly; larger ones get
inverted lists with 8-bit scalar quantisation, very large ones product quantisation. The quantiser
is trained once, on a sample; every part of the index is a copy of it filled with its own rows, so
that the nearest of all parts, merged, are what one large index would have found.
"""

import functools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import faiss
import numpy as np
import torch

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.artifacts import write_atomic, write_json
from vllm_memdec.train.cluster import Cluster
from vllm_memdec.train.complete import check_there
from vllm_memdec.train.config import IndexSettings
from vllm_memdec.train.corpus import shard_rows
from vllm_memdec.train.datastore import Keys
from vllm_memdec.train.faults import reraise
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.shards import load_shard

FLAT_BELOW = 10_000  # keys: brute force is faster than training lists
PQ_ABOVE = 20_000_000  # keys: 8-bit scalars no longer fit in memory comfortably
PQ_KEYS = 39 * 256  # faiss's minimum for sound codes of 8 bits
PQ_BYTES = 64  # a key, as in the paper
POINTS_PER_LIST = 256  # faiss samples no more for k-means
SAMPLE_SHARDS = 64  # at least so many, evenly spread, give the sample
PART_SHARE = 4  # a part of the index, or the sample, takes a fourth of the memory budget
LABELS = "labels.i32"  # of all rows, in order
OVER_QUERIES = 3  # faiss's parallel mode; in its default one search_preassigned() has one thread
GPU_LARGEST_K = 2048  # neighbours, or lists to visit, that faiss finds on a GPU
# Numbers of a key that one byte of a code stands for, of which faiss makes no tables in advance.
GPU_PQ_WIDTHS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32)
# Parts stay on a GPU while so much of its memory is free. Every shard of queries needs all parts,
# and one of 1 GiB takes 0.2 s to come from cached files and 0.04 s over PCIe; the half of an H100
# that may be filled holds 550 M keys of 72 bytes (arithmetic, not measured).
GPU_FREE = 0.5
GPU_TRIAL = """
import faiss, numpy
index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, faiss.IndexFlatL2(8))
index.add(numpy.eye(8, dtype="float32"))
assert index.search(numpy.eye(8, dtype="float32"), 1)[1].ravel().tolist() == list(range(8))
"""


def most_sampled(width: int, budget: int) -> int:
    """Return how many keys may be sampled: they are held in fp16 and in float32."""
    return budget // PART_SHARE // (6 * width)


def factory_string(kind: str, n_keys: int, width: int, budget: int) -> str:
    """Return the faiss factory string for a kind of index, "auto" choosing by the key count.

    budget: bytes a process may take, which bounds the sample and by that the number of lists.
    """
    if kind == "auto":
        kind = "flat" if n_keys < FLAT_BELOW else "sq8" if n_keys < PQ_ABOVE else "pq"
    if kind == "flat":
        return "Flat"
    # About sqrt(n) lists; at least 40 keys each, faiss's minimum for a sound centroid.
    lists = max(1, min(int(n_keys**0.5), min(n_keys, most_sampled(width, budget)) // 40))
    if kind in ("sq8", "fp16"):
        return f"IVF{lists},SQ{'8' if kind == 'sq8' else 'fp16'}"
    if n_keys < PQ_KEYS:
        raise MemdecError(
            f"index.kind pq needs {PQ_KEYS} keys to train on, this corpus has {n_keys}: choose sq8."
        )
    codes = max(m for m in range(1, PQ_BYTES + 1) if width % m == 0)
    return f"OPQ{codes},IVF{lists},PQ{codes}"


def shaping(settings: IndexSettings, n_keys: int, width: int, budget: int) -> dict[str, Any]:
    """Return what shapes an index, for its manifest."""
    kind = factory_string(settings.kind, n_keys, width, budget)
    sampled = None if kind == "Flat" else min(n_keys, most_sampled(width, budget))
    return {"kind": kind, "sampled": sampled, "seed": settings.seed}


def index_files(work: Path) -> Iterator[str]:
    """Yield the names of an index's files."""
    yield from ("index.json", LABELS)
    if (work / "index.json").exists():
        parts = len(read_facts(work / "index.json")["first_rows"])
        yield from (part_path(work, part).name for part in range(parts))


def key_bytes(description: str, width: int) -> int:
    """Return how many bytes an index holds a key, its row number among them."""
    if description == "Flat":
        return 4 * width
    code = description.rsplit(",", 1)[1]
    sizes = {"SQ8": width, "SQfp16": 2 * width}
    return 8 + (sizes[code] if code in sizes else int(code.removeprefix("PQ")))


def index_parts(starts: np.ndarray, width_bytes: int, budget: int) -> list[range]:
    """Return runs of shards whose keys take at most a share of the budget; one shard at least."""
    most = max(1, budget // PART_SHARE // width_bytes)
    parts, first = [], 0
    for stop in range(1, len(starts)):
        if stop == len(starts) - 1 or starts[stop + 1] - starts[first] > most:
            parts.append(range(first, stop))
            first = stop
    return parts


@functools.cache
def no_gpu() -> str:
    """Return why faiss uses no GPU in this process, "" if it uses the one that torch has.

    Tried in another process: a faiss without kernels for a GPU ends the process that asks it.
    """
    if not torch.cuda.is_available():
        return "there is no GPU"
    if not hasattr(faiss, "StandardGpuResources"):
        return "this faiss was built without CUDA"
    return failure(GPU_TRIAL)


def failure(code: str) -> str:
    """Return the last line that Python code ends with in another process if it fails, else ""."""
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if tried.returncode == 0:
        return ""
    return (tried.stderr.strip().splitlines() or [f"faiss ended with {tried.returncode}"])[-1]


def gpu_options(index: Any) -> dict[str, bool]:
    """Return the options with which faiss takes an index to a GPU."""
    options = {"use_cuvs": False}  # which knows no 8-bit scalars
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None and isinstance(ivf := faiss.downcast_index(ivf), faiss.IndexIVFPQ):
        # A query's table of 64-byte codes has 64 x 256 entries: 32 kB in fp16; in float32 it is
        # larger than the 48 kB of shared memory.
        options["useFloat16"] = True
        # Tables made in advance take 32 kB a list, and their fp16 is of larger numbers.
        options["usePrecomputed"] = ivf.pq.dsub not in GPU_PQ_WIDTHS
    return options


def to_gpu(index: Any, resources: Any = None) -> Any:
    """Return the index on this process's GPU if faiss has one and takes it there, else unchanged.

    On one only: a worker of cluster.py has one. resources: faiss's, 1.5 GB of the GPU's memory.
    """
    if no_gpu():
        return index
    options = faiss.GpuClonerOptions()
    for name, value in gpu_options(index).items():
        assert hasattr(options, name), name  # one that faiss does not know it would not miss
        setattr(options, name, value)
    try:
        return faiss.index_cpu_to_gpu(resources or faiss.StandardGpuResources(), 0, index, options)
    except RuntimeError as error:
        logging.getLogger(__name__).warning("an index stays on CPUs: %s", error)
        return index


def to_cpu(index: Any) -> Any:
    """Return the index in host memory, where it can be written."""
    return faiss.index_gpu_to_cpu(index) if hasattr(faiss, "index_gpu_to_cpu") else index


def inverted_lists(index: Any, queries: np.ndarray) -> tuple[np.ndarray, Any]:
    """Return (queries as its lists hold keys, the IVF index) of an index, None if it has no such.

    One on GPUs finds its lists by itself.
    """
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = faiss.downcast_index(index.index)
        if isinstance(inner, faiss.IndexIVF):
            for n in range(index.chain.size()):
                queries = faiss.downcast_VectorTransform(index.chain.at(n)).apply(queries)
            return queries, inner
    return queries, index if isinstance(index, faiss.IndexIVF) else None


def sample_rows(keys: Keys, starts: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (row numbers, keys fp16) of about so many rows, evenly spread over the shards."""
    n_shards, n_rows = len(starts) - 1, int(starts[-1])
    shards = np.arange(n_shards)
    if not keys.settings.keep_keys:  # each costs a forward pass: take more rows of fewer shards
        most = max(SAMPLE_SHARDS, -(-2 * rows * n_shards // n_rows))
        shards = np.unique(np.linspace(0, n_shards - 1, min(n_shards, most)).astype(int))
    available = int(np.diff(starts)[shards].sum())
    stride = max(1, available // rows)
    found, numbers = [], []
    for shard in shards:
        found.append(keys(int(shard))[::stride].copy())  # what stays mapped counts as memory
        numbers.append(np.arange(starts[shard], starts[shard + 1])[::stride])
    return np.concatenate(numbers), np.concatenate(found)


def train_index(settings: IndexSettings, keys: Keys, budget: int, work: Path) -> dict[str, Any]:
    """Write trained.faiss, empty and trained on a sample of the keys; return its description."""
    starts = shard_rows(keys.corpus)
    n_keys, width = int(starts[-1]), keys(0).shape[1]
    description = factory_string(settings.kind, n_keys, width, budget)
    index = faiss.index_factory(width, description)
    if not index.is_trained:
        ivf = faiss.extract_index_ivf(index)
        ivf.cp.seed = settings.seed
        wanted = min(POINTS_PER_LIST * ivf.nlist, most_sampled(width, budget))
        least = PQ_KEYS if "PQ" in description else 40 * ivf.nlist
        sample = sample_rows(keys, starts, max(wanted, least))[1].astype(np.float32)
        index = to_gpu(index)
        index.train(sample)
        index = to_cpu(index)
    write_atomic(work / "trained.faiss", lambda p: faiss.write_index(index, str(p)))
    return {"kind": description, "width": width, "keys": n_keys}


def part_path(folder: Path, part: int) -> Path:
    """Return the file of one part of the index."""
    return folder / f"index-{part:05d}.faiss"


@dataclass
class Filler:
    """Writes one part of the index: the trained quantiser, filled with the keys of its shards."""

    gpu: ClassVar[bool] = True
    keys: Keys
    parts: list[range]
    work: Path

    def __call__(self, part: int) -> int:
        index = to_gpu(faiss.read_index(str(self.work / "trained.faiss")))
        rows = 0
        for shard in self.parts[part]:
            added = np.asarray(self.keys(shard), dtype=np.float32)
            index.add(added)
            rows += len(added)
        index = to_cpu(index)
        write_atomic(part_path(self.work, part), lambda p: faiss.write_index(index, str(p)))
        return rows


def build_index(
    settings: IndexSettings,
    keys: Keys,
    budget: int,
    work: Path,
    progress: Progress,
    cluster: Cluster,
) -> None:
    """Write index-N.faiss, each over a run of rows, labels.i32 [rows] and index.json.

    budget: bytes a process may take for a part of the index.
    """
    if (work / "index.json").exists():  # killed just before the end
        (work / "trained.faiss").unlink(missing_ok=True)
        return
    starts = shard_rows(keys.corpus)
    if not (work / "training.json").exists():
        with progress.task("index: training", 1, "pass") as advance:
            facts = cluster.call(train_index, settings, keys, budget, work)
            parts = index_parts(starts, key_bytes(facts["kind"], facts["width"]), budget)
            # Kept, so that a resumed run with another budget does not divide the rows anew.
            facts["first_shards"] = [part.start for part in parts]
            write_json(work / "training.json", facts)
            advance(1)
    facts = read_facts(work / "training.json")
    bounds = [*facts.pop("first_shards"), len(starts) - 1]
    parts = [range(a, b) for a, b in pairwise(bounds)]
    todo = [n for n in range(len(parts)) if not part_path(work, n).exists()]
    if torch.cuda.is_available() and (why := no_gpu()):
        progress.say(f"index: built on CPUs, {why}")
    with progress.task(f"index: adding to {facts['kind']}", int(starts[-1]), "keys") as advance:
        for n in set(range(len(parts))) - set(todo):
            advance(int(starts[parts[n].stop] - starts[parts[n].start]), done_before=True)
        for rows in cluster.map(Filler(keys, parts, work), todo):
            advance(rows)
    check_there(work, (part_path(work, n).name for n in range(len(parts))), os.listdir(work))

    def write_labels(path: Path) -> None:
        with open(path, "wb") as file:
            for shard in range(len(starts) - 1):
                load_shard(keys.datastore, "labels", shard).astype("<i4").tofile(file)

    write_atomic(work / LABELS, write_labels)
    facts["first_rows"] = [int(starts[part.start]) for part in parts]
    write_json(work / "index.json", facts)
    (work / "training.json").unlink()
    (work / "trained.faiss").unlink()


def read_facts(path: Path) -> dict[str, Any]:
    """Return index.json."""
    return json.loads(path.read_text())


@dataclass
class Index:
    """The parts of an index, searched as one.

    Parts are mapped, and kept so up to a share of the budget: what is mapped counts as the
    process's memory. Each of the others is mapped for a search, which costs little where its file
    stays cached, and takes another share.
    """

    folder: Path
    probes: int
    budget: int
    opened: dict[tuple[int, bool], Any] = field(default_factory=dict)

    @cached_property
    def facts(self) -> dict[str, Any]:
        return read_facts(self.folder / "index.json")

    @cached_property
    def labels(self) -> np.ndarray:
        """Return the label of every row [rows] int32, memory-mapped."""
        labels = np.memmap(self.folder / LABELS, dtype="<i4", mode="r")
        if len(labels) != self.facts["keys"]:
            raise MemdecError(
                f"{self.folder / LABELS} is cut off: delete the folder {self.folder} and build "
                "again."
            )
        return labels

    @cached_property
    def resources(self) -> Any:
        return faiss.StandardGpuResources()

    def on_cpu(self, k: int) -> str:
        """Return why a search for k neighbours is done on CPUs, "" if a GPU does it."""
        lists = self.probes if "IVF" in self.facts["kind"] else 1
        if why := no_gpu():
            return why
        return f"a GPU finds at most {GPU_LARGEST_K}" if max(k, lists) > GPU_LARGEST_K else ""

    def _part(self, part: int, on_gpu: bool) -> Any:
        if (part, on_gpu) in self.opened:
            return self.opened[part, on_gpu]
        path = part_path(self.folder, part)
        try:
            index = faiss.read_index(str(path), 0 if on_gpu else faiss.IO_FLAG_MMAP)
        except RuntimeError as error:
            reraise(error, path)
            raise MemdecError(
                f"{path} is damaged or missing: delete the folder {self.folder} and build again."
            ) from error
        if not isinstance(index, faiss.IndexFlat):
            ivf = faiss.extract_index_ivf(index)
            ivf.nprobe = min(self.probes, ivf.nlist)
            ivf.parallel_mode = OVER_QUERIES
        held = to_gpu(index, self.resources) if on_gpu else index
        if held is not index:
            free, total = torch.cuda.mem_get_info()
            stays = free >= GPU_FREE * total
        else:
            size = key_bytes(self.facts["kind"], self.facts["width"])
            total = sum(i.ntotal for i in self.opened.values()) + index.ntotal
            stays = total * size <= self.budget // PART_SHARE
        if stays:
            self.opened[part, on_gpu] = held
        return held

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (squared distances, row ids), both [rows, k], nearest first; -1 where none."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        distances = np.full((len(queries), k), np.inf, dtype=np.float32)
        ids = np.full((len(queries), k), -1, dtype=np.int64)
        lists, on_gpu = None, not self.on_cpu(k)
        for part, first in enumerate(self.facts["first_rows"]):
            index = ivf = None  # the part before, before the next is mapped
            index = self._part(part, on_gpu)
            transformed, ivf = inverted_lists(index, queries)
            if ivf is None:
                d, i = index.search(queries, k)
            else:  # every part has the same lists: which are near is found once
                lists = lists or ivf.quantizer.search(transformed, ivf.nprobe)
                d, i = ivf.search_preassigned(transformed, k, lists[1], lists[0])
            i = np.where(i < 0, -1, i + first)
            if part == 0:
                distances, ids = np.where(i < 0, np.inf, d).astype(np.float32), i
                continue
            distances = np.concatenate([distances, np.where(i < 0, np.inf, d)], axis=1)
            ids = np.concatenate([ids, i], axis=1)
            # By distance, then by row: as one index would, and the same however it is divided.
            order = np.lexsort((ids, distances), axis=1)[:, :k]
            distances = np.take_along_axis(distances, order, axis=1)
            ids = np.take_along_axis(ids, order, axis=1)
        return distances, ids

    def blocks(self, queries: np.ndarray, k: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yield (rows, distances, ids) of as many queries at once as the budget allows."""
        at_once = max(1, self.budget // 8 // (3 * 12 * k))
        for start in range(0, len(queries), at_once):
            rows = slice(start, min(start + at_once, len(queries)))
            yield rows, *self.search(queries[rows], k)


@dataclass(frozen=True)
class TimedSearch:
    """Seconds of an index's training, filling and search, and what was found."""

    train: float
    add: float
    search: float
    compare: float  # of the search: finding the lists
    lists: int
    visited: int  # keys that queries were compared with
    distances: np.ndarray
    ids: np.ndarray


def time_search(keys: np.ndarray, own: np.ndarray, kind: str, k: int, probes: int) -> TimedSearch:
    """Build an index over a few keys, of the codes that a factory string names; search rows own."""

    def timed(function: Any, *args: Any) -> tuple[float, Any]:
        began = time.perf_counter()
        found = function(*args)
        return time.perf_counter() - began, found

    data, code = np.asarray(keys, dtype=np.float32), kind.split(",")[-1]
    lists = 1 if code == "Flat" else max(1, min(int(len(data) ** 0.5), len(data) // 40))
    index = faiss.index_factory(data.shape[1], code if code == "Flat" else f"IVF{lists},{code}")
    train, _ = timed(index.train, data)
    add, _ = timed(index.add, data)
    compare, queries = 0.0, data[own]
    if code != "Flat":
        index.nprobe = min(probes, lists)
        index.quantizer.search(queries, index.nprobe)  # warms up
        compare, _ = timed(index.quantizer.search, queries, index.nprobe)
        faiss.cvar.indexIVF_stats.reset()
    search, (distances, ids) = timed(index.search, queries, k)
    visited = len(own) * len(data) if code == "Flat" else faiss.cvar.indexIVF_stats.ndis
    return TimedSearch(train, add, search, compare, lists, visited, distances, ids)
