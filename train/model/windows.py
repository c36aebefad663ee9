"""Text as requests read it, and what a memory's weight should be by how much context there is.

A block of the corpus holds documents apart, so its contexts are as short as the documents. A server
also gets several texts in one prompt: passages, a few examples, turns of a chat. So text is read
twice here: each document by itself, and documents one after another in windows as long as what is
served, where a row's context is all that stands before it in the window. A base gains more from a
long context than a small memory does, so the best weight falls with the context.

Shape suffixes: B windows, T tokens of a window, N scored rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_memdec.train.data.blocks import (
    begun,
    load_blocks,
    pack,
    unmarked,
    unshared,
    valid_rows,
)
from vllm_memdec.train.model.scoring import best_alpha, label_logprobs, mix, perplexity
from vllm_memdec.train.progress import Progress

# Tokens of context at which the buckets of rows begin.
EDGES = (0, 64, 256, 512, *(2**n for n in range(10, 21)))
MIN_ROWS = 256  # rows that an alpha is tuned on, at least
# Tokens of a window where none are set: longer prompts are rare, and attention is quadratic.
MIN_WINDOW, MAX_WINDOW = 512, 4096
FILLED = 4  # windows that the text should fill
TOKENS_AT_ONCE = 2048  # tokens of a forward pass, which has one window at least
RUNS = 64  # stretches of a long validation text that are read, spread evenly


@dataclass(frozen=True)
class Windows:
    """Texts as requests: tokens and positions [B, T+1] int32, and which rows [B, T] are scored.

    A position counts the tokens before it in its request, and may be marked (see blocks.py). The
    first token of a document is not scored: nothing before it announces it.
    """

    tokens: np.ndarray
    positions: np.ndarray
    scored: np.ndarray

    @property
    def position_N(self) -> np.ndarray:
        """Return the position of the last token that each scored row has read."""
        return unmarked(self.positions[:, :-1][self.scored])

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: Any) -> "Windows":
        return Windows(self.tokens[part], self.positions[part], self.scored[part])


def alone(
    documents: Iterable[np.ndarray], width: int, filler: int, bos: int | None = None
) -> Windows:
    """Return documents each by itself, several short ones in a window that do not see each other.

    One that runs across the end of a window starts again at position 0. bos: what a tokenizer puts
    before every text.
    """
    tokens, positions = pack(documents, width, filler, bos)
    return Windows(tokens, positions, valid_rows(positions))


def joined(
    documents: Iterable[np.ndarray], width: int, filler: int, bos: int | None = None
) -> Windows:
    """Return documents shorter than a window one after another; a window starts with a document.

    The document that does not fit ends its window and starts the next one. A window that holds
    nothing but one document is left out: that is how alone() reads it. bos: what a tokenizer puts
    before every text, here before a window: in a request it stands nowhere else.
    """
    filled: list[list[np.ndarray]] = []
    window: list[np.ndarray] = []
    before = np.array([] if bos is None else [bos], np.int32)
    room = size = width + 1 - len(before)
    for document in documents:
        if len(document) >= width:
            continue
        document = begun(document, bos)[len(before) :]
        if room < len(document):
            window += [document[:room]] if room else []
            filled.append(window)
            window, room = [], size
        window.append(document)
        room -= len(document)
    filled = [parts for parts in [*filled, window] if len(parts) > 1]
    tokens = np.full((len(filled), width + 1), filler, np.int32)
    positions = np.zeros((len(filled), width + 1), np.int32)
    scored = np.zeros((len(filled), width), bool)
    for n, parts in enumerate(filled):
        parts = [before, *parts]
        stream = np.concatenate(parts)
        document = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        tokens[n, : len(stream)] = unmarked(stream)
        positions[n, : len(stream)] = np.arange(len(stream))
        scored[n, : len(stream) - 1] = (document[1:] == document[:-1]) & (stream[1:] >= 0)
    return Windows(tokens, positions, scored)


def spread(text: Windows, max_tokens: int) -> Windows:
    """Return windows of no more tokens, spread evenly."""
    max_windows = max(1, max_tokens // (text.tokens.shape[1] - 1))
    return text[np.linspace(0, len(text) - 1, min(max_windows, len(text))).astype(int)]


def readings(
    documents: list[np.ndarray],
    width: int,
    filler: int,
    max_tokens: int,
    bos: int | None = None,
) -> tuple[Windows, Windows]:
    """Return documents read alone and joined, see above, each of up to so many tokens."""
    each, together = (read(documents, width, filler, bos) for read in (alone, joined))
    return spread(each, max_tokens), spread(together, max_tokens)


def windows(
    documents: list[np.ndarray],
    width: int,
    filler: int,
    max_tokens: int,
    bos: int | None = None,
) -> Windows:
    """Return both readings as one, of up to so many tokens in all."""
    parts = readings(documents, width, filler, max_tokens // 2, bos)
    return Windows(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("tokens", "positions", "scored")
        )
    )


def window_logprobs(
    model: Any,
    text: Windows,
    progress: Progress | None = None,
    name: str = "",
    features_NF: torch.Tensor | None = None,
) -> np.ndarray:
    """Return log p(next token) [N] float64 of the scored rows; see label_logprobs()."""
    batch = max(1, TOKENS_AT_ONCE // (text.tokens.shape[1] - 1))
    rows = text.tokens, text.positions, batch, progress, name, features_NF, text.scored
    return label_logprobs(model, *rows)


def validation_documents(corpus: Path, max_tokens: int) -> list[np.ndarray]:
    """Return the validation documents of a corpus artifact, parts of it if there are more tokens.

    Blocks share a token with the next one, which begins there in any case; as the last of the block
    before it tells whether a document starts with it. What is not predicted is marked: ~id.
    """
    tokens, positions = load_blocks(corpus, "validation")
    T = tokens.shape[1] - 1
    max_blocks = max(1, max_tokens // T)
    if len(tokens) <= max_blocks:
        runs = [(0, len(tokens))]
    else:
        length = max(1, max_blocks // RUNS)
        starts = np.linspace(0, len(tokens) - length, max(1, max_blocks // length)).astype(int)
        runs = [(start, start + length) for start in starts.tolist()]
    documents = []
    for start, stop in runs:
        part, position = np.asarray(tokens[start:stop]), np.asarray(positions[start:stop])
        own = unshared(position)
        place = position[own]
        stream = np.where(place < 0, ~part[own], part[own])
        starts = np.flatnonzero(place[1:] == 0) + 1
        documents += [doc for doc in np.split(stream, starts) if len(doc) > 1]
    return documents


def window_tokens(given: int | None, tokens: int, configs: Iterable[Any]) -> int:
    """Return how many tokens a window has: as given, or the longest that the text can fill.

    The default is a power of two up to MAX_WINDOW, and short enough for a text of so many tokens to
    fill FILLED windows, though no shorter than MIN_WINDOW. Never more than a model has positions.
    """
    width = given
    if width is None:
        width = MIN_WINDOW
        while width < MAX_WINDOW and FILLED * 2 * width <= tokens:
            width *= 2
    for config in configs:
        width = min(width, getattr(config, "max_position_embeddings", None) or width)
    return width


def bucket_of(position_N: np.ndarray) -> np.ndarray:
    """Return the bucket [N] of each row: EDGES[bucket] <= position."""
    return np.searchsorted(EDGES, position_N, side="right") - 1


def alphas_by_context(
    position_N: np.ndarray, base_N: np.ndarray, memory_N: np.ndarray
) -> list[tuple[int, float]]:
    """Return (position, alpha) pairs: the best alpha from that position on, up to the next one's.

    A bucket with too few rows is tuned together with the next one; the last keeps the alpha before.
    """
    pairs: list[tuple[int, float]] = []
    bucket_N = bucket_of(position_N)
    start, rows = 0, np.zeros(len(position_N), bool)
    last = int(bucket_N.max())
    for bucket in range(last + 1):
        rows = rows | (bucket_N == bucket)
        if rows.sum() < MIN_ROWS and not (bucket == last and not pairs):
            continue
        pairs.append((start, best_alpha(base_N[rows], memory_N[rows])))
        start, rows = EDGES[bucket + 1], np.zeros(len(position_N), bool)
    return pairs


def alpha_at(table: Iterable[Sequence[float]], position_N: np.ndarray) -> np.ndarray:
    """Return the alpha [N] of each row by a table of alphas_by_context()."""
    starts, alphas = (np.array(column) for column in zip(*table, strict=True))
    return alphas[np.searchsorted(starts, position_N, side="right") - 1].astype(np.float64)


def by_context(
    position_N: np.ndarray,
    base_N: np.ndarray,
    memory_N: np.ndarray,
    mixed: dict[str, np.ndarray],
) -> list[dict[str, Any]]:
    """Return a row for each bucket of context: tokens, perplexities, the best alpha and its.

    mixed: log-probabilities [N] of what is compared with base and memory, by name.
    """
    bucket_N, rows = bucket_of(position_N), []
    systems = {"base": base_N, "memory": memory_N, **mixed}
    for bucket in np.unique(bucket_N).tolist():
        here = bucket_N == bucket
        alpha = best_alpha(base_N[here], memory_N[here])
        rows.append(
            {
                "from": EDGES[bucket],
                "to": EDGES[bucket + 1],
                "tokens": int(here.sum()),
                **{name: perplexity(logp_N[here]) for name, logp_N in systems.items()},
                "best_alpha": alpha,
                "best": perplexity(mix(base_N[here], memory_N[here], alpha)),
            }
        )
    return rows
