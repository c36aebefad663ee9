"""What the operating system refuses is told as that: nobody is told to delete what is whole.

And what the sentence says to do works: the run after it keeps what was finished.
"""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import sys
from pathlib import Path

import faiss
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.artifacts import open_artifact
from vllm_memdec.train.data.documents import documents
from vllm_memdec.train.data.shards import load_shard
from vllm_memdec.train.executor.context import RAM_BUDGET
from vllm_memdec.train.faults import fault, sentence_of
from vllm_memdec.train.model.huggingface import load_config, load_model, load_tokenizer
from vllm_memdec.train.pipeline import STAGES
from vllm_memdec.train.stages.search import Index
from vllm_memdec.train.verify.report import FAILED, verify

REFUSED = {}  # pattern of a path -> the number of the error that opening it raises


def refuse(event, arguments):
    if event == "open" and REFUSED and isinstance(arguments[0], (str, os.PathLike)):
        for pattern, number in REFUSED.items():
            if re.search(pattern, os.fspath(arguments[0])):
                raise OSError(number, os.strerror(number), os.fspath(arguments[0]))


sys.addaudithook(refuse)  # asked by Python whenever it opens a file; there for good


@contextlib.contextmanager
def refusing(pattern, number):
    REFUSED[pattern] = number
    try:
        yield
    finally:
        REFUSED.clear()


@contextlib.contextmanager
def handles(more=None, limit=None):
    """Let this process have so many open files, or so many more than it has."""
    before, held = resource.getrlimit(resource.RLIMIT_NOFILE), []
    if limit is None:
        last = max(int(name) for name in os.listdir("/proc/self/fd"))
        while not held or held[-1] < last:  # the limit is one of numbers: leave no gaps below it
            held.append(os.open(os.devnull, os.O_RDONLY))
        limit = held[-1] + 1 + more
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for handle in held:
            os.close(handle)


def hash_of(output, stage):
    return json.loads((output / stage / "manifest.json").read_text())["hash"]


AWAY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.ENOMEM, errno.EMFILE,
        errno.ENFILE)  # fmt: skip


def names(numbers):
    return [errno.errorcode[number] for number in numbers]


@pytest.mark.parametrize("number", AWAY, ids=names(AWAY))
def test_what_is_said(number):
    error = OSError(number, os.strerror(number), "/data/keys-00000.npy")
    said = sentence_of(error)
    assert said.endswith(".") and "delete" not in said and "damaged" not in said
    expected = {errno.EMFILE: "ulimit -n", errno.ENFILE: "close other programs",
                errno.ENOMEM: "out of memory", errno.EACCES: "no permission for /data/keys",
                }.get(number, "/data/keys-00000.npy cannot be read or written now")  # fmt: skip
    assert expected in said
    wrapped = RuntimeError("a library lost its grip")
    wrapped.__cause__ = error
    assert sentence_of(wrapped) == said
    assert sentence_of(ValueError(os.strerror(number))) is None  # of a value, whatever its words


def test_what_is_no_fault():
    for error in (MemdecError("x."), FileNotFoundError(2, "none", "x"), KeyError("Stale file"),
                  RuntimeError("shape"), EOFError()):  # fmt: skip
        assert fault(error) is None
    assert sentence_of(RuntimeError("CUDA out of memory. Tried to")).startswith("out of memory:")


@pytest.mark.parametrize("number", AWAY, ids=names(AWAY))
def test_every_reader_says_so(pipeline, number):
    out = pipeline.output
    readers = {
        r"keys-00000\.npy$": lambda: load_shard(out / "datastore", "keys", 0),
        r"index/manifest\.json$": lambda: open_artifact(out / "index"),
        r"a\.txt$": lambda: list(documents(out.parent / "a.txt")),
        r"/config\.json$": lambda: load_config(pipeline.base),
        r"/tokenizer\.json$|tokenizer_config": lambda: load_tokenizer(pipeline.base),
    }
    (out.parent / "a.txt").write_text("Some text.")
    for pattern, read in readers.items():
        with refusing(pattern, number), pytest.raises(OSError) as raised:
            read()
        assert raised.value.errno == number, pattern


def test_libraries_without_handles(pipeline, tmp_path):
    """Those that open files in C++ or Rust say it in words of their own."""
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["Some text."]}), table)
    index = Index(pipeline.output / "index", 32, RAM_BUDGET)
    queries = load_shard(pipeline.output / "datastore", "keys", 0)[:2].astype("float32")
    load_model(pipeline.base), list(documents(table)), index.facts  # imports
    for read in (
        lambda: load_model(pipeline.base),
        lambda: list(documents(table)),
        lambda: Index(index.folder, 32, RAM_BUDGET).search(queries, 3),
    ):
        for more in range(4):
            with contextlib.suppress(OSError), handles(more):
                try:
                    read()
                except Exception as error:
                    assert error.errno == errno.EMFILE, error
                    raise
    damaged = shutil.copytree(index.folder, tmp_path / "index")
    path = next(damaged.glob("lists*.faiss"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MemdecError, match="damaged or missing: delete the folder"):
        Index(damaged, 32, RAM_BUDGET).search(queries, 3)


MANY = {"corpus": {"block_tokens": 16, "shard_blocks": 1}, "memory": {"epochs": 0.02},
        "targets": {"neighbours": 4}, "datastore": {"batch_blocks": 1}}  # fmt: skip


@pytest.fixture(scope="module")
def many(pipeline, tmp_path_factory, english, build, quick):
    """Return a build of 400 shards, made of 400 files with 256 handles."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "corpus").mkdir()
    for n, text in enumerate(english(400, 1, seed=3)):
        (folder / "corpus" / f"{n:03d}.txt").write_text(text)
    with handles(limit=256):
        build(pipeline.base, folder / "corpus", folder / "out", quick(MANY))
    return folder / "out"


def test_400_shards_with_256_handles(many, pipeline):
    assert len(list((many / "targets").glob("probs-*.npy"))) >= 400
    with handles(limit=256):
        results = verify(many, sample=64, base=Path(pipeline.base))
    wrong = {check.name: check.detail for check in results if check.status == FAILED}
    assert wrong.keys() <= {"fidelity"}, wrong  # which has learned nothing
    assert all("open files" not in check.detail for check in results)


def test_no_reader_holds_more_than_it_reads(many, monkeypatch):
    """Files that are mapped stay open: counted at every one that is opened."""
    from vllm_memdec.train.data import shards

    peak, load = [0], shards.load_array

    def counted(path):
        peak[0] = max(peak[0], len(os.listdir("/proc/self/fd")))
        return load(path)

    monkeypatch.setattr(shards, "load_array", counted)
    before = len(os.listdir("/proc/self/fd"))
    verify(many, sample=16)
    assert peak[0] - before <= 16


@pytest.mark.parametrize("number", AWAY, ids=names(AWAY))
def test_verify_does_not_call_it_damage(pipeline, memdec_here, number, tmp_path):
    report = tmp_path / "report.json"
    with refusing(r"targets/ids-00001\.npy$", number):
        code, out, err = memdec_here("verify", pipeline.output, "--sample", 8)
    assert code == 1 and "delete" not in err and "damaged" not in out, err
    with refusing(r"targets/(ids|probs)-00001\.npy$", number):
        # Hashed before it was away.
        from vllm_memdec.train.verify import report as checking

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checking, "file_sha256", lambda path: digest(path))
            code, out, err = memdec_here("verify", pipeline.output, "--sample", 8, "--json", report)
    assert code == 1 and "delete" not in err, err
    results = {check["name"]: check for check in json.loads(report.read_text())["checks"]}
    assert results["files"]["status"] == "ok"
    assert results["probabilities"]["status"] == FAILED
    assert "no file is known damaged" in results["probabilities"]["fix"]


def digest(path):
    return json.loads((path.parent / "manifest.json").read_text())["files"][path.name]["sha256"]


# Of each stage a file that it reads in its middle, and where finished shards would be lost.
READ = {
    "corpus": r"corpus\.jsonl$",
    "datastore": r"corpus/tokens-train-00003\.npy$",
    "index": r"datastore/keys-00002\.npy$",
    "targets": r"datastore/labels-00003\.npy$",
    "memory": r"targets/ids-00002\.npy$",
    "export": r"corpus/positions-validation-00000\.npy$",
}
# And one that it writes there.
WRITTEN = {
    "corpus": r"corpus\.partial/positions-train-00002\.npy\..*tmp$",
    "datastore": r"datastore\.partial/labels-00003\.npy\..*tmp$",
    "index": r"index\.partial/lists-00000\.faiss\..*tmp$",
    "targets": r"targets\.partial/probs-00003\.npy\..*tmp$",
    "memory": r"memory\.partial/logs/loss\.png\..*tmp$",
    "export": r"export\.partial/tokenizer_config\.json$",
}
NUMBERS = dict(zip(STAGES, (errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES) * 2))  # noqa: B905


@pytest.mark.parametrize("stage", STAGES)
def test_a_build_goes_on_afterwards(pipeline, command, quick, stage):
    """What cannot be read for a while, then a full disk: finished stages and shards are kept."""
    memdec = command(pipeline.base, pipeline.corpus, quick())
    shutil.copytree(pipeline.output, memdec.output)
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(memdec.output / later)
    with refusing(READ[stage], NUMBERS[stage]):
        code, err = memdec.here(until=stage)
    assert code == 1 and "Traceback" not in err, err
    said = err.splitlines()[-1]
    assert "delete" not in said and "damaged" not in said, said
    with refusing(WRITTEN[stage], errno.ENOSPC):
        code, err = memdec.here(until=stage)
    assert code == 1 and err.splitlines()[-1].startswith("memdec: the disk is full: free"), err
    assert not list(memdec.output.rglob("*.tmp"))
    # A shard of several files that lacks one is made again.
    done = {p: p.stat().st_mtime_ns for p in memdec.output.rglob("*-0000[0-2].npy")}
    assert stage not in ("datastore", "targets") or any(".partial" in str(p) for p in done)
    code, err = memdec.here(until=stage)
    assert code == 0, err
    assert "starting over" not in err and "building again" not in err
    for path, when in done.items():
        kept = Path(str(path).replace(".partial", ""))
        assert not kept.exists() or kept.stat().st_mtime_ns == when, path
    assert hash_of(memdec.output, stage) == hash_of(pipeline.output, stage)


def test_a_manifest_that_cannot_be_read_rebuilds_nothing(pipeline, build, tmp_path):
    """It was taken for a damaged one, and a week's work was made again."""
    out = shutil.copytree(pipeline.output, tmp_path / "out")
    for name in ("datastore/manifest.json", "memory/manifest.json"):
        with refusing(f"out/{name}$", errno.EIO), pytest.raises(OSError):
            build(pipeline.base, pipeline.corpus, out)
    (out / "memory").rename(out / "memory.partial")
    (out / "memory.partial/plan.json").write_bytes((out / "index/manifest.json").read_bytes())
    with refusing(r"memory\.partial/plan\.json$", errno.EIO), pytest.raises(OSError):
        build(pipeline.base, pipeline.corpus, out)
    assert (out / "memory.partial/model.safetensors").exists()


def test_the_limit_that_is_printed_is_enough(pipeline, command, quick):
    """Too few handles, then as many as the sentence says."""
    memdec = command(pipeline.base, pipeline.corpus, quick())
    shutil.copytree(pipeline.output, memdec.output)
    for stage in ("targets", "memory", "export"):
        shutil.rmtree(memdec.output / stage)
    with handles(more=3):
        code, err = memdec.here(until="targets")
    said = err.splitlines()[-1]
    assert code == 1 and "too many open files" in said, err
    limit = int(re.search(r"`ulimit -n (\d+)`", said)[1])
    with handles(limit=limit):
        code, err = memdec.here(until="targets")
    assert code == 0 and "index: up to date" in err, err
    assert hash_of(memdec.output, "targets") == hash_of(pipeline.output, "targets")


def test_faiss_still_says_it_in_these_words(tmp_path):
    path = str(tmp_path / "x.faiss")
    faiss.write_index(faiss.IndexFlatL2(4), path)
    with handles(0), pytest.raises(RuntimeError) as raised:
        faiss.read_index(path)
    assert fault(raised.value).errno == errno.EMFILE


@pytest.mark.parametrize(
    ("name", "read_by"),
    [("targets/ids-00001.npy", "memory"), ("datastore/keys-00002.npy", "index")],
)
def test_deleting_the_folder_that_is_named_mends_it(pipeline, command, quick, name, read_by):
    """A shard that is damaged within its size: what the build says, and what verify says."""
    memdec = command(pipeline.base, pipeline.corpus, quick())
    shutil.copytree(pipeline.output, memdec.output)
    path, stage = memdec.output / name, name.split("/")[0]

    def damage():
        path.write_bytes(b"\0" * path.stat().st_size)

    damage()
    shutil.rmtree(memdec.output / read_by)
    code, err = memdec.here(until=read_by)
    assert code == 1 and f"{path} is damaged or missing" in err, err
    shutil.rmtree(re.search(r"delete the folder (\S+) and build again", err)[1])
    code, err = memdec.here(until=read_by)
    assert code == 0 and "building again" not in err, err
    damage()
    code, _, err = memdec.memdec_here("verify", memdec.output / stage, "--sample", 8)
    said = re.search(r"delete the (\w+) folder and run the same memdec build again", err)
    assert code == 1 and said[1] == stage, err
    shutil.rmtree(memdec.output / said[1])
    code, err = memdec.here(until=read_by)
    assert code == 0 and f"{read_by}: up to date" in err, err
    assert hash_of(memdec.output, stage) == hash_of(pipeline.output, stage)
