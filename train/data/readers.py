"""Read one file of a corpus, whatever its format and compression: its documents, one by one.

A reader yields (where it stands, text, value of another field). No file is held whole: but for a
page of HTML, at most 8 MiB of text lines, a record of JSON or a page of a table's columns are.
"""

import contextlib
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.chat import CHAT_FIELDS, Chat, read_chat
from vllm_memdec.train.data.files import format_of
from vllm_memdec.train.data.opening import BINARY, PairsWhole, decode, opened, sentences, unpacked
from vllm_memdec.train.data.pages import text_of_page

TABLE_ROWS = 256  # rows of a table read at once; one may be a book
PAGE_BYTES = 2**20  # bytes of a column that are read at once
PIECE_BYTES = 8 * 2**20  # bytes of a file that are read and tokenised as one piece
FIELDS_NAMED = 12
NAME = 40  # characters of a field's name that an error shows
MISSING = object()
KINDS = {  # what errors call a value
    type(None): "null",
    str: "a string",
    bytes: "bytes",
    list: "a list",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    dict: "an object",
}
# The end-of-text marker alone in its line, as TinyStories has it between documents.
SEPARATOR = re.compile(r"(?<![^\r\n])[ \t]*<\|(?:endoftext|end_of_text)\|>[ \t]*(?![^\r\n])")
Document = tuple[str, str, Any]  # where it stands, its text, the value of another field


@dataclass(frozen=True)
class Piece:
    """A part of a corpus file: row groups of a .parquet, else the lines that start in its bytes."""

    path: Path
    start: int = 0
    stop: int | None = None  # None: the end of the file


@dataclass(frozen=True)
class Fields:
    """The fields of a row that are read: dotted names reach into it."""

    text: str = "text"
    group: str | None = None  # a field that rows which belong together share
    loss_on: str = "all"  # or "assistant": what is predicted of a chat

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the names of the fields that may hold the text; the first with some is read."""
        return (self.text, *CHAT_FIELDS) if self.text == Fields.text else (self.text,)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the fields."""
        return self.texts if self.group is None else (*self.texts, self.group)


TEXT = Fields()


def read(piece: Piece, fields: Fields) -> Iterator[Document]:
    """Yield the documents of a piece; MemdecError where it is not what its name says."""
    kind = format_of(piece.path)
    with sentences(piece.path):
        if kind in TEXTS:
            yield from ((where, text, None) for where, text in TEXTS[kind](piece))
            return
        name, group = fields.text, fields.group
        for where, row in ROWS[kind](piece, fields):
            # Of short rows the way through _text() is a good part of the time.
            text = row.get(name) if type(row) is dict else None
            if type(text) is not str or not text or text.isspace():
                text = _text(row, fields, where)
            yield where, text, None if group is None else lookup(row, group)


def lookup(row: Any, name: str | None, missing: Any = None) -> Any:
    """Return the value of a field, or `missing`: a.b is the field b in the field a."""
    if not isinstance(row, dict) or name is None:
        return missing
    if name in row:
        return row[name]
    first, _, rest = name.partition(".")
    within = row.get(first, missing) if rest else missing
    return within if within is None else lookup(within, rest, missing)


def _text(row: Any, fields: Fields, where: str) -> str:
    """Return the text of a row, a string or a list of messages: the first that is not empty."""
    empty = None
    for name in fields.texts:
        text = lookup(row, name)
        of_objects = isinstance(text, list) and text and all(isinstance(m, dict) for m in text)
        if of_objects or (isinstance(text, list) and name in CHAT_FIELDS):
            text = read_chat(text, where, fields.loss_on == "assistant")
        if isinstance(text, Chat) or (isinstance(text, str) and name == fields.text):
            if text and not text.isspace():
                return text
            empty = text
    if empty is not None:
        return empty
    option, name = "--text-field (corpus.text_field)", fields.text
    if not isinstance(row, dict):
        what = f"and is {_kind(row)}, no object: write it as an object"
    elif lookup(row, name, MISSING) is MISSING:
        what = f"it has {listed(_fields(row))}: give the right one with {option}"
    else:
        what = (
            f"here it is {_kind(lookup(row, name))}: write a string there, give another field with "
            f"{option}"
        )
    raise MemdecError(
        f"{where}: every row needs a string field `{name}`, {what}, or leave the file out."
    )


def _kind(value: Any) -> str:
    return KINDS.get(type(value), type(value).__name__)


def _fields(row: dict[str, Any], before: str = "") -> list[str]:
    """Return the names of a row's fields, those within a field dotted."""
    names: list[str] = []
    for name, value in row.items():
        within = isinstance(value, dict) and value and not before
        names += _fields(value, f"{name}.") if within else [f"{before}{name}"]
    return names


def listed(names: Iterable[str]) -> str:
    """Return the names of fields in words; long ones cut, as text that was taken for names is."""
    words = [" ".join(name.split()) for name in names]
    words = [w if len(w) <= NAME else f"{w[: NAME - 3]}..." for w in words]
    return ", ".join([*words[:FIELDS_NAMED], *["..."][: len(words) > FIELDS_NAMED]]) or "no fields"


def lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Yield (place in the file, line) of the lines that start in the piece."""
    with opened(piece.path) as file:
        place = piece.start
        if piece.start:  # the line that the piece before ends in is its own
            file.seek(piece.start - 1)
            place += len(file.readline()) - 1
        for line in file:
            if piece.stop is not None and place >= piece.stop:
                return
            yield place, line
            place += len(line)


def text_lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Yield what lines() does, of lines that end in LF, CR LF or CR."""
    with opened(piece.path) as file:
        place = max(piece.start - 1, 0)
        if place:
            file.seek(place)
        for part in file:
            for line in part.splitlines(keepends=True):
                if piece.stop is not None and place >= piece.stop:
                    return
                if place >= piece.start:
                    yield place, line
                place += len(line)


def _txt(piece: Piece) -> Iterator[tuple[str, str]]:
    """Yield a document for each of the pieces that a file of lines has, or several (SEPARATOR)."""
    for _, part in groupby(text_lines(piece), lambda line: line[0] // PIECE_BYTES):
        places, texts = zip(*part, strict=True)
        text = decode(b"".join(texts), str(piece.path), places[0])
        documents = SEPARATOR.split(text) if "<|end" in text else [text]
        for document in documents:
            yield str(piece.path), document.strip("\r\n") if len(documents) > 1 else document


def _html(piece: Piece) -> Iterator[tuple[str, str]]:
    """Yield the text that a page shows."""
    with opened(piece.path) as file:
        page = decode(file.read(), str(piece.path))
    if "\0" in page:  # the parser drops it
        raise MemdecError(f"{piece.path} {BINARY}")
    yield str(piece.path), text_of_page(page)


def _jsonl(piece: Piece, fields: Fields) -> Iterator[tuple[str, Any]]:
    for number, (place, line) in enumerate(lines(piece), 1):
        # text_hash reads a file whole and first, and meets all errors where lines can be counted.
        where = f"{piece.path}, {f'byte {place}' if piece.start else f'line {number}'}"
        text = decode(line, where)
        if not text.strip():
            continue
        try:
            yield where, json.loads(text)
        except (ValueError, RecursionError) as error:
            what = str(error).split(":")[0]
            if "integer string conversion" in what:
                raise MemdecError(
                    f"{where} has an integer of more than {sys.get_int_max_str_digits():,} digits: "
                    "write it as a string."
                ) from None
            raise MemdecError(f"{where} is not valid JSON ({what}): mend the line.") from None


def _json(piece: Piece, fields: Fields) -> Iterator[tuple[str, Any]]:
    """Yield the objects of an array, or those that follow each other, one by one."""
    import ijson

    with opened(piece.path) as file:
        head = file.read(1 << 16)
    array = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    with opened(piece.path) as file:
        if head.startswith(b"\xef\xbb\xbf"):
            file.read(3)
        rows = ijson.items(
            PairsWhole(file), "item" if array else "", multiple_values=not array, use_float=True
        )
        try:
            for number, row in enumerate(rows, 1):
                yield f"{piece.path}, row {number}", row
        except ijson.JSONError as error:
            if not head.strip():
                return
            said = error.args[0] if error.args else ""
            what = (said.decode(errors="replace") if isinstance(said, bytes) else str(said)) or "?"
            if "integer overflow" in what:  # a second line has some of the text, with the number
                digits = re.search(r"(-?\d{18,})(\s*\n)?", what)
                shown = f" ({digits[1]}{digits[2] and '...' or ''})" if digits else ""
                raise MemdecError(
                    f"{piece.path} has an integer beyond 64 bits{shown}: write it as a string, or "
                    "each object as a line of a .jsonl file, which takes it."
                ) from None
            raise MemdecError(
                f"{piece.path} is not valid JSON ({what.splitlines()[0].strip()}): mend it."
            ) from None


def _csv(piece: Piece, fields: Fields) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # a field may be a book
    with opened(piece.path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        rows = csv.DictReader(text, strict=True)
        try:
            if (names := rows.fieldnames) and fields.text not in names:
                raise MemdecError(
                    f"{piece.path}: every row needs a string field `{fields.text}`, it has "
                    f"{listed(names)}: give the right one with --text-field (corpus.text_field), "
                    "or, if the file has no first line of names, add one."
                )
            _once(piece.path, list(names or ()), fields.names)
            for number, row in enumerate(rows, 1):
                where = f"{piece.path}, row {number}"
                if None in row or row[fields.text] is None:
                    more = "more" if None in row else "fewer"
                    raise MemdecError(
                        f"{where} has {more} fields than the first line names: mend the quotes."
                    )
                yield where, row
        except csv.Error as error:
            raise MemdecError(f"{piece.path} is not valid CSV ({error}): mend it.") from None
        except UnicodeDecodeError:
            raise MemdecError(
                f"{piece.path} is not UTF-8 text: convert it or leave it out."
            ) from None


@contextlib.contextmanager
def parquet(path: Path) -> Iterator[Any]:
    """Open a .parquet file, to be read page by page: a row group may be all of the file."""
    import pyarrow.parquet

    with (
        unpacked(path) as place,
        pyarrow.OSFile(place) as file,
        pyarrow.parquet.ParquetFile(file, buffer_size=PAGE_BYTES, pre_buffer=False) as table,
    ):
        yield table


def row_groups(path: Path) -> int:
    """Return how many row groups a .parquet file has."""
    with sentences(path), parquet(path) as table:
        return int(table.num_row_groups)


def _parquet(piece: Piece, fields: Fields) -> Iterator[tuple[str, Any]]:
    with parquet(piece.path) as file:
        places = _places(piece.path, file.schema_arrow, fields)
        columns = [".".join(place) for place in places.values()]  # of an object these fields alone
        groups = range(file.num_row_groups)[piece.start : piece.stop]
        number = sum(file.metadata.row_group(n).num_rows for n in range(piece.start))
        for batch in file.iter_batches(
            batch_size=TABLE_ROWS, row_groups=list(groups), columns=columns
        ):
            yield from _numbered(piece.path, batch, places, number)
            number += batch.num_rows


def _arrow(piece: Piece, fields: Fields) -> Iterator[tuple[str, Any]]:
    """Yield the rows of Arrow's file format, or of its stream, which `datasets` writes."""
    import pyarrow

    # A map holds nothing: a record batch may be all of the file.
    with unpacked(piece.path) as place, pyarrow.memory_map(place) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
        places = _places(piece.path, reader.schema, fields)
        number = 0
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            for start in range(0, batch.num_rows, TABLE_ROWS):
                part = batch.slice(start, TABLE_ROWS)
                yield from _numbered(piece.path, part, places, number)
                number += part.num_rows


def _places(path: Path, schema: Any, fields: Fields) -> dict[str, list[str]]:
    """Return of each field that a table has its column and the names within it."""
    places = {name: _place(schema, name) for name in fields.names}
    if not any(places[name] for name in fields.texts):
        there = _fields({field.name: _within(field.type) for field in schema})
        raise MemdecError(
            f"{path}: the table needs a string column `{fields.text}`, it has {listed(there)}: "
            "give the right one with --text-field (corpus.text_field)."
        )
    _once(path, schema.names, [place[0] for place in places.values() if place])
    return {name: place for name, place in places.items() if place}


def _place(kind: Any, name: str) -> list[str]:
    """Return where a schema, or a type of objects, has a field; [] if nowhere."""
    if name in _within(kind):
        return [name]
    first, _, rest = name.partition(".")
    if not rest or first not in _within(kind):
        return []
    within = _place(kind.field(kind.names.index(first)).type, rest)
    return [first, *within] if within else []


def _within(kind: Any) -> dict[str, None]:
    return dict.fromkeys(getattr(kind, "names", ()))


def _once(path: Path, there: list[str], names: Iterable[str]) -> None:
    for name in names:
        if there.count(name) > 1:
            raise MemdecError(
                f"{path} has {there.count(name)} columns `{name}`: rename all but one."
            )


def _numbered(
    path: Path, batch: Any, places: dict[str, list[str]], before: int
) -> Iterator[tuple[str, Any]]:
    import pyarrow.compute

    columns = []
    for column, *within in places.values():
        values = batch.column(column)
        columns.append(pyarrow.compute.struct_field(values, within) if within else values)
    rows = zip(*(values.to_pylist() for values in columns), strict=True)
    for number, row in enumerate(rows, before + 1):
        yield f"{path}, row {number}", dict(zip(places, row, strict=True))


TEXTS: dict[str, Callable[[Piece], Iterable[tuple[str, str]]]] = {
    ".txt": _txt,
    ".md": _txt,
    ".html": _html,
    ".htm": _html,
}
ROWS: dict[str, Callable[[Piece, Fields], Iterable[tuple[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
