"""Which documents of a corpus are held out for validation: by their text, not by their place."""

import hashlib

import numpy as np

LARGEST_SHARE = 3  # times the fraction to hold out that one long document may make of it


def digest(text: str) -> int:
    """Return 64 bits of a text's SHA-256: the same in every process, so no seed decides a split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def split_lengths(
    lengths: np.ndarray,
    texts: np.ndarray,
    groups: np.ndarray,
    fraction: float,
    block_tokens: int,
) -> np.ndarray:
    """Return how many tokens of each document are trained on; the rest of it is held out.

    Groups of documents are held out whole, those with the lowest digests until they are enough: so
    neither the order of documents nor a period in it decides, and equal texts are on one side.
    Where groups are too few or too long for that, the tail of the text is held out. A text that
    occurs several times is on one side, or cut at the same place each time.
    """
    total = int(lengths.sum())
    enough = max(block_tokens + 1, fraction * total)
    max_tokens = min(LARGEST_SHARE * fraction, 0.6) * total
    ids, group = np.unique(groups, return_inverse=True)  # ascending digests
    sizes = np.bincount(group, lengths, minlength=len(ids))
    candidates = np.flatnonzero(sizes <= max_tokens / 2)  # a long one must not take the corpus away
    # The index of the candidate with which it is enough.
    last = int(np.searchsorted(np.cumsum(sizes[candidates]), enough))
    held_out = np.isin(group, candidates[: last + 1])
    held_out |= np.isin(texts, texts[held_out])  # texts that are in two groups
    if last < len(candidates) and lengths[held_out].sum() <= max_tokens:
        return np.where(held_out, 0, lengths)
    # Copies of a text are cut where its first one is, so that no text is on both sides.
    _, first_ones, text = np.unique(texts, return_index=True, return_inverse=True)
    own = np.zeros(len(lengths), lengths.dtype)
    own[first_ones] = lengths[first_ones]
    cut = int(own.sum()) - max(block_tokens + 1, int(own.sum() * fraction))
    taken = np.clip(cut - (np.cumsum(own) - own), 0, lengths)[first_ones][text]
    # One token alone predicts nothing: it goes with the rest of its document.
    return np.where(taken > 1, taken, 0)


def split_as_before(
    lengths: np.ndarray, texts: np.ndarray, train: np.ndarray, held_out: np.ndarray, fraction: float
) -> np.ndarray:
    """Return what split_lengths() does, for a corpus that changes one whose split is known.

    train, held_out: digest and tokens of the documents before, [documents, 2] uint64. What was on
    one side stays there: a memory has learnt it, or has not. Others are held out up to the highest
    digest that was, where digests decided it, but one at least is trained on.
    """
    whole = held_out[~np.isin(held_out[:, 0], train[:, 0]), 0]
    highest = whole.max(initial=0)
    if not len(whole) or (train[:, 0] < highest).any():  # the tail of the text was held out
        highest = np.uint64(fraction * 2**64)
    short = lengths <= min(LARGEST_SHARE * fraction, 0.6) * lengths.sum() / 2
    known = np.isin(texts, np.r_[train[:, 0], held_out[:, 0]])
    low = ~known & short & (texts <= highest)
    new = ~known & (lengths > 1)
    if new.any() and not (new & ~low).any():
        low &= texts != texts[new].max()
    out = low | (np.isin(texts, held_out[:, 0]) & ~np.isin(texts, train[:, 0]))
    taken = np.where(out, 0, lengths)
    for digest_of, tokens in train[np.isin(train[:, 0], held_out[:, 0])].tolist():  # that are cut
        taken[texts == digest_of] = tokens
    return taken
