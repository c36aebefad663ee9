"""Data parallelism 2: a mixture of experts, which both ranks hold in common, beside dense memories.

In each step the ranks wait for one another within the base: one with nothing to do runs a dummy
batch. Memories and drafts are each rank's own affair.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import choices
from support.choices import PLAIN, Choice

SCRIPT = Path(choices.__file__).with_name("data_parallel_script.py")
NONE, BIO = Choice("none"), Choice("bio")
# Which requests each rank gets in a round: their choices, and how many tokens.
ROUNDS = [
    ([(PLAIN, 12), (PLAIN, 9)], [(NONE, 20), (NONE, 11)]),
    ([(NONE, 20)], [(PLAIN, 12), (BIO, 9)]),
    ([(PLAIN, 8)], []),
    ([], [(NONE, 8)]),
    ([(BIO, 9), (NONE, 12)], [(PLAIN, 10), (Choice("law", 1.0), 16)]),
]


@pytest.fixture(scope="module")
def models(tiny_model):
    return choices.make_models(tiny_model) | {"base": tiny_model("qwen3_moe")}


def prompt(rank, place, number):
    return [(7 * k + 31 * rank + 3 * place + number) % 1000 for k in range(10 + number)]


@pytest.mark.feature(
    "data parallel 2",
    note="a base of experts held in common; vLLM for CPUs lacks two collectives for it",
    drafts="works",  # both in one test
)
def test_each_rank_answers_for_itself(models, subprocess_env):
    """No rank waits for ever, and each answer is that of its own memory, with drafts and without.

    Where one drafts the other may not, has no memory, or nothing to do.
    """
    block = choices.memdec_block(models)
    llm = {
        "model": models["base"],
        "model_impl": "memdec",
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": 100,
        "disable_log_stats": False,
        "seed": 0,
    }
    sampling = {"temperature": 0, "ignore_eos": True}
    rounds = [
        [
            [
                (prompt(rank, place, n), sampling | {"max_tokens": k, "extra_args": c.extra_args})
                for n, (c, k) in enumerate(asked)
            ]
            for rank, asked in enumerate(both)
        ]
        for place, both in enumerate(ROUNDS)
    ]
    drafts = [{}, {"speculative_tokens": 3}]
    jobs = [
        {"llm": llm | {"additional_config": {"memdec": block | more}}, "rounds": rounds}
        for more in drafts
    ]
    one_process = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run(
        [sys.executable, SCRIPT, json.dumps(jobs)],
        env=subprocess_env | one_process,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-20000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 2 * len(drafts) * len(ROUNDS)
    proposed = {}
    for rank, job, place, found, count in lines:
        wanted = [
            choices.greedy(models, choice, prompt(rank, place, n), tokens)
            for n, (choice, tokens) in enumerate(ROUNDS[place][rank])
        ]
        assert found == wanted, (rank, job, place)
        proposed[job] = max(proposed.get(job, 0), count)
    assert proposed[0] == 0 and proposed[1] > 0
