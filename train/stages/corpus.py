"""Corpus stage: documents -> fixed-length token blocks, in shards.

Documents are tokenised, closed with the end-of-text token and packed one after another into
blocks of T+1 tokens; neighbouring blocks share one token, so that every token but a document's
first is predicted once. Beside each token stands its position within its document (and block):
positions restart at 0 where a document starts, which is also what keeps documents from seeing
each other in training. A pair (token, next token) counts iff the position rises by one and is not
marked (see blocks.py); the last block is filled with one-token documents, which hold no such pair.

Pieces of the text are tokenised side by side; one pass over the tokens then packs them, so that a
block's content does not depend on how the text was divided.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data import completeness
from vllm_memdec.train.data.artifacts import write_json
from vllm_memdec.train.data.blocks import (
    SPLITS,
    bos_of,
    load_texts,
    tokenise,
    unmarked,
)
from vllm_memdec.train.data.completeness import check_there, numbered
from vllm_memdec.train.data.documents import canonical, fields_of, pieces, read_rows
from vllm_memdec.train.data.duplicates import overlap, stored_documents
from vllm_memdec.train.data.places import place_in_file, save_places
from vllm_memdec.train.data.readers import Fields, Piece
from vllm_memdec.train.data.shards import (
    load_shard,
    save_array,
    save_parts,
    shard_path,
    unfinished,
)
from vllm_memdec.train.data.splits import digest, split_as_before, split_lengths
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model.huggingface import (
    check_positions,
    load_text_config,
    load_tokenizer,
)
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import CorpusSettings
from vllm_memdec.train.stages.packing import in_blocks, listing, write_blocks, write_changed
from vllm_memdec.train.stages.stage import OTHERS, Build, Stage

TOKENISED = ("tokens", "texts", "groups", "places", "lengths")  # arrays of a piece
LAYOUT = "layout.json"  # the pieces by file, size of the file, and place in it
PIECES = "pieces"  # the folder of tokenised text, not yet packed, in the working folder


@dataclass
class Tokeniser:
    """Writes tokens, and each document's length, digests and place, of one piece of text."""

    base: str
    pieces: list[Piece]
    fields: Fields  # a field may group the rows that are held out together
    work: Path

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base)

    def __call__(self, number: int) -> int:
        digests: list[tuple[int, int]] = []  # of each document
        lengths: list[int] = []
        places: list[int] = []
        piece = self.pieces[number]

        def texts() -> Iterator[str]:
            for text, value, where in read_rows(piece, self.fields):
                places.append(place_in_file(where, piece.path))
                own, grouped = digest(text), self.fields.group is not None
                digests.append((own, digest(canonical(value)) if grouped else own))
                yield text

        def documents() -> Iterator[np.ndarray]:
            for document in tokenise(self.tokenizer, texts(), keep_empty=True):
                lengths.append(len(document))
                yield document

        save_parts(shard_path(self.work, "tokens", number), documents(), np.int32)
        kept = np.array(lengths, np.int64) > 0
        of_text, of_group = np.array(digests, np.uint64).reshape(-1, 2)[kept].T
        save_array(shard_path(self.work, "texts", number), of_text)
        save_array(shard_path(self.work, "groups", number), of_group)
        save_array(shard_path(self.work, "places", number), np.array(places, np.int64)[kept])
        save_array(shard_path(self.work, "lengths", number), np.array(lengths, np.int64)[kept])
        return 1


def build_corpus(
    settings: CorpusSettings,
    base: str,
    corpus: Path,
    validation: Path | None,
    work: Path,
    context: Context,
    old: Path | None = None,
) -> None:
    """Write tokens-SPLIT, positions-SPLIT and documents-SPLIT in shards, [blocks, T+1] int32.

    Beside them rows-SPLIT.npy, the valid rows of each block, used-SPLIT.npy, the tokens that occur,
    texts-SPLIT.npy, digest and tokens of each document, and corpus.json. Without a validation path
    documents are held out by a digest of their text, or of the field that settings.group names; a
    corpus of too few documents gives its last blocks. old: a corpus whose blocks stay where their
    documents do, see changes.py; what was held out of it is held out again.
    """
    from vllm_memdec.checkpoint import tokenizer_fingerprint

    if (work / "corpus.json").exists():  # killed just before the end
        shutil.rmtree(work / PIECES, ignore_errors=True)
        return
    tokenizer = load_tokenizer(base)
    if tokenizer.eos_token_id is None:
        raise MemdecError(
            f"the tokenizer of {base} has no end-of-text token: set eos_token "
            "in its tokenizer_config.json."
        )
    config = load_text_config(base)
    check_positions(config, base, settings.block_tokens)
    texts = [corpus] if validation is None else [corpus, validation]
    fields = fields_of(settings, validation)
    tokenised = tokenise_pieces(base, texts, fields, work / PIECES, context)
    train, held_out = tokenised[0], tokenised[-1]
    lengths = np.concatenate([part.copy() for part in train.lengths()])  # maps would stay open
    if not len(lengths):
        raise MemdecError(f"the tokenizer of {base} finds no token in {corpus}: give other text.")
    highest = max(text.highest() for text in tokenised)
    if highest >= config.vocab_size:
        raise MemdecError(
            f"{base} has {config.vocab_size} vocabulary rows, but its tokenizer gives token "
            f"{highest}: give a model that belongs to this tokenizer."
        )
    if validation is None and lengths.sum() < 2 * (settings.block_tokens + 1):
        raise MemdecError(
            f"{corpus} has {lengths.sum()} tokens, less than one block of {settings.block_tokens} "
            "to train on and one to hold out: give more text or lower corpus.block_tokens."
        )
    digests = train.digests("texts")
    if old is not None and not np.isin(load_texts(old, "train")[:, 0], digests).any():
        raise MemdecError(
            f"no document of {old.parent} is in {corpus} any more: build afresh, without --update."
        )
    if validation is None:
        taken = (
            split_lengths(
                lengths,
                digests,
                train.digests("groups"),
                settings.validation_fraction,
                settings.block_tokens,
            )
            if old is None
            else split_as_before(
                lengths,
                digests,
                load_texts(old, "train"),
                load_texts(old, "validation"),
                settings.validation_fraction,
            )
        )
        if old is not None and (lengths - taken).sum() < settings.block_tokens + 1:
            raise MemdecError(
                f"of what {old.parent} held out too little is left to tune alpha on: build afresh, "
                "without --update."
            )
        if not taken.any():
            raise MemdecError(
                f"{corpus} repeats itself: without its copies it is too short to train on and to "
                f"hold out {settings.block_tokens} tokens: give more text, or --validation."
            )
        if settings.group is not None and ((taken > 0) & (taken < lengths)).any():
            raise MemdecError(
                f"too few values of corpus.group ({settings.group}) to hold out a block of "
                f"{settings.block_tokens} tokens by them: give --validation, or leave it out."
            )
        documents = {
            "train": train.parts(taken, first=True),
            "validation": train.parts(taken, first=False),
        }
        texts_of = {"train": (digests, taken), "validation": (digests, lengths - taken)}
    else:
        taken = lengths
        documents = {"train": train.documents(), "validation": held_out.documents()}
        others = np.concatenate([part.copy() for part in held_out.lengths()])
        texts_of = {
            "train": (digests, lengths),
            "validation": (held_out.digests("texts"), others),
        }
    counts: dict[str, Any] = {
        "block_tokens": settings.block_tokens,
        "shard_blocks": settings.shard_blocks,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }
    ends = tokenizer.eos_token_id, bos_of(tokenizer)
    for name in SPLITS:
        listed = listing(*texts_of[name])
        how = settings, ends, name, work, context.progress
        if old is not None and name == "train":
            counts |= write_changed(documents[name], listed, *how, old)
        else:
            counts[name] = write_blocks(in_blocks(documents[name], settings, ends), listed, *how)
    if validation is not None:
        equal = np.isin(held_out.digests("texts"), train.digests("texts"))
        counts["validation"]["equal_documents"] = int(equal.sum())
        if equal.all():
            raise MemdecError(
                f"every document of {validation} is in {corpus}, which the memory learns by heart: "
                "give --validation text that it does not see, or leave it out."
            )
        if equal.any():
            context.progress.say(
                f"corpus: {equal.sum():,} of {len(equal):,} validation documents "
                f"({equal.mean():.0%}) are in the corpus word for word: the memory looks better on "
                "them than it is"
            )
    train.save_places(corpus, taken > 0, work)
    write_json(work / "corpus.json", counts)
    say_near_copies(work, context.progress)
    shutil.rmtree(work / PIECES)


def say_near_copies(corpus: Path, progress: Progress) -> None:
    """Say how many held-out documents are nearly the same as one that is trained on."""
    with progress.task("corpus: comparing the splits", 1, "passes") as advance:
        leak = overlap(stored_documents(corpus, "train"), stored_documents(corpus, "validation"))
        advance(1)
    if leak.near:
        progress.say(
            f"corpus: {leak.near:,} of {leak.compared:,} held-out documents compared "
            f"({leak.near / leak.compared:.0%}) have a near copy in the training text, and alpha "
            "comes out too high: remove near copies, or keep what belongs together on one side "
            "with corpus.group"
        )


@dataclass(frozen=True)
class Tokenised:
    """The tokenised pieces of a text, read one after the other."""

    folder: Path
    numbers: range
    files: list[Path]  # the file of each piece

    def lengths(self) -> Iterator[np.ndarray]:
        """Yield the lengths of each piece's documents."""
        for number in self.numbers:
            yield load_shard(self.folder, "lengths", number)

    def digests(self, of: str) -> np.ndarray:
        """Return a digest [documents] uint64 of each document's "texts" or "groups"."""
        parts = (load_shard(self.folder, of, number) for number in self.numbers)
        return np.concatenate([part.copy() for part in parts])  # maps would stay open

    def documents(self) -> Iterator[np.ndarray]:
        """Yield every document's tokens."""
        for number, lengths in zip(self.numbers, self.lengths(), strict=True):
            tokens = load_shard(self.folder, "tokens", number)
            ends = np.cumsum(lengths)
            for end, length in zip(ends, lengths, strict=True):
                yield tokens[end - length : end]

    def highest(self) -> int:
        """Return the highest token id."""
        tokens = (load_shard(self.folder, "tokens", number) for number in self.numbers)
        return max((int(unmarked(t).max(initial=0)) for t in tokens), default=0)

    def parts(self, taken: np.ndarray, first: bool) -> Iterator[np.ndarray]:
        """Yield the first `taken` tokens of each document, or the rest, where there are any."""
        for document, n in zip(self.documents(), taken, strict=True):
            part = document[:n] if first else document[n:]
            if len(part):
                yield part

    def save_places(self, text: Path, chosen: np.ndarray, work: Path) -> None:
        """Write where the chosen documents, a mask, stood in the files of the text."""
        names = list(dict.fromkeys(os.path.relpath(file, text.parent) for file in self.files))
        numbers = {name: number for number, name in enumerate(names)}
        of_piece = [numbers[os.path.relpath(file, text.parent)] for file in self.files]
        file = np.repeat(of_piece, [len(part) for part in self.lengths()])
        places = np.concatenate(
            [load_shard(self.folder, "places", number).copy() for number in self.numbers]
        )
        where = np.stack([file, places], axis=1)[chosen]
        save_places(work, names, where, self.digests("texts")[chosen])


def tokenise_pieces(
    base: str,
    texts: list[Path],
    fields: Fields,
    folder: Path,
    context: Context,
) -> list[Tokenised]:
    """Tokenise some texts piece by piece into a folder."""
    parts: list[Piece] = []
    layout: list[list[Any]] = []
    tokenised: list[Tokenised] = []
    for text in texts:
        first = len(parts)
        parts += pieces(text)
        layout += [
            [os.path.relpath(part.path, text), part.path.stat().st_size, part.start, part.stop]
            for part in parts[first:]
        ]
        files = [part.path for part in parts[first:]]
        tokenised.append(Tokenised(folder, range(first, len(parts)), files))
    # Pieces are known by their numbers, and the same text may have been cut into other files.
    if folder.exists() and read_layout(folder) != layout:
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    write_json(folder / LAYOUT, layout)
    todo = unfinished(folder, TOKENISED, len(parts))
    with context.progress.task("corpus: tokenising", len(parts), "pieces") as advance:
        advance(len(parts) - len(todo), done_before=True)
        for done in context.executor.map(Tokeniser(base, parts, fields, folder), todo):
            advance(done)
    check_there(folder, numbered(TOKENISED, len(parts)), os.listdir(folder))
    return tokenised


def read_layout(folder: Path) -> list[list[Any]] | None:
    """Return which pieces a folder holds, None if it does not say so."""
    path = folder / LAYOUT
    return json.loads(path.read_text()) if path.exists() else None


def stage(build: Build) -> Stage:
    """Return how the corpus is made."""
    settings = build.settings.corpus.model_dump()
    del settings["text_field"]  # decides nothing but the text, whose hash is an input
    if settings["loss_on"] == "all":
        del settings["loss_on"]  # as it was before this setting
    if build.validation is not None:
        settings["validation_fraction"] = settings["group"] = None  # nothing is held out
    if (bos := bos_of(load_tokenizer(build.base))) is not None:
        settings["bos"] = bos  # blocks of a build before this setting lack it

    def make(work: Path) -> None:
        text = build.corpus, build.validation
        old = None if build.old is None else build.old["corpus"].path
        build_corpus(build.settings.corpus, build.base, *text, work, build.context, old)

    remedy = f"{OTHERS}, or give --ray-address none, which takes one worker,"
    return Stage(settings, (), make, completeness.corpus_files, remedy)
