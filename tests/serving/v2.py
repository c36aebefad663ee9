"""Engines on the V2 runner for tests: jobs for run_v2.py, and what their results must show."""

import json
import subprocess
import sys
from pathlib import Path

import oracle

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
        llm["compilation_config"] = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": SIZES,
        }
    return {"llm": llm | options, "batches": requests, "graphs": graphs, "no_wait": True}


def run(jobs, env):
    """Return the results of jobs by their names, all from one process."""
    script = str(Path(__file__).with_name("run_v2.py"))
    run = subprocess.run(
        [sys.executable, script, json.dumps([*jobs.values()])],
        env=env,
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


def worst_error(result, base, chosen):
    """Return the largest error of all log-probabilities; chosen: (memory's folder, weight) each."""
    errors = [
        oracle.worst_error(*request, base, folder, alpha)
        for request, (folder, alpha) in zip(result["requests"], chosen, strict=True)
    ]
    return max(errors)


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
    return modes
