"""Building models within a model: the base under vLLM's own configuration, memories beside it.

Nothing is wrapped. initialize_model builds a model by its configuration, with_hf_config names the
base's own class where the configuration names the composite, set_model_tag gives each memory a
compile cache of its own, as vLLM gives a draft model one.

May go when vLLM has a documented way to build a model within another.
Relies on their arguments alone.
"""

from typing import Any

import torch
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import maybe_prefix
from vllm.utils.torch_utils import set_default_torch_dtype

SIGNATURES = {
    "vllm.model_executor.model_loader.utils:initialize_model": (
        "vllm_config prefix model_class model_config"
    ),
    "vllm.config:VllmConfig.with_hf_config": "self hf_config architectures",
    "vllm.compilation.backends:set_model_tag": "tag is_encoder",
}


def build_base(vllm_config: VllmConfig, prefix: str) -> Any:
    """Return the base, a module; quantisation settings refer to its usual layer names."""
    model_config = vllm_config.model_config
    own = vllm_config.with_hf_config(model_config.hf_config, model_config.architectures)
    return initialize_model(own, prefix=prefix)


def build_memory(config: VllmConfig, name: str, prefix: str) -> Any:
    """Return a memory, a module with its own compile cache and dtype; config: its own."""
    with set_model_tag(name), set_default_torch_dtype(dtype_of(config.model_config)):
        return initialize_model(config, prefix=maybe_prefix(prefix, name))


def build_spare(config: VllmConfig, layers: dict[str, Any], prefix: str) -> Any:
    """Return a memory on the host that no step runs; its layers leave those that vLLM serves."""
    before = dict(layers)
    with torch.device("cpu"):
        module = build_memory(config, "spare", prefix)
    layers.clear()
    layers.update(before)
    return module


def dtype_of(model: ModelConfig) -> torch.dtype:
    """Return the dtype of a model that vLLM has configured."""
    assert isinstance(model.dtype, torch.dtype)
    return model.dtype
