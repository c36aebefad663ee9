"""What a user can get wrong ends with exit code 1 and one sentence: the problem and its mending.

Most are run in this process, some of every kind as a command of their own.
"""

import json
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vllm_memdec.train.pipeline import STAGES

TEXT = "Some words that make a corpus. " * 40
SMALL = {"corpus": {"block_tokens": 256}, "memory": {"layers": 1}}


def assert_one_sentence(code, err, *parts):
    assert code == 1, err
    # What was done before may have been told.
    lines = [line for line in err.splitlines() if not line.startswith("corpus: tokenising: ")]
    assert len(lines) == 1 and lines[0].startswith("memdec: "), err
    assert lines[0].endswith(".") and "Traceback" not in err
    for part in parts:
        assert part in lines[0]


def no_artifact(output):
    return not output.exists() or not any((output / stage).exists() for stage in STAGES)


def write(name, content):
    """Return a function that writes a corpus file of that content."""

    def make(folder):
        path = folder / name
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def broken_parquet(folder):
    path = write("broken.parquet", pa.table({"text": [TEXT] * 50}))(folder)
    path.write_bytes(path.read_bytes()[:-20])
    return path


def folder_without_text(folder):
    (folder / "folder").mkdir()
    (folder / "folder" / "notes.rst").write_text(TEXT)
    return folder / "folder"


ROW = json.dumps({"text": TEXT})
CORPORA = {
    "missing": (lambda f: f / "nowhere", "nowhere does not exist", "check the path"),
    "empty": (write("a.txt", ""), "a.txt is empty", "give a corpus that holds text"),
    "blank": (write("a.txt", " \n\n "), "a.txt is empty", "give a corpus that holds text"),
    "without text files": (
        folder_without_text, "folder is no text", ".json, .jsonl, .csv, .parquet", "README.md",
    ),
    "binary": (write("a.txt", "ELF\0\1" + TEXT), "a.txt is binary", "convert it to UTF-8"),
    "latin-1": (write("a.txt", "na\xefve".encode("latin-1")), "not UTF-8", "byte 2", "convert"),
    "latin-1 row": (
        write("a.jsonl", ROW.encode() + b'\n{"text": "\xef"}'), "line 2 is not UTF-8", "convert",
    ),
    "broken JSON": (write("a.jsonl", ROW + '\n{"text": "x'), "line 2 is not valid JSON", "mend"),
    "huge number": (write("a.jsonl", "1" * 5000), "line 1 has an integer", "as a string"),
    "row without text": (write("a.jsonl", ROW + '\n{"txt": "x"}'), "line 2", "string field `text`"),
    "row is a list": (write("a.jsonl", "[1]"), "line 1", "string field `text`"),
    "text is a number": (write("a.jsonl", '{"text": 3}'), "line 1", "string field `text`"),
    "half a surrogate": (write("a.jsonl", r'{"text": "\ud800"}'), "line 1 is binary", "leave it"),
    "broken parquet": (broken_parquet, "is not a readable parquet file", "copy it again"),
    "parquet without text": (
        write("a.parquet", pa.table({"body": [TEXT]})), "needs a string column `text`",
    ),
    "parquet of bytes": (
        write("a.parquet", pa.table({"text": pa.array([b"\xff"]).view(pa.string())})),
        "is not a readable parquet file", "copy it again",
    ),
    "parquet with a hole": (
        write("a.parquet", pa.table({"text": [TEXT, None]})), "row 2", "string field `text`",
    ),
    "parquet of numbers": (write("a.parquet", pa.table({"text": [3]})), "string field `text`"),
}  # fmt: skip


@pytest.mark.parametrize("name", CORPORA)
def test_corpus(tiny_model, tmp_path, command, name):
    make, *parts = CORPORA[name]
    memdec = command(tiny_model("llama"), make(tmp_path), {})
    assert_one_sentence(*memdec.here(), *parts)
    assert no_artifact(memdec.output)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"memory": {"epoch": 3}}, ("epoch", "did you mean epochs?")),
        ({"memory": {"epochs": "many"}}, ("memory.epochs must be a number", "'many'")),
        ({"memory": {"beta": 2}}, ("memory.beta must be between 0 and 1",)),
        ("memory: {beta: .nan}", ("memory.beta must be a number, got nan",)),
        ("memory: {beta: [", ("is not valid YAML",)),
    ],
    ids=["unknown", "type", "range", "nan", "yaml"],
)
def test_settings(tiny_model, tmp_path, command, settings, parts):
    corpus = write("a.txt", TEXT)(tmp_path)
    memdec = command(tiny_model("llama"), corpus, settings)
    code, err = memdec.here()
    assert_one_sentence(code, err.replace("?\n", "?.\n"), *parts)
    assert no_artifact(memdec.output)


@pytest.fixture
def memdec(tiny_model, tmp_path, command):
    return command(tiny_model("llama"), write("a.txt", TEXT)(tmp_path), SMALL)


def test_paths(memdec, tmp_path):
    nowhere, occupied = tmp_path / "nowhere", write("file", "")(tmp_path)
    missing = "is not a model folder, it has no config.json: check --base"
    assert_one_sentence(*memdec.here(base=nowhere), f"{nowhere} {missing}")
    assert_one_sentence(*memdec.here(config=nowhere), "nowhere does not exist: check --config")
    assert_one_sentence(
        *memdec.here(validation=nowhere), "nowhere does not exist", "check the path"
    )
    for output in (occupied, occupied / "deeper"):
        is_file = "is a file, not a folder: give another --output"
        assert_one_sentence(*memdec.here(output=output), is_file)
    # No user may create a folder there, not even root.
    writable = "choose a place you may read or write"
    assert_one_sentence(
        *memdec.run(output="/sys/memdec"), "no permission for /sys/memdec", writable
    )
    assert occupied.read_bytes() == b""


def test_brackets_in_a_path_are_shown_as_they_are(memdec, tmp_path):
    path = tmp_path / "[red]x[" / ":warning:"
    assert_one_sentence(*memdec.run(corpus=path), f"{path} does not exist")


def test_corpus_shorter_than_a_block(memdec, tmp_path):
    short = write("short.txt", "Too short.")(tmp_path)
    sentence = ("less than one block of 256", "or lower corpus.block_tokens")
    assert_one_sentence(*memdec.run(corpus=short), *sentence)
    assert no_artifact(memdec.output)


def test_base_without_a_tokenizer(memdec, tiny_model, tmp_path):
    base = shutil.copytree(tiny_model("gpt2"), tmp_path / "base")  # transformers makes one up
    for path in base.glob("tokenizer*"):
        path.unlink()
    assert_one_sentence(
        *memdec.here(base=base), "no readable tokenizer", "copy its tokenizer files"
    )
    assert no_artifact(memdec.output)


def test_memory_that_cannot_be(tiny_model, tmp_path, command):
    """Said before hours of work on the stages that come first."""
    corpus, base = write("a.txt", TEXT)(tmp_path), tiny_model("llama")
    nowhere = command(base, corpus, {"memory": {"init": str(tmp_path / "nowhere")}})
    assert_one_sentence(*nowhere.here(), "nowhere is not a model folder", "check memory.init")
    deep = command(base, corpus, {"memory": {"layers": 3}})
    assert_one_sentence(*deep.here(), "memory.layers is 3", "has only 2 layers: lower it")
    assert no_artifact(deep.output)


def may_mount(folder):
    """Return whether this user may mount a tmpfs in a namespace of its own."""
    mount = f"mount -t tmpfs -o size=4k tmpfs '{folder}'"
    done = subprocess.run(["unshare", "-Urm", "bash", "-c", mount], capture_output=True)
    return done.returncode == 0


def full_disk(tmpfs, folder, kilobytes):
    """Return (unshare or not, shell lines that leave `folder` so little room, and give more).

    Where nothing may be mounted, the kernel's limit on the size of a file stands in.
    """
    if tmpfs and may_mount(folder):
        mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs '{folder}' || exit 9"
        return ["unshare", "-Urm"], mount, "", f"mount -o remount,size=1g '{folder}' || exit 9"
    return [], "", f"ulimit -S -f {min(kilobytes, 500)};", "ulimit -S -f unlimited"


WRITERS = """
import io, pathlib, sys
import faiss, numpy, torch
from safetensors.torch import save_file
from vllm_memdec.train.data.artifacts import write_atomic, write_json
from vllm_memdec.train.faults import sentence_of
from vllm_memdec.train.data.shards import save_array

folder = pathlib.Path(sys.argv[1])
big = numpy.zeros(300_000, numpy.float32)
index = faiss.IndexFlatL2(10)
index.add(big.reshape(-1, 10))
writers = {
    "array": lambda p: save_array(p, big),
    "tofile": lambda p: big.tofile(p),
    "json": lambda p: write_json(p, "x" * 1_200_000),
    "torch": lambda p: write_atomic(p, lambda t: torch.save({"a": torch.from_numpy(big)}, t)),
    "safetensors": lambda p: save_file({"a": torch.from_numpy(big)}, p),
    "faiss": lambda p: write_atomic(p, lambda t: faiss.write_index(index, str(t))),
}
for name, write in writers.items():
    path = folder / name
    try:
        write(path)
        print(name, "was written")
    except Exception as error:
        print(name, sentence_of(error), path.exists() and name not in ("tofile", "safetensors"))
    for left in folder.iterdir():
        left.unlink()
"""


@pytest.mark.parametrize("tmpfs", [True, False], ids=["tmpfs", "file limit"])
def test_a_full_disk_is_understood_whoever_writes(tmp_path, tmpfs):
    disk = tmp_path / "disk"
    disk.mkdir()
    prefix, fill, limit, _ = full_disk(tmpfs, disk, 500)
    script = f'{fill}\n{limit} "$@"'
    command = [*prefix, "bash", "-c", script, "bash", sys.executable, "-c", WRITERS, str(disk)]
    done = subprocess.run(command, capture_output=True, text=True)
    sentence = "the disk is full: free some space and run again, finished parts are kept."
    names = ("array", "tofile", "json", "torch", "safetensors", "faiss")
    assert done.stdout.splitlines() == [f"{name} {sentence} False" for name in names], done.stderr


def test_a_full_disk_in_a_build(pipeline, command, quick, tmp_path, hashes):
    """The disk fills up in the memory stage; with more room the next run goes on from there."""
    memdec = command(pipeline.base, pipeline.corpus, quick({"memory": {"checkpoint_seconds": 0}}))
    whole = shutil.copytree(pipeline.output, tmp_path / "whole")
    for stage in ("memory", "export"):
        shutil.rmtree(whole / stage)
    used = sum(-(-p.stat().st_size // 4096) * 4 for p in whole.rglob("*") if p.is_file())
    memdec.output.mkdir()
    prefix, fill, limit, more = full_disk(True, memdec.output, used + 900)
    script = f"""
        {fill}
        cp -r {whole}/. {memdec.output} || exit 9
        {limit} "$@" 2> {tmp_path}/err; echo $? > {tmp_path}/code
        ls {memdec.output} > {tmp_path}/left
        {more}
        "$@" || exit 9
        cp -r {memdec.output}/. {tmp_path}/result
    """
    code, second = memdec.run(*prefix, "bash", "-c", script, "bash")
    first = (tmp_path / "err").read_text()
    assert (tmp_path / "code").read_text() == "1\n", first
    assert "targets: up to date" in first and "Traceback" not in first
    assert first.splitlines()[-1].startswith("memdec: the disk is full: free some space")
    assert first.count("memdec:") == 1
    left = (tmp_path / "left").read_text().split()
    assert "memory" not in left and {"memory.partial", "targets"} <= set(left)
    assert code == 0 and "memory: resuming" in second
    assert hashes(tmp_path / "result") == hashes(pipeline.output)


def test_output_inside_the_corpus(tiny_model, tmp_path, command):
    """The second run would take what the first one wrote for text."""
    (tmp_path / "a.txt").write_text(TEXT * 20)
    build = command(tiny_model("llama"), tmp_path, SMALL)  # writes to tmp_path/command/out
    code, err = build.here()
    assert_one_sentence(code, err, "lies inside --corpus", "choose a folder outside")
    assert no_artifact(build.output)


def test_validation_file_inside_the_corpus(tiny_model, tmp_path, command):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(TEXT * 20)
    build = command(tiny_model("llama"), folder, SMALL)
    code, err = build.here(validation=folder / "b.txt")
    assert_one_sentence(code, err, "b.txt is in both --corpus and --validation", "move it")


def test_validation_that_is_the_corpus(tiny_model, tmp_path, command):
    """Alpha would be tuned on what the memory knows by heart; a copy has another name."""
    for name in ("a.txt", "copy.txt"):
        (tmp_path / name).write_text(TEXT * 20)
    build = command(tiny_model("llama"), tmp_path / "a.txt", SMALL)
    for same in ("a.txt", "copy.txt"):
        code, err = build.here(validation=tmp_path / same)
        assert_one_sentence(code, err, "--validation is the text of --corpus", "leave --validation")
        assert no_artifact(build.output)
