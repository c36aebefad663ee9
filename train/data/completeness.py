"""The files that a stage must have written, of each stage its names: what is sealed is whole."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.ownership import read_object

BLOCKS = ("tokens", "positions", "documents")  # arrays [blocks, T+1] of a corpus, in shards


def numbered(names: Iterable[str], count: int) -> Iterator[str]:
    """Yield NAME-00000.npy, NAME-00001.npy, ... of each name."""
    for name in names:
        yield from (f"{name}-{n:05d}.npy" for n in range(count))


def corpus_files(work: Path) -> Iterator[str]:
    """Yield the names of a corpus's files."""
    yield "corpus.json"
    facts = read_object(work / "corpus.json") or {}
    for split in ("train", "validation"):
        yield from (f"rows-{split}.npy", f"used-{split}.npy", f"texts-{split}.npy")
        if split in facts:
            count = -(-facts[split]["blocks"] // facts["shard_blocks"])
            yield from numbered((f"{kind}-{split}" for kind in BLOCKS), count)


def n_shards(corpus: Path) -> int:
    """Return how many shards a finished corpus has, and every stage made from it."""
    facts = json.loads((corpus / "corpus.json").read_text())
    return -(-facts["train"]["blocks"] // facts["shard_blocks"])


def model_files(work: Path) -> Iterator[str]:
    """Yield the names of a model folder's files, the weights in one or several."""
    yield "config.json"
    index = read_object(work / "model.safetensors.index.json")
    if index is None:
        yield "model.safetensors"
    else:
        yield from sorted(set(index["weight_map"].values()))


def check_there(folder: Path, names: Iterable[str], there: Iterable[str]) -> None:
    """Raise MemdecError if files that were written are not there."""
    present = set(there)
    missing = [name for name in names if name not in present]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MemdecError(
            f"{missing[0]}{more} are not in {folder} though they were written: see that all "
            "machines have the same storage there and run again, finished parts are kept; if it "
            f"says so again, delete {folder}."
        )
