"""Every base that people serve, beside a memory: see support/bases.py.

Each is a real engine of vLLM on tiny random weights as transformers writes them, and is compared
with transformers' own model in float64. What is found is vllm_memdec/bases.csv: see `make bases`.
"""

import functools
import random
import re

import pytest
from support import base_rows, bases, mamba1, oracle, v2_process
from support.feature_engines import count
from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import destroy_model_parallel

from vllm_memdec import check as checking

PREFIX = 70  # tokens in common: two blocks of 32 or one of 64, and a rest
# Of a log-probability. A weight that is off by 0.1 makes 7e-2 in bfloat16.
TOLERANCE = {"float32": oracle.TOLERANCE, "bfloat16": 5e-3}
GREEDY = {"temperature": 0, "logprobs": 5, "ignore_eos": True}
# Mamba 2 and experts, a gated delta net, short convolutions, experts; test_images.py has others.
ON_V2 = ["Granite 4", "Qwen3.5", "LFM2", "Qwen3-MoE"]
# Those that see images have their rows from test_images.py.
ROWS = [name for name in bases.BASES if name in base_rows.NAMES and name not in bases.MULTIMODAL]
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return save(name), done once: it fails after vLLM has run a class of transformers itself."""
    return functools.cache(lambda name: save(name, tmp_path_factory.mktemp("pair")))


def options_of(how, patch):
    """Return the options of an engine, and set what else it needs."""
    if how.error:
        mamba1.install(patch)
    for variable, value in how.env.items():
        patch.setenv(variable, value)
    options = {"block_size": 32, "max_num_batched_tokens": 64, "max_model_len": 256}
    return {"dtype": how.dtype} | options | how.options


def answers(llm, base, memory, prompts, rows=None):
    """Return the answers to prompts of all choices in one batch, and the errors of them all."""
    # A base that vLLM runs by transformers' own class has changed it: it wants its config.
    with set_current_vllm_config(llm.llm_engine.vllm_config):
        oracle.load(base)
    asked = GREEDY | {"max_tokens": 5, "prompt_logprobs": rows}
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        [SamplingParams(**asked, extra_args=extra) for extra, _ in CHOICES],
        use_tqdm=False,
    )
    pairs = zip(outputs, CHOICES, strict=True)
    return outputs, [e for output, (_, a) in pairs for e in oracle.gaps(output, base, memory, a)]


def check(errors, how):
    """Return the largest error, which is small enough."""
    assert max(errors) < TOLERANCE[how.dtype]
    return max(errors)


@pytest.mark.parametrize("name", bases.BASES)
def test_base(name, saved, engine, monkeypatch, base_row):
    """Mixed weights in one batch, prompts in chunks, and once more from the prefix cache."""
    base, memory, how = saved(name)
    rng = random.Random(0)
    prefix = [rng.randrange(990) for _ in range(PREFIX)]
    prompts = oracle.prompts(len(CHOICES), 3, 30, 990, prefix)
    errors = []
    with engine(base, memory, **options_of(how, monkeypatch)) as llm:
        for rows in (5, None):  # of prompts: with them vLLM does not look into the prefix cache
            outputs, found = answers(llm, base, memory, prompts, rows)
            errors += found
        assert all(output.num_cached_tokens >= 64 for output in outputs)
        model = llm.llm_engine.model_config
    error = check(errors, how)
    if name in ROWS:
        said = {"architecture": model.architecture, "kind": base_rows.kind_of(model)}
        base_row(name, **said, dtype=how.dtype, error=f"{error:.0e}", on_cpu=how.needs)


@pytest.mark.parametrize("name", ROWS)
def test_drafts(name, saved, engine, monkeypatch, base_row):
    """Three drafts by the memory, where a start with them is not refused."""
    base, memory, how = saved(name)
    options = options_of(how, monkeypatch) | {"disable_log_stats": False}
    drafts = checking.check(base, memory).drafts
    block = {"model": memory, "alpha": 0.6, "speculative_tokens": 3}
    if drafts != "work":
        sentence = re.escape(drafts.removeprefix("refused: "))
        with pytest.raises(ValueError, match=sentence), engine(base, block, **options):
            pass
        return base_row(name, drafts=base_rows.drafts_of(drafts))
    prompts = oracle.prompts(len(CHOICES), 3, 100, 990)
    with engine(base, block, **options) as llm:
        check(answers(llm, base, memory, prompts)[1], how)
        # One of the weights is 1: what the memory drafts is what it then says.
        assert count(llm, "spec_decode_num_accepted_tokens") > 0
    base_row(name, drafts=base_rows.drafts_of(drafts))


@pytest.mark.parametrize("name", bases.FAILING)
def test_what_vllm_does_not_run_on_a_cpu(name, tmp_path, engine):
    """By itself, either; once vLLM runs it, it belongs among the others."""
    bases.save(name, tmp_path)
    with engine(str(tmp_path)) as llm, pytest.raises(Exception, match=bases.CASES[name].error):
        llm.generate({"prompt_token_ids": [5, 6, 7]}, use_tqdm=False)


@pytest.mark.feature("V2 model runner")
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
