"""Arrays in numbered files: NAME-00000.npy, NAME-00001.npy, ..., each whole or absent.

A shard is the unit of work: what a worker writes at once, and all that has to be done again
after a worker or the whole run was killed. All reading is by memory map.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.artifacts import write_hashed


def shard_path(folder: Path, name: str, shard: int) -> Path:
    """Return the file of one shard."""
    return folder / f"{name}-{shard:05d}.npy"


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file that is whole or absent."""
    write_hashed(path, lambda file: np.lib.format.write_array(file, array, allow_pickle=False))


def save_parts(path: Path, parts: Iterable[np.ndarray], dtype: type[np.generic]) -> None:
    """Write arrays of one dimension, one after the other, as an .npy file that is whole or absent.

    They are never held at once.
    """
    with tempfile.TemporaryFile(dir=path.parent) as raw:
        for part in parts:
            raw.write(np.ascontiguousarray(part, dtype).data)
        shape = (raw.tell() // np.dtype(dtype).itemsize,)
        raw.seek(0)

        def write(file: Any) -> None:
            description = np.lib.format.dtype_to_descr(np.dtype(dtype))
            header = {"descr": description, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            shutil.copyfileobj(raw, file, 1 << 20)

        write_hashed(path, write)


def load_array(path: Path) -> np.ndarray:
    """Return an .npy file's array, memory-mapped; MemdecError if the file is cut off or absent.

    Any other refusal of the operating system is raised as it is: the file may be whole.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (FileNotFoundError, NotADirectoryError, ValueError, EOFError):
        raise MemdecError(
            f"{path} is damaged or missing: delete the folder {path.parent} and build again."
        ) from None


def load_shard(folder: Path, name: str, shard: int) -> np.ndarray:
    """Return one shard, memory-mapped."""
    return load_array(shard_path(folder, name, shard))


def unfinished(folder: Path, names: tuple[str, ...], count: int) -> list[int]:
    """Return the shards below count of which any of the files NAME-N.npy is missing."""
    there = {path.name for path in folder.iterdir()}
    return [
        n
        for n in range(count)
        if not all(shard_path(folder, name, n).name in there for name in names)
    ]


class Shards(Sequence[np.ndarray]):
    """The shards NAME-*.npy of a folder in order, each mapped for the time it is looked at.

    However many there are, no more files are open than arrays are held.
    """

    def __init__(self, folder: Path, name: str) -> None:
        # By number, not by name: beyond 99,999 shards the two differ.
        unsorted = folder.glob(f"{name}-*.npy")
        self.paths = sorted(unsorted, key=lambda path: int(path.stem.split("-")[-1]))

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, number: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, number: slice) -> list[np.ndarray]: ...

    def __getitem__(self, number: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(number, slice):
            return [load_array(path) for path in self.paths[number]]
        return load_array(self.paths[number])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Return the number of rows of each shard [shards] int64."""
        return np.array([len(shard) for shard in self], dtype=np.int64)

    @cached_property
    def starts(self) -> np.ndarray:
        """Return the number of each shard's first row, and of all rows [shards+1] int64."""
        return np.r_[0, np.cumsum(self.lengths)].astype(np.int64)

    @property
    def rows(self) -> int:
        """Return the number of rows of all shards."""
        return int(self.starts[-1])


def shards(folder: Path, name: str) -> Shards:
    """Return the shards NAME-*.npy of an artifact in order."""
    return Shards(folder, name)


class Sharded:
    """One array in shards of `per_shard` rows, the last one perhaps shorter.

    A shard is mapped for the time of a read: what stays mapped counts as the process's RAM.
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
        copied = np.empty((len(rows), *like.shape[1:]), dtype=like.dtype)
        number = rows // self.per_shard
        for shard in np.unique(number):
            here = number == shard
            copied[here] = self.shard(int(shard))[rows[here] % self.per_shard]
        return copied
