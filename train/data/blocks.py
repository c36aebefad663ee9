"""Token blocks: documents packed one after the other, and the files that hold them.

Blocks have T + 1 tokens, the last of which is the next block's first, so that every token is
predicted once. Positions restart at 0 with every document. Where a tokenizer puts a token before
every text (BOS), a block that continues a document has it before the token that it shares: so a
base reads it as it reads any request.

Beside them stands the number of each token's document, and of each document a digest of its text.

A token that is not predicted is marked: a document has ~id in its place, a block ~position. So a
block that continues a document begins with BOS at ~0, the shared token at ~1.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vllm_memdec.train.data.chat import Chat, Renderer
from vllm_memdec.train.data.shards import Sharded, load_array

SPLITS = ("train", "validation")
TOKENIZER_BATCH = 256  # documents handed to the tokenizer at once
TOKENIZER_CHARACTERS = 2**22  # characters from which fewer documents are handed to it
PACKED_AT_ONCE = 1024  # token blocks made at once


def bos_of(tokenizer: Any) -> int | None:
    """Return the token that a tokenizer puts before every text, None if there is none."""
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None


def unmarked(array: np.ndarray) -> np.ndarray:
    """Return token ids of a document, or positions of blocks, whether predicted or not."""
    return np.where(array < 0, ~array, array)


def begun(document: np.ndarray, bos: int | None) -> np.ndarray:
    """Return a document that begins with BOS; in a part of one nothing announces what follows."""
    if bos is None or unmarked(document[:1]).tolist() in ([], [bos]):
        return document
    return np.r_[np.int32(bos), ~unmarked(document[:1]), document[1:]]


def tokenise(
    tokenizer: Any, texts: Iterable[str], keep_empty: bool = False
) -> Iterator[np.ndarray]:
    """Yield each document's token ids, closed with the end-of-text token; empty ones are left out.

    Documents are handed to the tokenizer in groups of a bounded size. keep_empty: yield an array
    without tokens for a document in which the tokenizer finds none. What looks like a special token
    is text there like any other: a document about `<|im_end|>` does not end a turn. A chat ends as
    its template ends it.
    """
    bos = bos_of(tokenizer)

    def flush(group: list[str]) -> Iterator[np.ndarray]:
        as_text = {"verbose": False, "split_special_tokens": True}
        for ids in tokenizer(group, **as_text)["input_ids"] if group else []:
            if ids and ids[-1] == tokenizer.eos_token_id:
                ids = ids[:-1]
            if ids and ids != [bos]:  # a tokenizer may drop all of a text
                yield np.array([*ids, tokenizer.eos_token_id], dtype=np.int32)
            elif keep_empty:
                yield np.zeros(0, np.int32)

    group: list[str] = []
    characters, render = 0, None
    for text in texts:
        if isinstance(text, Chat):
            yield from flush(group)
            group, characters, render = [], 0, render or Renderer(tokenizer)
            if len(ids := render(text)) or keep_empty:
                yield ids
            continue
        group.append(text)
        characters += len(text)
        if len(group) == TOKENIZER_BATCH or characters >= TOKENIZER_CHARACTERS:
            yield from flush(group)
            group, characters = [], 0
    yield from flush(group)


def packed(
    documents: Iterable[np.ndarray],
    block_tokens: int,
    filler: int,
    at_once: int,
    bos: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield tokens and positions, both [blocks, T+1] int32, of `at_once` blocks; fewer at the end.

    Neighbouring blocks share a token, across what is yielded at once too. bos: what every document
    begins with, and every block.
    """
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    held, any_cut = 0, False

    def blocks(n: float) -> tuple[np.ndarray, np.ndarray]:
        """Cut n blocks off what is held, or all, which keeps the token that the next one shares."""
        nonlocal tokens, positions, held, any_cut
        stream, position = np.concatenate(tokens), np.concatenate(positions)
        starts = [0]
        # A text of one token fills a block, too.
        while len(starts) <= n and (starts[-1] < held - 1 or not (any_cut or starts[1:])):
            repeated = bos is not None and position[starts[-1]] != 0
            starts.append(starts[-1] + block_tokens - repeated)
        missing = max(0, starts[-1] + 1 - held)
        stream = np.r_[stream, np.full(missing, filler, np.int32)]
        position = np.r_[position, np.zeros(missing, np.int32)]
        tokens, positions = [stream[starts[-1] :]], [position[starts[-1] :]]
        held, any_cut = len(tokens[0]), True
        start_B1 = np.array(starts[:-1])[:, None]
        continues_B1 = position[start_B1] != 0
        column = np.arange(block_tokens + 1, dtype=np.int32)
        index = start_B1 + column - (continues_B1 if bos is not None else 0)
        t, p = stream[index], position[index]
        # A document that runs on from the block before restarts at 0: its context is not here.
        p[:, :1] = continues_B1
        runs_on = np.logical_and.accumulate(p != 0, axis=1)
        p = np.where(runs_on, np.where(p < 0, ~column, column), p)
        if bos is not None:
            t[continues_B1[:, 0], 0] = bos
            p[continues_B1[:, 0], :2] = ~0, ~1
        return t, p

    for document in documents:
        document = begun(document, bos)
        tokens.append(np.array(unmarked(document), dtype=np.int32))
        place = np.arange(len(document), dtype=np.int32)
        place[1:] ^= document[1:] >> 31
        positions.append(place)
        held += len(document)
        while held > at_once * block_tokens:
            yield blocks(at_once)
    if held > 1 or (held and not any_cut):
        yield blocks(np.inf)


def pack(
    documents: Iterable[np.ndarray], block_tokens: int, filler: int, bos: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and positions, both [blocks, T+1] int32, of documents packed in order."""
    parts = packed(documents, block_tokens, filler, PACKED_AT_ONCE, bos)
    tokens, positions = zip(*parts, strict=True)
    return np.concatenate(tokens), np.concatenate(positions)


class Owners:
    """Documents on their way into blocks, and then which of them each token of a block is of."""

    def __init__(self, documents: Iterable[np.ndarray], bos: int | None) -> None:
        self.documents, self.bos = documents, bos
        self.ends: list[int] = []  # of the documents from `first` on, in the stream of their tokens
        self.first = self.read = self.placed = 0
        self.last = -1

    def __iter__(self) -> Iterator[np.ndarray]:
        for document in self.documents:
            self.read += len(begun(document, self.bos))
            self.ends.append(self.read)
            yield document

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the number of each token's document [blocks, T+1] int32, of the next blocks.

        -1 stands for what fills the last block.
        """
        own = unshared(positions, self.placed == 0)
        place = np.arange(self.placed, self.placed + own.sum())
        passed = np.searchsorted(np.array(self.ends, np.int64), place, side="right")
        owner = np.empty(positions.shape, np.int32)
        owner[own] = np.where(passed < len(self.ends), self.first + passed, -1)
        before = np.r_[np.int32(self.last), owner[:-1, -1]]  # whose last token is shared
        for column in (0, 1):
            owner[:, column] = np.where(own[:, column], owner[:, column], before)
        self.placed, self.last = self.placed + len(place), int(owner[-1, -1])
        done = min(int(passed[-1]), len(self.ends) - 1)  # the last document is asked for again
        self.first, self.ends = self.first + done, self.ends[done:]
        return owner


def valid_rows(positions: np.ndarray) -> np.ndarray:
    """Return a mask [blocks, T]: does (t, t+1) lie within one document, and is t+1 predicted?"""
    return positions[:, 1:] == unmarked(positions[:, :-1]) + 1


def unshared(positions: np.ndarray, first: bool = True) -> np.ndarray:
    """Return a mask [blocks, T+1] of the tokens that the block before does not have.

    first: whether none is before the first of these, which has all of its own but a repeated BOS.
    """
    repeats = positions[:, 0] < 0
    own = np.ones(positions.shape, bool)
    own[:, 0], own[:, 1] = False, ~repeats
    if first:
        own[0, :2] = ~repeats[0], True
    return own


def load_blocks(corpus: Path, split: str) -> tuple[Sharded, Sharded]:
    """Return tokens and positions of a split, both [blocks, T+1] in shards."""
    facts = json.loads((corpus / "corpus.json").read_text())
    tokens, positions = (
        Sharded(corpus, f"{kind}-{split}", facts[split]["blocks"], facts["shard_blocks"])
        for kind in ("tokens", "positions")
    )
    return tokens, positions


def load_texts(corpus: Path, split: str) -> np.ndarray:
    """Return digest and number of tokens of each document of a split [documents, 2] uint64."""
    return load_array(corpus / f"texts-{split}.npy")


def load_rows(corpus: Path, split: str) -> np.ndarray:
    """Return how many valid rows each block of a split has [blocks] int32."""
    return load_array(corpus / f"rows-{split}.npy")


def load_used(corpus: Path, split: str) -> np.ndarray:
    """Return the tokens that occur in the blocks of a split, ascending int32."""
    return load_array(corpus / f"used-{split}.npy")


def shard_rows(corpus: Path) -> np.ndarray:
    """Return where each training shard's rows start, and where the last ones end [shards+1]."""
    per_shard = json.loads((corpus / "corpus.json").read_text())["shard_blocks"]
    rows = load_rows(corpus, "train")
    counts = np.add.reduceat(rows, np.arange(0, len(rows), per_shard), dtype=np.int64)
    return np.r_[0, np.cumsum(counts)]
