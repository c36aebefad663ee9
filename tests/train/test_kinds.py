"""Bases that cannot be served, or not read rightly, are refused before the first stage."""

import numpy as np
import pytest
import torch
import transformers
from support.bases import BASES
from support.tiny_models import VOCAB, save_tokenizer

from vllm_memdec.errors import MemdecError
from vllm_memdec.kernels.head_loss import SparseRows
from vllm_memdec.train.model import output_head
from vllm_memdec.train.model.hidden_states import hidden_states, keeps_apart
from vllm_memdec.train.model.huggingface import load_model, skeleton
from vllm_memdec.train.model.scoring import label_logprobs
from vllm_memdec.train.plan.rates import base_parameters
from vllm_memdec.train.settings import MemorySettings
from vllm_memdec.train.training.steps import memory_loss

SMALL = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Return a function: the folder of a configuration, with a tokenizer and perhaps weights."""

    def make(config, weights=False):
        path = tmp_path / config.model_type
        config.save_pretrained(path)
        if weights:
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
        save_tokenizer(path)
        return path

    return make


KINDS = {
    "is an encoder-decoder, which": lambda: transformers.BartConfig(vocab_size=VOCAB),
    "is a model without attention, which": lambda: transformers.MambaConfig(vocab_size=VOCAB),
    "is a distilbert model, of which transformers has no causal LM": (
        lambda: transformers.DistilBertConfig(vocab_size=VOCAB)
    ),
    "is a masked language model, which": (
        lambda: transformers.BertConfig(vocab_size=VOCAB, architectures=["BertForMaskedLM"])
    ),
    "is a model without an output head, which": transformers.Qwen2_5OmniConfig,
    "is a model that needs pixel_values beside tokens, which": transformers.Blip2Config,
    "is vit, no text decoder": transformers.ViTConfig,
}


@pytest.mark.parametrize("kind", KINDS)
def test_bases_that_serving_would_refuse(folder, pipeline, command, quick, kind):
    made = command(folder(KINDS[kind]()), pipeline.corpus, quick())
    code, said = made.here()
    assert code == 1 and said.count("\n") == 1 and kind in said, said
    assert not list(made.output.glob("corpus*"))


MEMORIES = {
    "a mixture of experts": "Qwen3-MoE",
    "a state-space or hybrid model": "Qwen3.5",
    "a state-space or hybrid model, by its layers": "LFM2",
    "multimodal": "Gemma 3, multimodal",
}


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_memory_that_serving_would_refuse(folder, pipeline, command, quick, kind):
    settings = quick({"memory": {"init": str(folder(BASES[MEMORIES[kind]]()))}})
    code, said = command(pipeline.base, pipeline.corpus, settings).here()
    expected = f"is {kind.split(', by')[0]}, which vllm-memdec cannot serve as a memory: give"
    assert code == 1 and expected in said, said


def test_a_memory_that_predicts_nothing(folder, pipeline, command, quick):
    init = folder(transformers.DistilBertConfig(vocab_size=VOCAB))
    code, said = command(pipeline.base, pipeline.corpus, quick({"memory": {"init": "x"}})).here(
        init=init, until="corpus"
    )
    assert code == 1 and said.count("\n") == 1, said
    assert "is a distilbert model, of which transformers has no causal LM, which vllm-mem" in said


def test_a_config_that_transformers_makes_no_model_of():
    with pytest.raises(MemdecError, match=r"makes no causal LM of the config of .* \(distilbert\)"):
        skeleton(transformers.DistilBertConfig())


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek V3", "Granite 4", "Jamba", "Llama 3"])
def test_weights_that_a_token_goes_through(folder, name):
    """Two of four experts: as many as in a model of two."""
    config = BASES[name]()
    found = base_parameters(str(folder(config)))
    half = BASES[name]()
    for count in ("num_experts", "n_routed_experts", "num_local_experts"):
        if getattr(half, count, None) == 4:
            setattr(half, count, 2)
    own = half.hidden_size  # of the router, for each expert of each layer
    expected = sum(p.numel() for p in skeleton(half).parameters())
    assert 0 <= found - expected <= 4 * own * half.num_hidden_layers


def test_what_sees_is_not_counted(folder):
    whole, text = (BASES[f"Gemma 3{part}"]() for part in (", multimodal", ""))
    found, expected = (base_parameters(str(folder(config))) for config in (whole, text))
    assert found == expected


def test_a_base_with_experts_and_a_dense_memory(folder, pipeline, command, quick):
    """It is served, so it is built."""
    config = transformers.MixtralConfig(**SMALL, num_local_experts=2)
    made = command(folder(config, weights=True), pipeline.corpus, quick({"memory": {"init": "x"}}))
    code, said = made.here(init=pipeline.base, until="corpus")
    assert code == 0, said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_that_does_something_else(folder, dtype):
    """HyperCLOVA X multiplies by the setting that Granite divides by."""
    scaled = SMALL | {"logits_scaling": 4.0}
    load_model(str(folder(transformers.GraniteConfig(**scaled), weights=True)), dtype)
    clova = folder(transformers.HyperCLOVAXConfig(**scaled), weights=True)
    with pytest.raises(MemdecError, match="does more to its logits than memdec knows of"):
        load_model(str(clova), dtype)


def test_hidden_states_that_are_scaled_before_the_head(folder, monkeypatch):
    """MiniCPM3's: scores, and the loss of a memory, are those of the model as it is."""
    own = dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"), 32)
    own |= {"qk_rope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 2}
    own |= {"dim_model_base": 16, "initializer_range": 0.3}
    model = load_model(str(folder(transformers.MiniCPM3Config(**SMALL | own), weights=True)))
    assert model.config.logits_scaling == 4
    ids = torch.arange(2, 34)[None]
    places, offsets = torch.arange(31), torch.zeros(32, dtype=torch.int64)
    with torch.inference_mode():
        logp_TV = model(ids).logits[0].log_softmax(-1)[:-1]
    expected = logp_TV.gather(1, ids[0, 1:, None])[:, 0]
    found = label_logprobs(model, ids.numpy(), np.arange(32)[None], 1)
    np.testing.assert_allclose(found, expected.double(), rtol=1e-4)
    targets = SparseRows(offsets, torch.empty(0, dtype=torch.int64), torch.empty(0))
    batch = ids[:, :-1], torch.arange(31)[None], places, ids[0, 1:], targets
    settings = MemorySettings(dtype="float32", beta=0)
    _, sums = memory_loss(model, batch, output_head.ALL, settings, 1.0, True)
    torch.testing.assert_close(sums[1].detach().float(), -expected.sum(), rtol=1e-4, atol=0)
    monkeypatch.setattr(output_head, "logits_transform", lambda config: None)
    with pytest.raises(MemdecError, match="does more to its logits"):
        output_head.check_head(model, "folder")


@pytest.mark.parametrize("kind", ["BertLMHeadModel", "PaliGemmaForConditionalGeneration"])
def test_a_model_that_looks_ahead(kind):
    torch.manual_seed(0)
    text = dict.fromkeys(("hidden_size", "intermediate_size"), 64) | {"num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "vocab_size": VOCAB, "initializer_range": 0.3}
    config = transformers.BertConfig(**text)
    if kind != "BertLMHeadModel":
        vision = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
        text |= {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 32}
        vision |= {"model_type": "siglip_vision_model", "intermediate_size": 32}
        own = {"projection_dim": 64, "image_token_id": VOCAB - 1}
        config = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, **own)
    model = getattr(transformers, kind)(config).eval()
    with pytest.raises(MemdecError, match=f"in a {kind} a token sees those after it"):
        keeps_apart(model)


def test_layers_of_several_streams_are_no_keys(tiny_model):
    """Gemma 3n's put out four at once."""
    model = load_model(tiny_model("llama"))
    model.model.layers[0].register_forward_hook(lambda m, given, out: torch.stack([out] * 4))
    ids = torch.arange(16)[None]
    with pytest.raises(MemdecError, match=r"has \[4, 1, 16, 64\] states of \[1, 16\] tokens where"):
        hidden_states(model, 0.5, ids, ids)


def test_weights_that_are_not_numbers(tiny_model):
    model = load_model(tiny_model("llama"))
    model.base_model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(MemdecError, match="gives no finite logits: copy its weights again"):
        output_head.check_head(model, "folder")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_are_the_models_own(tiny_model, kind, dtype, monkeypatch):
    model = load_model(tiny_model(kind), dtype)
    monkeypatch.setattr(output_head, "logits_transform", lambda config: lambda logits: logits * 1.1)
    with pytest.raises(MemdecError, match="does more to its logits"):
        output_head.check_head(model, kind)
