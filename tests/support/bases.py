"""The bases that people serve, tiny: BASES maps a name to a function that returns its config.

Each has a vocabulary of VOCAB, random weights wide enough that answers differ, and head sizes that
vLLM's attention on a CPU allows. `save` writes the folder of one, as transformers writes it; CASES
says how one is run on a CPU where that is not in float32 and with vLLM's defaults. A config's own
key "oracle" holds what oracle.py changes in it, where transformers and vLLM read it differently.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import transformers
from support.tiny_models import VOCAB, save_tokenizer
from transformers import PreTrainedConfig

SPREAD = 0.3  # of the weights; see tiny_models.tiny_config
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": SPREAD,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
MAMBA_2 = {
    "mamba_chunk_size": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_expand": 2,
}


def decoder(name: str, **own: Any) -> PreTrainedConfig:
    """Return a config of transformers by its name: 2 layers of 2 heads of 32, and what is `own`."""
    common = TINY | {"architectures": [f"{name}ForCausalLM"]}
    return getattr(transformers, f"{name}Config")(**common | own)


def llama3() -> PreTrainedConfig:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return decoder("Llama", rope_parameters=rope)


def mistral() -> PreTrainedConfig:
    return decoder("Mistral", sliding_window=32)


def mixtral() -> PreTrainedConfig:
    return decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2)


def qwen2() -> PreTrainedConfig:
    return decoder("Qwen2", tie_word_embeddings=True)


def qwen3() -> PreTrainedConfig:
    return decoder("Qwen3")


def qwen3_moe() -> PreTrainedConfig:
    return decoder("Qwen3Moe", **EXPERTS, norm_topk_prob=True)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
DELTA = {
    "initializer_range": 0.05,
    # vLLM makes a block of the KV cache as large as a state: with these, 64 tokens.
    "num_key_value_heads": 2,
    "head_dim": 128,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}


def qwen3_next() -> PreTrainedConfig:
    return decoder("Qwen3Next", **EXPERTS, **DELTA, shared_expert_intermediate_size=64)


def qwen3_5() -> PreTrainedConfig:
    return decoder("Qwen3_5Text", **DELTA, architectures=["Qwen3_5ForCausalLM"])


def qwen3_5_moe() -> PreTrainedConfig:
    experts = EXPERTS | {"shared_expert_intermediate_size": 64}
    return decoder("Qwen3_5MoeText", **DELTA, **experts, architectures=["Qwen3_5MoeForCausalLM"])


def qwen3_5_multimodal() -> PreTrainedConfig:
    text = qwen3_5().to_dict() | {"tie_word_embeddings": False}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    text["rope_parameters"] = rope | {"mrope_section": [8, 4, 4], "mrope_interleaved": True}
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
    }
    return transformers.Qwen3_5Config(
        architectures=["Qwen3_5ForConditionalGeneration"],
        text_config=text,
        vision_config=vision,
        initializer_range=DELTA["initializer_range"],
        image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
        vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4,
    )


WINDOWS = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
# A tied head would find the token of an embedding that is wide and, as Gemma's, scaled by 8.
GEMMA = WINDOWS | {"tie_word_embeddings": True, "initializer_range": 0.15}


def gemma2() -> PreTrainedConfig:
    oracle = {"attn_implementation": "eager"}  # the default one has no soft cap
    return decoder("Gemma2", **GEMMA, query_pre_attn_scalar=32, oracle=oracle)


def gemma3() -> PreTrainedConfig:
    own = GEMMA | {"query_pre_attn_scalar": 32, "architectures": ["Gemma3ForCausalLM"]}
    return decoder("Gemma3Text", **own)


def gemma3_multimodal() -> PreTrainedConfig:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    }
    return transformers.Gemma3Config(
        architectures=["Gemma3ForConditionalGeneration"],
        text_config=gemma3().to_dict(),
        vision_config=vision,
        initializer_range=GEMMA["initializer_range"],
        mm_tokens_per_image=4,
        boi_token_index=VOCAB - 2,
        eoi_token_index=VOCAB - 3,
        image_token_index=VOCAB - 1,
    )


def gemma4() -> PreTrainedConfig:
    own = GEMMA | {"global_head_dim": 64, "architectures": ["Gemma4ForCausalLM"]}
    layers = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB}
    return decoder("Gemma4Text", **own, **layers)


def phi3() -> PreTrainedConfig:
    return decoder("Phi3", original_max_position_embeddings=256)


def olmo3() -> PreTrainedConfig:
    return decoder("Olmo3", **WINDOWS)


def smollm3() -> PreTrainedConfig:
    return decoder("SmolLM3", no_rope_layers=[1, 0])


def cohere2() -> PreTrainedConfig:
    oracle = {"sliding_window": 33}  # vLLM's sees the token itself and 32 before it
    own = {"tie_word_embeddings": True, "logit_scale": 1.0, "oracle": oracle}
    return decoder("Cohere2", **WINDOWS, **own)


def glm4_moe() -> PreTrainedConfig:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return decoder("Glm4Moe", **experts, first_k_dense_replace=1, use_qk_norm=True)


def gpt_oss() -> PreTrainedConfig:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    }
    own = {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": rope}
    return decoder("GptOss", **own, **WINDOWS)


def deepseek_v3() -> PreTrainedConfig:
    return decoder(
        "DeepseekV3",
        num_key_value_heads=2,
        q_lora_rank=32,
        kv_lora_rank=512,  # with the next, 576: vLLM's kernel for a CPU knows no other size
        qk_rope_head_dim=64,
        head_dim=64,  # the same again
        qk_nope_head_dim=128,  # as in the released one: vLLM's MLA knows few others
        v_head_dim=128,
        initializer_range=0.15,  # its experts are scaled by 2.5: with 0.3 float32 is off by 1e-4
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_group=2,
        topk_group=1,
        topk_method="noaux_tc",  # as the next in every checkpoint; transformers knows neither
        scoring_func="sigmoid",
        first_k_dense_replace=1,
    )


def granite4() -> PreTrainedConfig:
    return decoder(
        "GraniteMoeHybrid",
        **MAMBA_2,
        layer_types=["linear_attention", "full_attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
        position_embedding_type="nope",
        attention_multiplier=32**-0.5,
    )


def falcon_h1() -> PreTrainedConfig:
    # Both branches of a layer add up: with 0.3 plain float32 is 7e-5 from float64.
    return decoder("FalconH1", **MAMBA_2, mamba_d_ssm=128, initializer_range=0.15)


def nemotron_h() -> PreTrainedConfig:
    return decoder(
        "NemotronH",
        num_hidden_layers=None,
        layer_types=["linear_attention", "mlp", "full_attention", "mlp"],
        mamba_num_heads=4,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=1,
        chunk_size=32,
        oracle={"time_step_min": 0.0},  # by which transformers clips, and vLLM does not
    )


def lfm2() -> PreTrainedConfig:
    layers = ["conv", "full_attention"]
    # The sizes of blocks are in every checkpoint, but transformers does not know them.
    own = {"block_dim": 64, "conv_dim": 64, "block_auto_adjust_ff_dim": False}
    own["tie_word_embeddings"] = True  # vLLM takes it for granted
    return decoder("Lfm2", layer_types=layers, **own)


def jamba() -> PreTrainedConfig:
    return decoder(
        "Jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=16,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    )


def gpt2() -> PreTrainedConfig:
    return transformers.GPT2Config(
        architectures=["GPT2LMHeadModel"],
        vocab_size=VOCAB,
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=256,
        initializer_range=SPREAD,
        bos_token_id=0,
        eos_token_id=1,
    )


def gpt_neox() -> PreTrainedConfig:
    return decoder("GPTNeoX", num_key_value_heads=2)  # as many as heads: it knows no fewer


BASES: dict[str, Callable[[], PreTrainedConfig]] = {
    "Llama 3": llama3,
    "Mistral": mistral,
    "Mixtral": mixtral,
    "Qwen2": qwen2,
    "Qwen3": qwen3,
    "Qwen3-MoE": qwen3_moe,
    "Qwen3-Next": qwen3_next,
    "Qwen3.5": qwen3_5,
    "Qwen3.5, multimodal": qwen3_5_multimodal,
    "Qwen3.5-MoE": qwen3_5_moe,
    "Gemma 2": gemma2,
    "Gemma 3": gemma3,
    "Gemma 3, multimodal": gemma3_multimodal,
    "Gemma 4": gemma4,
    "Phi-3": phi3,
    "OLMo 3": olmo3,
    "SmolLM3": smollm3,
    "Cohere 2": cohere2,
    "GLM-4 MoE": glm4_moe,
    "gpt-oss": gpt_oss,
    "DeepSeek V3": deepseek_v3,
    "Granite 4": granite4,
    "Falcon-H1": falcon_h1,
    "Nemotron-H": nemotron_h,
    "LFM2": lfm2,
    "Jamba": jamba,
    "GPT-2": gpt2,
    "GPT-NeoX": gpt_neox,
}


@dataclass(frozen=True)
class Case:
    """How a base is run on a CPU, and why not in float32 or with vLLM's defaults."""

    why: str = ""
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)  # of LLM
    env: dict[str, str] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)  # of its config
    error: str = ""  # what vLLM says where it cannot run it by itself

    @property
    def needs(self) -> str:
        """What vLLM on a CPU is to be started with, and why."""
        words = [f"{name}={value}" for name, value in self.env.items()]
        if self.dtype != "float32":
            words.append(f"--dtype {self.dtype}")
        if config := self.options.get("compilation_config"):
            words.append(f"--compilation-config '{json.dumps(config)}'")
        return f"{' '.join(words)} ({self.why})" if words else ""


TEXT_ONLY = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
DELTA_CASE = Case(
    "vLLM's gated delta net on a CPU knows bfloat16 alone",
    dtype="bfloat16",
    # As wide as the base's KV: a narrower memory gets longer blocks, here of 512 tokens, and vLLM
    # finds a prefix that is whole blocks of both.
    memory={"num_key_value_heads": 2, "head_dim": 128, "initializer_range": 0.015},
)
ROTARY_CASE = Case(
    "vLLM's rotary kernel for a CPU takes the heads of a 3-dimensional tensor for one",
    options={"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}},
)
CASES = {
    "Qwen3-Next": DELTA_CASE,
    "Qwen3.5": DELTA_CASE,
    "Qwen3.5, multimodal": replace(DELTA_CASE, options=TEXT_ONLY),
    "Gemma 3, multimodal": Case("Images have tests of their own", options=TEXT_ONLY),
    "Qwen3.5-MoE": DELTA_CASE,
    "DeepSeek V3": replace(
        ROTARY_CASE,
        why=f"{ROTARY_CASE.why}, and its MLA has no block size in common with other attention",
        env={"VLLM_MLA_DISABLE": "1"},
    ),
    "LFM2": ROTARY_CASE,
    "Jamba": Case(
        "vLLM has no Mamba 1 for a CPU: support/mamba1.py takes its place",
        error="no attribute 'selective_scan_fwd'",
    ),
}

FAILING = [name for name, how in CASES.items() if how.error]
MULTIMODAL = [name for name in BASES if name.endswith("multimodal")]


def save(
    base: str | PreTrainedConfig, folder: str | Path, dtype: str = "float32", seed: int = 0
) -> None:
    """Write a base, by its name or config, with random weights and the tiny tokenizer."""
    import torch

    torch.manual_seed(seed)
    config = BASES[base]() if isinstance(base, str) else base
    if dtype == "bfloat16":  # whose errors are up to 1.5e-2 with 0.05, ten times that with 0.3
        for part in (config, config.get_text_config()):
            part.initializer_range = min(part.initializer_range, 0.02)
    model = getattr(transformers, config.architectures[0])._from_config(config)
    if dtype == "bfloat16":  # where two experts are all but equal, rounding chooses
        for name, weight in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                weight.data *= 20
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    save_tokenizer(folder)
