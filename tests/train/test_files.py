"""Which files of a folder are a corpus: links once, nothing hidden, the rest is named."""

import gzip
import json

import pyarrow as pa
import pytest

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.documents import documents
from vllm_memdec.train.data.files import COMPRESSIONS, corpus_files

TEXT = "Words of a corpus. " * 20


@pytest.fixture
def folder(tmp_path):
    """Return a folder with one text, linked data beside it not counted."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("first")
    return tmp_path / "corpus"


def test_linked_files_are_read_once(folder, tmp_path):
    data = tmp_path / "data"
    (data / "part").mkdir(parents=True)
    (data / "part" / "b.txt").write_text("second")
    (folder / "linked").symlink_to(data)
    (folder / "again").symlink_to(data / "part")
    (folder / "relative.txt").symlink_to("a.txt")
    (folder / "z.txt").symlink_to(data / "part" / "b.txt")
    assert sorted(documents(folder)) == ["first", "second"]


def test_a_link_without_its_suffix_in_the_store(folder, tmp_path):
    """Caches of data keep a file under its hash; the link has the name."""
    (tmp_path / "0a1b2c").write_text("second")
    (folder / "b.txt").symlink_to(tmp_path / "0a1b2c")
    assert list(documents(folder)) == ["first", "second"]


def test_loops_of_links_end(folder, tmp_path):
    (folder / "self").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    (folder / "deep").mkdir()
    (folder / "deep" / "back").symlink_to("..")
    (folder / "nothing").symlink_to("nothing")
    (tmp_path / "not_of_the_corpus.txt").write_text("other")
    files = corpus_files(folder)
    assert files.files == [folder / "a.txt"]
    assert files.left_out() == "1 links to what is not there, 3 links to a folder that they lie in"


def test_links_to_nothing_stop_the_build(folder):
    for name in "bcd":
        (folder / f"{name}.txt").symlink_to(f"/nowhere/{name}")
    with pytest.raises(MemdecError, match="3 links to what is not there.*git annex get"):
        corpus_files(folder)


def test_what_is_hidden_is_no_text(folder):
    for name in (".git", ".ipynb_checkpoints", ".cache", "deep/.hidden"):
        (folder / name).mkdir(parents=True)
        (folder / name / "b.txt").write_text(TEXT)
    (folder / "._a.txt").write_bytes(b"\0\5\x16\7" + b"\0" * 4000)
    assert list(documents(folder)) == ["first"]
    assert corpus_files(folder).hidden == 5
    assert list(documents(folder / ".git")) == [TEXT]  # the user named it


def test_what_is_left_out_is_named(folder):
    (folder / "a.txt").write_text(TEXT * 10)
    for name, size in (("b.pdf", 2000), ("c.PDF", 1000), ("notes", 5), ("d.png", 90_000)):
        (folder / name).write_bytes(b"x" * size)
    assert corpus_files(folder).left_out() == (
        "1 .png (90.0 kB), 2 .pdf (3.0 kB), 1 without a suffix (5 bytes)"
    )
    (folder / "b.pdf").write_bytes(b"x" * 2500)
    (folder / "c.PDF").write_bytes(b"x" * 2500)
    with pytest.raises(MemdecError) as refused:
        corpus_files(folder)
    for part in ("most of", "2 .pdf (5.0 kB)", "1 files (3.8 kB)", "pdftotext", "README.md"):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "suffix", [*(f".jsonl{c}" for c in COMPRESSIONS), ".parquet", ".arrow", ".parquet.gz"]
)
def test_a_file_of_no_bytes_that_should_have_a_header(folder, suffix):
    """An interrupted copy leaves it; one format's library names its codec, another says nothing."""
    (folder / f"b{suffix}").touch()
    for path in (folder, folder / f"b{suffix}"):
        with pytest.raises(MemdecError) as refused:
            list(documents(path))
        assert str(refused.value) == (
            f"{folder / 'b'}{suffix} has 0 bytes, which no {suffix[1:]} file has: copy it again, "
            "or remove it."
        )
    (folder / f"c{suffix}").touch()
    with pytest.raises(MemdecError, match=r"file has \(1 more are like it\): copy"):
        list(documents(folder))


def test_a_text_of_no_bytes_is_no_document(folder):
    """Tools that write a file a worker leave some of them empty."""
    for suffix in (".txt", ".jsonl", ".json", ".csv", ".html"):
        (folder / f"b{suffix}").touch()
    (folder / "c.txt.gz").write_bytes(gzip.compress(b""))
    assert list(documents(folder)) == ["first"]


def test_caches_of_datasets_are_left_out(folder):
    """Its maps and filters leave all rows once more beside the data."""
    table = pa.table({"text": [TEXT] * 20})
    for name in ("cache-0a1b2c3d.arrow", "cache-4e5f_00000_of_00002.arrow", "data.arrow"):
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table)
    assert list(documents(folder)) == ["first", *[TEXT] * 20]
    assert corpus_files(folder).counts == {"cache-*.arrow": 2}
    assert len(list(documents(folder / "cache-0a1b2c3d.arrow"))) == 20  # the user named it
    (folder / "data.arrow").unlink()
    assert list(documents(folder)) == ["first"]
    (folder / "a.txt").unlink()
    with pytest.raises(MemdecError, match=r"2 cache-\*.arrow .*save_to_disk"):
        corpus_files(folder)


def test_a_build_says_what_it_left_out(build, tiny_model, folder, tmp_path, english):
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in english(40)))
    (folder / "b.pdf").write_bytes(b"x")
    (folder / ".cache").mkdir()
    lines = build(tiny_model("llama"), folder, tmp_path / "out", until="corpus")
    assert any("left out of" in x and "1 .pdf (1 bytes), 1 hidden" in x for x in lines)
