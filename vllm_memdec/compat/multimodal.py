"""Bases that see images: vLLM asks the base, where it would ask the class that it loads.

get_model_architecture and get_model_cls of vllm.model_executor.model_loader are wrapped: by the
class vLLM finds the processor of images and the text that stands for one in a prompt, in the front
end and in workers. Here the base's own class answers. vLLM's loader has both functions from the
module that defines them, so it still loads the composite.
answer_for() gives a composite what both runners ask of a model that sees images, or whose positions
have several dimensions (M-RoPE).

May go when vLLM lets a model name the class of its processor.
Relies on these users importing both functions from the package, when they call them.
"""

from collections.abc import Callable
from typing import Any

from vllm import ModelRegistry
from vllm.model_executor import model_loader
from vllm.model_executor.models.interfaces import (
    SupportsEncoderCudaGraph,
    SupportsMRoPE,
    SupportsMultiModalPruning,
)

from vllm_memdec.compat.hooks import wrap
from vllm_memdec.config import ARCHITECTURE

LOADER = "vllm.model_executor.model_loader"
INTERFACES = "vllm.model_executor.models.interfaces"
SIGNATURES = {
    f"{LOADER}.utils:get_model_architecture": "model_config",
    f"{LOADER}.utils:get_model_cls": "model_config",
    f"{INTERFACES}:SupportsMultiModal.embed_multimodal": "self kwargs",
    f"{INTERFACES}:SupportsMultiModal.embed_input_ids": (
        "self input_ids multimodal_embeddings is_multimodal"
    ),
    f"{INTERFACES}:SupportsMRoPE.get_mrope_input_positions": "self input_tokens mm_features",
}
ATTRIBUTES = {
    f"{INTERFACES}:SupportsMultiModal": "requires_raw_input_tokens supports_tower_connector_lora",
    "vllm.config:ModelConfig": "architectures supports_multimodal_inputs uses_mrope",
}
# What runners call or read of a model that sees images, beside what they ask of every model.
ASKED = (
    "embed_multimodal",
    "mm_prefix_clamp_sliding_window",
    "requires_sequential_video_encoding",
    "supports_tower_connector_lora",
    "get_mm_lora_token_counts",
    *(
        name
        for interface in (SupportsMRoPE, SupportsMultiModalPruning, SupportsEncoderCudaGraph)
        for name in vars(interface)
        if not name.startswith("_")
    ),
)


def install() -> None:
    """Let the base's class answer for the composite's."""
    wrap(model_loader, "get_model_architecture", _architecture)
    wrap(model_loader, "get_model_cls", _class)


def _architecture(original: Callable) -> Callable:
    def get_model_architecture(model_config: Any) -> Any:
        if model_config.hf_config.architectures == [ARCHITECTURE]:
            return ModelRegistry.resolve_model_cls(model_config.architectures, model_config)
        return original(model_config)

    return get_model_architecture


def _class(original: Callable) -> Callable:
    def get_model_cls(model_config: Any) -> Any:
        # As the original, which would call its own module's function: the loader's, for composites.
        return model_loader.get_model_architecture(model_config)[0]

    return get_model_cls


def answer_for(base: Any, composite: Any) -> None:
    """Give a composite the base's answers."""
    for name in ASKED:
        if hasattr(base, name):
            setattr(composite, name, getattr(base, name))
