"""Documents -> shards of token blocks, of a fresh corpus or of one that changes an old one."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.blocks import Owners, load_texts, packed, valid_rows
from vllm_memdec.train.data.changes import BLOCKS_KEPT, Blocks, KeptBlocks, compare, resharded
from vllm_memdec.train.data.completeness import BLOCKS
from vllm_memdec.train.data.shards import load_array, save_array, shard_path
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import CorpusSettings


def listing(digests: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return digest and tokens of those documents that have any [documents, 2] uint64."""
    return np.stack([digests, tokens.astype(np.uint64)], axis=1)[tokens > 0]


def in_blocks(
    documents: Iterable[np.ndarray], settings: CorpusSettings, ends: tuple[int, int | None]
) -> Iterator[Blocks]:
    """Yield tokens, positions and documents of the blocks of a shard, as documents are packed.

    ends: the end-of-text token, which fills the last block, and what documents begin with, if any.
    """
    filler, bos = ends
    owners = Owners(documents, bos)
    shape = settings.block_tokens, filler, settings.shard_blocks, bos
    for tokens, positions in packed(owners, *shape):
        yield tokens, positions, owners(positions)


def write_changed(
    documents: Iterable[np.ndarray],
    texts: np.ndarray,
    settings: CorpusSettings,
    ends: tuple[int, int | None],
    name: str,
    work: Path,
    progress: Progress,
    old: Path,
) -> dict[str, Any]:
    """Write the blocks of an old corpus that stay, then those of new documents; return counts."""
    before, (filler, bos) = load_texts(old, name), ends
    stays, added = compare(before[:, 0], texts[:, 0])
    if stays.all() and not added.any():
        raise MemdecError(
            f"no document that the memory of {old.parent} was trained on has changed, and none is "
            "new: there is nothing to update, as nothing is learnt of held-out text."
        )
    # Neighbouring blocks share a token: the first new one begins with what an old one ends with.
    filling = np.array([filler if bos is None else bos], np.int32)
    new = itertools.chain([filling], itertools.compress(documents, added))
    kept = KeptBlocks(old, stays, filler)

    def parts() -> Iterator[Blocks]:
        yield from kept
        kept.save(work)
        for tokens, positions, owner in in_blocks(new, settings, ends) if added.any() else ():
            yield tokens, positions, np.where(owner > 0, owner - 1 + stays.sum(), -1)

    listed = np.concatenate([before[stays], texts[added]])
    blocks = resharded(parts(), settings.shard_blocks)
    counts = write_blocks(blocks, listed, settings, ends, name, work, progress)
    change = {"added": int(added.sum()), "removed": int((~stays).sum())}
    change["kept_blocks"] = len(load_array(work / BLOCKS_KEPT))
    progress.say(
        f"corpus: {change['added']:,} documents are new, {change['removed']:,} are gone, "
        f"{stays.sum():,} stay"
    )
    return {name: counts, "update": change}


def write_blocks(
    blocks: Iterable[Blocks],
    texts: np.ndarray,
    settings: CorpusSettings,
    ends: tuple[int, int | None],
    name: str,
    work: Path,
    progress: Progress,
) -> dict[str, int]:
    """Write shards of blocks [blocks, T+1], and what is known of them; return counts.

    texts: digest and tokens of each of their documents.
    """
    counts = {"tokens": int(texts[:, 1].sum()), "documents": len(texts)}
    rows, used = [np.zeros(0, np.int32)], np.zeros(0, bool)  # used: does a token occur?
    for shard, arrays in enumerate(blocks):
        tokens, positions, _ = arrays
        rows.append(valid_rows(positions).sum(axis=1, dtype=np.int32))
        used = np.pad(used, (0, max(0, int(tokens.max()) + 1 - len(used))))
        used[tokens] = True
        for kind, array in zip(BLOCKS, arrays, strict=True):
            if not (path := shard_path(work, f"{kind}-{name}", shard)).exists():
                save_array(path, array.astype(np.int32, copy=False))
    if counts["tokens"] < settings.block_tokens + 1:
        raise MemdecError(
            f"the {name} text has {counts['tokens']} tokens, less than one block of "
            f"{settings.block_tokens}: give more text or lower corpus.block_tokens."
        )
    row_counts = np.concatenate(rows)
    if not row_counts.any():
        raise MemdecError(
            f"nothing of the {name} text is predicted: give it chats in which the assistant "
            "answers, or set corpus.loss_on to all."
        )
    save_array(work / f"texts-{name}.npy", texts)
    save_array(work / f"rows-{name}.npy", row_counts)
    save_array(work / f"used-{name}.npy", np.flatnonzero(used).astype(np.int32))
    n_blocks = len(row_counts)
    progress.say(f"corpus: {counts['tokens']:,} tokens of {name} text in {n_blocks:,} blocks")
    return counts | {"blocks": n_blocks, "rows": int(row_counts.sum())}
