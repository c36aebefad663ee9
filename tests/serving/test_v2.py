"""The V2 runner's probabilities equal the float64 mixture too: CUDA's default, interpreted here."""

import json
import subprocess
import sys
from pathlib import Path

import oracle
import pytest

DEFAULT = 0.37
ALPHAS = (0.0, 0.3, 0.6, 1.0, None)  # None: the server's default


@pytest.mark.feature("V2 model runner", note="on a CPU through Triton's interpreter")
def test_mixture(tiny_model, subprocess_env):
    """One mixed batch, prefilled in chunks, with a memory of other width, depth and vocabulary."""
    base = tiny_model("qwen2")
    memory = tiny_model("llama", seed=1, hidden=96, layers=1, vocab=1024)
    prompts = oracle.prompts(len(ALPHAS), 2, 14, 1000)
    requests = []
    for ids, alpha in zip(prompts, ALPHAS, strict=True):
        params = {"temperature": 0, "max_tokens": 3, "logprobs": 5, "prompt_logprobs": 5}
        if alpha is not None:
            params["extra_args"] = {"memdec_alpha": alpha}
        requests.append((ids, {**params, "ignore_eos": True}))
    job = {
        "llm": {
            "model": base,
            "model_impl": "memdec",
            "additional_config": {"memdec": {"model": memory, "alpha": DEFAULT}},
            "dtype": "float32",
            "enforce_eager": True,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            "max_model_len": 64,
            "disable_log_stats": True,
        },
        "requests": requests,
    }
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_v2.py")), json.dumps(job)],
        env=subprocess_env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads(run.stdout.strip().splitlines()[-1])
    for (prompt, sampled, *rows), alpha in zip(results, ALPHAS, strict=True):
        weight = DEFAULT if alpha is None else alpha
        error = oracle.worst_error(prompt, sampled, *rows, base, memory, weight)
        assert error < oracle.TOLERANCE, f"alpha {alpha}"
