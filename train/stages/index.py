"""Index stage: datastore keys -> faiss indices over runs of rows, and the label of every row.

Squared L2 distance, as in the paper. Small datastores are searched exactly; larger ones get
inverted lists with 8-bit scalar quantisation, very large ones product quantisation. The quantiser
is trained once, on a sample, and stored once; the parts of the index are the inverted lists of
runs of rows, so that the nearest of all parts, merged, are those of one large index.
What an index is follows from the number and width of its keys: see Shape. The RAM budget only
decides in how many parts it lies.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import faiss
import numpy as np
import torch
from faiss.contrib.factory_tools import get_code_size

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.artifacts import write_atomic, write_json
from vllm_memdec.train.data.blocks import shard_rows
from vllm_memdec.train.data.completeness import check_there
from vllm_memdec.train.data.shards import load_shard
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model.hidden_states import Keys
from vllm_memdec.train.settings import IndexSettings
from vllm_memdec.train.stages.datastore import keys_of, sampled
from vllm_memdec.train.stages.faiss_gpu import no_gpu, to_cpu, to_gpu
from vllm_memdec.train.stages.stage import Build, Stage, less_budget

FLAT_BELOW = 10_000  # keys below which brute force is faster than training lists
TWO_LEVELS_FROM = 10**6  # keys from which k-means of all lists at once takes longer than filling
PQ_ABOVE = 20_000_000  # keys above which 8-bit scalars no longer fit in RAM comfortably
# Lists from which to compare a key with all takes longer than to walk a graph of them. Measured
# once, on one core, for width 96: 16,384 lists are compared in less than half the time of a walk.
GRAPH_FROM = 1 << 16
GRAPH_LINKS = 32  # links of a centroid, as faiss advises
GRAPH_SEARCH, GRAPH_CONSTRUCTION = 64, 200  # candidates; faiss's 16 and 40 miss near lists
PQ_KEYS = 39 * 256  # keys that faiss needs for sound codes of 8 bits
PQ_BYTES = 64  # bytes of a key's code, as in the paper
CODE_SAMPLE = 256 * 256  # keys on which codes are trained: faiss takes no more
POINTS_PER_LIST = 256  # keys a list in k-means: faiss takes no more
MIN_PER_LIST = 40  # keys a list that a sound centroid needs
TWO_LEVEL_POINTS = 64  # keys a list in two levels: what is read of a corpus grows with them
KMEANS_PASSES = 10  # faiss's own number for the lists of an index
SAMPLE_BYTES = 2**30  # bytes of the sample, in fp16 and float32, where lists are trained at once
PART_SHARE = 4  # a part of the index takes a fourth of the RAM budget
# A search makes the tables of product codes, 64 kB a list, where they pay: see search.py.
SKIP_TABLES = faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE
LABELS = "labels.i32"  # the labels of all rows, in order
TRAINED = "trained.faiss"  # the index without keys
SAMPLE = "sample.f16"  # the keys on which lists are trained


@dataclass(frozen=True)
class Shape:
    """All that decides what an index finds, beside the keys and the seed."""

    kind: str  # faiss's factory string
    lists: int  # inverted lists, 0: none
    sample: int  # keys on which the lists are trained
    levels: int  # levels of k-means: 2 where lists are clusters within clusters


def shape(settings: IndexSettings, n_keys: int, width: int) -> Shape:
    """Return what an index over so many keys is like; MemdecError if they are too few for it.

    The number of lists follows the corpus alone: sqrt(n), and from a million keys on a power of two
    near n^0.6, which is 2 sqrt(n) at 10^9. What a query visits at a given nprobe grows with n^0.4.
    """
    kind = settings.kind
    if kind == "auto":
        kind = "flat" if n_keys < FLAT_BELOW else "sq8" if n_keys < PQ_ABOVE else "pq"
    if kind == "flat":
        return Shape("Flat", 0, 0, 0)
    if kind == "pq" and n_keys < PQ_KEYS:
        raise MemdecError(
            f"index.kind pq needs {PQ_KEYS} keys to train on, this corpus has {n_keys}: choose sq8."
        )
    if n_keys < TWO_LEVELS_FROM:
        lists, levels = max(1, min(math.isqrt(n_keys), n_keys // MIN_PER_LIST)), 1
        at_once = SAMPLE_BYTES // (6 * width)
        sample = max(MIN_PER_LIST * lists, min(POINTS_PER_LIST * lists, at_once))
    else:
        many = TWO_LEVELS_FROM**0.5 * (n_keys / TWO_LEVELS_FROM) ** 0.6
        lists, levels = 1 << round(math.log2(many)), 2
        sample = TWO_LEVEL_POINTS * lists
    sample = min(n_keys, max(sample, PQ_KEYS))
    inverted = f"IVF{lists}" + (f"_HNSW{GRAPH_LINKS}" if lists >= GRAPH_FROM else "")
    if kind != "pq":
        return Shape(f"{inverted},SQ{'8' if kind == 'sq8' else 'fp16'}", lists, sample, levels)
    codes = max(m for m in range(1, PQ_BYTES + 1) if width % m == 0)
    return Shape(f"OPQ{codes},{inverted},PQ{codes}", lists, sample, levels)


def shaping(settings: IndexSettings, n_keys: int, width: int) -> dict[str, Any]:
    """Return what shapes an index, for its manifest: the RAM budget is no part of it."""
    return {"seed": settings.seed, **asdict(shape(settings, n_keys, width))}


def index_files(work: Path) -> Iterator[str]:
    """Yield the names of an index's files."""
    yield from ("index.json", LABELS)
    if (work / "index.json").exists():
        facts = read_facts(work / "index.json")
        what = "index"
        if "IVF" in facts["kind"]:
            what = "lists"
            yield TRAINED
        yield from (f"{what}-{number:05d}.faiss" for number in part_numbers(facts))


def part_numbers(facts: dict[str, Any]) -> list[int]:
    """Return the number of every part of an index in its file's name: its first shard's.

    A release before this one counted parts.
    """
    return facts.get("parts", list(range(len(facts["first_rows"]))))


def key_bytes(kind: str, width: int) -> int:
    """Return how many bytes an index of a kind holds a key, its row number among them."""
    return get_code_size(width, kind) + (8 if "IVF" in kind else 0)


def trained_bytes(shape: Shape, width: int) -> int:
    """Return how many bytes the centroids take, and the graph of them."""
    return shape.lists * (4 * width + (8 * GRAPH_LINKS if "HNSW" in shape.kind else 0))


def training_bytes(shape: Shape, width: int) -> int:
    """Return how many bytes the training of an index takes, whatever the RAM budget."""
    if shape.levels == 2:
        at_once = max(POINTS_PER_LIST * math.isqrt(shape.lists), CODE_SAMPLE)
        return trained_bytes(shape, width) + 8 * width * min(at_once, shape.sample)
    return 6 * width * shape.sample  # the sample, in fp16 and in float32


def index_parts(
    starts: np.ndarray, width_bytes: int, budget: int, filled: Iterable[range] = ()
) -> list[range]:
    """Return runs of shards whose keys take at most a share of the budget; one shard at least.

    filled: runs that stay as they are.
    """
    max_rows = max(1, budget // PART_SHARE // width_bytes)
    kept, end = {part.start: part.stop for part in filled}, len(starts) - 1
    parts, first = [], 0
    while first < end:
        stop = kept.get(first, first + 1)
        if first not in kept:
            while stop < end and stop not in kept and starts[stop + 1] - starts[first] <= max_rows:
                stop += 1
        parts.append(range(first, stop))
        first = stop
    return parts


def inverted(index: Any) -> Any:
    """Return the inverted lists' index within an index, None if it has no such."""
    ivf = faiss.try_extract_index_ivf(index)
    return None if ivf is None else faiss.downcast_index(ivf)


def transformed(index: Any, keys: np.ndarray) -> np.ndarray:
    """Return keys [rows, D] float32 as the lists of an index hold them."""
    for transform in transforms(index):
        keys = transform.apply(keys)
    return keys


def transforms(index: Any) -> list[Any]:
    """Return what an index does to keys before its lists get them, in order."""
    outer = faiss.downcast_index(index)
    if not isinstance(outer, faiss.IndexPreTransform):
        return []
    chain: Any = outer.chain  # a std::vector, which faiss's stubs call a list
    return [faiss.downcast_VectorTransform(chain.at(n)) for n in range(chain.size())]


def kmeans(points: np.ndarray, lists: int, seed: int) -> np.ndarray:
    """Return the centroids [lists, D] float32 of points [rows, D]."""
    points = np.ascontiguousarray(points, np.float32)
    options = {"min_points_per_centroid": 1, "max_points_per_centroid": POINTS_PER_LIST}
    options["gpu"] = 0 if no_gpu() else 1
    clustering = faiss.Kmeans(points.shape[1], lists, niter=KMEANS_PASSES, seed=seed, **options)
    clustering.train(points)
    assert clustering.centroids is not None  # train() has made them
    return clustering.centroids


def two_level_kmeans(sample: "np.ndarray | Rotated", lists: int, seed: int) -> np.ndarray:
    """Return centroids [lists, D] float32 of a sample: of clusters, then within each of them.

    Of the sample, which may be mapped, only the points of a few clusters are in RAM at once;
    faiss.contrib.clustering's function of this kind holds all of it in float32.
    """
    coarse = math.isqrt(lists)
    centroids = kmeans(sample[:: max(1, len(sample) // (POINTS_PER_LIST * coarse))], coarse, seed)
    cluster = np.empty(len(sample), np.int64)
    for start in range(0, len(sample), CODE_SAMPLE):
        part = np.asarray(sample[start : start + CODE_SAMPLE], np.float32)
        cluster[start : start + len(part)] = faiss.knn(part, centroids, 1)[1][:, 0]
    # Each cluster has lists by the number of its points.
    ends = np.cumsum(np.bincount(cluster, minlength=coarse)) * lists // len(sample)
    fine = [
        kmeans(sample[cluster == n], count, seed)
        for n, count in enumerate(np.diff(ends, prepend=0).tolist())
        if count
    ]
    return np.concatenate(fine)


def train_index(settings: IndexSettings, keys: Keys, work: Path) -> dict[str, Any]:
    """Write trained.faiss, an index without keys, its lists trained on a sample of them.

    A flat index has none. Returns the description of the index.
    """
    starts = shard_rows(keys.corpus)
    n_keys, width = int(starts[-1]), keys.width
    plan = shape(settings, n_keys, width)
    if plan.lists:

        def write_sample(path: Path) -> None:  # a shard at a time: all of it may be large
            with open(path, "wb") as file:
                for _, some in sampled(keys, starts, plan.sample):
                    some.tofile(file)

        if not (work / SAMPLE).exists():
            write_atomic(work / SAMPLE, write_sample)
        sample = np.memmap(work / SAMPLE, np.float16, "r").reshape(-1, width)
        index = train_lists(faiss.index_factory(width, plan.kind), sample, plan, settings.seed)
        write_atomic(work / TRAINED, lambda p: faiss.write_index(index, str(p)))
        (work / SAMPLE).unlink()
    return {"kind": plan.kind, "width": width, "keys": n_keys}


def train_lists(index: Any, sample: np.ndarray, plan: Shape, seed: int) -> Any:
    """Train an index on a sample of keys [rows, D] fp16; return it."""
    ivf = inverted(index)
    ivf.cp.seed = seed
    if isinstance(ivf, faiss.IndexIVFPQ):
        ivf.use_precomputed_table = -1  # else training makes the tables that a search may need
    if plan.levels == 1:
        index = to_gpu(index)
        index.train(np.asarray(sample, np.float32))
        return to_cpu(index)
    chosen = np.linspace(0, len(sample) - 1, min(CODE_SAMPLE, len(sample))).astype(np.int64)
    few = np.asarray(sample[chosen], np.float32)
    for transform in transforms(index)[:1]:  # what stands before the lists comes first
        transform.train(few)
    rotated = Rotated(index, sample)
    centroids = two_level_kmeans(rotated, plan.lists, seed)
    quantizer = faiss.downcast_index(ivf.quantizer)
    if isinstance(quantizer, faiss.IndexHNSW):
        quantizer.hnsw.efConstruction = GRAPH_CONSTRUCTION
        quantizer.hnsw.efSearch = GRAPH_SEARCH
    quantizer.train(centroids)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # several would link a graph in another order every time
    quantizer.add(centroids)
    faiss.omp_set_num_threads(threads)
    index.train(few)
    return index


@dataclass(frozen=True)
class Rotated:
    """Keys of a sample [rows, D] as the lists of an index hold them, computed when read."""

    index: Any
    sample: np.ndarray

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return transformed(self.index, np.ascontiguousarray(self.sample[rows], np.float32))


def part_path(folder: Path, number: int) -> Path:
    """Return the file of one part of an index: its inverted lists, or all of it."""
    what = "lists" if (folder / TRAINED).exists() else "index"
    return folder / f"{what}-{number:05d}.faiss"


def write_part(index: Any, path: Path) -> None:
    """Write the inverted lists of an index; of one without lists, all of it."""
    if (ivf := inverted(index)) is None:
        faiss.write_index(index, str(path))
        return
    file = faiss.FileIOWriter(str(path))
    faiss.write_InvertedLists(ivf.invlists, file)
    del file  # closes it


@dataclass
class Filler:
    """Writes one part of the index: what the trained one becomes with the keys of some shards."""

    gpu: ClassVar[bool] = True
    keys: Keys
    parts: list[range]
    work: Path

    def __call__(self, part: int) -> int:
        index, rows, starts = None, 0, shard_rows(self.keys.corpus)
        lists = (self.work / TRAINED).exists()
        for shard in self.parts[part]:
            added = np.asarray(self.keys(shard), dtype=np.float32)
            if index is None:
                index = to_gpu(self.empty(added.shape[1]))
            if lists:
                index.add_with_ids(added, np.arange(starts[shard], starts[shard + 1]))
            else:
                index.add(added)
            rows += len(added)
        index = to_cpu(index)
        path = part_path(self.work, self.parts[part].start)
        write_atomic(path, lambda p: write_part(index, p))
        return rows

    def empty(self, width: int) -> Any:
        """Return the index without keys."""
        trained = self.work / TRAINED
        if not trained.exists():
            return faiss.IndexFlatL2(width)
        return faiss.read_index(str(trained), SKIP_TABLES)


def build_index(settings: IndexSettings, keys: Keys, work: Path, context: Context) -> None:
    """Write trained.faiss, lists-N.faiss (of a flat index: index-N.faiss), labels.i32, index.json.

    Each part is over a run of rows; labels are [rows] int32. A part takes a fourth of the
    ram budget.
    """
    if (work / "index.json").exists():  # killed just before the end
        (work / "training.json").unlink(missing_ok=True)
        return
    progress, executor = context.progress, context.executor
    starts = shard_rows(keys.corpus)
    if not (work / "training.json").exists():
        with progress.task("index: training", 1, "pass") as advance:
            write_json(work / "training.json", executor.call(train_index, settings, keys, work))
            advance(1)
    facts = read_facts(work / "training.json")
    if "parts" not in facts:
        for path in work.glob("*-*.faiss"):  # an earlier release counted parts
            path.unlink()
    # What is not filled is divided anew for another budget: a part too large may be what failed.
    bounds = pairwise([*facts.get("parts", []), len(starts) - 1])
    filled = [range(a, b) for a, b in bounds if part_path(work, a).exists()]
    parts = index_parts(
        starts, key_bytes(facts["kind"], facts["width"]), context.ram_budget, filled
    )
    facts["parts"] = [part.start for part in parts]
    write_json(work / "training.json", facts)
    todo = [n for n, part in enumerate(parts) if part not in filled]
    if torch.cuda.is_available() and (why := no_gpu()):
        progress.say(f"index: built on CPUs, {why}")
    with progress.task(f"index: adding to {facts['kind']}", int(starts[-1]), "keys") as advance:
        for n in set(range(len(parts))) - set(todo):
            advance(int(starts[parts[n].stop] - starts[parts[n].start]), done_before=True)
        for rows in executor.map(Filler(keys, parts, work), todo):
            advance(rows)
    check_there(work, (part_path(work, n).name for n in facts["parts"]), os.listdir(work))

    def write_labels(path: Path) -> None:
        with open(path, "wb") as file:
            for shard in range(len(starts) - 1):
                load_shard(keys.datastore, "labels", shard).astype("<i4").tofile(file)

    write_atomic(work / LABELS, write_labels)
    facts["first_rows"] = [int(starts[part.start]) for part in parts]
    write_json(work / "index.json", facts)
    (work / "training.json").unlink()


def read_facts(path: Path) -> dict[str, Any]:
    """Return index.json."""
    return json.loads(path.read_text())


def stage(build: Build) -> Stage:
    """Return how the index is made."""
    rows = json.loads((build.path("corpus") / "corpus.json").read_text())["train"]["rows"]
    keys = keys_of(build, build.path("datastore"))
    settings = shaping(build.settings.index, rows, keys.width)

    def make(work: Path) -> None:
        build_index(build.settings.index, keys, work, build.context)

    return Stage(settings, ("datastore",), make, index_files, less_budget(build.settings))
