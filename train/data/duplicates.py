"""How much of the held-out text was trained on as well: documents equal to one, or near to one.

A held-out document is near to a training document that has half of its shingles: runs of eight
tokens, of which a quarter is looked at, chosen by hash. On token arrays that is some lines of
numpy; libraries for MinHash hash each shingle in Python, which costs more than the tokenising.
Shingles that many held-out documents have (a licence, a header) are left out: they are of no
document, and each would be compared with each.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_memdec.train.data.blocks import load_blocks, unshared

SHINGLE = 8  # tokens
KEPT = 4  # of so many shingles one is looked at
MAX_OWNERS = 16  # held-out documents that may have a shingle that is compared
MIN_SHINGLES = 4  # shingles of a document that can be judged
NEAR = 0.5  # share of its shingles that one training document has
SAMPLE = 512  # held-out documents that are compared, at most
MAX_TOKENS = 2**14  # tokens that are compared of one, at most
AT_ONCE = 2**17  # tokens of training documents compared at once
SLICE = 512  # blocks read at once
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Overlap:
    """What held-out documents have in common with training documents."""

    documents: int  # held out
    equal: int  # of them, those that are trained on word for word
    compared: int  # of them, those looked at for near copies, each text once
    near: int  # of those, the ones with a near copy and none that is equal


def stored_documents(corpus: Path, split: str) -> Iterator[np.ndarray]:
    """Yield the documents of a split as its blocks have them, those of one token left out."""
    tokens, positions = load_blocks(corpus, split)
    rest = np.array(tokens[0][:0])
    for start in range(0, len(tokens), SLICE):
        position = np.asarray(positions[start : start + SLICE])
        own = unshared(position, start == 0)
        stream = np.concatenate([rest, np.asarray(tokens[start : start + SLICE])[own]])
        *whole, rest = np.split(stream, len(rest) + np.flatnonzero(position[own] == 0))
        yield from (document for document in whole if len(document) > 1)
    if len(rest) > 1:
        yield rest


def overlap(train: Iterable[np.ndarray], held_out: Iterable[np.ndarray]) -> Overlap:
    """Compare held-out documents with training documents, both arrays of token ids."""
    known: dict[bytes, int] = {}  # digest -> how often it is held out
    sample: list[tuple[int, int, np.ndarray]] = []  # the documents of the highest digests
    documents = 0
    for documents, document in enumerate(held_out, 1):
        digest = _digest(document)
        known[digest] = known.get(digest, 0) + 1
        if known[digest] > 1:
            continue
        entry = int.from_bytes(digest), documents, np.array(document[:MAX_TOKENS])
        (heapq.heappush if len(sample) < SAMPLE else heapq.heappushpop)(sample, entry)
    hashes, owners = _shingles([document for _, _, document in sample])
    pairs = np.unique(np.stack([hashes, owners.astype(np.uint64)]), axis=1)
    _, of_hash, counts = np.unique(pairs[0], return_inverse=True, return_counts=True)
    pairs = pairs[:, counts[of_hash] <= MAX_OWNERS]
    hashes, owners = pairs[0], pairs[1].astype(np.int64)  # ascending hashes
    sizes = np.bincount(owners, minlength=len(sample))
    shared = np.zeros(len(sample), np.int64)
    equal: set[bytes] = set()

    def compare(batch: list[np.ndarray]) -> None:
        shingles, document = _shingles(batch)
        first = np.searchsorted(hashes, shingles)
        hits = first < np.searchsorted(hashes, shingles, "right")
        keys = np.unique(document[hits] * max(len(hashes), 1) + first[hits])  # once a document
        document, first = np.divmod(keys, max(len(hashes), 1))
        counts = np.searchsorted(hashes, hashes[first], "right") - first
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        of = owners[np.repeat(first, counts) + within]
        pair, times = np.unique(np.repeat(document, counts) * len(sample) + of, return_counts=True)
        np.maximum.at(shared, pair % max(len(sample), 1), times)

    batch: list[np.ndarray] = []
    held = 0
    for document in train:
        digest = _digest(document)
        if digest in known:
            equal.add(digest)
        batch.append(document)
        held += len(document)
        if held >= AT_ONCE:
            compare(batch)
            batch, held = [], 0
    compare(batch)
    same = np.array([_of(entry) in equal for entry in sample], dtype=bool)
    judged = (sizes >= MIN_SHINGLES) | same
    near = judged & ~same & (shared >= NEAR * sizes)
    return Overlap(documents, sum(known[d] for d in equal), int(judged.sum()), int(near.sum()))


def _digest(document: np.ndarray) -> bytes:
    data = np.ascontiguousarray(document, np.int32).tobytes()
    return hashlib.blake2b(data, digest_size=8).digest()


def _of(entry: tuple[int, int, np.ndarray]) -> bytes:
    return entry[0].to_bytes(8)


def _shingles(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes uint64 of some shingles of each document, and the number of its document."""
    tokens = np.concatenate([np.zeros(0, np.int32), *documents]).astype(np.uint64)
    owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    count = max(len(tokens) - SHINGLE + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for n in range(SHINGLE):
        hashes = (hashes + tokens[n : n + count] + np.uint64(1)) * MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    whole = owner[:count] == owner[SHINGLE - 1 : SHINGLE - 1 + count]
    kept = whole & (hashes % np.uint64(KEPT) == 0)
    return hashes[kept], owner[:count][kept]
