"""Every base that people serve, beside a memory: see support/bases.py.

Each is a real engine of vLLM on tiny random weights as transformers writes them, and is compared
with transformers' own model in float64.
"""

import random

import pytest
from support import bases, oracle
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import destroy_model_parallel

PREFIX = 70  # tokens in common: two blocks of 32 or one of 64, and a rest
# In bfloat16, where it is half of that. A weight that is off by 0.1 makes 7e-2, a context of which
# the base knows 10 tokens and no more 0.3.
MEAN_TOLERANCE = 5e-3
MULTIMODAL = {name for name in bases.BASES if name.endswith("multimodal")}
FAILING = [name for name, how in bases.CASES.items() if how.error]
SERVED = [name for name in bases.BASES if name not in {*FAILING, *MULTIMODAL}]
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


@pytest.fixture(params=SERVED)
def case(request):
    return request.param, bases.CASES.get(request.param, bases.Case())


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


def test_base(case, tmp_path, engine, monkeypatch):
    """Mixed weights in one batch, prompts in chunks, and once more from the prefix cache."""
    name, how = case
    exact = how.dtype == "float32"
    base, memory = str(tmp_path / "base"), str(tmp_path / "memory")
    own = {"hidden_size": 96, "num_hidden_layers": 3, "initializer_range": 0.15} | how.memory
    bases.save(name, base, how.dtype)
    bases.save(bases.decoder("Llama", **own), memory, how.dtype, seed=1)
    for variable, value in how.env.items():
        monkeypatch.setenv(variable, value)
    options = {"block_size": 32, "max_num_batched_tokens": 64, "max_model_len": 256} | how.options
    rng = random.Random(0)
    prefix = [rng.randrange(990) for _ in range(PREFIX)]
    prompts = oracle.prompts(len(CHOICES), 3, 30, 990, prefix)
    errors = []
    with engine(base, memory, dtype=how.dtype, **options) as llm:
        vllm_config = llm.llm_engine.vllm_config
        # A base that vLLM runs by transformers' own class has changed it: it wants its config.
        with set_current_vllm_config(vllm_config):
            oracle.load(base)
        for prompt_rows in (5, None):  # with them vLLM does not look into the prefix cache
            outputs = llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts],
                [sampling(extra, prompt_rows) for extra, _ in CHOICES],
                use_tqdm=False,
            )
            for output, (_, alpha) in zip(outputs, CHOICES, strict=True):
                errors += oracle.gaps(output, base, memory, alpha)
        assert all(output.num_cached_tokens >= 64 for output in outputs)
    if exact:
        assert max(errors) < oracle.TOLERANCE
    else:
        assert sum(errors) / len(errors) < MEAN_TOLERANCE


@pytest.mark.parametrize("name", FAILING)
def test_base_that_vllm_does_not_run_on_a_cpu(name, tmp_path, engine):
    """By itself, either; once vLLM runs it, it belongs among the others."""
    bases.save(name, tmp_path)
    with engine(str(tmp_path)) as llm, pytest.raises(Exception, match=bases.CASES[name].error):
        llm.generate({"prompt_token_ids": [5, 6, 7]}, use_tqdm=False)
