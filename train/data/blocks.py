"""Token blocks: documents packed one after the other, and the files that hold them.

Blocks have T + 1 tokens, the last of which is the next block's first, so that every token is
predicted once. Positions restart at 0 with every document.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vllm_memdec.train.data.shards import Sharded, load_array

SPLITS = ("train", "validation")
TOKENIZER_BATCH = 256  # documents handed to the tokenizer at once
TOKENIZER_CHARACTERS = 2**22  # characters from which fewer documents are handed to it
PACKED_AT_ONCE = 1024  # token blocks made at once


def tokenise(
    tokenizer: Any, texts: Iterable[str], keep_empty: bool = False
) -> Iterator[np.ndarray]:
    """Yield each document's token ids, closed with the end-of-text token; empty ones are left out.

    Documents are handed to the tokenizer in groups of a bounded size. keep_empty: yield an array
    without tokens for a document in which the tokenizer finds none. What looks like a special token
    is text there like any other: a document about `<|im_end|>` does not end a turn.
    """
    # mistral_common never reads special tokens in text, and refuses the word.
    named = type(tokenizer).__name__ == "MistralCommonBackend"
    as_text: dict[str, Any] = {} if named else {"split_special_tokens": True}

    def flush(group: list[str]) -> Iterator[np.ndarray]:
        for ids in tokenizer(group, verbose=False, **as_text)["input_ids"] if group else []:
            if ids and ids[-1] == tokenizer.eos_token_id:
                ids = ids[:-1]
            if ids:  # a tokenizer may drop all of a text
                yield np.array([*ids, tokenizer.eos_token_id], dtype=np.int32)
            elif keep_empty:
                yield np.zeros(0, np.int32)

    group: list[str] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if len(group) == TOKENIZER_BATCH or characters >= TOKENIZER_CHARACTERS:
            yield from flush(group)
            group, characters = [], 0
    yield from flush(group)


def packed(
    documents: Iterable[np.ndarray], block_tokens: int, filler: int, at_once: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield tokens and positions, both [blocks, T+1] int32, of `at_once` blocks; fewer at the end.

    Neighbouring blocks share a token, across what is yielded at once too.
    """
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    held, begun = 0, False
    size = at_once * block_tokens

    def blocks(n: int) -> tuple[np.ndarray, np.ndarray]:
        """Cut n blocks off what is held, which keeps the token that the next one shares."""
        nonlocal tokens, positions, held
        stream, position = np.concatenate(tokens), np.concatenate(positions)
        tokens, positions = [stream[n * block_tokens :]], [position[n * block_tokens :]]
        held -= n * block_tokens
        index = np.arange(n)[:, None] * block_tokens + np.arange(block_tokens + 1)[None, :]
        t, p = stream[index], position[index]
        # A document that runs on from the block before restarts at 0: its context is not here.
        return t, p - np.where(np.minimum.accumulate(p, axis=1) > 0, p[:, :1], 0)

    for document in documents:
        tokens.append(np.array(document, dtype=np.int32))  # a copy: a view keeps its file open
        positions.append(np.arange(len(document), dtype=np.int32))
        held += len(document)
        while held > size:
            begun = True
            yield blocks(at_once)
    min_rows = 1 if held and not begun else 0  # a text of one token fills a block, too
    n_blocks = -(-max(held - 1, min_rows) // block_tokens)
    if n_blocks:
        padding = n_blocks * block_tokens + 1 - held
        tokens.append(np.full(padding, filler, dtype=np.int32))
        positions.append(np.zeros(padding, dtype=np.int32))
        held += padding
        yield blocks(n_blocks)


def pack(
    documents: Iterable[np.ndarray], block_tokens: int, filler: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and positions, both [blocks, T+1] int32, of documents packed in order."""
    tokens, positions = zip(*packed(documents, block_tokens, filler, PACKED_AT_ONCE), strict=True)
    return np.concatenate(tokens), np.concatenate(positions)


def valid_rows(positions: np.ndarray) -> np.ndarray:
    """Return a mask [blocks, T]: does (t, t+1) lie within one document?"""
    return positions[:, 1:] == positions[:, :-1] + 1


def load_blocks(corpus: Path, split: str) -> tuple[Sharded, Sharded]:
    """Return tokens and positions of a split, both [blocks, T+1] in shards."""
    facts = json.loads((corpus / "corpus.json").read_text())
    tokens, positions = (
        Sharded(corpus, f"{kind}-{split}", facts[split]["blocks"], facts["shard_blocks"])
        for kind in ("tokens", "positions")
    )
    return tokens, positions


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
