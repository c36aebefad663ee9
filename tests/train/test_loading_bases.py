"""What people give as a base: models in other formats, adapters, tokenizers of other packages."""

import importlib.resources
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.inputs import check_model
from vllm_memdec.train.model.huggingface import load_tokenizer

TEXT = "Some words that make a corpus. " * 40
WEIGHTS = "model.safetensors"


@pytest.fixture
def base(tiny_model, tmp_path):
    """Return a base of one's own, to change."""
    return shutil.copytree(tiny_model("llama"), tmp_path / "base")


@pytest.fixture
def memdec(base, tmp_path, command, quick):
    (tmp_path / "a.txt").write_text(TEXT)
    return command(str(base), tmp_path / "a.txt", quick())


def adapter(base):
    """Make it what peft saves: no config.json of a model."""
    (base / WEIGHTS).rename(base / "adapter_model.safetensors")
    (base / "config.json").unlink()
    content = {"peft_type": "LORA", "base_model_name_or_path": "someone/else", "r": 8}
    (base / "adapter_config.json").write_text(json.dumps(content))


def adapter_with_config(base):
    config = (base / "config.json").read_bytes()
    adapter(base)
    (base / "config.json").write_bytes(config)


def gguf(base):
    (base / WEIGHTS).unlink()
    (base / "config.json").unlink()
    (base / "model-q4_k_m.gguf").write_bytes(b"GGUF" + bytes(100))


def gguf_with_config(base):
    (base / WEIGHTS).rename(base / "model-q4_k_m.gguf")


def mistral(base):
    (base / WEIGHTS).rename(base / "consolidated.safetensors")
    (base / "config.json").rename(base / "params.json")


def flax(base):
    (base / WEIGHTS).rename(base / "flax_model.msgpack")


HOLDS = "holds a GGUF file, which a build does not read: give --base the folder of the model in Hug"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (adapter, "is an adapter (LoRA) of someone/else, no model: merge it into that"),
        (adapter_with_config, "is an adapter (LoRA) of someone/else, no model: merge it into that"),
        (gguf, HOLDS),
        (gguf_with_config, HOLDS),
        (mistral, "holds a model in its makers' own format (consolidated weights, params.json)"),
        (flax, "has no weights, neither model.safetensors nor pytorch_model.bin: copy the whole"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_refused_before_the_first_stage(base, memdec, change, sentence):
    change(base)
    code, err = memdec.here()
    assert code == 1 and err.startswith(f"memdec: {base} {sentence}"), err
    assert len(err.splitlines()) == 1 and not (memdec.output / "corpus").exists()


def test_a_file_in_place_of_a_folder(base):
    gguf(base)
    with pytest.raises(MemdecError, match="q4_k_m.gguf holds a GGUF file"):
        check_model(str(base / "model-q4_k_m.gguf"), "--base")


def test_pickled_weights_and_the_ways_to_write_a_path(base, memdec, tmp_path, monkeypatch):
    """Old models have pytorch_model.bin; a quoted ~ and a slash at the end name the same folder."""
    torch.save(load_file(base / WEIGHTS), base / "pytorch_model.bin")
    code, err = memdec.here(until="datastore")
    hashes = [(memdec.output / "datastore" / "manifest.json").read_text()]
    assert code == 0, err
    (base / WEIGHTS).unlink()
    monkeypatch.setenv("HOME", str(tmp_path))
    code, err = memdec.here(until="datastore", base="~/base/", corpus="~/a.txt")
    assert code == 0 and "corpus: up to date" in err, err
    files = [json.loads(text)["files"] for text in hashes]
    assert json.loads((memdec.output / "datastore/manifest.json").read_text())["files"] == files[0]


def test_a_tokenizer_whose_reader_is_not_installed(base, monkeypatch):
    for path in base.glob("tokenizer*"):
        path.unlink()
    source = importlib.resources.files("mistral_common") / "data/tokenizer.model.v1"
    Path(base, "tokenizer.model").write_bytes(source.read_bytes())
    assert len(load_tokenizer(str(base))) == 32000
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MemdecError, match="model cannot be read: .*`pip install sentencepiece`"):
        load_tokenizer(str(base))
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    with pytest.raises(MemdecError, match="`pip install sentencepiece protobuf`"):
        load_tokenizer(str(base))
    Path(base, "tokenizer.model").unlink()
    with pytest.raises(MemdecError, match="has no readable tokenizer: copy its tokenizer files"):
        load_tokenizer(str(base))
