"""Cases whose right answer is the plain engine's own output: weight 0, and memory = base."""

import pytest
from support import oracle

ALPHAS = (0.0, 0.37, 1.0)


def generate(llm, prompts, alpha=None, **options):
    from vllm import SamplingParams

    extra = None if alpha is None else {"memdec_alpha": alpha}
    # Without texts: 1000 of them a row take longer than the engine.
    options |= {"temperature": 0, "ignore_eos": True, "detokenize": False}
    params = SamplingParams(extra_args=extra, **options)
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def rows(outputs):
    """Return every reported (token -> value) row, prompt rows included."""
    result = []
    for output in outputs:
        for row in [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]:
            result.append({token: entry.logprob for token, entry in row.items()})
    return result


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "bfloat16"), ("gpt2", "float32")])
def test_alpha_zero_is_the_base_bit_for_bit(kind, dtype, tiny_model, engine):
    base, memory = tiny_model(kind), tiny_model("llama", seed=1, hidden=96, layers=3)
    prompts = oracle.prompts(4, 1, 8, 1000)
    options = {"dtype": dtype, "logprobs_mode": "raw_logits"}
    asked = {"max_tokens": 3, "logprobs": -1, "prompt_logprobs": -1, "detokenize": False}
    with engine(base, **options) as llm:
        plain = generate(llm, prompts, **asked)
    with engine(base, memory, **options) as llm:
        composite = generate(llm, prompts, 0.0, **asked)
        other = generate(llm, prompts[:1], 0.001, **asked)
    assert len(rows(plain)[0]) == 1000
    assert rows(composite) == rows(plain)
    assert rows(other)[0] != rows(plain)[0]


@pytest.mark.feature("greedy")
@pytest.mark.feature("eager mode")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_memory_equal_to_base_changes_nothing(kind, tiny_model, engine):
    base = tiny_model(kind)
    prompts = oracle.prompts(9, 1, 40, 1000)
    with engine(base) as llm:
        plain = [o.outputs[0].token_ids for o in generate(llm, prompts, max_tokens=24)]
    with engine(base, base) as llm:
        for alpha in ALPHAS:
            mixed = [o.outputs[0].token_ids for o in generate(llm, prompts, alpha, max_tokens=24)]
            assert mixed == plain, f"alpha {alpha}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_weight_survives_half_precision(dtype, tiny_model, engine):
    """0.3 rounds to 0.3008 in bfloat16: the mixture must use 0.3."""
    import torch

    base, memory = tiny_model("llama"), tiny_model("llama", seed=1, hidden=96, layers=3)
    asked = {"max_tokens": 1, "logprobs": -1, "prompt_logprobs": -1, "detokenize": False}
    with engine(base, memory, dtype=dtype, logprobs_mode="raw_logits") as llm:
        values = {}
        for alpha in (0.0, 0.3, 1.0):
            found = rows(generate(llm, [[5, 6, 7, 8]], alpha, **asked))
            values[alpha] = torch.tensor(
                [[row[t] for t in range(1000)] for row in found], dtype=torch.float64
            )
    p = {alpha: logits.softmax(-1) for alpha, logits in values.items()}
    torch.testing.assert_close(p[0.3], 0.7 * p[0.0] + 0.3 * p[1.0], rtol=2e-6, atol=0)
    # The logits form: the normaliser stays the base's.
    torch.testing.assert_close(
        values[0.3].logsumexp(-1), values[0.0].logsumexp(-1), rtol=0, atol=1e-5
    )


@pytest.mark.feature("speculation with a draft model", drafts="refused")
def test_the_memory_as_draft_model_changes_nothing(tiny_model, engine):
    """vLLM's own draft_model speculation verifies against the mixture."""
    base, memory = tiny_model("llama"), tiny_model("llama", seed=1, hidden=96, layers=3)
    prompts = oracle.prompts(6, 1, 40, 1000)
    drafting = {"method": "draft_model", "model": memory, "num_speculative_tokens": 3}
    texts = []
    for options in ({}, {"speculative_config": drafting}):
        with engine(base, memory, **options) as llm:
            found = [generate(llm, prompts, alpha, max_tokens=24) for alpha in (0.9, 0.3)]
            texts.append([o.outputs[0].token_ids for outputs in found for o in outputs])
    assert texts[0] == texts[1]
