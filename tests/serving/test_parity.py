"""The V1 runner's probabilities equal the float64 mixture of the two plain models."""

import random

import pytest
from support import oracle

pytestmark = pytest.mark.usefixtures("hostile")
ALPHAS = (0.0, 0.3, 0.6, 1.0)
# base, memory: (kind, options of tiny_model), engine options
PAIRS = {
    "llama+llama": (("llama", {}), ("llama", {"seed": 1, "hidden": 96, "layers": 3}), {}),
    "qwen2+llama, chunked prefill": (
        ("qwen2", {"hidden": 128}),
        ("llama", {"seed": 1}),
        {"max_num_batched_tokens": 32},
    ),
    "gpt2+gpt2": (("gpt2", {}), ("gpt2", {"seed": 1, "hidden": 96, "layers": 1}), {}),
    "qwen3+gpt2": (("qwen3", {}), ("gpt2", {"seed": 1}), {}),
    "mistral with a window+llama": (("mistral", {}), ("llama", {"seed": 1}), {}),
    "memory padded": (("llama", {}), ("qwen2", {"seed": 1, "vocab": 1024}), {}),
    "base padded": (("llama", {"vocab": 1024}), ("qwen2", {"seed": 1}), {}),
}


def requests(alphas, rng, prompt_share=0.7):
    from vllm import SamplingParams

    return [
        SamplingParams(
            temperature=rng.choice((0.0, 1.0)),
            max_tokens=rng.randint(2, 6),
            logprobs=5,
            prompt_logprobs=5 if rng.random() < prompt_share else None,
            ignore_eos=True,
            extra_args={"memdec_alpha": alpha},
        )
        for alpha in alphas
    ]


@pytest.mark.feature("V1 model runner")
@pytest.mark.parametrize("pair", PAIRS)
def test_mixture(pair, tiny_model, engine):
    (base_kind, base_options), (memory_kind, memory_options), options = PAIRS[pair]
    base = tiny_model(base_kind, **base_options)
    memory = tiny_model(memory_kind, **memory_options)
    vocab = base_options.get("vocab", 1000)
    rng = random.Random(0)
    prefix = [rng.randrange(vocab) for _ in range(70)]
    with engine(base, memory, block_size=32, **options) as llm:
        for size in (1, 16, 5):
            alphas = [ALPHAS[i % len(ALPHAS)] for i in range(size)]
            rng.shuffle(alphas)
            ids = oracle.prompts(size, 1, 60, vocab, prefix if size == 5 else (), seed=size)
            outputs = llm.generate(
                [{"prompt_token_ids": p} for p in ids], requests(alphas, rng), use_tqdm=False
            )
            worst = max(
                oracle.gap(o, base, memory, a) for o, a in zip(outputs, alphas, strict=True)
            )
            assert worst < oracle.TOLERANCE, f"batch of {size}: off by {worst}"
        # Again without prompt log-probabilities: these read the prefix from the cache, and its
        # entries must not depend on the weight of the request that wrote them.
        again = [{"prompt_token_ids": [*prefix, 7, 8]}, {"prompt_token_ids": [*prefix, 9]}]
        outputs = llm.generate(again, requests([0.3, 1.0], rng, 0), use_tqdm=False)
        assert all(o.num_cached_tokens >= 64 for o in outputs)
        for output, alpha in zip(outputs, (0.3, 1.0), strict=True):
            assert oracle.gap(output, base, memory, alpha) < oracle.TOLERANCE


def test_default_alpha(tiny_model, engine):
    """A request that gives no weight gets the server's."""
    from vllm import SamplingParams

    base, memory = tiny_model("llama"), tiny_model("llama", seed=1, hidden=96, layers=3)
    with engine(base, memory, alpha=0.37) as llm:
        params = SamplingParams(temperature=0, max_tokens=3, logprobs=5, prompt_logprobs=5)
        [output] = llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
    assert oracle.gap(output, base, memory, 0.37) < oracle.TOLERANCE


def test_bad_weight_in_python(tiny_model, engine):
    """LLM raises ValueError for the bad request and goes on serving."""
    from vllm import SamplingParams

    base, memory = tiny_model("llama"), tiny_model("llama", seed=1, hidden=96, layers=3)
    prompt = {"prompt_token_ids": [5, 6, 7]}
    with engine(base, memory) as llm:
        for alpha in (1.5, float("nan"), "0.3"):
            with pytest.raises(ValueError, match="^memdec_alpha must be a number between 0 and 1"):
                llm.generate(prompt, SamplingParams(extra_args={"memdec_alpha": alpha}))
        assert llm.generate(prompt, SamplingParams(max_tokens=2), use_tqdm=False)
    with engine(base) as llm, pytest.raises(ValueError, match="runs without a memory"):
        llm.generate(prompt, SamplingParams(extra_args={"memdec_alpha": 0.3}))
