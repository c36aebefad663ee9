"""Open a file of a corpus, compressed or not; say what is wrong with one that cannot be read."""

import bz2
import contextlib
import gzip
import io
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.files import compression, format_of
from vllm_memdec.train.faults import reraise

BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError)
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

BINARY = "is binary, not text: convert it to UTF-8 or leave it out."
HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # of a surrogate pair, which are two escapes
ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<half>u[dD][89a-fA-F]..)|.)", re.DOTALL
)


class PairsWhole:
    """A file of JSON whose halves of surrogate pairs are NUL, which no text may hold.

    The parser would make a question mark of one, as if the file had it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.rest = file, b""

    def read(self, size: int = -1) -> bytes:
        """Return some of the file; nothing only at its end."""
        while size:
            new = self.file.read(size)
            data = self.rest + new
            # A pair that goes on in what is read next waits for it.
            open_pair = new and b"\\" in data[-12:]
            end = len(data.rstrip(b"\\u0123456789abcdefABCDEF")) if open_pair else len(data)
            data, self.rest = data[:end], data[end:]
            if data or not new:
                return ESCAPE.sub(_without_half, data) if HALF.search(data) else data
        return b""


def _without_half(escape: re.Match[bytes]) -> bytes:
    return rb"\u0000" if escape["half"] else escape[0]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, what it holds if it is compressed."""
    kind = compression(path)
    if kind == ".zst":
        import pyarrow

        with pyarrow.CompressedInputStream(str(path), "zstd") as stream:
            yield cast(BinaryIO, io.BufferedReader(stream, 1 << 20))
        return
    opener: Callable[..., Any] = OPENERS.get(kind, open)
    with opener(path, "rb") as file:
        yield file


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[str]:
    """Yield the path of what a file holds: its own, or of a copy on disk that is not compressed."""
    if not compression(path):
        yield str(path)
        return
    with opened(path) as file, tempfile.TemporaryFile() as copy:  # nothing of it outlives a kill
        shutil.copyfileobj(file, copy, 1 << 20)
        copy.flush()
        yield f"/dev/fd/{copy.fileno()}"


@contextlib.contextmanager
def sentences(path: Path) -> Iterator[None]:
    """Say what is wrong with a file that its library cannot read."""
    try:
        yield
    except MemdecError:
        raise
    except Exception as error:
        import pyarrow

        reraise(error, path)
        # OSError without a number for a broken page, UnicodeDecodeError for a column that is none
        numbered = isinstance(error, OSError) and error.errno is not None
        if numbered or not isinstance(error, (pyarrow.ArrowException, *BROKEN)):
            raise
        what = " ".join(str(error).split()) or type(error).__name__
        kind = compression(path)[1:] or format_of(path)[1:]
        long_window = kind == "zst" and "too much memory" in what
        mend = "unpack it with zstd -d --long=31" if long_window else "copy it again"
        raise MemdecError(f"{path} is not a readable {kind} file ({what}): {mend}.") from None


def decode(data: bytes, where: str, place: int = 0) -> str:
    """Return UTF-8 as text, without its mark; place: of the data in its file."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MemdecError(
            f"{where} is not UTF-8 text (byte {place + error.start}): convert it or leave it out."
        ) from None
