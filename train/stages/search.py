"""The nearest keys of queries: an index, which may be larger than the RAM, searched in its parts.

Parts are the outer loop and queries the inner one, so that what does not stay in RAM is read
once for all the queries that are searched together, see Index.group_rows().
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.faults import reraise
from vllm_memdec.train.stages.faiss_gpu import GPU_LARGEST_K, no_gpu, to_gpu
from vllm_memdec.train.stages.index import (
    GRAPH_SEARCH,
    LABELS,
    SKIP_TABLES,
    TRAINED,
    inverted,
    part_numbers,
    part_path,
    read_facts,
    transformed,
)

OVER_QUERIES = 3  # faiss's parallel mode; in its default one search_preassigned() has one thread
# Shares of the RAM budget, 4 for a fourth. Half of it is for parts: those that stay open, and those
# of one pass. A fourth is for queries and their neighbours, the last for what sums those up, and to
# spare.
PARTS_SHARE = 4  # parts that stay open
GROUP_SHARE = 8  # queries that are searched together, and their neighbours so far
GPU_GROUP_SHARE = 2  # the same, where the parts are in a GPU's memory
BLOCK_SHARE = 8  # neighbours from all parts of a pass, for the queries searched at once
# The tables of a product quantiser, made in advance for all lists, take 64 kB a list with 64-byte
# codes. The budget has no say, as distances are rounded in another way without them. Where a byte
# of a code stands for few numbers of a key, a list's table is made sooner than read from RAM.
TABLES_BYTES, TABLES_FROM = 2**30, 8
# Parts may fill this share of a GPU's free memory: 60 GB of an H100 hold 830 M keys of 72 bytes
# (arithmetic, not measured). The rest is for faiss's own memory and for the parts of a pass.
GPU_PARTS = 0.75


def group_rows(width: int, k: int, nprobe: int, budget: int, on_gpu: bool) -> int:
    """Return how many queries may be searched together: they and their neighbours are in RAM."""
    share = budget // (GPU_GROUP_SHARE if on_gpu else GROUP_SHARE)
    return max(1, share // (4 * width + 12 * (k + nprobe)))


def table_bytes(lists: int, codes: int, width: int) -> int:
    """Return how many bytes the tables of product codes take that a search on CPUs makes, 0: none.

    lists: of the index; codes: of a key, a byte each; width: of a key.
    """
    size = 4 * lists * codes * 256
    return size if width // codes >= TABLES_FROM and size <= TABLES_BYTES else 0


@dataclass
class Block:
    """Queries that are searched at once, and their nearest keys so far."""

    queries: np.ndarray  # [rows, D] float32, as the lists of the index hold keys
    lists: np.ndarray | None  # lists that are visited [rows, nprobe]; None: the index has none
    list_distances: np.ndarray | None
    nearest: tuple[np.ndarray, np.ndarray] | None = None  # distances and ids [rows, k], in order


@dataclass
class Index:
    """The parts of an index, searched as one.

    budget: bytes a process may take, what is mapped among them; gpu: use one, if faiss can.
    """

    folder: Path
    nprobe: int
    budget: int
    gpu: bool = True

    def __post_init__(self) -> None:
        self.opened: dict[int, Any] = {}  # parts that stay

    def __reduce__(self) -> Any:  # another process opens its own parts
        return Index, (self.folder, self.nprobe, self.budget, self.gpu)

    @cached_property
    def facts(self) -> dict[str, Any]:
        return read_facts(self.folder / "index.json")

    @cached_property
    def labels(self) -> np.ndarray:
        """Return the label of every row [rows] int32, memory-mapped."""
        path = self.folder / LABELS
        if not path.exists():
            raise self.damaged(path)
        if path.stat().st_size != 4 * self.facts["keys"]:
            raise self.damaged(path, "cut off")
        return np.memmap(path, dtype="<i4", mode="r")

    def damaged(self, path: Path, how: str = "damaged or missing") -> MemdecError:
        return MemdecError(f"{path} is {how}: delete the folder {self.folder} and build again.")

    @cached_property
    def resources(self) -> Any:
        return faiss.StandardGpuResources()

    @cached_property
    def on_gpu(self) -> bool:
        return self.gpu and not no_gpu()

    @cached_property
    def without_gpu(self) -> "Index":
        return replace(self, gpu=False)

    def on_cpu(self, k: int) -> str:
        """Return why a search for k neighbours is done on CPUs, "" if a GPU does it."""
        lists = self.nprobe if "IVF" in self.facts["kind"] else 1
        if why := no_gpu():
            return why
        return f"a GPU finds at most {GPU_LARGEST_K}" if max(k, lists) > GPU_LARGEST_K else ""

    @cached_property
    def trained(self) -> Any:
        """Return the index without keys, None if it is flat; its lists are those of parts."""
        path = self.folder / TRAINED
        if "IVF" not in self.facts["kind"]:
            return None
        old = self.folder / "index-00000.faiss"  # an earlier release wrote it into every part
        if not path.exists() and old.exists():
            path = old
        index = self._read(path, lambda p: faiss.read_index(p, SKIP_TABLES))
        ivf = inverted(index)
        ivf.nprobe = min(self.nprobe, ivf.nlist)
        ivf.parallel_mode = OVER_QUERIES
        graph = faiss.downcast_index(ivf.quantizer)
        if isinstance(graph, faiss.IndexHNSW):
            graph.hnsw.efSearch = max(GRAPH_SEARCH, 2 * ivf.nprobe)
        if isinstance(ivf, faiss.IndexIVFPQ) and not self.on_gpu:
            ivf.use_precomputed_table = 1 if table_bytes(ivf.nlist, ivf.pq.M, ivf.d) else -1
            ivf.precompute_table()
        return index

    @cached_property
    def coarse(self) -> Any:
        """Return what finds the lists near a query."""
        if not self.on_gpu:
            return inverted(self.trained).quantizer
        flat = faiss.IndexFlatL2(inverted(self.trained).d)
        flat.add(inverted(self.trained).quantizer.reconstruct_n(0, inverted(self.trained).nlist))
        return to_gpu(flat, self.resources)

    @cached_property
    def sizes(self) -> list[int]:
        """Return the bytes of every part."""
        paths = [part_path(self.folder, n) for n in part_numbers(self.facts)]
        return [path.stat().st_size if path.exists() else 0 for path in paths]

    @property
    def fits(self) -> bool:
        """Tell whether all parts stay open, on a machine without a GPU."""
        return sum(self.sizes) <= self.budget // PARTS_SHARE

    @cached_property
    def passes(self) -> list[list[int]]:
        """Return the parts that are open at once, those that stay open first."""
        room = share = self.budget // PARTS_SHARE
        if self.on_gpu:
            room = int(torch.cuda.mem_get_info()[0] * GPU_PARTS)
            share = max(self.sizes)
            room -= share if sum(self.sizes) > room else 0
        groups: list[list[int]] = [[]]
        filled = 0
        for part, size in enumerate(self.sizes):
            if filled + size > (room if len(groups) == 1 else share):
                groups.append([])
                filled = 0
            groups[-1].append(part)
            filled += size
        return groups

    def group_rows(self, k: int) -> int:
        """Return how many queries the budget allows to search together for k neighbours each."""
        return group_rows(self.facts["width"], k, self.nprobe, self.budget, self.on_gpu)

    def rows_at_once(self, k: int) -> int:
        """Return how many queries the budget allows to search at once."""
        results = max(map(len, self.passes)) + 2  # each part's, those before, and the merged
        return max(1, self.budget // BLOCK_SHARE // (12 * k * results))

    def _read(self, path: Path, read: Any) -> Any:
        """Return what faiss reads from a file; MemdecError only if the file is damaged."""
        try:
            with open(path, "rb"):  # faiss has one kind of error for all that may be wrong
                pass
            return read(str(path))
        except (FileNotFoundError, RuntimeError) as error:
            reraise(error, path)
            raise self.damaged(path) from error

    def _open(self, part: int) -> Any:
        """Return a part: an index, or one whose inverted lists are lent to the trained one."""
        path = part_path(self.folder, part_numbers(self.facts)[part])
        flags = 0 if self.on_gpu else faiss.IO_FLAG_MMAP
        if self.trained is None:
            index = self._read(path, lambda p: faiss.read_index(p, flags))
            return to_gpu(index, self.resources) if self.on_gpu else index
        if (self.folder / TRAINED).exists():
            held = self._read(path, lambda p: read_lists(p, flags))
        else:
            held = self._read(path, lambda p: faiss.read_index(p, flags | SKIP_TABLES))
        lists = inverted(held).invlists
        taken = lists.compute_ntotal() * (lists.code_size + 8)
        if path.stat().st_size < taken:  # a mapped file does not tell
            raise self.damaged(path)
        if not self.on_gpu:
            return held
        self._lend(lists)
        there = to_gpu(self.trained, self.resources)
        self._lend(None)
        return held if there is self.trained else there  # the same where the GPU is full

    def _lend(self, lists: Any) -> None:
        """Let the trained index have the inverted lists of a part, or none."""
        ivf = inverted(self.trained)
        empty = lists is None
        lists = faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size) if empty else lists
        ivf.replace_invlists(lists, empty)
        if empty:
            lists.this.disown()
        ivf.ntotal = self.trained.ntotal = lists.compute_ntotal()

    def _block(self, queries: np.ndarray) -> Block:
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if self.trained is None:
            return Block(queries, None, None)
        queries = transformed(self.trained, queries)
        distances, lists = self.coarse.search(queries, inverted(self.trained).nprobe)
        return Block(queries, lists, distances)

    def _search(self, held: Any, block: Block, k: int, out: dict[str, np.ndarray]) -> None:
        """Put what one part finds into D and I [rows, k]."""
        if block.lists is None:
            held.search(block.queries, k, **out)
            return
        if (ivf := inverted(held)) is not None:  # the part is in RAM
            self._lend(ivf.invlists)
            ivf = inverted(self.trained)
        else:
            index: Any = faiss.downcast_index(held)  # a GPU's class, which the stubs lack
            if hasattr(index, "chain"):
                index = faiss.downcast_index(index.index)
            ivf = index
            ivf.nprobe = block.lists.shape[1]
        ivf.search_preassigned(block.queries, k, block.lists, block.list_distances, **out)

    def _add(self, parts: dict[int, Any], block: Block, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Merge what some parts find into the nearest of the parts before them; return those."""
        before = block.nearest
        shape = (len(parts) + (before is not None), len(block.queries), k)
        distances, ids = np.empty(shape, np.float32), np.empty(shape, np.int64)
        if before is not None:
            distances[0], ids[0] = before
        for n, (part, held) in enumerate(parts.items(), int(before is not None)):
            self._search(held, block, k, {"D": distances[n], "I": ids[n]})
            if self.counted_by_part:
                ids[n][ids[n] >= 0] += self.facts["first_rows"][part]
        # Equal distances come from the part that comes first: as one index would have them.
        merged = (
            (distances[0], ids[0]) if len(ids) == 1 else faiss.merge_knn_results(distances, ids)
        )
        merged[0][merged[1] < 0] = np.inf
        by_row(*merged)
        block.nearest = merged
        return merged

    @cached_property
    def counted_by_part(self) -> bool:
        """Tell whether every part counts its rows from 0, as those without lists do."""
        return not (self.folder / TRAINED).exists()

    def search_all(
        self, batches: Iterable[np.ndarray], k: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield search() of each batch in turn; parts that do not stay open are read once."""
        if self.on_gpu and self.on_cpu(k):
            yield from self.without_gpu.search_all(batches, k)
            return
        first, *others = self.passes
        for part in first:
            if part not in self.opened:
                self.opened[part] = self._open(part)
        blocks = map(self._block, batches)
        if not others:
            for block in blocks:
                yield self._add(self.opened, block, k)
            return
        held: dict[int, Block] = {}
        for block in blocks:
            if first:
                self._add(self.opened, block, k)
            held[len(held)] = block
        for parts in others:
            opened = {part: self._open(part) for part in parts}
            for n in list(held):
                nearest = self._add(opened, held[n], k)
                if parts is others[-1]:
                    del held[n]
                    yield nearest
            if not self.on_gpu and self.trained is not None:
                self._lend(None)
            del opened

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (squared distances, row ids), both [rows, k], nearest first; -1 where none.

        Of equal distances the lower row comes first.
        """
        return next(self.search_all([queries], k))


def read_lists(path: str, flags: int) -> Any:
    """Return the inverted lists of a file, in an index without centroids that owns them."""
    file = faiss.FileIOReader(path)
    lists = faiss.read_InvertedLists(file, flags)
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(1), 1, lists.nlist)
    index.code_size = lists.code_size
    index.replace_invlists(lists, True)
    return index


def by_row(distances: np.ndarray, ids: np.ndarray) -> None:
    """Put equally near neighbours, both [rows, k], into the order of their ids, in place."""
    wrong = (distances[:, 1:] == distances[:, :-1]) & (ids[:, 1:] < ids[:, :-1]) & (ids[:, 1:] >= 0)
    rows = np.flatnonzero(wrong.any(axis=1))
    if len(rows):
        order = np.lexsort((ids[rows], distances[rows]), axis=1)
        distances[rows] = np.take_along_axis(distances[rows], order, axis=1)
        ids[rows] = np.take_along_axis(ids[rows], order, axis=1)
