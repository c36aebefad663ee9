"""Read text: .txt, .jsonl and .parquet files -> documents, checked.

A .txt file is one document, a long one several; a row of the others is one, in the field `text`.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.files import corpus_files
from vllm_memdec.train.faults import reraise

PARQUET_BATCH = 256  # rows read at once; one may be a book
PIECE_BYTES = 8 * 2**20  # bytes of a file that are read and tokenised as one piece


@dataclass(frozen=True)
class Piece:
    """A part of a corpus file: row groups of a .parquet, else the lines that start in its bytes."""

    path: Path
    start: int = 0
    stop: int | None = None  # None: the end of the file


def pieces(path: Path) -> list[Piece]:
    """Return a corpus in pieces, in order: each is read by itself and holds whole documents."""
    parts = []
    for file in corpus_files(path).files:
        if file.suffix.lower() == ".parquet":
            with _parquet(file) as table:
                parts += [Piece(file, n, n + 1) for n in range(table.num_row_groups)]
        else:
            starts = range(0, max(file.stat().st_size, 1), PIECE_BYTES)
            parts += [Piece(file, start, start + PIECE_BYTES) for start in starts]
    return parts


def read_documents(piece: Piece) -> Iterator[str]:
    """Yield the documents with text in a piece: of a .txt one, of the others each row."""
    for text, _ in read_rows(piece):
        yield text


def read_rows(piece: Piece, field: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (text, value of a field) of the documents with text in a piece; no field: None.

    Raises MemdecError where a row lacks the field.
    """
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for where, text, value in readers[piece.path.suffix.lower()](piece, field):
        if not isinstance(text, str):
            raise MemdecError(f"{where}: every row needs a string field `text`.")
        if "\0" in text or not _encodable(text):
            raise MemdecError(f"{where} is binary, not text: convert it to UTF-8 or leave it out.")
        if text.strip():
            if field is not None and value is None:
                raise MemdecError(f"{where} has no field `{field}`: add it, or check corpus.group.")
            yield text, value


def documents(path: Path) -> Iterator[str]:
    """Yield every document of a corpus, in order."""
    for piece in pieces(path):
        yield from read_documents(piece)


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Yield (place in the file, line) of the lines that start in the piece."""
    with open(piece.path, "rb") as lines:
        place = piece.start
        if piece.start:  # the line that the piece before ends in is its own
            lines.seek(piece.start - 1)
            place += len(lines.readline()) - 1
        for line in lines:
            if piece.stop is not None and place >= piece.stop:
                return
            yield place, line
            place += len(line)


def _read_txt(piece: Piece, field: str | None) -> Iterator[tuple[str, Any, Any]]:
    lines = list(_lines(piece))
    if lines:
        text = _decode(b"".join(line for _, line in lines), str(piece.path), lines[0][0])
        # A memory of Windows line ends would never see them in a prompt.
        yield str(piece.path), text.replace("\r\n", "\n"), None


def _read_jsonl(piece: Piece, field: str | None) -> Iterator[tuple[str, Any, Any]]:
    for number, (place, line) in enumerate(_lines(piece), 1):
        # text_hash reads a file whole and first, and meets all errors where lines can be counted.
        where = f"{piece.path}, {f'byte {place}' if piece.start else f'line {number}'}"
        text = _decode(line, where)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            what = str(error).split(":")[0]
            raise MemdecError(f"{where} is not valid JSON ({what}): mend the line.") from None
        row = row if isinstance(row, dict) else {}
        yield where, row.get("text"), row.get(field)


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise MemdecError(f"{path}: a parquet corpus needs a string column `text`.")
            yield file
    # OSError for a broken page, UnicodeDecodeError for a string column that is none
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reraise(error, path)
        what = " ".join(str(error).split())
        raise MemdecError(
            f"{path} is not a readable parquet file ({what}): copy it again."
        ) from None


def _read_parquet(piece: Piece, field: str | None) -> Iterator[tuple[str, Any, Any]]:
    with _parquet(piece.path) as file:
        columns = [name for name in ("text", field) if name in file.schema_arrow.names]
        groups = range(file.num_row_groups)[piece.start : piece.stop]
        number = sum(file.metadata.row_group(n).num_rows for n in range(piece.start))
        for batch in file.iter_batches(
            batch_size=PARQUET_BATCH, row_groups=list(groups), columns=columns
        ):
            for row in batch.to_pylist():
                number += 1
                yield f"{piece.path}, row {number}", row["text"], row.get(field)


def _decode(data: bytes, where: str, place: int = 0) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MemdecError(
            f"{where} is not UTF-8 text (byte {place + error.start}): convert it or leave it out."
        ) from None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return True


def canonical(value: Any) -> str:
    """Return one text for equal values of a field, whatever JSON or parquet made of them."""
    return json.dumps(value, sort_keys=True, default=str)


def text_hash(path: Path, group: str | None = None) -> str:
    """Return a hash over the documents at a path, each of them read and checked.

    group: a field of theirs that counts as well.
    """
    digest, documents = hashlib.sha256(), 0
    for piece in pieces(path):
        if piece.path.suffix.lower() == ".jsonl":
            if piece.start:
                continue
            piece = Piece(piece.path)
        for text, value in read_rows(piece, group):
            for part in (text,) if group is None else (text, canonical(value)):
                data = part.encode()
                digest.update(len(data).to_bytes(8) + data)
            documents += 1
    if not documents:
        raise MemdecError(f"{path} is empty: give a corpus that holds text.")
    return digest.hexdigest()
