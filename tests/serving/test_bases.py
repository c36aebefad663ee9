"""Every base that people serve, beside a memory: see support/bases.py.

Each is a real engine of vLLM on tiny random weights as transformers writes them, and is compared
with transformers' own model in float64. What is found is vllm_memdec/bases.csv: see `make bases`.
"""

import functools
import random

import pytest
from support import base_rows, bases, mamba1, oracle
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import destroy_model_parallel

from vllm_memdec.check import check

PREFIX = 70  # tokens in common: two blocks of 32 or one of 64, and a rest
# In bfloat16, where it is half of that. A weight that is off by 0.1 makes 7e-2, a context of which
# the base knows 10 tokens and no more 0.3.
MEAN_TOLERANCE = 5e-3
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function that gives the folders of a base and its memory, written once.

    Where vLLM runs transformers' own class, that can be created outside vLLM only before.
    """

    @functools.cache
    def make(name):
        how = bases.CASES.get(name, bases.Case())
        base, memory = (str(tmp_path_factory.mktemp(role)) for role in ("base", "memory"))
        own = {"hidden_size": 96, "num_hidden_layers": 3, "initializer_range": 0.15} | how.memory
        bases.save(name, base, how.dtype)
        bases.save(bases.decoder("Llama", **own), memory, how.dtype, seed=1)
        return base, memory

    return make


@pytest.fixture(params=bases.SERVED)
def case(request, folders, monkeypatch):
    """Return the name of a base, how it is run, folders of it and a memory, options of LLM."""
    name = request.param
    how = bases.CASES.get(name, bases.Case())
    if how.error:
        mamba1.install(monkeypatch)
    for variable, value in how.env.items():
        monkeypatch.setenv(variable, value)
    options = {"block_size": 32, "max_num_batched_tokens": 64, "max_model_len": 256}
    return name, how, *folders(name), {"dtype": how.dtype} | options | how.options


def sampling(extra, prompt_rows):
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=5,
        logprobs=5,
        prompt_logprobs=prompt_rows,
        ignore_eos=True,
        extra_args=extra,
    )


def answers(llm, base, memory, prompts, prompt_rows=None):
    """Return the answers to prompts of all choices in one batch, and the errors of them all."""
    # A base that vLLM runs by transformers' own class has changed it: it wants its config.
    with set_current_vllm_config(llm.llm_engine.vllm_config):
        oracle.load(base)
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        [sampling(extra, prompt_rows) for extra, _ in CHOICES],
        use_tqdm=False,
    )
    pairs = zip(outputs, CHOICES, strict=True)
    return outputs, [e for output, (_, a) in pairs for e in oracle.gaps(output, base, memory, a)]


def error(errors, how):
    """Return the error that counts, and how large it may be."""
    if how.dtype == "float32":
        return max(errors), oracle.TOLERANCE
    return sum(errors) / len(errors), MEAN_TOLERANCE


def test_base(case, engine, base_row):
    """Mixed weights in one batch, prompts in chunks, and once more from the prefix cache."""
    name, how, base, memory, options = case
    rng = random.Random(0)
    prefix = [rng.randrange(990) for _ in range(PREFIX)]
    prompts = oracle.prompts(len(CHOICES), 3, 30, 990, prefix)
    errors = []
    with engine(base, memory, **options) as llm:
        for prompt_rows in (5, None):  # with them vLLM does not look into the prefix cache
            outputs, found = answers(llm, base, memory, prompts, prompt_rows)
            errors += found
        assert all(output.num_cached_tokens >= 64 for output in outputs)
        model = llm.llm_engine.model_config
    found, allowed = error(errors, how)
    assert found < allowed
    if how.error:  # what vLLM runs with our help is no row
        return
    base_row(
        name,
        architecture=model.architecture,
        kind=base_rows.kind_of(model),
        dtype=how.dtype,
        error=f"{found:.0e}",
        note=how.why,
    )


def test_drafts(case, engine, base_row):
    """Three drafts by the memory, where a start with them is not refused."""
    name, how, base, memory, options = case
    drafts = check(base, memory).drafts
    if not how.error:
        base_row(name, drafts="works" if drafts == "work" else drafts.partition(":")[0])
    if drafts != "work":
        return
    prompts = oracle.prompts(len(CHOICES), 3, 100, 990)
    block = {"model": memory, "alpha": 0.6, "speculative_tokens": 3}
    with engine(base, block, **options) as llm:
        assert llm.llm_engine.vllm_config.speculative_config.num_speculative_tokens == 3
        found, allowed = error(answers(llm, base, memory, prompts)[1], how)
    assert found < allowed


@pytest.mark.parametrize("name", bases.FAILING)
def test_base_that_vllm_does_not_run_on_a_cpu(name, tmp_path, engine):
    """By itself, either; once vLLM runs it, it belongs among the others."""
    bases.save(name, tmp_path)
    with engine(str(tmp_path)) as llm, pytest.raises(Exception, match=bases.CASES[name].error):
        llm.generate({"prompt_token_ids": [5, 6, 7]}, use_tqdm=False)
