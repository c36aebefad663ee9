"""The untrained memory: a cut of the base, a folder's model, or a fresh one; misfits refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from vllm_memdec.train.model.decoder import build_memory, memory_config
from vllm_memdec.train.settings import MemorySettings

BLOCK = 32


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "qwen3"])
def test_truncated_copy_is_the_bases_first_layers(tiny_model, kind):
    base = tiny_model(kind, layers=4)
    memory = build_memory(MemorySettings(layers=3), base, BLOCK)
    assert memory.config.num_hidden_layers == 3
    if kind.startswith("qwen"):
        assert len(memory.config.layer_types) == 3
    whole = AutoModelForCausalLM.from_pretrained(base).eval()
    tokens = torch.randint(0, 1000, (2, 20))
    deep = whole.base_model(tokens, output_hidden_states=True).hidden_states[3]
    norm = whole.transformer.ln_f if kind == "gpt2" else whole.model.norm
    expected = whole.get_output_embeddings()(norm(deep))
    assert torch.allclose(memory.eval()(tokens).logits, expected, atol=1e-5)
    assert all(p.dtype == torch.float32 for p in memory.parameters())


def test_folder_with_weights_starts_from_them(tiny_model):
    folder = tiny_model("gpt2", seed=5)
    memory = build_memory(MemorySettings(init=folder), tiny_model("llama"), BLOCK)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in memory.state_dict().items())


def test_folder_with_a_config_starts_fresh_from_the_seed(tiny_model, tmp_path):
    shutil.copy(tiny_model("llama") + "/config.json", tmp_path)
    first, again, other = (
        build_memory(MemorySettings(init=str(tmp_path), seed=s), tiny_model("gpt2"), BLOCK)
        for s in (1, 1, 2)
    )
    name = "model.layers.0.mlp.up_proj.weight"
    weights = [model.state_dict()[name] for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].std() > 0.1  # as the config's initializer_range says


def test_memory_can_be_saved_whatever_the_bases_generation_config(tiny_model, tmp_path):
    """transformers reads sampling flags without do_sample, but raises when it writes them."""
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    (base / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    memory = build_memory(MemorySettings(layers=1), str(base), BLOCK)
    memory.save_pretrained(tmp_path / "memory")
    assert GenerationConfig.from_pretrained(tmp_path / "memory").temperature is None


def with_config(folder, tmp_path, **changes):
    copy = shutil.copytree(folder, tmp_path / "changed")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return str(copy)


def refused(settings, base, match):
    with pytest.raises(ValueError, match=match):
        build_memory(settings, base, BLOCK)


def test_misfits_are_refused(tiny_model, tmp_path):
    base = tiny_model("llama")
    refused(MemorySettings(layers=9), base, "memory.layers is 9.*only 2 layers: lower it")
    refused(MemorySettings(init=str(tmp_path)), base, "no usable config.json")
    other = tiny_model("llama", tokenizer=3)
    refused(MemorySettings(init=other), base, "another tokenizer than")
    small = tiny_model("gpt2", positions=16)
    refused(MemorySettings(init=small), base, "has 16 positions: lower corpus.block_tokens from 32")
    narrow = with_config(base, tmp_path, vocab_size=900)
    refused(MemorySettings(init=narrow), base, "900 vocabulary rows.* needs 1000")


def test_lost_weights_are_refused_not_made_up(tiny_model, tmp_path):
    deeper = with_config(tiny_model("llama"), tmp_path, num_hidden_layers=5)
    refused(MemorySettings(layers=5), deeper, "lacks the weight model.layers.2")
    assert memory_config(MemorySettings(layers=5), deeper, BLOCK).num_hidden_layers == 5


@pytest.mark.parametrize(("has", "kept"), [(2, 2), (6, 4)])
def test_default_number_of_layers(has, kept, tiny_model):
    """Four, or all of a base that has fewer."""
    base = tiny_model("llama", layers=has)
    assert build_memory(MemorySettings(), base, BLOCK).config.num_hidden_layers == kept
