"""Where rows of the datastore come from: which document, what stands around, and in which file.

Which tokens are of one document is in the blocks themselves: positions restart at 0. Where in the
user's files a document stood is not, so the corpus stage leaves it under `logs/`: names of files
change nothing in a build, and what lies there is in no hash. A build of an earlier release has
none of it, and its documents only have numbers.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vllm_memdec.train.data.artifacts import write_json
from vllm_memdec.train.data.blocks import load_blocks, load_rows, unshared, valid_rows
from vllm_memdec.train.data.files import format_of
from vllm_memdec.train.data.ownership import FILES, LOGS, PLACES, read_object
from vllm_memdec.train.data.shards import load_array, save_parts

WITHIN = re.compile(r", (line|row|byte) (\d+)")


def place_in_file(where: str, file: Path) -> int:
    """Return the line or row at which a document stands in a file, as a reader names it.

    ~byte where a line's number is not known, 0 in a file that is not of rows.
    """
    match = WITHIN.fullmatch(where.removeprefix(str(file)))
    if match is None:
        return 0
    return ~int(match[2]) if match[1] == "byte" else int(match[2])


def save_places(corpus: Path, files: list[tuple[str, int]], places: Iterable[np.ndarray]) -> None:
    """Write the files of a training text, with how many documents each has, and their places."""
    (corpus / LOGS).mkdir(exist_ok=True)
    write_json(corpus / LOGS / FILES, {"files": files})
    save_parts(corpus / LOGS / PLACES, places, np.int64)


@dataclass(frozen=True)
class Passage:
    """Some tokens of a document in a row."""

    ids: list[int]
    at: int  # which of them is the row's label
    begins: bool  # whether the document begins with them
    ends: bool


class Places:
    """The places of a corpus's training rows."""

    def __init__(self, corpus: Path) -> None:
        self.corpus = corpus
        self.tokens, self.positions = load_blocks(corpus, "train")

    @cached_property
    def first_rows(self) -> np.ndarray:
        """Return the number of each block's first row, and of all rows [blocks+1]."""
        return np.r_[0, np.cumsum(load_rows(self.corpus, "train"), dtype=np.int64)]

    @cached_property
    def first_documents(self) -> np.ndarray:
        """Return how many documents begin before each block [blocks], a shard read at a time."""
        counts = [
            np.count_nonzero(self._begins(shard, number == 0), axis=1)
            for number in range(self.positions.n_shards)
            for shard in (self.positions.shard(number),)
        ]
        return np.r_[0, np.cumsum(np.concatenate(counts), dtype=np.int64)][:-1]

    @staticmethod
    def _begins(positions: np.ndarray, first: bool) -> np.ndarray:
        """Return a mask [blocks, T+1] of the tokens with which a document begins, each once."""
        return (positions == 0) & unshared(positions, first)

    def _by_block(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
        """Yield (which of the rows, their block, its positions), a shard opened once for all."""
        block_N = np.searchsorted(self.first_rows, rows, side="right") - 1
        order = np.argsort(block_N, kind="stable")
        per_shard, opened = self.positions.per_shard, (-1, np.zeros(0))
        for here in np.split(order, np.flatnonzero(np.diff(block_N[order])) + 1):
            number, local = divmod(int(block_N[here[0]]), per_shard)
            if opened[0] != number:
                opened = number, self.positions.shard(number)
            yield here, number * per_shard + local, opened[1][local]

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (block, column) [N] of the token that each row has before its label."""
        block_N, column_N = np.empty((2, len(rows)), np.int64)
        for here, block, position in self._by_block(rows):
            block_N[here] = block
            columns = np.flatnonzero(valid_rows(position[None])[0])
            column_N[here] = columns[rows[here] - self.first_rows[block]]
        return block_N, column_N

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of each row's document [N] in the training text, from 0."""
        number_N = np.empty(len(rows), np.int64)
        for here, block, position in self._by_block(rows):
            columns = np.flatnonzero(valid_rows(position[None])[0])
            begun = np.cumsum(self._begins(position[None], block == 0)[0])
            column = columns[rows[here] - self.first_rows[block]]
            number_N[here] = self.first_documents[block] - 1 + begun[column]
        return number_N

    def passage(self, row: int, before: int, after: int) -> Passage:
        """Return the label of a row with up to so many tokens of its document on either side."""
        [block], [column] = self.places(np.array([row]))
        width = self.tokens.shape[1] - 2  # of a block, without what may be repeated
        low = max(0, block - before // width - 1)
        high = min(len(self.tokens), block + after // width + 2)
        tokens, positions = self.tokens[low:high], self.positions[low:high]
        own = unshared(positions, low == 0)
        at = int(np.count_nonzero(own.ravel()[: (block - low) * own.shape[1] + column + 1]))
        stream, starts = tokens[own], np.flatnonzero(positions[own] == 0)
        start = starts[: np.searchsorted(starts, at, side="right")].max(initial=0)
        stop = starts[starts > at].min(initial=len(stream))
        first, last = max(start, at - before), min(stop, at + after + 1)
        ends = bool(first == start), bool(last == stop)
        return Passage(stream[first:last].tolist(), int(at - first), *ends)

    @cached_property
    def files(self) -> tuple[list[str], np.ndarray] | None:
        """Return the files of the text and where the documents of each end, if that was kept."""
        known = read_object(self.corpus / LOGS / FILES)
        if known is None:
            return None
        names, counts = zip(*known["files"], strict=True)
        return list(names), np.cumsum(counts)

    def name(self, document: int) -> str | None:
        """Return the file of a document, and its line or row there; None if that was not kept."""
        if self.files is None:
            return None
        names, ends = self.files
        name = names[int(np.searchsorted(ends, document, side="right"))]
        place = int(load_array(self.corpus / LOGS / PLACES)[document])
        if not place:
            return name
        if place < 0:
            return f"{name}, byte {~place}"
        return f"{name}, {'line' if format_of(Path(name)) == '.jsonl' else 'row'} {place}"
