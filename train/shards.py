"""Arrays in numbered files: NAME-00000.npy, NAME-00001.npy, ..., each whole or absent.

A shard is the unit of work: what a worker writes at once, and the most that is done twice after a
worker or the whole run was killed. All reading is by memory map.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.artifacts import write_atomic


def shard_path(folder: Path, name: str, shard: int) -> Path:
    """Return the file of one shard."""
    return folder / f"{name}-{shard:05d}.npy"


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file that is whole or absent."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.save(file, array)

    write_atomic(path, write)


def load_array(path: Path) -> np.ndarray:
    """Return an .npy file's array, memory-mapped; MemdecError if the file is cut off or absent."""
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, PermissionError):
            raise
        raise MemdecError(
            f"{path} is damaged or missing: delete the folder {path.parent} and build again."
        ) from None


def load_shard(folder: Path, name: str, shard: int) -> np.ndarray:
    """Return one shard, memory-mapped."""
    return load_array(shard_path(folder, name, shard))


def shards(folder: Path, name: str) -> list[np.ndarray]:
    """Return the shards NAME-*.npy of an artifact in order, memory-mapped."""
    # By number, not by name: beyond 99,999 shards the two differ.
    paths = sorted(folder.glob(f"{name}-*.npy"), key=lambda path: int(path.stem.split("-")[-1]))
    return [load_array(path) for path in paths]


class Sharded:
    """One array in shards of `per_shard` rows, the last one perhaps shorter.

    A shard is mapped for the time of a read: what stays mapped counts as the process's memory.
    """

    def __init__(self, folder: Path, name: str, length: int, per_shard: int) -> None:
        self.folder, self.name = folder, name
        self.length, self.per_shard = length, per_shard

    def __len__(self) -> int:
        return self.length

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length, *self.shard(0).shape[1:])

    @property
    def n_shards(self) -> int:
        return -(-self.length // self.per_shard)

    def shard(self, number: int) -> np.ndarray:
        """Return one shard, memory-mapped."""
        return load_shard(self.folder, self.name, number)

    def __iter__(self) -> Iterator[np.ndarray]:
        for number in range(self.n_shards):
            yield from self.shard(number)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Return a row, or the rows of a slice or of an array of row numbers, copied."""
        rows = (
            np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index)
        )
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows must be from 0 to {len(self) - 1}, got {index}.")
        if rows.ndim == 0:
            return self.shard(int(rows) // self.per_shard)[int(rows) % self.per_shard]
        like = self.shard(0)
        found = np.empty((len(rows), *like.shape[1:]), dtype=like.dtype)
        number = rows // self.per_shard
        for shard in np.unique(number):
            here = number == shard
            found[here] = self.shard(int(shard))[rows[here] % self.per_shard]
        return found
