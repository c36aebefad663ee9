"""What of a corpus stays in one that updates it: documents, their blocks, and the rows of those.

A document that is gone leaves a hole in its blocks: documents there do not see each other, so the
keys of the others stay what they are, and nothing of them is computed again. A hole is filled as
the end of a corpus is, with one-token documents; a block that is all hole is dropped. New
documents follow in blocks of their own.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vllm_memdec.train.data.blocks import load_texts, valid_rows
from vllm_memdec.train.data.completeness import BLOCKS, n_shards
from vllm_memdec.train.data.shards import Shards, load_array, load_shard, save_array

ROWS = "kept-rows.npy"  # whether each row of the corpus before stays [rows] bool
BLOCKS_KEPT = "kept-blocks.npy"  # the blocks of the corpus before that come first, int64
Blocks = tuple[np.ndarray, ...]  # tokens, positions and documents, each [blocks, T+1]


def compare(old: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which old documents stay, and which new ones are not among them, by their digests.

    Of several copies as many stay as there are now.
    """
    return copies_before(old) < count_in(old, new), copies_before(new) >= count_in(new, old)


def copies_before(digests: np.ndarray) -> np.ndarray:
    """Return how many documents before each one have the same digest."""
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    counts = np.empty(len(digests), np.int64)
    counts[order] = np.arange(len(digests)) - np.searchsorted(ordered, ordered)
    return counts


def count_in(digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return how often each digest occurs among others."""
    others = np.sort(others)
    return np.searchsorted(others, digests, "right") - np.searchsorted(others, digests)


class KeptBlocks:
    """The blocks of a corpus with holes where documents are gone; afterwards, what was kept."""

    def __init__(self, old: Path, stays: np.ndarray, filler: int) -> None:
        """stays: of each training document of the old corpus; filler: the token of a hole."""
        self.old, self.filler = old, filler
        # The last entry is of -1, which is no document.
        self.number = np.r_[np.where(stays, np.cumsum(stays) - 1, -1), -1].astype(np.int32)
        self.rows: list[np.ndarray] = [np.zeros(0, bool)]
        self.blocks: list[np.ndarray] = [np.zeros(0, np.int64)]

    def __iter__(self) -> Iterator[Blocks]:
        first = 0
        for shard in range(n_shards(self.old)):
            tokens, positions, owner = (
                load_shard(self.old, f"{kind}-train", shard) for kind in BLOCKS
            )
            number = self.number[owner]
            hole = number < 0
            self.rows.append(~hole[:, 1:][valid_rows(positions)])
            kept = ~hole.all(axis=1)
            self.blocks.append(first + np.flatnonzero(kept))
            first += len(tokens)
            holed = np.where(hole, self.filler, tokens), np.where(hole, 0, positions), number
            yield tuple(array[kept] for array in holed)

    def save(self, work: Path) -> None:
        """Write which rows and blocks were kept, once all are read."""
        save_array(work / ROWS, np.concatenate(self.rows))
        save_array(work / BLOCKS_KEPT, np.concatenate(self.blocks))


def gone_fragments(old: Path, new: Path) -> Iterator[np.ndarray]:
    """Yield the parts of documents that are gone, of each block in turn, as marked documents.

    Their rows are the rows of the old corpus that were not kept, in order.
    """
    rows, first = load_array(new / ROWS), 0
    for shard in range(n_shards(old)):
        tokens, positions, owner = (load_shard(old, f"{kind}-train", shard) for kind in BLOCKS)
        valid = valid_rows(positions)
        gone = np.zeros(owner.shape, bool)
        gone[:, 1:][valid] = ~np.asarray(rows[first : first + int(valid.sum())])
        first += int(valid.sum())
        documents = np.unique(owner[gone])
        marked = np.where(positions < 0, ~tokens, tokens)
        for block in np.flatnonzero(gone.any(axis=1)).tolist():
            cuts = np.flatnonzero(np.diff(owner[block])) + 1
            for part, whose in zip(
                np.split(marked[block], cuts), np.split(owner[block], cuts), strict=True
            ):
                if len(part) > 1 and whose[0] in documents:
                    yield part


def resharded(parts: Iterator[Blocks], each: int) -> Iterator[Blocks]:
    """Yield blocks so many at once, fewer at the end, of parts of any size."""
    held: list[Blocks] = []
    count = 0
    for part in parts:
        held.append(part)
        count += len(part[0])
        while count >= each:
            whole = tuple(np.concatenate(arrays) for arrays in zip(*held, strict=True))
            yield tuple(array[:each] for array in whole)
            held, count = [tuple(array[each:] for array in whole)], count - each
    if count:
        yield tuple(np.concatenate(arrays) for arrays in zip(*held, strict=True))


class KeptRows:
    """The rows of an old stage's shards that a new corpus keeps, or those that it does not."""

    def __init__(self, old: Path, corpus: Path, kept: bool = True) -> None:
        """old: the folder of a stage with a file labels-N.npy for each shard of rows."""
        self.old, self.rows, self.kept = old, load_array(corpus / ROWS), kept
        self.starts = Shards(old, "labels").starts
        counts = [int((self.rows[a:b] == kept).sum()) for a, b in zip(*self._bounds(), strict=True)]
        self.ends = np.r_[0, np.cumsum(counts)].astype(np.int64)

    def _bounds(self) -> tuple[list[int], list[int]]:
        return self.starts[:-1].tolist(), self.starts[1:].tolist()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, name: str, first: int, stop: int) -> np.ndarray:
        """Return the rows from `first` to `stop` of those that are meant, of NAME-N.npy."""
        parts = []
        for shard, (start, end) in enumerate(zip(*self._bounds(), strict=True)):
            before, after = self.ends[shard : shard + 2].tolist()
            if before < stop and after > first:
                chosen = np.flatnonzero(self.rows[start:end] == self.kept)
                wanted = chosen[max(first - before, 0) : stop - before]
                parts.append(load_shard(self.old, name, shard)[wanted])
        return np.concatenate(parts) if parts else load_shard(self.old, name, 0)[:0]


def known_texts(corpus: Path) -> bool:
    """Tell whether a corpus knows its documents: one of an earlier release does not."""
    return (corpus / "texts-train.npy").exists() and len(load_texts(corpus, "train")) > 0
