"""vLLM's own configurations of a memory, made from those of the base that it serves beside."""

import copy
import math
from typing import TYPE_CHECKING, Any

from vllm_memdec.config import MemDecConfig, MemoryConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def memory_model_config(memory: MemoryConfig, base: "ModelConfig") -> "ModelConfig":
    """Return vLLM's own ModelConfig of a memory, in the base's dtype unless it has its own.

    Its max_model_len is its length: how many positions of the server's are the memory's.
    """
    from vllm.config import ModelConfig

    dtype: Any = memory.dtype or base.dtype
    config = ModelConfig(
        model=memory.model,
        revision=memory.revision,
        tokenizer=base.tokenizer,
        tokenizer_revision=base.tokenizer_revision,
        trust_remote_code=base.trust_remote_code,
        dtype=dtype,
        quantization=memory.quantization,
        seed=base.seed,
        enforce_eager=base.enforce_eager,
        runner="generate",
        model_impl="vllm",
    )
    is_given = base.original_max_model_len not in (None, -1)  # --max-model-len
    config.max_model_len = min(base.max_model_len, positions_of(config, is_given))
    return config


def memory_lengths(vllm_config: "VllmConfig") -> list[int]:
    """Return how many positions of a server's are each memory's, those to come in slots too."""
    memories, base = MemDecConfig.from_vllm(vllm_config).built, vllm_config.model_config
    return [memory_model_config(memory, base).max_model_len for memory in memories]


def positions_of(memory: "ModelConfig", is_given: bool) -> int:
    """Return how many positions a memory has; is_given: the user asked for a number of them."""
    ropes = getattr(memory.hf_text_config, "rope_parameters", None) or {}
    by_layer = [rope for rope in ropes.values() if isinstance(rope, dict)]
    kinds = {rope.get("rope_type") for rope in (ropes, *by_layer)}
    # vLLM derives a multiple of the positions that its table of a dynamic rope has, and the short
    # range of a longrope, whose long one it takes where it is asked to.
    if "dynamic" in kinds or (is_given and "longrope" in kinds):
        positions = memory.model_arch_config.derived_max_model_len_and_key[0]
        if not math.isinf(positions):  # a config that names none: vLLM gives a number of its own
            return int(positions)
    return memory.max_model_len


def memory_vllm_config(
    vllm_config: "VllmConfig", memory: MemoryConfig, number: int
) -> "VllmConfig":
    """Return the configuration under which vLLM builds a memory beside the base."""
    from vllm.config import replace

    base = vllm_config.model_config
    model_config = memory_model_config(memory, base)
    # One window for all layers travels in the cache config; the memory must not get the base's.
    cache_config = copy.copy(vllm_config.cache_config)
    cache_config.sliding_window = uniform_sliding_window(model_config)
    # Of a hybrid base: its max_model_len, and vLLM refuses other numbers without a prefix cache.
    cache_config.mamba_block_size = None
    if memory.kv_cache_dtype is not None:
        kv_cache_dtype: Any = memory.kv_cache_dtype  # one of vLLM's, see startup.py
        cache_config.cache_dtype = kv_cache_dtype
    # Its own: vLLM writes into it whether the model is a mixture of experts.
    parallel_config = copy.copy(vllm_config.parallel_config)
    if memory.tensor_parallel_size == 1:
        parallel_config.tensor_parallel_size = 1  # whose heads vLLM counts by it
    assert isinstance(vllm_config.additional_config, dict)
    # quant_config None: vLLM derives the memory's own, if its config.json names one.
    return replace(
        vllm_config,
        model_config=model_config,
        cache_config=cache_config,
        parallel_config=parallel_config,
        # Part of vLLM's key of compiled code: no memory is to load what was compiled for another.
        additional_config=vllm_config.additional_config | {"memdec_memory": number},
        quant_config=None,
        lora_config=None,
    )


def uniform_sliding_window(model_config: "ModelConfig") -> int | None:
    """Return the window of a model whose layers all have it, as vLLM decides for the base."""
    layer_types = getattr(model_config.hf_text_config, "layer_types", None)
    if layer_types is not None and any(kind != "sliding_attention" for kind in layer_types):
        return None
    return model_config.get_sliding_window()
