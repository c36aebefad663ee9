"""The V2 runner's probabilities equal the float64 mixture too: CUDA's default, interpreted here."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
from gates import gate_weights, random_gate
from matrix import CHOICES, Choice, greedy, make_models, memdec_block

from vllm_memdec.gate import write_gate

VOCAB = 1000
LAW, BIO = 0.37, 0.4  # the server's weights


def run_v2(job, env):
    """Return what run_v2.py prints."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_v2.py")), json.dumps(job)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.strip().splitlines()[-1])


@pytest.mark.feature("V2 model runner", note="on a CPU through Triton's interpreter")
def test_mixture(tiny_model, subprocess_env, tmp_path):
    """One batch of three memories and none, prefilled in chunks; one has a gate."""
    base = tiny_model("qwen2")
    folders = {
        "law": tiny_model("llama", seed=1, hidden=96, layers=1, vocab=1024),
        "bio": tiny_model("gpt2", seed=2, layers=1),
        "gated": str(tmp_path / "gated"),
    }
    shutil.copytree(tiny_model("llama", seed=3, layers=1, spread=0.15), folders["gated"])
    write_gate(tmp_path / "gated", random_gate(64, 3))
    memories = {
        "gated": {"model": folders["gated"]},
        "law": {"model": folders["law"], "alpha": LAW},
        "bio": {"model": folders["bio"], "alpha": BIO},
    }
    chosen = [
        ({}, ("law", LAW)),
        ({"memdec_memory": "bio"}, ("bio", BIO)),
        ({"memdec_memory": "none"}, ("law", 0.0)),
        ({"memdec_alpha": 0}, ("law", 0.0)),
        ({"memdec_alpha": 0.6}, ("law", 0.6)),
        ({"memdec_alpha": 0.3, "memdec_memory": "bio"}, ("bio", 0.3)),
        ({"memdec_alpha": 1}, ("law", 1.0)),
        ({"memdec_memory": "gated"}, ("gated", "auto")),
        ({"memdec_memory": "gated", "memdec_alpha": 0.4}, ("gated", "at most 0.4")),
    ]
    params = {"temperature": 0, "max_tokens": 3, "logprobs": 5, "ignore_eos": True}
    prompts = oracle.prompts(len(chosen), 2, 14, VOCAB)
    job = {
        "llm": {
            "model": base,
            "model_impl": "memdec",
            "additional_config": {"memdec": {"memories": memories, "default": "law"}},
            "dtype": "float32",
            "enforce_eager": True,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            "max_model_len": 64,
            "disable_log_stats": True,
        },
        # Every second request asks for its prompt's log-probabilities too.
        "requests": [
            (ids, params | {"extra_args": extra, "prompt_logprobs": None if row % 2 else 5})
            for row, (ids, (extra, _)) in enumerate(zip(prompts, chosen, strict=True))
        ],
    }
    results = run_v2(job, subprocess_env)
    for (prompt, sampled, *rows), (extra, (name, alpha)) in zip(results, chosen, strict=True):
        if name == "gated":
            most = 1.0 if alpha == "auto" else 0.4
            models = folders | {"base": base}
            alpha = gate_weights(models, name, most, [*prompt, *sampled])
        error = oracle.worst_error(prompt, sampled, *rows, base, folders[name], alpha)
        assert error < oracle.TOLERANCE, extra


@pytest.mark.feature("speculation by the memory itself")
def test_drafting(tiny_model, subprocess_env):
    """Greedy answers are the mixture's, prompts in chunks; what agrees is accepted."""
    models = make_models(tiny_model)
    block = memdec_block(models)
    block["memories"]["same"] = {"model": models["base"], "alpha": 0.5}
    choices = [*CHOICES, Choice("same"), Choice("same", 0.3)]
    job = {
        "llm": {
            "model": models["base"],
            "model_impl": "memdec",
            "additional_config": {"memdec": block | {"speculative_tokens": 2}},
            "dtype": "float32",
            "enforce_eager": True,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 32,
            "max_model_len": 64,
            "disable_log_stats": False,
        },
        "metrics": True,
    }
    greedy_params = {"temperature": 0, "max_tokens": 7, "ignore_eos": True}
    prompts = oracle.prompts(len(choices), 2, 20, VOCAB)
    job["requests"] = [
        (ids, greedy_params | {"extra_args": choice.extra_args})
        for ids, choice in zip(prompts, choices, strict=True)
    ]
    *results, drafted, accepted = run_v2(job, subprocess_env)
    folders = models | {"same": models["base"]}
    for (prompt, sampled, *_), choice in zip(results, choices, strict=True):
        name, alpha = ("same", 0.5) if choice.memory == "same" else choice.resolved
        key = greedy(
            {"base": models["base"], "law": folders[name]}, Choice("law", alpha), prompt, 7
        )
        assert sampled == key, choice
    # The two whose memory is the base have two rounds of two accepted drafts each.
    assert 8 <= accepted < drafted
