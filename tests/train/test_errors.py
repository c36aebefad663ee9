"""One sentence for what a user can mend; a traceback, and what to do with it, for a defect."""

import errno
import json
import os
import resource
import shutil
import traceback

import pytest

from vllm_memdec.errors import MemdecError
from vllm_memdec.train import pipeline
from vllm_memdec.train.explained import DEFECT
from vllm_memdec.train.faults import sentence_of
from vllm_memdec.train.model.huggingface import load_config, load_model, load_tokenizer


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemdecError("this is wrong: mend it."), "this is wrong: mend it."),
        (OSError(errno.ESTALE, "Stale file handle", "x"), "Stale file handle"),
        (ValueError("setting an array element with a sequence."), None),  # numpy's, of a defect
        (OSError("no errno: not of the system"), None),
        (KeyError("labels"), None),
    ],
)
def test_whose_mistake_it_is(error, sentence):
    said = sentence_of(error)
    assert said == sentence or sentence and said and sentence in said


WORDS = ("build", "--base", "x", "--corpus", "y", "--output", "z", "--ray-address", "none")


def failing(monkeypatch, error, cause=None):
    def build(*_):
        raise error from cause

    monkeypatch.setattr(pipeline, "build", build)


def test_a_defect_keeps_its_traceback(memdec_here, monkeypatch):
    failing(monkeypatch, ValueError("operands could not be broadcast together"))
    with pytest.raises(ValueError) as raised:
        memdec_here(*WORDS)
    shown = "".join(traceback.format_exception(raised.value)).splitlines()
    assert shown[-2:] == ["ValueError: operands could not be broadcast together", DEFECT]
    assert any(line.endswith("in build") for line in shown)


def test_debug_shows_where_a_mistake_was_found(memdec_here, monkeypatch):
    failing(monkeypatch, MemdecError("this is wrong: mend it."), KeyError("what a library said"))
    code, _, err = memdec_here(*WORDS)
    assert (code, err) == (1, "memdec: this is wrong: mend it.\n")
    code, _, err = memdec_here("--debug", *WORDS)
    assert code == 1 and err.splitlines()[-1] == "memdec: this is wrong: mend it."
    assert "Traceback" in err and "KeyError: 'what a library said'" in err
    assert "Traceback" not in memdec_here(*WORDS)[2]  # of one command only


@pytest.mark.parametrize(
    ("name", "changes", "load", "says"),
    [
        ("tokenizer.json", [1], load_tokenizer, "has no readable tokenizer"),
        ("tokenizer_config.json", None, load_tokenizer, "has no readable tokenizer"),
        ("tokenizer_config.json", {"eos_token": 3}, load_tokenizer, "has no readable tokenizer"),
        ("config.json", 3, load_config, "has no usable config.json"),
        ("config.json", {"hidden_size": "a"}, load_config, "expected int, got str"),
        ("config.json", {"num_attention_heads": 7}, load_model, "not a multiple of the number of"),
        ("generation_config.json", [1], load_model, "no causal LM could be loaded"),
    ],
)
def test_what_libraries_stumble_on_in_a_model_folder(
    tiny_model, tmp_path, name, changes, load, says
):
    """They raise TypeError, AttributeError and classes of their own for a file that is wrong."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(
        json.dumps(content | changes if isinstance(changes, dict) else changes)
    )
    with pytest.raises(MemdecError, match=says) as raised:
        load(str(folder))
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


def test_no_file_handles_is_not_the_folder_s_fault(tiny_model):
    folder = tiny_model("llama")
    load_config(folder)  # imports
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 1, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                load_config(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
