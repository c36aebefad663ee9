"""Every format and compression gives the same documents, and what is damaged is named."""

import bz2
import csv
import gzip
import html
import json
import lzma
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data import readers
from vllm_memdec.train.data.documents import documents, pieces, read_documents, text_hash
from vllm_memdec.train.data.files import COMPRESSIONS, FORMATS
from vllm_memdec.train.data.readers import Fields
from vllm_memdec.train.plan import probes

DOCUMENT = 'First: a naïve café, "quoted".\n\nThen x < y, and\ta tab.'
MARKUP = DOCUMENT.replace("<", "&lt;")


def as_csv(path, texts):
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([["id", "text"], *enumerate(texts)])


def as_arrow(path, texts, file=False):
    table = pa.table({"id": range(len(texts)), "text": texts})
    new = pa.ipc.new_file if file else pa.ipc.new_stream
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = {
    ".json": lambda p, texts: p.write_text(json.dumps([{"text": t} for t in texts], indent=1)),
    ".jsonl": lambda p, texts: p.write_text("".join(f"{json.dumps({'text': t})}\n" for t in texts)),
    ".csv": as_csv,
    ".parquet": lambda p, texts: pq.write_table(pa.table({"text": texts}), p, row_group_size=2),
    ".arrow": as_arrow,
    ".txt": lambda p, texts: p.write_text(texts[0]),
    ".md": lambda p, texts: p.write_text(texts[0]),
    ".html": lambda p, texts: p.write_text(f"<title>T</title><pre>{MARKUP}</pre>"),
    ".htm": lambda p, texts: p.write_text(f"<html><body><pre>{MARKUP}</pre></body></html>"),
}
COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_one_document_has_one_hash(tmp_path, suffix):
    """In each format, compressed or not, and with the line ends of any system."""
    expected = text_hash(write(tmp_path / "expected.jsonl", [DOCUMENT]))
    for ends in ("\n", "\r\n", "\r"):
        plain = write(tmp_path / f"a{suffix}", [DOCUMENT.replace("\n", ends)])
        assert list(documents(plain)) == [DOCUMENT]
        assert text_hash(plain) == expected
        for kind in COMPRESSIONS:
            small = tmp_path / f"a{suffix.upper()}{kind}"
            small.write_bytes(COMPRESS[kind](plain.read_bytes()))
            assert text_hash(small) == expected


def write(path, texts):
    WRITERS[path.suffix](path, texts)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ".arrow"])
def test_rows_come_in_order(tmp_path, suffix):
    texts = [f"{n}: {DOCUMENT}" for n in range(7)]
    path = write(tmp_path / f"a{suffix}", [*texts[:3], " ", *texts[3:]])
    assert list(documents(path)) == texts
    assert [text for piece in pieces(path) for text in read_documents(piece)] == texts


@pytest.mark.parametrize("tag", ["div", "font", "b", "ul><li", "table><tr><td", "p", "blockquote"])
@pytest.mark.parametrize("depth", [300, 20_000])
def test_a_deep_page_is_read_to_its_end(tmp_path, tag, depth):
    """Old pages leave <font> open for each paragraph; libxml2 stops at 256 elements."""
    path, repeats = tmp_path / "a.html", depth // (tag.count("<") + 1)
    path.write_text(
        "<html><body>first " + f"<{tag}>" * repeats + "deep</p><p>last</p></body></html>"
    )
    words = [word for word in next(documents(path)).split() if len(word) > 1]  # no bullets
    assert words == ["first", "deep", "last"]


@pytest.mark.parametrize(
    "page",
    [
        "<html><body><p>first</p></body></html><p>last</p>",
        "<html><body><p>first</p></body></html>\n<HTML><BODY>last</BODY></HTML >\n",
        "<p>first</p><!--" + "x" * 11_000_000 + "--><p>last</p>",
        "<p>first</p><script>" + "x" * 11_000_000 + "</script><p>last</p>",
        "<?xml version='1.0' encoding='latin-1'?><p>first</p><?php 1 ?>last",
    ],
    ids=["after its end", "two pages", "long comment", "long script", "instructions"],
)
def test_no_text_of_a_page_is_lost(tmp_path, page):
    (tmp_path / "a.html").write_text(page)
    assert next(documents(tmp_path / "a.html")).split() == ["first", "last"]


def test_a_page_of_more_than_ten_megabytes(tmp_path):
    text = "words of a page " * 650_000 + "and its end"
    (tmp_path / "a.html").write_text(f"<pre>{text}</pre>")
    assert next(documents(tmp_path / "a.html")) == text


def test_json_that_is_one_object_or_lines(tmp_path):
    path = tmp_path / "a.json"
    for text in ('{"text": "a"}', '\ufeff{"text":\n"a"}', '{"text": "a"}\n{"text": "a"}\n'):
        path.write_text(text)
        assert set(documents(path)) == {"a"}


def test_arrow_as_a_file_and_as_a_stream(tmp_path):
    texts = [f"{n}: {DOCUMENT}" for n in range(7)]
    as_arrow(tmp_path / "a.arrow", texts, file=True)
    assert list(documents(tmp_path / "a.arrow")) == texts


def test_half_of_a_surrogate_pair_is_no_text(tmp_path):
    """Wherever a read of the file ends; one in another field is nobody's text."""
    whole = r"\ud83d\ude00 \ud55c\\ud83d\uAC00\\\\\uD83D\uDE00"
    expected = json.loads(f'"{whole}"')
    for length in range(30):
        pad = '"' + "x" * ((1 << 16) - 24 - length)
        rows = f'[{{"pad": {pad}", "x": "\\ude00", "text": "{whole}"}}'
        path = tmp_path / "a.json"
        path.write_text(f"{rows}]")
        assert list(documents(path)) == [expected]
        for half in (r"\ud83d", r"\uDE00", r"\\\ud83d\n", r"\ud83d\ud83d\ude00"):
            path.write_text(f'{rows}, {{"text": "{half} a"}}]')
            with pytest.raises(MemdecError, match="a.json, row 2 is binary, not text"):
                list(documents(path))


def test_members_of_a_compressed_file_follow_each_other(tmp_path):
    lines = [json.dumps({"text": f"{n}: {DOCUMENT}"}).encode() + b"\n" for n in range(4)]
    for kind in COMPRESSIONS:
        path = tmp_path / f"a.jsonl{kind}"
        path.write_bytes(b"".join(COMPRESS[kind](line) for line in lines))
        assert len(list(documents(path))) == 4


def test_a_long_text_is_divided_alike_if_it_is_compressed(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_BYTES", 64)
    (tmp_path / "a.txt").write_text("".join(f"line {n} of a text\n" for n in range(40)))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress((tmp_path / "a.txt").read_bytes()))
    assert len(list(documents(tmp_path / "a.txt"))) > 5
    assert text_hash(tmp_path / "a.txt") == text_hash(tmp_path / "b.txt.gz")


@pytest.mark.parametrize("size", [16, 17, 50, 64, 10**6])
def test_line_ends_divide_a_long_text_alike(tmp_path, monkeypatch, size):
    """A line of the marker separates, whatever ends it, and pieces begin where lines do."""
    monkeypatch.setattr(readers, "PIECE_BYTES", size)
    marker = "<|endoftext|>"
    text = "".join(f"line {n}\n" * (n % 5 + 1) + f" {marker}\n" * (n % 3) for n in range(30))
    (tmp_path / "a.txt").write_text(text)
    expected = list(documents(tmp_path / "a.txt"))
    (tmp_path / "cr.txt").write_text(text.replace("\n", "\r"))
    assert list(documents(tmp_path / "cr.txt")) == expected
    mixed = "".join(
        line[:-1] + ("\r\n", "\r", "\n")[n * n % 3]
        for n, line in enumerate(text.splitlines(keepends=True))
    )
    (tmp_path / "mixed.txt").write_bytes(mixed.encode())
    (tmp_path / "mixed.txt.gz").write_bytes(gzip.compress(mixed.encode()))
    assert list(documents(tmp_path / "mixed.txt.gz")) == list(documents(tmp_path / "mixed.txt"))
    together = "\n".join(documents(tmp_path / "mixed.txt")).replace(marker, "").split()
    assert together == text.replace(marker, "").split()


@pytest.mark.parametrize("suffix", [*(f".jsonl{c}" for c in COMPRESSIONS), ".parquet.gz", ".arrow"])
def test_what_is_cut_off_is_named(tmp_path, suffix):
    kind = "." + suffix.split(".")[1]
    plain = write(tmp_path / f"a{kind}", [f"{n}: {DOCUMENT}" for n in range(200)])
    data = plain.read_bytes()
    for compression in suffix.split(".")[2:]:
        data = COMPRESS[f".{compression}"](data)
    path = tmp_path / f"b{suffix}"
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(MemdecError, match=f"b{suffix} is not a readable .* file"):
        text_hash(path)
    path.write_bytes(b"this is no such file")
    with pytest.raises(MemdecError, match=f"b{suffix} is not a readable .* file"):
        text_hash(path)


def test_a_window_of_zstd_beyond_the_library_s_says_how_to_unpack_it(tmp_path):
    """Public dumps of forums are compressed with --long=31, a window of 2 GB."""
    for window, found in ((27, "a text"), (31, None)):
        frame = bytes([0x28, 0xB5, 0x2F, 0xFD, 0, (window - 10) << 3])
        (tmp_path / "a.txt.zst").write_bytes(frame + bytes([6 << 3 | 1, 0, 0]) + b"a text")
        if found:
            assert list(documents(tmp_path / "a.txt.zst")) == [found]
            continue
        with pytest.raises(MemdecError, match=r"too much memory.*: unpack it with zstd -d --long"):
            list(documents(tmp_path / "a.txt.zst"))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.json", '[{"text": "a"', "a.json is not valid JSON .*: mend it"),
        ("a.json", '[{"text": nope}]', "a.json is not valid JSON .*: mend it"),
        ("a.json", "", "a.json is empty"),
        (
            "a.json",
            "[3]",
            "row 1: every row needs a string field `text`, and is a number, no object",
        ),
        (
            "a.json",
            '["a"]',
            "row 1: every row needs a string field `text`, and is a string, no obj",
        ),
        (
            "a.jsonl",
            "null",
            "line 1: every row needs a string field `text`, and is null, no object",
        ),
        (
            "a.jsonl",
            "[{}]",
            "line 1: every row needs a string field `text`, and is a list, no object",
        ),
        ("a.json", f'[{{"n": {2**70}}}]', f"a.json has an integer beyond 64 bits .{2**70}.: write"),
        (
            "a.json",
            f'[{{"n": {"9" * 5000}}}]',
            r"64 bits .9{20,40}\.\.\..: write it as a string, or",
        ),
        ("a.jsonl", f'{{"n": {"9" * 5000}}}', "line 1 has an integer .* 4,300 digits: write it as"),
        ("a.csv", "some text\n", "a.csv: .* `text`, it has some text: .*no first line of names"),
        ("a.csv", "id,text\n1\n", "row 1 has fewer fields than the first line names: mend"),
        ("a.csv", 'text\n"a', "a.csv is not valid CSV"),
        ("a.csv", "text\na,b\n", "row 1 has more fields"),
        ("a.csv", b"text\n\xef\n", "a.csv is not UTF-8"),
        ("a.csv", "", "a.csv is empty"),
        ("a.html", b"<p>\xef</p>", "a.html is not UTF-8"),
        ("a.html", "<p></p>", "a.html is empty"),
        ("a.html", "<p>a</p>\0<p>b</p>", "a.html is binary, not text: convert"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MemdecError, match=match):
        text_hash(tmp_path / name)


VALUES = {
    "null": None, "bytes": b"\xff", "a list": ["a"], "a number": 3, "a boolean": True,
    "an object": {"a": "b"},
}  # fmt: skip


@pytest.mark.parametrize("kind", VALUES)
def test_a_field_that_is_no_string_says_what_it_is(tmp_path, kind):
    value = VALUES[kind]
    rows = [{"text": None, "meta": {"body": None}}, {"text": value, "meta": {"body": value}}]
    rows = [{"text": "a", "meta": {"body": "a"}}, *rows] if kind == "null" else rows[1:]
    table = pa.Table.from_pylist(rows)
    for suffix in (".parquet", ".arrow"):
        write_table(tmp_path / f"a{suffix}", table)
    if kind != "bytes":
        (tmp_path / "a.json").write_text(json.dumps(rows))
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in tmp_path.iterdir():
        row = f"{'line' if path.suffix == '.jsonl' else 'row'} {1 + (kind == 'null')}"
        for field in ("text", "meta.body"):
            with pytest.raises(MemdecError) as refused:
                list(documents(path, Fields(field)))
            assert str(refused.value) == (
                f"{path}, {row}: every row needs a string field `{field}`, here it is {kind}: "
                "write a string there, give another field with --text-field (corpus.text_field), "
                "or leave the file out."
            )


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl"])
def test_what_lies_beside_a_field_is_not_read(tmp_path, suffix):
    """A time that Python cannot hold, in an object whose other field is the text."""
    path = tmp_path / f"a{suffix}"
    times = pa.array([2**62, None], pa.timestamp("us"))
    body = pa.StructArray.from_arrays([pa.array(["a", "b"])], ["body.raw"])
    meta = pa.StructArray.from_arrays([body, times], ["x", "time"])
    if suffix == ".jsonl":
        path.write_text('{"meta": {"x": {"body.raw": "a"}}}\n{"meta": {"x": {"body.raw": "b"}}}')
    else:
        write_table(path, pa.table({"time": times, "meta": meta}))
    assert list(documents(path, Fields("meta.x.body.raw"))) == ["a", "b"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".csv"])
def test_columns_of_one_name_are_refused(tmp_path, suffix):
    """As a join of two tables leaves them: which is meant?"""
    path = tmp_path / f"a{suffix}"
    table = pa.Table.from_arrays([pa.array([x]) for x in "abcd"], ["id", "text", "id", "text"])
    if suffix == ".csv":
        path.write_text("id,text,id,text\na,b,c,d\n")
    else:
        write_table(path, table)
    with pytest.raises(MemdecError) as refused:
        list(documents(path))
    assert str(refused.value) == f"{path} has 2 columns `text`: rename all but one."


def write_table(path, table):
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".arrow", ".csv"])
def test_long_names_of_fields_are_cut(tmp_path, suffix):
    """A file without a header has text for names, and objects may be keyed by addresses."""
    name, path = "a name\nof " + "many words " * 20, tmp_path / f"a{suffix}"
    table = pa.table({name: ["a"], "id": ["b"]})
    if suffix in (".parquet", ".arrow"):
        write_table(path, table)
    elif suffix == ".csv":
        path.write_text(f'"{name}",id\na,b\n')
    else:
        path.write_text(json.dumps(table.to_pylist()[0]))
    with pytest.raises(
        MemdecError, match=r"it has a name of many words many words many \.\.\., id: "
    ):
        list(documents(path))


def test_no_file_is_held_whole(tmp_path):
    """40 MB of text in each format, in less than 12 MB."""
    texts = [f"{n} " + "words of a document " * 1000 for n in range(2000)]
    for suffix in (".json", ".jsonl", ".csv", ".arrow", ".jsonl.zst", ".json.gz"):
        path = write(tmp_path / f"a{'.' + suffix.split('.')[1]}", texts)
        if suffix.count(".") > 1:
            data = COMPRESS["." + suffix.split(".")[2]](path.read_bytes())
            path = tmp_path / f"b{suffix}"
            path.write_bytes(data)
        tracemalloc.start()
        assert sum(1 for piece in pieces(path) for _ in read_documents(piece)) == 2000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12e6, (suffix, peak)
        path.unlink()


@pytest.mark.parametrize("suffix", [".parquet", ".parquet.gz", ".arrow", ".arrow.gz"])
@pytest.mark.parametrize("parts", [1, 8])
def test_no_table_is_held_whole(tmp_path, suffix, parts):
    """20 MB in one row group or record batch, or in eight, beside another column as large."""
    rows = 4000
    texts = [f"{n:04}" * 1250 for n in range(rows)]
    table = pa.table({"text": texts, "other": texts})
    path = tmp_path / f"a{suffix.removesuffix('.gz')}"
    if suffix.startswith(".parquet"):
        pq.write_table(table, path, rows // parts, compression="none", use_dictionary=False)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=rows // parts)
    if suffix.endswith(".gz"):
        data, path = path.read_bytes(), tmp_path / f"a{suffix}"
        path.write_bytes(gzip.compress(data, 0))
        del data
    held, before = 0, pa.total_allocated_bytes()
    tracemalloc.start()
    for _ in documents(path):
        of_python = tracemalloc.get_traced_memory()[0]
        held = max(held, of_python + pa.total_allocated_bytes() - before)
    tracemalloc.stop()
    assert held < 12e6  # a page of a column has 1,024 rows, 5 MB, and these are strings as well


def test_data_beside_what_datasets_writes(tmp_path):
    as_arrow(tmp_path / "data-00000-of-00001.arrow", [DOCUMENT])
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text(json.dumps({"version": "x" * 9000}))
    assert list(documents(tmp_path)) == [DOCUMENT]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".arrow", ".csv"])
def test_the_text_in_another_field(tmp_path, suffix):
    rows = [{"id": n, "body": f"{n}: {DOCUMENT}", "meta": {"raw": DOCUMENT}} for n in range(3)]
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        path.write_text("id,body,meta.raw\n1,one,two\n")
        expected = {"body": ["one"], "meta.raw": ["two"]}  # a name with a dot of its own
    else:
        table = pa.Table.from_pylist(rows)
        if suffix in (".parquet", ".arrow"):
            write_table(path, table)
        else:
            lines = "\n".join(map(json.dumps, rows))
            path.write_text(lines if suffix == ".jsonl" else f"[{lines.replace(chr(10), ',')}]")
        expected = {"body": [r["body"] for r in rows], "meta.raw": [DOCUMENT] * 3}
    for name, texts in expected.items():
        assert list(documents(path, Fields(name))) == texts
    with pytest.raises(MemdecError, match="it has id, body, meta.*--text-field"):
        list(documents(path))
    with pytest.raises(MemdecError, match="`meta.nothing`, it has .*meta.raw"):
        list(documents(path, Fields("meta.nothing")))


def test_a_build_of_another_field(memdec_here, tiny_model, tmp_path, english):
    """It is the same corpus: what names the field is in no manifest."""
    base, outputs = tiny_model("llama"), []
    for name, field in (("text", None), ("body", "meta.body")):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"text": t} if field is None else {"meta": {"body": t}} for t in english(40)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["build", "--base", base, "--corpus", path, "--output", tmp_path / name]
        words += ["--until", "corpus", "--ray-address", "none", "--set", "corpus.block_tokens=32"]
        code, _, err = memdec_here(*words, *(["--text-field", field] if field else []))
        assert code == 0, err
        manifest = json.loads((tmp_path / name / "corpus" / "manifest.json").read_text())
        assert "text_field" not in manifest["settings"]
        outputs.append(manifest["hash"])
    assert outputs[0] == outputs[1]
    code, _, err = memdec_here(*words)
    assert code == 1 and "it has meta.body: give the right one with --text-field" in err


def test_a_sample_of_another_field(tmp_path):
    """What `memdec plan` reads, of a compressed file its share."""
    rows = "".join(json.dumps({"body": f"{n}: {DOCUMENT}"}) + "\n" for n in range(100))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(rows.encode()))
    size = path.stat().st_size
    sample, read, total = probes.sample_text(path, tmp_path, Fields("body"))
    assert len(list(documents(sample))) == 100 and read == total == size


@pytest.mark.parametrize("limit", [500, 10**6])
def test_a_large_file_is_sampled_from_its_beginning(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(probes, "SAMPLE_BYTES", limit)
    path = write(tmp_path / "a.json", [f"{n:03}: {DOCUMENT}" for n in range(100)])
    sample, read, total = probes.sample_text(path, tmp_path, readers.TEXT)
    assert read == pytest.approx(total * len(list(documents(sample))) / 100, abs=1)


@pytest.mark.parametrize(
    ("command", "options"),
    [("evaluate", ["--text"]), ("alpha", ["--text"]), ("calibrate", ["--general", "--domain"])],
)
def test_other_commands_read_another_field(memdec_here, pipeline, tmp_path, command, options):
    path = write(tmp_path / "a.jsonl", ["other"])
    words = [pipeline.output / "export", "--base", pipeline.base, "--text-field", "body"]
    words += [word for option in options for word in (option, path)]
    code, _, err = memdec_here(command, *words)
    assert code == 1 and "needs a string field `body`, it has text: give the right one" in err


def test_builds_of_one_document_in_every_format(build, tiny_model, tmp_path, english):
    """A folder with the document in one format gives the corpus that any other format gives."""
    text, made = "\n\n".join(english(12)), {}
    for suffix in FORMATS:
        (tmp_path / suffix).mkdir()
        path = tmp_path / suffix / f"a{suffix}"
        if suffix in (".html", ".htm"):
            path.write_text(f"<html><body><pre>{html.escape(text)}</pre></body></html>")
        else:
            WRITERS[suffix](path, [text])
        output = tmp_path / f"out{suffix}"
        build(tiny_model("llama"), path.parent, output, until="corpus")
        made[suffix] = json.loads((output / "corpus" / "manifest.json").read_text())["hash"]
    assert len(set(made.values())) == 1, made
