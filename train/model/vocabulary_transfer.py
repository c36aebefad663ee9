"""Give a model another vocabulary: the trunk stays, embedding and head are made anew.

Token ids of two tokenizers have nothing in common, the text they stand for has. So a row of the
new vocabulary starts from rows of the old one (arXiv 2508.09874 re-initialises both matrices; that
trains a memory for a second family of bases in a tenth of the budget):

    row'[t] = row[s]                        if the old vocabulary has a token s of the same text
    row'[t] = mean of row[s] over the       otherwise: the old tokenizer's pieces of that text
              pieces s of t
    row'[t] = mean of row[s] over all s     if it has none: other special tokens, rows of padding

Special tokens go by their role, then by their name. Tokenizers spell text in three ways, byte-level
BPE ("Ġdog"), SentencePiece ("▁dog", "<0x0A>") and WordPiece ("dog", "##s"); they are compared as
bytes, where a token that begins a word begins with a space.
Shape suffixes: V, W rows of the old and the new vocabulary, D hidden.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import torch

from vllm_memdec.checkpoint import tokenizer_vocabulary
from vllm_memdec.errors import MemdecError

ROLES = ("eos", "bos", "unk", "pad")  # the first that a token has counts
# Texts to put before a piece of text, so that a tokenizer takes it for the middle of a text. The
# first is used whose own tokens stay the same with the piece behind it.
ANCHORS = ("\n", "a", ",", "0")
BYTE = re.compile("<0x([0-9A-F]{2})>")
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
# Of byte-level BPE: printable bytes are their own character, the others follow from U+0100 on.
BYTE_ALPHABET = {chr(b): bytes([b]) for b in PRINTABLE} | {
    chr(256 + i): bytes([b]) for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)
}


@dataclass(frozen=True)
class Transfer:
    """From which rows of the old vocabulary each row of the new one is made."""

    sources: list[list[int]]  # [W] old rows, of which the mean is taken; none: of all of `known`
    known: list[int]  # old rows that are tokens: not padding
    shared: int  # rows copied from a token of the same text or role
    averaged: int  # rows made from the pieces of their text

    def apply(self, matrix_VD: torch.Tensor) -> torch.Tensor:
        """Return the new vocabulary's rows [W, D]."""
        known_D = matrix_VD[self.known].mean(0)
        flat = torch.tensor([i for rows in self.sources for i in rows], dtype=torch.long)
        lengths = torch.tensor([len(rows) for rows in self.sources])
        starts = lengths.cumsum(0) - lengths
        new_WD = torch.nn.functional.embedding_bag(flat, matrix_VD, starts, mode="mean")
        new_WD[lengths == 0] = known_D
        return new_WD

    def __str__(self) -> str:
        rest = len(self.sources) - self.shared - self.averaged
        return (
            f"{self.shared:,} rows copied, {self.averaged:,} averaged over the pieces of their "
            f"text, {rest:,} without text set to the mean"
        )


def spelling(tokenizer: Any) -> str:
    """Return how a tokenizer spells text: bytes, metaspace or wordpiece; MemdecError if none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    part = backend and (backend.decoder or backend.pre_tokenizer)
    if part:
        part_json = json.dumps(json.loads(part.__getstate__()), ensure_ascii=False)
        marks = {'"ByteLevel"': "bytes", '"WordPiece"': "wordpiece", "▁": "metaspace"}
        for mark, name in marks.items():
            if mark in part_json:
                return name
    raise MemdecError(
        f"the tokenizer of {tokenizer.name_or_path} is neither byte-level BPE nor SentencePiece "
        "nor WordPiece with a tokenizer.json, so the text of a token is not known: give another."
    )


def texts(tokenizer: Any) -> dict[int, bytes]:
    """Return the bytes that each token stands for, without special ones; byte fallbacks come last.

    A partial character is bytes like any other.
    """
    kind = spelling(tokenizer)
    learned, added = tokenizer_vocabulary(tokenizer)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    text_of = {i: token.encode() for token, i in added.items() if i not in special}
    fallbacks = {}
    for token, i in sorted(learned.items(), key=lambda item: item[1]):
        if kind == "bytes":
            text_of[i] = b"".join(BYTE_ALPHABET.get(c, c.encode()) for c in token)
        elif kind == "metaspace":
            if byte := BYTE.fullmatch(token):
                fallbacks[i] = bytes([int(byte[1], 16)])
            else:
                text_of[i] = token.replace("▁", " ").encode()
        elif token.startswith("##") and token != "##":
            text_of[i] = token[2:].encode()
        else:  # punctuation needs no space before it
            text_of[i] = (" " if token[:1].isalnum() else "").encode() + token.encode()
    return text_of | fallbacks


def roles(old: Any, new: Any) -> dict[int, int]:
    """Return new id -> old id of special tokens with the same role, or else the same name."""
    old_added, new_added = (tokenizer_vocabulary(tokenizer)[1] for tokenizer in (old, new))
    old_of = {i: old_added[name] for name, i in new_added.items() if name in old_added}
    for role in reversed(ROLES):
        ids = [getattr(tokenizer, f"{role}_token_id") for tokenizer in (new, old)]
        if None not in ids:
            old_of[ids[0]] = ids[1]
    return old_of


def tokenise_inside(tokenizer: Any, pieces: list[str]) -> list[list[int]]:
    """Return the token ids of each piece of text as it stands in the middle of a text."""
    ids_of: list[list[int]] = [[] for _ in pieces]
    pending = list(range(len(pieces)))
    for anchor in (*ANCHORS, ""):
        if not pending:
            break
        batch = [anchor] + [anchor + pieces[i] for i in pending]
        before, *ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        left = []
        for i, row in zip(pending, ids, strict=True):
            # A tokenizer that drops the anchor would take the piece for the start of a text.
            if anchor == "" or (before and len(row) > len(before) and row[: len(before)] == before):
                ids_of[i] = row[len(before) :]
            else:
                left.append(i)
        pending = left
    return ids_of


def split_bytes(text: bytes, table: dict[bytes, int]) -> list[int]:
    """Return the ids of the longest known tokens of some bytes, from left to right."""
    ids = []
    while text:
        length = next((n for n in range(len(text), 0, -1) if text[:n] in table), None)
        if length:
            ids.append(table[text[:length]])
        text = text[length or 1 :]
    return ids


def transfer(old: Any, new: Any, old_rows: int, new_rows: int) -> Transfer:
    """Return how [new_rows] rows of tokenizer `new` are made of [old_rows] rows of `old`."""
    table: dict[bytes, int] = {}
    for i, text in texts(old).items():
        if text and i < old_rows:
            table.setdefault(text, i)
    known = sorted(i for i in set(old.get_vocab().values()) if i < old_rows)
    sources: list[list[int]] = [[] for _ in range(new_rows)]
    whole: dict[int, str] = {}  # tokens of whole characters, left to the old tokenizer
    shared = averaged = 0
    for i, text in texts(new).items():
        if i >= new_rows:
            continue
        if text in table:
            sources[i] = [table[text]]
            shared += 1
            continue
        try:
            whole[i] = text.decode()
        except UnicodeDecodeError:
            sources[i] = split_bytes(text, table)
            averaged += bool(sources[i])
    pieces = tokenise_inside(old, list(whole.values()))
    for i, ids in zip(whole, pieces, strict=True):
        sources[i] = [piece for piece in ids if piece < old_rows and piece != old.unk_token_id]
        averaged += bool(sources[i])
    for i, j in roles(old, new).items():
        if i < new_rows and j < old_rows and not sources[i]:
            sources[i] = [j]
            shared += 1
    return Transfer(sources, known, shared, averaged)


@torch.no_grad()
def exchange(model: Any, old: Any, new: Any, rows: int) -> None:
    """Give a causal LM of tokenizer `old` the vocabulary of `new`, padded to `rows`."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    how = transfer(old, new, len(embedding.weight), rows)
    tied = head.weight is embedding.weight
    bias_V = getattr(head, "bias", None)
    embedding_WD = how.apply(embedding.weight)
    head_WD = embedding_WD if tied else how.apply(head.weight)
    bias_W = None if bias_V is None else how.apply(bias_V[:, None])[:, 0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.weight.copy_(embedding_WD)
    head.weight.copy_(head_WD)
    if bias_W is not None:
        head.bias.copy_(bias_W)
    # Of the old vocabulary: it would keep some other token's row from being trained.
    embedding.padding_idx = None
    for role in ("bos", "eos", "pad"):
        setattr(model.config, f"{role}_token_id", getattr(new, f"{role}_token_id"))
