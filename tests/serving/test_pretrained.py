"""A pretrained model as its own memory: whatever the weight, it must answer as it does alone."""

import pytest

from benchmarks.corpora import download

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "Once upon a time there was",
    "1, 1, 2, 3, 5, 8,",
]


@pytest.fixture(scope="module")
def smollm2():
    return str(download.smollm2())


def greedy(llm, alpha=None):
    from vllm import SamplingParams

    extra = None if alpha is None else {"memdec_alpha": alpha}
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, extra_args=extra)
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, params, use_tqdm=False)]


def test_memory_equal_to_base_changes_nothing(smollm2, engine):
    with engine(smollm2, max_model_len=256) as llm:
        plain = greedy(llm)
        assert "Paris" in llm.get_tokenizer().decode(plain[0]), "the pretrained weights are there"
    with engine(smollm2, smollm2, max_model_len=256) as llm:
        for alpha in (0.0, 0.37, 1.0):
            assert greedy(llm, alpha) == plain, f"alpha {alpha}"
