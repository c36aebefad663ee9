"""`memdec build` from bases of kinds of their own, and `vllm serve` with what it made."""

import json

import httpx
import pytest
import torch
import yaml
from support import oracle, soak_client
from support.bases import save
from support.multimodal import SAVE
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
    SAVE[name](folder)


def alone(llm, prompts):
    """Return log-probabilities [T-1, V] of what follows each token of each prompt."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [
        torch.tensor([[row[i].logprob for i in range(len(row))] for row in o.prompt_logprobs[1:]])
        for o in outputs
    ]


@pytest.mark.parametrize(
    ("write", "name", "dtype", "memory_type"),
    [
        (save, "Qwen3-MoE", "float32", "qwen3"),
        # vLLM has its recurrent layers in no other format on a CPU.
        (save_multimodal, "qwen3_5", "bfloat16", "qwen3"),
        (save_multimodal, "gemma3", "float32", "gemma3_text"),
    ],
    ids=["Qwen3-MoE", "Qwen3.5, multimodal", "Gemma 3, multimodal"],
)
def test_built_and_served(write, name, dtype, memory_type, tmp_path, engine, forked, monkeypatch):
    """The base is what vLLM serves alone, the memory what transformers has in float64."""
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

    prompts = oracle.prompts(3, 5, 40, VOCAB)
    with engine(str(base), dtype=dtype) as llm:
        base_rows = alone(llm, prompts)
    block = {"model": str(memory), "alpha": ALPHA, "dtype": "float32"}
    server = soak_client.Server(
        {"base": str(base)},
        forked,
        tmp_path / "log",
        block=block,
        options=["--dtype", dtype, "--num-gpu-blocks-override", "400"],
    )
    try:
        answer = httpx.post(
            f"{server.wait().url}/v1/completions",
            json={"model": str(base), "prompt": prompts, "max_tokens": 1, "prompt_logprobs": 5},
            timeout=100,
        ).json()
    finally:
        server.stop()
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    for ids, base_TV, choice in zip(prompts, base_rows, choices, strict=True):
        memory_TV = oracle.log_probs(str(memory), ids, base_TV.shape[1])[:-1]
        expected_TV = ((1 - ALPHA) * base_TV.double().exp() + ALPHA * memory_TV.exp()).log()
        rows = choice["prompt_logprobs"][1:]
        assert len(rows) == len(ids) - 1
        apart = [
            (abs(entry["logprob"] - expected_V[int(i)]), abs(entry["logprob"] - base_V[int(i)]))
            for row, expected_V, base_V in zip(rows, expected_TV, base_TV, strict=True)
            for i, entry in row.items()
        ]
        from_mixture, from_base = (max(values) for values in zip(*apart, strict=True))
        assert from_mixture < oracle.TOLERANCE
        assert from_base > 0.1
