"""`memdec build` from bases of kinds of their own, and vLLM serving them with what it made."""

import json

import pytest
import yaml
from support import oracle
from support.bases import save
from support.tiny_models import VOCAB, tiny_text
from typer.testing import CliRunner

from vllm_memdec.kernels import sparse_kl

ALPHA = 0.4
SETTINGS = {
    "corpus": {"block_tokens": 32},
    "datastore": {"dtype": "float32"},
    "targets": {"neighbours": 16},
    "memory": {"layers": 1, "epochs": 1, "dtype": "float32"},
    "export": {"dtype": "float32"},
}


def save_multimodal(name, folder):
    """Write a base that sees images, with its processors."""
    from support import multimodal

    multimodal.SAVE[name](folder)


@pytest.mark.parametrize(
    ("write", "name", "memory_type"),
    [
        (save, "Qwen3-MoE", "qwen3"),
        (save, "Qwen3.5", "qwen3"),
        (save_multimodal, "gemma3", "gemma3_text"),
    ],
    ids=["Qwen3-MoE", "Qwen3.5", "Gemma 3, multimodal"],
)
def test_built_and_served(write, name, memory_type, tmp_path, engine, monkeypatch):
    from vllm import SamplingParams

    from vllm_memdec.train.cli import app

    monkeypatch.setattr(sparse_kl, "INTERPRETED", False)  # as for users, who have no interpreter
    base, corpus, config = tmp_path / "base", tmp_path / "corpus.jsonl", tmp_path / "settings.yaml"
    base.mkdir()
    write(name, base)
    words = tiny_text(1).split()
    texts = [" ".join(words[n : n + 40]) for n in range(0, 1200, 40)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config.write_text(yaml.safe_dump(SETTINGS))
    options = {"base": base, "corpus": corpus, "output": tmp_path / "out", "config": config}
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    done = CliRunner().invoke(app, ["build", *given, "--ray-address", "none"])
    assert done.exit_code == 0, done.stderr
    memory = tmp_path / "out" / "export"
    assert json.loads((memory / "config.json").read_text())["model_type"] == memory_type

    params = SamplingParams(max_tokens=8, temperature=0, logprobs=5, prompt_logprobs=5)
    prompts = oracle.prompts(3, 5, 40, VOCAB)
    with engine(str(base), {"model": str(memory), "alpha": ALPHA}) as llm:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        own = llm.generate([texts[0]], SamplingParams(max_tokens=4, temperature=0))
    for output in outputs:
        assert oracle.gap(output, str(base), str(memory), ALPHA) < oracle.TOLERANCE
    assert own[0].outputs[0].token_ids
