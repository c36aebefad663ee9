"""The head's scaling, and the sampled columns against the whole vocabulary."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from vllm_memdec.train.model.output_head import ALL, Candidates, head, logits_transform

VOCABULARY = 503


def test_sampled_normaliser_is_unbiased():
    """Over many draws the mean of the estimated sum of exponentials is the true sum."""
    logits_NV = torch.randn(6, VOCABULARY).double()
    used = np.arange(0, VOCABULARY, 9)
    true = logits_NV.exp().sum(-1)
    draws = []
    for step in range(3000):
        some = Candidates.draw(used, VOCABULARY, 20, [1, step]).columns
        draws.append((logits_NV[:, some.ids] + some.log_weight).exp().sum(-1))
    estimates = torch.stack(draws)
    error = estimates.std(0) / math.sqrt(len(draws))
    assert ((estimates.mean(0) - true).abs() < 4 * error).all()
    assert (error < 0.01 * true).all()  # sharp enough to see a wrong weight


def test_draw_keeps_what_is_used_and_samples_others_once():
    used = np.array([2, 3, 50, 400])
    some = Candidates.draw(used, VOCABULARY, 30, [0, 1])
    ids, log_weight = some.columns.ids, some.columns.log_weight
    assert ids[:4].tolist() == used.tolist() and len(set(ids.tolist())) == len(ids) == 34
    assert some.columns.trained == 4
    assert ids[some.rank(torch.tensor([400, 2, 50]))].tolist() == [400, 2, 50]
    assert log_weight[:4].tolist() == [0] * 4
    assert np.allclose(log_weight[4:], math.log((VOCABULARY - 4) / 30))
    assert torch.equal(ids, Candidates.draw(used, VOCABULARY, 30, [0, 1]).columns.ids)
    assert not torch.equal(ids, Candidates.draw(used, VOCABULARY, 30, [0, 2]).columns.ids)


@pytest.mark.parametrize("sampled", [None, VOCABULARY - 4, VOCABULARY])
def test_draw_of_everything_is_the_whole_vocabulary(sampled):
    assert Candidates.draw(np.array([2, 3, 50, 400]), VOCABULARY, sampled, [0]) == ALL


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        CohereConfig(**SMALL, logit_scale=0.25),
        GraniteConfig(**SMALL, logits_scaling=3.0),
        Gemma2Config(**SMALL, final_logit_softcapping=0.5),
    ],
    ids=lambda config: config.model_type,
)
def test_logits_are_scaled_as_the_architecture_does(config):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        h_ND = model.base_model(tokens).last_hidden_state[0]
        plain = model.get_output_embeddings()(h_ND)
        assert torch.allclose(head(model, h_ND), model(tokens).logits[0], atol=1e-6)
    assert not torch.allclose(head(model, h_ND), plain, atol=1e-3)


def test_other_architectures_scale_nothing():
    assert logits_transform(SimpleNamespace(logit_scale=None)) is None
