"""`memdec evaluate` and `memdec alpha`: what a memory does beside a base, on any text."""

import json
import shutil

import numpy as np
import pytest
from support.tiny_models import tiny_text
from transformers import AutoTokenizer

from vllm_memdec.checkpoint import read_block, write_block
from vllm_memdec.config import MemoryConfig
from vllm_memdec.gate import write_gate
from vllm_memdec.train.data.blocks import tokenise
from vllm_memdec.train.data.documents import documents
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.model.scoring import mix, perplexity
from vllm_memdec.train.model.windows import alone, joined, window_logprobs

TABLE = [[0, 0.6], [64, 0.2]]


@pytest.fixture(scope="module")
def memory(pipeline, tmp_path_factory):
    """Return a copy of a memory with weights by context and a gate."""
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("compare") / "memory"
    shutil.copytree(pipeline.output / "export", folder)
    write_block(folder, replace(read_block(folder), alpha=0.5, alpha_by_context=TABLE))
    rng = np.random.default_rng(0)
    gate = {
        "w1": rng.normal(size=(4, 96)) / 10,
        "b1": rng.normal(size=4),
        "w2": rng.normal(size=4),
        "b2": np.array(-1.0),
        "certainty": rng.normal(size=(4, 2)),
        "context": rng.normal(size=4),
        "longest": np.array(200),
    }
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    write_gate(folder, gate | {"w1": rng.normal(size=(4, width)) / 10})
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory, english, jsonl):
    """Return two files of short documents."""
    folder = tmp_path_factory.mktemp("texts")
    other = [tiny_text(n, 12) for n in range(30)]
    return [
        jsonl(folder / "domain.jsonl", english(30, 2, seed=5)),
        jsonl(folder / "other.jsonl", other),
    ]


def readings(pipeline, memory, path, width):
    """Return (positions, base, memory) of a text's rows: documents alone, then joined."""
    tokenizer = AutoTokenizer.from_pretrained(pipeline.base)
    ids = list(tokenise(tokenizer, documents(path)))
    models = [load_model(str(folder)) for folder in (pipeline.base, memory)]
    rows = []
    for read in (alone, joined):
        text = read(ids, width, tokenizer.eos_token_id)
        rows.append((text.position_N, *(window_logprobs(model, text) for model in models)))
    return rows


def test_evaluate(pipeline, memory, texts, tmp_path, memdec_here):
    report = tmp_path / "report.json"
    words = ("evaluate", memory, "--base", pipeline.base, "--context", 128, "--json", report)
    code, out, err = memdec_here(*words, "--text", texts[0], "--text", texts[1])
    assert code == 0, out + err
    scores = json.loads(report.read_text())
    assert [*scores["texts"]] == [str(path) for path in texts]
    for path in texts:
        told = scores["texts"][str(path)]
        alone, joined = readings(pipeline, memory, path, 128)
        assert told["context_tokens"] == 128 and told["tokens"] == len(alone[0])
        weights = np.where(alone[0] < 64, 0.6, 0.2)
        for name, logp_N in (
            ("base", alone[1]),
            ("memory", alone[2]),
            ("mixture", mix(*alone[1:], weights)),
            ("fixed", mix(*alone[1:], 0.5)),
        ):
            assert told[name] == pytest.approx(perplexity(logp_N), rel=1e-4)
        position, base, trained = (np.concatenate(pair) for pair in zip(alone, joined, strict=True))
        assert [row["from"] for row in told["by_context"]] == [0, 64]
        for row, alpha in zip(told["by_context"], (0.6, 0.2), strict=True):
            here = (position >= row["from"]) & (position < row["to"])
            assert row["tokens"] == here.sum() > 0
            expected = perplexity(mix(base[here], trained[here], alpha))
            assert row["mixture"] == pytest.approx(expected, rel=1e-4)
            assert row["gate"] > 0 and row["best"] <= row["mixture"] + 1e-4
    assert "documents by themselves" in out + err and "tokens of context" in out + err
    assert memdec_here(*words, "--text", "nowhere.txt")[0] == 1


def test_alpha_for_another_base(pipeline, memory, texts, tmp_path, memdec_here, tiny_model):
    """What it prints serves: the server reads the same weights."""
    report, other = tmp_path / "report.json", tiny_model("llama", seed=9)
    words = ("alpha", memory, "--base", other, "--context", 128, "--json", report)
    code, out, err = memdec_here(*words, "--text", texts[0])
    assert code == 0, out + err
    weights = json.loads(report.read_text())
    both = [np.concatenate(p) for p in zip(*readings_of(other, memory, texts[0]), strict=True)]
    grid = np.linspace(0, 1, 101)
    best = min(grid, key=lambda a: perplexity(mix(both[1], both[2], a)))
    assert weights["alpha"] == pytest.approx(best, abs=0.011)
    assert weights["serve"] in out + err and other in weights["serve"]
    settings = json.loads(weights["serve"].split("'")[1])["memdec"]
    served = MemoryConfig.parse("memory", settings)
    assert served.alpha == "auto" and served.alpha_by_context == weights["alpha_by_context"]
    assert not served.gate  # which was trained beside another base


def readings_of(base, memory, path):
    """Return readings() beside another base."""
    from types import SimpleNamespace

    return readings(SimpleNamespace(base=base), memory, path, 128)
