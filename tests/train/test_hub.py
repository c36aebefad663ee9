"""Ids of the Hugging Face hub in place of paths, against a server that speaks its protocol."""

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data import hub
from vllm_memdec.train.data.files import corpus_files
from vllm_memdec.train.pipeline import STAGES

BASE, CORPUS = "someone/base", "someone/texts"


@pytest.fixture
def stage(command, quick):
    """Return a function: `memdec build` in this process up to a stage; exit code and lines."""

    def run(base, corpus, until="corpus", folder="stage", **options):
        memdec = command(base, corpus, quick(), folder)
        code, err = memdec.here(until=until, **options)
        return code, err, memdec.output

    return run


def sources(output, name):
    return json.loads((output / name / "manifest.json").read_text()).get("sources")


def test_a_build(server, pipeline, command, quick, hashes, tmp_path):
    """As a user runs it: what is made is what a build of the same files on disk makes."""
    base = server.push_folder("models", BASE, pipeline.base, README__md=b"A card.")
    texts = {"data/part.jsonl": pipeline.corpus.read_bytes(), "README.md": b"A card." * 99}
    corpus = server.push("datasets", CORPUS, texts, branch="v1")
    environment = {
        "HF_ENDPOINT": server.url, "HF_HOME": tmp_path / "home", "HF_TOKEN": "hf_secret",
        "HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "",
    }  # fmt: skip
    words = ["env", *(f"{name}={value}" for name, value in environment.items())]
    memdec = command(BASE, f"{CORPUS}@v1", quick())

    code, said = memdec.run(*words)
    assert code == 0 and "hf_secret" not in said and server.url not in said, said
    assert f"--base: {BASE}@{base}" in said and f"--corpus: {CORPUS}@{corpus}" in said
    assert f"vllm serve {BASE} --revision {base} --model-impl memdec" in " ".join(said.split())
    made, wanted = hashes(memdec.output), hashes(pipeline.output)
    assert {s: made[s] for s in STAGES[:5]} == {s: wanted[s] for s in STAGES[:5]}
    names = {BASE: f"{BASE}@{base}", CORPUS: f"{CORPUS}@{corpus}"}
    assert sources(memdec.output, "corpus") == {"tokenizer": names[BASE], "corpus": names[CORPUS]}
    for name in ("datastore", "memory", "export"):
        assert sources(memdec.output, name) == {"base": names[BASE]}
    config = json.loads((memdec.output / "export/config.json").read_text())
    assert config["memdec"]["base"] == names[BASE]
    assert not any(line.startswith("GET") and "README" in line for line in server.asked)


def test_another_commit(online, pipeline, stage):
    """What changes nothing rebuilds nothing; what does is noticed."""
    files = {p.name: p.read_bytes() for p in Path(pipeline.base).iterdir()}
    first = online.push("models", BASE, files)
    code, err, output = stage(BASE, pipeline.corpus)
    assert code == 0 and f"{BASE}@{first}" in err, err
    second = online.push("models", BASE, files | {"README.md": b"A card."})
    code, err, _ = stage(BASE, pipeline.corpus)
    assert f"{BASE}@{second}" in err and "corpus: up to date" in err
    assert sources(output, "corpus") == {"tokenizer": f"{BASE}@{first}"}
    config = json.loads(files["config.json"]) | {"max_position_embeddings": 128}
    third = online.push("models", BASE, files | {"config.json": json.dumps(config).encode()})
    code, err, _ = stage(BASE, pipeline.corpus)
    assert "corpus: building again, its settings or inputs changed" in err
    assert sources(output, "corpus") == {"tokenizer": f"{BASE}@{third}"}
    online.commits.clear()  # what the cache has is enough
    code, err, _ = stage(BASE, pipeline.corpus)
    assert "corpus: up to date" in err
    code, err, _ = stage(f"{BASE}@{first}", pipeline.corpus)
    assert sources(output, "corpus") == {"tokenizer": f"{BASE}@{first}"}, err


def test_a_download_goes_on_where_it_was_cut_off(online, pipeline, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    online.push_folder("models", BASE, pipeline.base)
    online.cut["model.safetensors"] = 1000
    path = Path(hub.model_folder(BASE, "--base", print), "model.safetensors")
    assert path.read_bytes() == Path(pipeline.base, path.name).read_bytes()
    assert [line for line in online.asked if path.name in line][-1].endswith(" bytes=1000-")


def test_a_path_that_is_there_wins(online, pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pipeline.base, BASE)
    assert hub.model_folder(BASE, "--base", print) == BASE
    assert hub.text_path(Path(BASE), "--corpus", print) == Path(BASE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.model_folder(f"~/{BASE}/", "--base", print) == f"{tmp_path}/{BASE}/"
    assert hub.model_folder("missed", "--base", print) == "missed"
    for missed in ("data/corpus.jsonl", "corpus", "/nowhere", "../nowhere/there"):
        assert hub.text_path(Path(missed), "--corpus", print) == Path(missed)
    assert hub.served(BASE) == [BASE] and not online.asked


def test_what_is_fetched(online, tmp_path):
    """One copy of the weights; of a dataset what is read, and nothing of what describes it."""
    weights = {"model.safetensors": b"1", "pytorch_model.bin": b"2", "consolidated.00.pth": b"3"}
    others = {"config.json": b"{}", "onnx/model.onnx": b"4", "original/model.safetensors": b"5"}
    online.push("models", BASE, weights | others)
    folder = Path(hub.model_folder(f"hf://{BASE}", "--base", print))
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}
    del weights["model.safetensors"]
    online.push("models", "some/old", weights | others)
    folder = Path(hub.model_folder("some/old@main", "--base", print, weights=False))
    assert {p.name for p in folder.iterdir()} == {"config.json"}
    folder = Path(hub.model_folder("some/old@main", "--base", print))
    assert {p.name for p in folder.iterdir()} == {"config.json", "pytorch_model.bin"}
    row = b'{"text": "words"}\n'
    packed = gzip.compress(row)
    files = {"a/x.jsonl": row, "a/y.jsonl.gz": packed, "b/z.parquet": row, "README.md": b"card"}
    online.push(
        "datasets", CORPUS, files | {"LICENSE.txt": b"...", "c.png": b"", ".git/d.txt": b""}
    )
    folder = hub.text_path(Path(CORPUS), "--corpus", print)
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert found == ["a/x.jsonl", "a/y.jsonl.gz", "b/z.parquet"]
    online.push("datasets", "some/other", files)
    folder = hub.text_path(Path("hf://datasets/some/other@main/a"), "--corpus", print)
    assert sorted(p.name for p in folder.iterdir()) == ["x.jsonl", "y.jsonl.gz"]
    assert not (folder.parent / "b").exists()
    (folder.parent / "README.md").write_text("a card that another tool fetched")
    assert [p.name for p in corpus_files(folder.parent).files] == ["x.jsonl", "y.jsonl.gz"]
    with pytest.raises(MemdecError, match="some/other/nowhere is no text: convert it, or give"):
        hub.text_path(Path("hf://datasets/some/other/nowhere"), "--corpus", print)
    online.commits.clear()
    lines = []
    hub.text_path(Path(CORPUS), "--corpus", lines.append)
    assert lines[-1] == "--corpus: the hub was not asked if these 3 files of its cache are all"


def test_most_of_a_dataset_would_be_left_out(online):
    """It is refused before anything of it is downloaded; a little is named."""
    files = {"LICENSE.txt": b"...", "notes.txt": b"text", "all.tar.gz": bytes(10_000)}
    online.push("datasets", CORPUS, files)
    sentence = f"most of {CORPUS} would be left out: 1 .tar.gz .10.0 kB.; .* .unpack archives."
    with pytest.raises(MemdecError, match=sentence):
        hub.text_path(Path(CORPUS), "--corpus", print)
    assert not any("/resolve/" in line for line in online.asked)
    online.push("datasets", CORPUS, files | {"more.txt": bytes(20_000)})
    lines = []
    folder = hub.text_path(Path(CORPUS), "--corpus", lines.append)
    assert sorted(p.name for p in folder.iterdir()) == ["more.txt", "notes.txt"]
    assert f"left out of {CORPUS}: 1 .tar.gz (10.0 kB) (train/README.md, What is read)" in lines


SENTENCES = {
    "offline": (
        BASE,
        f"with HF_HUB_OFFLINE set .*unset HF_HUB_OFFLINE, or run `hf download {BASE}`",
    ),
    "unreachable": (f"{BASE}@v2", f"cannot be reached .*hf download {BASE} --revision v2.*HF_ENDP"),
    "absent": (
        "some/where",
        "has no model some/where that you may read: check --base, or `hf auth",
    ),
    "revision": (f"{BASE}@v9", f"its model {BASE} has no revision v9: check --base"),
    "gated": ("some/gated", "its model some/gated is gated: accept its terms on its page"),
    "no id": ("some--where/x..y", "nor can it be an id of the hub: check --base"),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_one_sentence(online, pipeline, stage, case, monkeypatch):
    from huggingface_hub import constants

    given, sentence = SENTENCES[case]
    for name in (BASE, "some/gated"):
        online.push_folder("models", name, pipeline.base)
    online.gated.add("some/gated")
    if case == "offline":
        monkeypatch.setattr(hub, "OFFLINE", True)
    if case == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://user:secret@127.0.0.1:9")
    code, err, output = stage(given, pipeline.corpus)
    [line] = [line for line in err.splitlines() if not line.startswith("--base: ")]
    assert code == 1 and line.startswith(f"memdec: --base: {given} is not there as a path"), err
    assert re.search(sentence, line) and line.endswith(".") and line.count(". ") == 0, line
    assert "secret" not in err and "127.0.0.1" not in err and not (output / "corpus").exists()
    if case == "offline":
        assert not online.asked


def test_code_of_the_hub_is_not_run_unasked(online, pipeline, stage, tmp_path):
    config = json.loads(Path(pipeline.base, "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config["model_type"] = "llama_of_its_own"
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w')".encode()
    given = json.dumps(config).encode()
    online.push_folder("models", BASE, pipeline.base, config__json=given, own__py=code)
    result, err, _ = stage(BASE, pipeline.corpus)
    sentence = (
        "needs code of its own, which is not run unasked: read its .py files, then give --trust"
    )
    assert result == 1 and sentence in err and not marker.exists(), err
    assert (Path(re.search(r"memdec: (\S+) needs", err)[1]) / "own.py").read_bytes() == code


def test_every_command_takes_them(online, pipeline, memdec_here):
    """A memory, its base and text, each from the hub."""
    online.push_folder("models", BASE, pipeline.base)
    online.push_folder("models", "someone/memory", pipeline.output / "export")
    online.push("datasets", CORPUS, {"part.jsonl": pipeline.corpus.read_bytes()})
    beside = ("--base", BASE)
    for words in (
        ("evaluate", "someone/memory", *beside, "--text", CORPUS),
        ("alpha", "someone/memory", *beside, "--text", f"hf://datasets/{CORPUS}"),
        ("explain", "a text", *beside, "--memory", "someone/memory", "--tokens", 1),
        ("verify", pipeline.output / "corpus", *beside),
    ):
        code, _, err = memdec_here(*words)
        assert code == 0 and f"--base: {BASE}@" in err, err
    for words in (
        ("plan", "--base", "some/where", "--tokens", 5000, "--ray-address", "none"),
        ("calibrate", pipeline.output, "--base", BASE, "--domain", "some/where", "--general", "x"),
    ):
        code, _, err = memdec_here(*words)
        assert code == 1 and "some/where that you may read" in err, err


def test_a_memory_to_start_from(online, pipeline, command, quick):
    commit = online.push_folder("models", "someone/memory", pipeline.output / "export")
    settings = quick({"memory": {"init": f"someone/memory@{commit}"}})
    memdec = command(pipeline.base, pipeline.corpus, settings)
    code, err = memdec.here(until="corpus")
    assert code == 0 and f"memory.init: someone/memory@{commit}\n" in err, err
    assert sources(memdec.output, "corpus") is None
