"""`memdec push`, by the hub's own client against a server that speaks its protocol."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support.hub_server import WRITER

from vllm_memdec.config import MemoryConfig
from vllm_memdec.gate import FILE as GATE
from vllm_memdec.gate import write_gate
from vllm_memdec.train.data import hub
from vllm_memdec.train.data.ownership import CARD_MARK, MANIFEST, retire

BASE, REPO = "someone/base", "someone/memory"
NAMED = ("--base-model", BASE, "--license", "apache-2.0", "--language", "en")
OWN = f"---\nbase_model: {BASE}\n---\n# My own words\n"


@pytest.fixture
def export(pipeline, tmp_path):
    """Return a copy of an export, to be changed."""
    return shutil.copytree(pipeline.output / "export", tmp_path / "export")


@pytest.fixture
def writer(online, monkeypatch):
    """Return the hub, to which the user's token may write."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return online


@pytest.fixture
def push(memdec_here):
    """Return a function that runs `memdec push`: exit code and lines."""

    def run(export, *words, named=NAMED):
        code, out, err = memdec_here("push", export, REPO, *named, *words)
        assert out == "" and WRITER not in err
        return code, err

    return run


def files(writer, branch="main"):
    """Return what the repository holds: name -> content."""
    return writer.commits["models", REPO][writer.branches["models", REPO][branch]]


def add_gate(export, **others):
    """Put a gate beside a memory, with other entries."""
    width = json.loads((export / "config.json").read_text())["hidden_size"]
    rng = np.random.default_rng(0)
    shapes = {"w1": (4, width), "b1": 4, "w2": 4, "b2": (), "certainty": (4, 4), "context": 4}
    gate = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return write_gate(export, gate | {"longest": np.array(64.0)} | others)


def test_what_is_pushed_is_served(writer, export, push, pipeline, memdec_here):
    """Back from the hub it is the memory that was pushed, for serving and for every command."""
    add_gate(export)
    code, err = push(export)
    assert code == 0, err
    commit = writer.branches["models", REPO]["main"]
    assert f"vllm serve {BASE}" in err and f'"revision": "{commit}"' in err
    manifest = json.loads((export / MANIFEST).read_text())
    pushed = files(writer)
    assert pushed.keys() == {*manifest["files"], GATE, "README.md", ".gitattributes"}
    for name in pushed.keys() - {".gitattributes"}:
        assert pushed[name] == (export / name).read_bytes(), name
        if name.endswith((".json", ".md", ".jinja")):
            assert str(export.parent).encode() not in pushed[name], name
    assert writer.cards == [(export / "README.md").read_text()]

    text = ("--text", pipeline.corpus, "--base", pipeline.base)
    told = memdec_here("evaluate", f"{REPO}@{commit}", *text)
    assert told[0] == 0 and told[1] == memdec_here("evaluate", export, *text)[1]
    assert "gate" in told[1]

    with hub.asking():
        served = MemoryConfig.parse("memory", {"model": REPO, "revision": commit})
        own = MemoryConfig.parse("memory", {"model": str(export)})
    assert served.block == own.block and served.gate and served.alpha == "auto"
    assert served.gate_file.read_bytes() == (export / GATE).read_bytes()


def test_an_earlier_memory_is_replaced(writer, export, push):
    """What it had and the new one has not would be read with it; files of others stay."""
    code, err = push(export)
    assert code == 0, err
    old = files(writer) | {"model-00002-of-00002.safetensors": b"", GATE: b"", "LICENSE": b"..."}
    notes = {"images/a.json": b"", "tokenizer_notes.md": b"mine"}
    writer.push("models", REPO, old | notes)
    code, err = push(export)
    assert code == 0 and re.findall(r"removed from someone/memory: (\S+),", err) == [
        GATE, "model-00002-of-00002.safetensors",
    ], err  # fmt: skip
    assert "not uploaded" not in err  # nor is the card of the first push a stranger
    kept = {"LICENSE", *notes, "config.json", "model.safetensors", "README.md"}
    assert kept <= files(writer).keys()
    assert not {GATE, "model-00002-of-00002.safetensors"} & files(writer).keys()


def test_a_branch(server, export, tmp_path):
    """As a user types it, twice: the command's own environment forbids the hub to all else."""
    environment = os.environ | {
        "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITER,
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "",
    }  # fmt: skip
    words = ["push", str(export), REPO, *NAMED, "--revision", "v2"]
    memdec = [sys.executable, "-m", "vllm_memdec.train.cli"]
    for _ in range(2):
        done = subprocess.run(
            [*memdec, *words], env=environment, capture_output=True, text=True, timeout=300
        )
        err = done.stderr
        assert done.returncode == 0 and "Warning" not in err, err
        assert f"The memory is {REPO}@{server.branches['models', REPO]['v2']}. Serve" in err
        assert WRITER not in err and server.url not in err
    assert '"revision": "v2"' in files(server, "v2")["README.md"].decode()
    assert files(server).keys() == {".gitattributes"}


def test_private(writer, export, push):
    code, err = push(export, "--private")
    assert code == 0 and REPO in writer.private and f"{REPO} is private" in err
    code, err = push(export)  # it stays so
    assert code == 0 and f"{REPO} is private" in err
    writer.private.clear()
    before = dict(writer.branches["models", REPO])
    code, err = push(export, "--private")
    assert code == 1 and f"{REPO} is there and public, --private makes only new" in err
    assert writer.branches["models", REPO] == before


def test_a_dry_run(export, push, server, monkeypatch):
    """It asks no hub, needs no token, and leaves the card to be read."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (export / "notes.txt").write_text("for me")
    code, err = push(export, "--dry-run")
    assert code == 0 and "with --dry-run nothing is uploaded" in err and not server.asked
    assert CARD_MARK in (export / "README.md").read_text()
    names = {*json.loads((export / MANIFEST).read_text())["files"], "README.md"}
    assert set(re.findall(r"^  (\S+), [\d,]+ bytes", err, re.M)) == names
    assert "not uploaded: export/notes.txt is no part of the build" in err
    code, err = push(export, "--dry-run", named=("--base-model", BASE))
    assert code == 0 and "names no licence: give --license" in err


def test_a_card_of_the_users_is_pushed_as_it_is(writer, export, push):
    card = export / "README.md"
    card.write_text(OWN)
    code, err = push(export, named=())
    assert code == 0 and files(writer)["README.md"].decode() == OWN, err
    code, err = push(export)
    assert code == 1 and "is a card of your own, which no option changes" in err
    for text, sentence in (
        ("# no head", r"names no base: add `base_model: ORG/NAME` to its head"),
        ("---\n[\n---\n", r"the head of \S+ is no YAML that the hub reads"),
    ):
        card.write_text(text)
        code, err = push(export, named=())
        assert code == 1 and re.search(sentence, err), err
    card.unlink()
    code, err = push(export)
    assert code == 1 and "was not written by memdec: copy it to" in err
    assert files(writer)["README.md"].decode() == OWN
    writer.push("models", REPO, files(writer) | {"README.md": b"---\nlicense: mit\n---\n"})
    code, err = push(export)  # what the hub's page for a new repository writes
    assert code == 0 and CARD_MARK in files(writer)["README.md"].decode()


def test_another_model_is_not_replaced(writer, export, push):
    held = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights"}
    writer.push("models", REPO, held)
    code, err = push(export)
    assert code == 1 and f"{REPO} holds a model that is no memory of memdec" in err
    assert files(writer) == held


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "missing": (lambda e: (e / "model.safetensors").unlink(), "model.safetensors is missing"),
    "short": (lambda e: cut(e / "tokenizer.json"), r"tokenizer.json has [\d,]+ of [\d,]+ bytes"),
    "changed": (lambda e: (e / "tokenizer_config.json").write_bytes(
        (e / "tokenizer_config.json").read_bytes().replace(b" ", b"\t", 1)), "SHA-256 differs"),
    "manifest": (lambda e: (e / MANIFEST).write_text(
        (e / MANIFEST).read_text().replace('"dtype": "float32"', '"dtype": "float64"')),
        "its manifest.json is not what was written"),
    "unfinished": (lambda e: (e / MANIFEST).rename(e / "plan.json"),
                   "its build has not finished: run memdec build again"),
    "no build": (lambda e: (e / MANIFEST).unlink(), "is no finished export: give the export/ of"),
    "gate": (lambda e: add_gate(e, memory=np.array("another")), "trained for other weights than"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_export_is_refused(writer, export, push, case):
    damage, sentence = DAMAGE[case]
    damage(export)
    refused(push(export), sentence)
    assert not writer.asked


def refused(result, sentence):
    """Check that a push failed with one sentence, its last line."""
    code, err = result
    line = err.splitlines()[-1]
    assert code == 1 and line.startswith("memdec: ") and re.search(sentence, line), err
    assert line.endswith(".") and line.count(". ") == 0, line


def test_other_folders(writer, pipeline, push, tmp_path):
    refused(push(pipeline.output), f"is no finished export: give {pipeline.output}/export")
    refused(push(pipeline.output / "memory"), "is no finished export: give the export/")
    refused(push(tmp_path / "nowhere"), "is no finished export: give the export/")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("memory", "--base-model", BASE), "REPO must be a repository of the hub, ORG/NAME"),
        (("a/b/c", "--base-model", BASE), "REPO must be a repository .* got 'a/b/c'"),
        (("some--one/x..y", "--base-model", BASE), "REPO must be a repository"),
        ((REPO, "--base-model", "/models/base"), "--base-model must be a repository"),
        ((REPO, "--revision", "refs/pr/1"), "--revision must be the name of a branch"),
        ((REPO, "--revision", "0" * 40), "--revision must be the name of a branch"),
        ((REPO,), "read from a folder, .*: give --base-model ORG/NAME"),
    ],
)
def test_names_that_cannot_be(writer, export, memdec_here, words, sentence):
    code, out, err = memdec_here("push", export, *words)
    refused((code, err), sentence)
    assert not writer.asked and not (export / "README.md").exists()


SENTENCES = {
    "no token": r"no token of the Hugging Face hub that may write to someone/memory: run `hf auth",
    "token": r"does not accept the token for someone/memory: make one that may .*`hf auth login`",
    "forbidden": r"the token may not write to someone/memory: make one .* or give a REPO of yours",
    "offline": r"with HF_HUB_OFFLINE set .*: unset it to push, or give --dry-run",
    "unreachable": r"cannot be reached for someone/memory \(\w+\): see to the network, or set HF_E",
    "license": r'refuses what it was sent \(Invalid .*: "license" must be .*\): check --license',
    "busy": r"answered 503 for someone/memory: run again later",
    "at once": r"answered 412 for someone/memory: someone else changes it as well, run again",
}


@pytest.mark.parametrize("case", SENTENCES)
def test_one_sentence(writer, export, push, case, monkeypatch, tmp_path):
    from huggingface_hub import constants

    named = NAMED
    if case == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    elif case == "token":
        monkeypatch.setenv("HF_TOKEN", "hf_reader")
    elif case == "forbidden":
        writer.forbidden.add(REPO)
    elif case == "offline":
        monkeypatch.setattr(hub, "OFFLINE", True)
    elif case == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://user:secret@127.0.0.1:9")
    elif case == "license":
        named = ("--base-model", BASE, "--license", "nonsense")
    elif case == "busy":
        writer.failing["commit"] = 503
    else:
        writer.meanwhile[REPO] = {"config.json": b"of someone else"}
    code, err = push(export, named=named)
    refused((code, err), SENTENCES[case])
    assert "secret" not in err and "127.0.0.1" not in err and "hf_reader" not in err
    assert not any(
        "README.md" in held for held in writer.commits.get(("models", REPO), {}).values()
    )


def test_a_build_replaces_its_own_card_alone(tmp_path):
    """A new export drops the old one's card, and keeps what a person wrote."""
    for text, kept in ((f"---\n---\n{CARD_MARK}\n", False), (OWN, True)):
        old, new = tmp_path / "export", tmp_path / "export.partial"
        for folder in (old, new):
            folder.mkdir()
        (old / MANIFEST).write_text('{"files": {}}')
        (old / "README.md").write_text(text)
        retire(old, new, print)
        assert (tmp_path / "export.kept/README.md").exists() == kept
        new.rmdir()
