"""Engines on the V2 runner for tests: jobs for v2_script.py, and what their results must show."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from support import oracle
from transformers import AutoModelForCausalLM

SIZES = [1, 2, 4, 8, 16, 32]  # tokens of a captured graph


def job(base, block, requests, graphs=None, **options):
    """Return a job: batches of requests, each [prompt ids, SamplingParams arguments]."""
    llm = {
        "model": base,
        "model_impl": "memdec",
        "additional_config": {"memdec": block},
        "dtype": "float32",
        "enforce_eager": graphs is None,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "max_model_len": 64,
        "disable_log_stats": False,
    }
    if graphs is not None:
        # vLLM 0.33 tries its sampler's kernels out, of which one is not for the interpreter.
        llm["kernel_config"] = {"enable_jit_warmup": False}
        llm["compilation_config"] = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": SIZES,
        }
    return {"llm": llm | options, "batches": requests, "graphs": graphs, "no_wait": True}


def run(jobs, env):
    """Return the results of jobs by their names, all from one process."""
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [tests, env.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-m", "support.v2_script"],
        input=json.dumps([*jobs.values()]),
        env=env | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads(run.stdout.strip().splitlines()[-1])
    return dict(zip(jobs, results, strict=True))


def answered(results, name):
    """Return one job's result, or fail with its error."""
    assert "error" not in results[name], results[name]["error"][-3000:]
    return results[name]


def check_answers(result, base, chosen, dtype="float32"):
    """Compare log-probabilities and greedy tokens with the float64 mixture."""
    tolerance = oracle.TOLERANCE
    if dtype != "float32":
        tolerance = 2 * rounding(result, base, chosen, dtype)
        assert tolerance < 0.4, "a wrong memory or weight is off by 1 and more"
    assert worst_error(result, base, chosen) < tolerance
    assert shortfall(result, base, chosen) < 2 * tolerance


def worst_error(result, base, chosen):
    """Return the largest error of all log-probabilities; chosen: (memory's folder, weight) each."""
    errors = [
        oracle.worst_error(*request, base, folder, alpha)
        for request, (folder, alpha) in zip(result["requests"], chosen, strict=True)
    ]
    return max(errors)


def rounding(result, base, chosen, dtype):
    """Return the worst error that Hugging Face's own models make in a dtype of 16 bits.

    On the same tokens; vLLM rounds at other places, so its own may be up to twice as large.
    """
    worst = 0.0
    for (prompt, sampled, _, rows), (folder, alpha) in zip(result["requests"], chosen, strict=True):
        ids = [*prompt, *sampled]
        exact_TV = oracle.mixture(base, folder, alpha, ids)
        base_TV, memory_TV = (rounded(name, ids, dtype) for name in (base, folder))
        mixed_TV = (1 - alpha) * base_TV
        shared = min(base_TV.shape[1], memory_TV.shape[1])
        mixed_TV[:, :shared] += alpha * memory_TV[:, :shared]
        error_TV = (mixed_TV.log() - exact_TV).abs()
        for position, row in enumerate(rows, start=len(prompt) - 1):
            worst = max(worst, *(error_TV[position, int(token)].item() for token in row))
    return worst


@torch.no_grad()
def rounded(folder, ids, dtype):
    """Return the probabilities [T, V] of a model that computes in a dtype, by its name."""
    model = load_rounded(folder, dtype)
    rows = model.get_input_embeddings().weight.shape[0]
    return model(torch.tensor([ids]).clamp(max=rows - 1)).logits[0].double().softmax(-1)


@functools.cache
def load_rounded(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def shortfall(result, base, chosen):
    """Return by how much a greedy token is less likely than the likeliest, at most."""
    found = 0.0
    for (prompt, sampled, *_), (folder, alpha) in zip(result["requests"], chosen, strict=True):
        key_TV = oracle.mixture(base, folder, alpha, [*prompt, *sampled])
        for position, token in enumerate(sampled, start=len(prompt) - 1):
            found = max(found, (key_TV[position].max() - key_TV[position, token]).item())
    return found


def ran(step, by="target", mode=None):
    """Return the numbers of the memories that ran in a step, whose tokens went through them."""
    return {
        int(name.removeprefix("memory"))
        for who, name, _, how in step["ran"]
        if who == by and name.startswith("memory") and "head" not in name and mode in (None, how)
    }


def heads(step, by="target"):
    """Return the numbers of the memories whose heads ran in a step."""
    return {
        int(name.removeprefix("memory").removesuffix(" head"))
        for who, name, *_ in step["ran"]
        if who == by and name.startswith("memory") and "head" in name
    }


def check_steps(result, drafts=0):
    """Check that each step ran what its requests asked for, in whichever mode; return the modes."""
    modes = set()
    for step in result["steps"]:
        [mode] = {how for who, name, _, how in step["ran"] if (who, name) == ("target", "base")}
        modes.add(mode)
        assert ran(step) == heads(step) == set(step["used"]), step
        assert ran(step, "draft") in ({*step["used"]} if drafts else set(), set()), step
        for memory, count in step["drafts"]:
            assert memory >= 0 or not count, step
    drafting = [step for step in result["steps"] if ran(step, "draft")]
    assert bool(drafting) == bool(drafts)
    assert result["kept"] == 0, "logits of all drafts pile up"
    return modes
