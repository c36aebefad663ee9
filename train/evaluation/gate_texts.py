"""The text that gates are trained on: documents of each kind, passages of several kinds in turn.

A fifth of the documents is kept for the report, by a digest of their text, before anything else is
made of them.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.blocks import tokenise, unmarked
from vllm_memdec.train.data.documents import documents
from vllm_memdec.train.data.readers import TEXT, Fields
from vllm_memdec.train.data.splits import digest

READ_TOKENS = 2**22  # tokens read of each file: the rest is never scored
KEPT = 5  # one document in so many is kept for the report
MIN_PIECE = 32  # tokens of a piece into which a text of few documents is divided, at least
MIN_TOKENS = KEPT * (MIN_PIECE + 1)  # tokens of a text, at least
# Documents that mix kinds: tokens of a passage, from and to, and passages of a document.
PASSAGE, SWITCHES = (16, 128), 4


def passages(texts: list[Any], min_length: int, max_length: int, seed: int = 0) -> list[Any]:
    """Return texts cut into passages of min_length to max_length tokens, drawn at random."""
    rng = random.Random(seed)
    cut = []
    for ids in texts:
        start = 0
        while len(ids) - start >= min_length:
            length = rng.randint(min_length, max_length)
            cut.append(ids[start : start + length])
            start += length
    return cut


def in_turn(*kinds: list[Any], seed: int = 0) -> list[np.ndarray]:
    """Return documents of SWITCHES passages, of several kinds in turn, each passage used once.

    Of more than two kinds the order is drawn anew in each turn, so that each follows on each.
    """
    rng = random.Random(seed)
    drawn = [rng.sample(kind, len(kind)) for kind in kinds]
    turns = [
        ids
        for turn in zip(*drawn, strict=False)
        for ids in (turn if len(turn) == 2 else rng.sample(turn, len(turn)))
    ]
    whole = range(0, len(turns) - SWITCHES + 1, SWITCHES)
    return [np.concatenate(turns[n : n + SWITCHES]) for n in whole]


@dataclass(frozen=True)
class Document:
    """A tokenised text and the digest by which it is known in whatever text it turns up."""

    digest: int
    ids: np.ndarray


def read_texts(tokenizer: Any, path: Path, fields: Fields = TEXT) -> list[Document]:
    """Return the texts of a file tokenised; in pieces, where they are too few to be divided."""
    read, digests, count = [], [], 0

    def noted() -> Iterator[str]:
        for text in documents(path, fields):
            digests.append(digest(text))
            yield text

    for n, ids in enumerate(tokenise(tokenizer, noted(), keep_empty=True)):
        if len(ids):
            read.append(Document(digests[n], ids))
            count += len(ids)
            if count > READ_TOKENS:
                break
    if len(read) >= 4 * KEPT:
        return read
    length = max(MIN_PIECE, sum(len(d.ids) for d in read) // (8 * KEPT))
    return [
        Document(digest(part.tobytes().hex()), part)
        for document in read
        for part in np.split(document.ids, range(length, len(document.ids), length))
    ]


def check_amounts(read: dict[str, list[Document]]) -> int:
    """Return the tokens of the smallest text, or raise MemdecError if that is too few."""
    counts = {kind: sum(len(d.ids) for d in texts) for kind, texts in read.items()}
    for kind, count in counts.items():
        if count < MIN_TOKENS:
            raise MemdecError(
                f"the {kind} text has {count} tokens: give more of it, some thousands if you can."
            )
    return min(counts.values())


def divide(
    texts: dict[str, list[Document]],
    bos: int | None = None,
    mixed: Sequence[str] = ("domain", "general"),
) -> tuple[dict[str, list[np.ndarray]], dict[str, list[np.ndarray]]]:
    """Return the documents of each kind that the gate is trained on, and those that are kept.

    Of each kind those with the lowest digests are kept, until they are one token in KEPT; what one
    kind keeps no other kind trains on. The kind "in turn" is made of the parts of those that are
    mixed, each of its own side, without the BOS that documents begin with.
    """
    kept: set[int] = set()
    for of_kind in texts.values():
        left = sum(len(d.ids) for d in of_kind) / KEPT
        for document in sorted(of_kind, key=lambda d: d.digest):
            if left <= 0 and document.digest not in kept:
                break
            kept.add(document.digest)
            left -= len(document.ids)
    trained, reported = (
        {
            kind: [d.ids for d in of_kind if (d.digest in kept) == side]
            for kind, of_kind in texts.items()
        }
        for side in (False, True)
    )
    for kind, ids in trained.items():
        if not ids:
            raise MemdecError(
                f"all of the {kind} text is kept for the report: give more documents."
            )
    for side in (trained, reported):
        parts = (
            passages([ids[int(unmarked(ids[:1])[0] == bos) :] for ids in side[kind]], *PASSAGE)
            for kind in mixed
        )
        stream = in_turn(*parts)
        if stream:  # less is no reason to refuse what is enough of each
            side["in turn"] = stream
    if "in turn" not in trained:
        reported.pop("in turn", None)
    return trained, reported
