"""The V2 runner's probabilities equal the float64 mixture too: CUDA's default, interpreted here."""

import json
import subprocess
import sys
from pathlib import Path

import oracle
import pytest

VOCAB = 1000
LAW, BIO = 0.37, 0.4  # the server's weights


@pytest.mark.feature("V2 model runner", note="on a CPU through Triton's interpreter")
def test_mixture(tiny_model, subprocess_env):
    """One batch of both memories and none, prefilled in chunks; no two models are alike."""
    base = tiny_model("qwen2")
    folders = {
        "law": tiny_model("llama", seed=1, hidden=96, layers=1, vocab=1024),
        "bio": tiny_model("gpt2", seed=2, layers=1),
    }
    memories = {
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
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_v2.py")), json.dumps(job)],
        env=subprocess_env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads(run.stdout.strip().splitlines()[-1])
    for (prompt, sampled, *rows), (extra, (name, alpha)) in zip(results, chosen, strict=True):
        error = oracle.worst_error(prompt, sampled, *rows, base, folders[name], alpha)
        assert error < oracle.TOLERANCE, extra
