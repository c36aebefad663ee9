"""Read text: .txt, .jsonl and .parquet files -> documents, checked.

A .txt file is one document; a row of the others is one, in the field `text`.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".txt", ".jsonl", ".parquet")
PARQUET_BATCH = 256  # rows read at once; one may be a book


def corpus_files(path: Path) -> tuple[list[Path], int]:
    """Return (corpus files at path, how many others), or raise ValueError if there are none."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: check --corpus and --validation.")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    kept = [p for p in files if p.suffix.lower() in SUFFIXES]
    if not kept:
        raise ValueError(f"{path} is no text: give {', '.join(SUFFIXES)}, or a folder of them.")
    return kept, len(files) - len(kept)


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents with text in one file: a .txt is one, a .jsonl or .parquet row is one."""
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for where, text in readers[path.suffix.lower()](path):
        if not isinstance(text, str):
            raise ValueError(f"{where}: every row needs a string field `text`.")
        if "\0" in text or not _encodable(text):
            raise ValueError(f"{where} is binary, not text: convert it to UTF-8 or leave it out.")
        if text.strip():
            yield text


def _read_txt(path: Path) -> Iterator[tuple[str, Any]]:
    # A memory of Windows line ends would never see them in a prompt.
    yield str(path), _decode(path.read_bytes(), str(path)).replace("\r\n", "\n")


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            text = _decode(line, where)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                what = str(error).split(":")[0]
                raise ValueError(f"{where} is not valid JSON ({what}): mend the line.") from None
            yield where, row.get("text") if isinstance(row, dict) else None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise ValueError(f"{path}: a parquet corpus needs a string column `text`.")
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield f"{path}, row {number}", text
    except PermissionError:
        raise
    # OSError for a broken page, UnicodeDecodeError for a string column that is none
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        raise ValueError(
            f"{path} is not a readable parquet file ({what}): copy it again."
        ) from None


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 text (byte {error.start}): convert it or leave it out."
        ) from None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return True


def text_hash(path: Path) -> str:
    """Return a hash over the documents at a path, each of them read and checked."""
    digest, documents = hashlib.sha256(), 0
    for file in corpus_files(path)[0]:
        for text in read_documents(file):
            data = text.encode()
            digest.update(len(data).to_bytes(8) + data)
            documents += 1
    if not documents:
        raise ValueError(f"{path} is empty: give a corpus that holds text.")
    return digest.hexdigest()
