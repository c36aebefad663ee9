"""Where rows of the datastore come from: which document, what stands around, and in which file.

Blocks know the document of each token. Where in the user's files a document stood they do not, so
the corpus stage leaves that under `logs/`: names of files change nothing in a build, and what lies
there is in no hash. Without it documents only have numbers.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.artifacts import write_json
from vllm_memdec.train.data.blocks import load_blocks, load_rows, load_texts, unshared, valid_rows
from vllm_memdec.train.data.changes import known_texts
from vllm_memdec.train.data.files import format_of
from vllm_memdec.train.data.ownership import FILES, LOGS, PLACES, read_object
from vllm_memdec.train.data.shards import Sharded, load_array, save_array

WITHIN = re.compile(r", (line|row|byte) (\d+)")


def place_in_file(where: str, file: Path) -> int:
    """Return the line or row at which a document stands in a file, as a reader names it.

    ~byte where a line's number is not known, 0 in a file that is not of rows.
    """
    match = WITHIN.fullmatch(where.removeprefix(str(file)))
    if match is None:
        return 0
    return ~int(match[2]) if match[1] == "byte" else int(match[2])


def save_places(corpus: Path, names: list[str], where: np.ndarray, digests: np.ndarray) -> None:
    """Write the place of each training document, in the order in which blocks number them.

    where: number of the file and place in it [documents, 2], digests: of each document's text, in
    the order of the files, in which an update does not have them.
    """
    places = np.empty_like(where)
    numbered = load_texts(corpus, "train")[:, 0]
    # Of copies the first in the blocks is the first in the files.
    places[np.argsort(numbered, kind="stable")] = where[np.argsort(digests, kind="stable")]
    (corpus / LOGS).mkdir(exist_ok=True)
    write_json(corpus / LOGS / FILES, {"files": names})
    save_array(corpus / LOGS / PLACES, places)


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
        if not known_texts(corpus):
            raise MemdecError(
                f"{corpus} does not know its documents, an earlier release made it: build again, "
                "into another folder."
            )
        self.corpus = corpus
        self.tokens, self.positions = load_blocks(corpus, "train")
        shards = self.tokens.length, self.tokens.per_shard
        self.owners = Sharded(corpus, "documents-train", *shards)

    @cached_property
    def first_rows(self) -> np.ndarray:
        """Return the number of each block's first row, and of all rows [blocks+1]."""
        return np.r_[0, np.cumsum(load_rows(self.corpus, "train"), dtype=np.int64)]

    def labels(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (block, column) [N] of each row's label, a shard opened once for all."""
        block_N = np.searchsorted(self.first_rows, rows, side="right") - 1
        column_N = np.empty(len(rows), np.int64)
        for shard in np.unique(block_N // self.positions.per_shard).tolist():
            first, positions = shard * self.positions.per_shard, self.positions.shard(shard)
            order = np.flatnonzero(block_N // self.positions.per_shard == shard)
            order = order[np.argsort(block_N[order], kind="stable")]
            for here in np.split(order, np.flatnonzero(np.diff(block_N[order])) + 1):
                block = int(block_N[here[0]])
                columns = np.flatnonzero(valid_rows(positions[block - first][None])[0]) + 1
                column_N[here] = columns[rows[here] - self.first_rows[block]]
        return block_N, column_N

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of each row's document [N] in the training text, from 0."""
        block_N, column_N = self.labels(rows)
        number_N = np.empty(len(rows), np.int64)
        shard_N = block_N // self.owners.per_shard
        for shard in np.unique(shard_N).tolist():
            here = shard_N == shard
            place = block_N[here] - shard * self.owners.per_shard, column_N[here]
            number_N[here] = self.owners.shard(shard)[place]
        return number_N

    def passage(self, row: int, before: int, after: int) -> Passage:
        """Return the label of a row with up to so many tokens of its document on either side."""
        [block], [column] = (each.tolist() for each in self.labels(np.array([row])))
        width = self.tokens.shape[1] - 2  # of a block, without what may be repeated
        low = max(0, block - before // width - 2)
        high = min(len(self.tokens), block + after // width + 3)
        tokens, positions, owner = (
            part[low:high] for part in (self.tokens, self.positions, self.owners)
        )
        mine = unshared(positions, low == 0) & (owner == owner[block - low, column])
        at = int(mine[: block - low].sum() + mine[block - low, :column].sum())
        ids = tokens[mine]
        first, last = max(0, at - before), min(len(ids), at + after + 1)
        # More of the document than is shown was looked at, if there is more.
        return Passage(ids[first:last].tolist(), at - first, first == 0, last == len(ids))

    @cached_property
    def files(self) -> list[str] | None:
        """Return the files of the text, if they were kept."""
        known = read_object(self.corpus / LOGS / FILES)
        return None if known is None else known["files"]

    def name(self, document: int) -> str | None:
        """Return the file of a document, and its line or row there; None if that was not kept."""
        if self.files is None:
            return None
        file, place = load_array(self.corpus / LOGS / PLACES)[document].tolist()
        name = self.files[file]
        if not place:
            return name
        if place < 0:
            return f"{name}, byte {~place}"
        return f"{name}, {'line' if format_of(Path(name)) == '.jsonl' else 'row'} {place}"
