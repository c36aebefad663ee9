"""Every base that people serve, beside a memory: see support/bases.py.

Each is a real engine of vLLM on tiny random weights as transformers writes them, and is compared
with transformers' own model in float64.
"""

import random

import pytest
from support import bases, mamba1, oracle, v2_process
from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import destroy_model_parallel

PREFIX = 70  # tokens in common: two blocks of 32 or one of 64, and a rest
# In bfloat16, where it is half of that. A weight that is off by 0.1 makes 7e-2, a context of which
# the base knows 10 tokens and no more 0.3.
MEAN_TOLERANCE = 5e-3
GREEDY = {"temperature": 0, "logprobs": 5, "ignore_eos": True}
ON_V2 = ["Granite 4", "Qwen3.5"]  # Mamba 2 and experts, a gated delta net
FAILING = [name for name, how in bases.CASES.items() if how.error]
CHOICES = [  # arguments of a request, and the weight that they stand for
    ({}, 0.6),
    ({"memdec_alpha": 0}, 0.0),
    ({"memdec_alpha": 0.3}, 0.3),
    ({"memdec_alpha": 1}, 1.0),
    ({"memdec_memory": "none"}, 0.0),
]


@pytest.fixture(autouse=True)
def new_groups():
    """vLLM keeps the process groups of a base without experts for one with: they lack its own."""
    destroy_model_parallel()


def save(name, folder, layers=3):
    """Save a base and a memory; return their folders, and how the base is run."""
    how = bases.CASES.get(name, bases.Case())
    base, memory = str(folder / "base"), str(folder / "memory")
    own = {"hidden_size": 96, "num_hidden_layers": layers, "initializer_range": 0.15}
    bases.save(name, base, how.dtype)
    bases.save(bases.decoder("Llama", **own | how.memory), memory, how.dtype, seed=1)
    return base, memory, how


def check(errors, how):
    if how.dtype == "float32":
        assert max(errors) < oracle.TOLERANCE
    else:
        assert sum(errors) / len(errors) < MEAN_TOLERANCE


@pytest.mark.parametrize("name", bases.BASES)
def test_base(name, tmp_path, engine, monkeypatch):
    """Mixed weights in one batch, prompts in chunks, and once more from the prefix cache."""
    base, memory, how = save(name, tmp_path)
    if how.error:
        mamba1.install(monkeypatch)
    for variable, value in how.env.items():
        monkeypatch.setenv(variable, value)
    options = {"block_size": 32, "max_num_batched_tokens": 64, "max_model_len": 256}
    rng = random.Random(0)
    prefix = [rng.randrange(990) for _ in range(PREFIX)]
    prompts = oracle.prompts(len(CHOICES), 3, 30, 990, prefix)
    errors = []
    with engine(base, memory, dtype=how.dtype, **options | how.options) as llm:
        vllm_config = llm.llm_engine.vllm_config
        # A base that vLLM runs by transformers' own class has changed it: it wants its config.
        with set_current_vllm_config(vllm_config):
            oracle.load(base)
        for rows in (5, None):  # of prompts: with them vLLM does not look into the prefix cache
            asked = GREEDY | {"max_tokens": 5, "prompt_logprobs": rows}
            outputs = llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts],
                [SamplingParams(**asked, extra_args=extra) for extra, _ in CHOICES],
                use_tqdm=False,
            )
            for output, (_, alpha) in zip(outputs, CHOICES, strict=True):
                errors += oracle.gaps(output, base, memory, alpha)
        assert all(output.num_cached_tokens >= 64 for output in outputs)
    check(errors, how)


@pytest.mark.parametrize("name", FAILING)
def test_what_vllm_does_not_run_on_a_cpu(name, tmp_path, engine):
    """By itself, either; once vLLM runs it, it belongs among the others."""
    bases.save(name, tmp_path)
    with engine(str(tmp_path)) as llm, pytest.raises(Exception, match=bases.CASES[name].error):
        llm.generate({"prompt_token_ids": [5, 6, 7]}, use_tqdm=False)


def test_v2(tmp_path_factory, subprocess_env):
    """CUDA's default runner, interpreted, reads these prompts in chunks of 32 tokens."""
    made = {name: save(name, tmp_path_factory.mktemp("v2"), layers=1) for name in ON_V2}
    chosen = [CHOICES[0], CHOICES[2], CHOICES[4]]
    asked = GREEDY | {"max_tokens": 4, "prompt_logprobs": 5}
    requests = [
        [ids, asked | {"extra_args": extra}]
        for ids, (extra, _) in zip(oracle.prompts(3, 33, 40, 990), chosen, strict=True)
    ]
    jobs = {
        name: v2_process.job(
            base, {"model": memory, "alpha": 0.6}, [requests], dtype=how.dtype, **how.options
        )
        for name, (base, memory, how) in made.items()
    }
    results = v2_process.run(jobs, subprocess_env)
    for name, (base, memory, how) in made.items():
        errors = []
        found = v2_process.answered(results, name)["requests"]
        for (prompt, sampled, *rows), (_, alpha) in zip(found, chosen, strict=True):
            key_TV = oracle.mixture(base, memory, alpha, [*prompt, *sampled])
            errors += oracle.errors(prompt, sampled, *rows, key_TV)
        check(errors, how)
