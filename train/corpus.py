"""Corpus stage: documents -> fixed-length token blocks.

Documents are tokenised, closed with the end-of-text token and packed one after another into
blocks of T+1 tokens; neighbouring blocks share one token, so that every token but a document's
first is predicted once. Beside each token stands its position within its document (and block):
positions restart at 0 where a document starts, which is also what keeps documents from seeing
each other in training. A pair (token, next token) counts iff the position rises by one; the last
block is filled with one-token documents, which hold no such pair.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vllm_memdec.train.artifacts import write_json
from vllm_memdec.train.config import CorpusSettings
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.text import corpus_files, read_documents

SPLITS = ("train", "validation")
TOKENIZER_BATCH = 256  # documents handed to the tokenizer at once,
TOKENIZER_CHARACTERS = 2**22  # or fewer, if they are long
LARGEST_SHARE = 3  # of the fraction to hold out, taken by documents that are longer than others


def load_tokenizer(folder: str) -> Any:
    """Return the tokenizer of a model folder, or raise ValueError in one sentence."""
    from transformers import AutoTokenizer

    from vllm_memdec.checkpoint import tokenizer_vocabulary

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        usable = bool(tokenizer_vocabulary(tokenizer)[0])  # some classes start empty without files
    except (OSError, ValueError, KeyError):
        usable = False
    if not usable:
        raise ValueError(f"{folder} has no readable tokenizer: copy its tokenizer files there.")
    return tokenizer


def load_config(folder: str) -> Any:
    """Return the Hugging Face config of a model folder, or raise ValueError in one sentence."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        what = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"{folder} has no usable config.json: {what}.") from None
    if not all(hasattr(config, name) for name in ("vocab_size", "num_hidden_layers")):
        raise ValueError(f"{folder} is {config.model_type}, no text decoder: give another model.")
    return config


def check_positions(config: Any, folder: str, block_tokens: int) -> None:
    """Raise ValueError unless a model has positions for a block."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < block_tokens:
        raise ValueError(
            f"{folder} has {positions} positions: lower corpus.block_tokens from {block_tokens}."
        )


def build_corpus(
    settings: CorpusSettings,
    base: str,
    corpus: Path,
    validation: Path | None,
    work: Path,
    progress: Progress,
) -> None:
    """Write tokens-SPLIT.i32 and positions-SPLIT.i32, each [blocks, T+1] int32, and corpus.json.

    Without a validation path every n-th document is held out; a corpus of too few documents
    gives its last blocks instead.
    """
    from vllm_memdec.checkpoint import tokenizer_fingerprint

    tokenizer = load_tokenizer(base)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {base} has no end-of-text token: set eos_token "
            "in its tokenizer_config.json."
        )
    config = load_config(base)
    check_positions(config, base, settings.block_tokens)
    documents = tokenise(tokenizer, corpus)
    if not documents:
        raise ValueError(f"the tokenizer of {base} finds no token in {corpus}: give other text.")
    if validation is not None:
        splits = {"train": documents, "validation": tokenise(tokenizer, validation)}
    else:
        splits = split_documents(documents, settings.validation_fraction, settings.block_tokens)
    highest = max(int(document.max()) for name in SPLITS for document in splits[name])
    if highest >= config.vocab_size:
        raise ValueError(
            f"{base} has {config.vocab_size} vocabulary rows, but its tokenizer gives token "
            f"{highest}: give a model that belongs to this tokenizer."
        )
    counts: dict[str, Any] = {}
    for name in SPLITS:
        n_tokens = sum(len(document) for document in splits[name])
        if n_tokens < settings.block_tokens + 1:
            raise ValueError(
                f"the {name} text has {n_tokens} tokens, less than one block of "
                f"{settings.block_tokens}: give more text or lower corpus.block_tokens."
            )
        tokens, positions = pack(splits[name], settings.block_tokens, tokenizer.eos_token_id)
        tokens.tofile(work / f"tokens-{name}.i32")
        positions.tofile(work / f"positions-{name}.i32")
        counts[name] = {
            "blocks": len(tokens),
            "tokens": n_tokens,
            "documents": len(splits[name]),
            "rows": int(valid_rows(positions).sum()),
        }
        progress.say(f"corpus: {n_tokens:,} tokens of {name} text in {len(tokens):,} blocks")
    counts["block_tokens"] = settings.block_tokens
    counts["tokenizer_fingerprint"] = tokenizer_fingerprint(tokenizer)
    write_json(work / "corpus.json", counts)


def tokenise(tokenizer: Any, path: Path) -> list[np.ndarray]:
    """Return each non-empty document's token ids, closed with the end-of-text token."""
    documents: list[np.ndarray] = []

    def flush(texts: list[str]) -> None:
        for ids in tokenizer(texts, verbose=False)["input_ids"] if texts else []:
            if ids and ids[-1] == tokenizer.eos_token_id:
                ids = ids[:-1]
            if ids:  # a tokenizer may drop all of a text
                documents.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.int32))

    texts: list[str] = []
    characters = 0
    for file in corpus_files(path)[0]:
        for text in read_documents(file):
            texts.append(text)
            characters += len(text)
            if len(texts) == TOKENIZER_BATCH or characters >= TOKENIZER_CHARACTERS:
                flush(texts)
                texts, characters = [], 0
    flush(texts)
    return documents


def split_documents(
    documents: list[np.ndarray], fraction: float, block_tokens: int
) -> dict[str, list[np.ndarray]]:
    """Hold out every n-th document, or the tail of the text if documents are too few or long."""
    every = max(2, round(1 / fraction))
    held_out = documents[every - 1 :: every]
    # A few long documents among them must not take the corpus away.
    most = min(LARGEST_SHARE * fraction, 0.6) * sum(len(d) for d in documents)
    if block_tokens < sum(len(d) for d in held_out) <= most:
        kept = [d for i, d in enumerate(documents) if i % every != every - 1]
        return {"train": kept, "validation": held_out}
    stream = np.concatenate(documents)
    cut = len(stream) - max(block_tokens + 1, int(len(stream) * fraction))
    train, taken = [], 0
    validation = []
    for document in documents:
        here = min(max(cut - taken, 0), len(document))
        if here > 1:  # one token alone predicts nothing
            train.append(document[:here])
        if here < len(document):
            validation.append(document[here:])
        taken += len(document)
    return {"train": train, "validation": validation}


def pack(
    documents: Iterable[np.ndarray], block_tokens: int, filler: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and positions, both [blocks, T+1] int32, of documents packed in order."""
    documents = list(documents)
    stream = np.concatenate(documents)
    position = np.concatenate([np.arange(len(d), dtype=np.int32) for d in documents])
    n_blocks = -(-max(len(stream) - 1, 1) // block_tokens)
    padding = n_blocks * block_tokens + 1 - len(stream)
    stream = np.concatenate([stream, np.full(padding, filler, dtype=np.int32)])
    position = np.concatenate([position, np.zeros(padding, dtype=np.int32)])
    index = np.arange(n_blocks)[:, None] * block_tokens + np.arange(block_tokens + 1)[None, :]
    tokens, positions = stream[index], position[index]
    # A document that runs on from the block before restarts at 0: its context is not here.
    carried = np.where(np.minimum.accumulate(positions, axis=1) > 0, positions[:, :1], 0)
    return tokens, positions - carried


def valid_rows(positions: np.ndarray) -> np.ndarray:
    """Return a mask [blocks, T]: does (t, t+1) lie within one document?"""
    return positions[:, 1:] == positions[:, :-1] + 1


def load_blocks(corpus: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and positions of a split, both [blocks, T+1], memory-mapped."""
    width = json.loads((corpus / "corpus.json").read_text())["block_tokens"] + 1
    tokens, positions = (
        np.memmap(corpus / f"{kind}-{split}.i32", dtype=np.int32, mode="r").reshape(-1, width)
        for kind in ("tokens", "positions")
    )
    return tokens, positions
