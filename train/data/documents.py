"""Read a corpus: its files in pieces, and of each piece the documents, checked and alike.

A text file is one document, a long one several; a row of a table or of JSON is one, in the field
`text`, or a chat (chat.py). The same document has the same text, whatever file it is in.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data import readers
from vllm_memdec.train.data.chat import Chat
from vllm_memdec.train.data.files import compression, corpus_files, format_of
from vllm_memdec.train.data.opening import BINARY
from vllm_memdec.train.data.readers import TEXT, Fields, Piece
from vllm_memdec.train.settings import CorpusSettings

READER = 6  # raised whenever the same files give other documents
TEXT_FILES = (".txt", ".md")
DIVIDED = (*TEXT_FILES, ".jsonl")  # files of lines, which can be read from anywhere


def pieces(path: Path) -> list[Piece]:
    """Return a corpus in pieces, in order: each is read by itself and holds whole documents."""
    parts = []
    for file in corpus_files(path).files:
        kind = format_of(file)
        if compression(file) or kind not in (*DIVIDED, ".parquet"):
            parts.append(Piece(file))
        elif kind == ".parquet":
            parts += [Piece(file, n, n + 1) for n in range(readers.row_groups(file))]
        else:
            starts = range(0, max(file.stat().st_size, 1), readers.PIECE_BYTES)
            parts += [Piece(file, start, start + readers.PIECE_BYTES) for start in starts]
    return parts


def read_documents(piece: Piece, fields: Fields = TEXT) -> Iterator[str]:
    """Yield the documents with text in a piece."""
    for text, _, _ in read_rows(piece, fields):
        yield text


def read_rows(piece: Piece, fields: Fields = TEXT) -> Iterator[tuple[str, Any, str]]:
    """Yield (text, value of the field that groups, place) of the documents with text in a piece.

    Raises MemdecError where a row lacks a field.
    """
    for where, text, value in readers.read(piece, fields):
        if "\0" in text or not (text.isascii() or _encodable(text)):
            raise MemdecError(f"{where} {BINARY}")
        if "\r" in text:  # a memory of Windows line ends would never see them in a prompt
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if text.strip():
            if fields.group is not None and value is None:
                raise MemdecError(
                    f"{where} has no field `{fields.group}`: add it, or check corpus.group."
                )
            yield text, value, where


def fields_of(settings: CorpusSettings, validation: Path | None) -> Fields:
    """Return the fields of the rows that are read; none groups them where none is held out."""
    group = settings.group if validation is None else None
    return Fields(settings.text_field, group, settings.loss_on)


def documents(path: Path, fields: Fields = TEXT) -> Iterator[str]:
    """Yield every document of a corpus, in order."""
    for piece in pieces(path):
        yield from read_documents(piece, fields)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return True


def canonical(value: Any) -> str:
    """Return one text for equal values of a field, whatever JSON or parquet made of them."""
    return json.dumps(value, sort_keys=True, default=str)


@dataclass
class Reading:
    """What reading a corpus whole tells of it."""

    hash: str = ""
    documents: int = 0
    separated: list[str] = field(default_factory=list)  # text files that hold several documents
    chats: int = 0  # of the documents


def text_hash(path: Path, fields: Fields = TEXT) -> str:
    """Return a hash over the documents at a path, each of them read and checked.

    A field that groups them counts as well.
    """
    return read_whole(path, fields).hash


def read_whole(path: Path, fields: Fields = TEXT) -> Reading:
    """Return the hash of text_hash(), and what was seen on the way."""
    digest, reading = hashlib.sha256(), Reading()
    for piece in pieces(path):
        kind = format_of(piece.path)
        if kind == ".jsonl":
            if piece.start:
                continue
            piece = Piece(piece.path)
        documents = size = 0
        for text, value, _ in read_rows(piece, fields):
            for part in (text,) if fields.group is None else (text, canonical(value)):
                data = part.encode()
                digest.update(len(data).to_bytes(8) + data)
                size += len(data)
            documents += 1
            reading.chats += isinstance(text, Chat)
        # Divided by its length alone, a text has no more documents than this.
        if kind in TEXT_FILES and documents > size // readers.PIECE_BYTES + 1:
            reading.separated.append(str(piece.path))
        reading.documents += documents
    if not reading.documents:
        raise MemdecError(f"{path} is empty: give a corpus that holds text.")
    reading.hash, reading.separated = digest.hexdigest(), sorted(set(reading.separated))
    return reading
