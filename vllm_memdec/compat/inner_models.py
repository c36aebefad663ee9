"""Building models within a model: the base under vLLM's own configuration, memories beside it.

Nothing is wrapped. initialize_model builds a model by its configuration, with_hf_config names the
base's own class where the configuration names the composite, set_model_tag gives each memory a
compile cache of its own, as vLLM gives a draft model one.

May go when vLLM has a documented way to build a model within another.
Relies on their arguments alone.
"""

from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
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


def build_base(vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """Return the base; it keeps its usual layer names, which quantisation settings refer to."""
    model_config = vllm_config.model_config
    own = vllm_config.with_hf_config(model_config.hf_config, model_config.architectures)
    return initialize_model(own, prefix=prefix)


def build_memory(config: VllmConfig, name: str, prefix: str) -> nn.Module:
    """Return a memory, with its own compile cache and in its own dtype; config: the memory's."""
    with set_model_tag(name), set_default_torch_dtype(config.model_config.dtype):
        return initialize_model(config, prefix=maybe_prefix(prefix, name))
