"""Recipes in train/configs/: they load, state what is computed, and their models can be read."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.speed.recipes import CONFIGS, MODELS, RECIPES, comment, cost, parameters
from vllm_memdec.train.model.hidden_states import check_isolation, hidden_states
from vllm_memdec.train.model.output_head import head
from vllm_memdec.train.settings import PRETRAINED, load_settings

# As the models' publishers count them: the shapes are theirs.
PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen3-0.6B-Base": 596_049_920,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.1-8B": 8_030_261_248,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b-pt": 999_885_952,
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_states_what_it_costs(name):
    settings = load_settings(CONFIGS / name)
    memory = settings.memory.pretrained()
    assert (memory.learning_rate, memory.epochs) == tuple(PRETRAINED.values())
    assert memory.init == f"models/{RECIPES[name][1]}"
    text = (CONFIGS / name).read_text()
    assert comment(text) == cost(name, settings.model_copy(update={"memory": memory}))
    assert f"--base models/{RECIPES[name][0]}" in " ".join(text.replace("#", "").split())


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_are_the_publishers(name):
    assert parameters(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", RECIPES)
def test_both_models_share_a_vocabulary(name):
    base, memory = (MODELS[model][1]["vocab_size"] for model in RECIPES[name])
    assert base == memory
    assert f"{base:,}" in (CONFIGS / name).read_text()


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in MODELS.values()}))
def test_models_of_these_types_can_be_read(kind):
    """Keys of packed documents leave each other alone, and the head is the model's own."""
    tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32}
    tiny |= {"num_key_value_heads": 1, "intermediate_size": 128, "vocab_size": 1000}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **tiny, pad_token_id=0, bos_token_id=0, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tokens = torch.randint(1000, (2, 16))
    positions = torch.arange(16).expand(2, 16)
    check_isolation(model)
    for key in ("last_mlp_input", "final_hidden"):
        keys = hidden_states(model, key, tokens, positions)
        assert keys.shape == (2, 16, 64)
    with torch.inference_mode():
        logits = head(model, keys.reshape(-1, 64)).reshape(2, 16, -1)
        expected = model(tokens, position_ids=positions).logits
    torch.testing.assert_close(logits.float(), expected, rtol=1e-5, atol=1e-5)  # float32, one order
