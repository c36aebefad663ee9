"""Which models can be served: told before the first stage, as serving would after the last.

The rules are those of vllm_memdec/startup.py, read from Hugging Face's configurations and classes.
"""

from typing import Any

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.model.huggingface import load_config

EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
SENSES = ("vision_config", "audio_config", "speech_config")
STATES = ("linear", "conv", "mamba", "hybrid", "recurrent")  # in names of kinds of layers


def check_base(folder: str, starts_memory: bool) -> None:
    """Raise MemdecError for a base that serving refuses, or whose first layers it would refuse.

    starts_memory: whether the memory is made of the base's first layers.
    """
    config = load_config(folder)
    if kind := not_served(config):
        raise MemdecError(f"{folder} is {kind}, which vllm-memdec cannot serve: take another base.")
    if starts_memory and has_experts(config):
        raise MemdecError(
            f"{folder} is a mixture of experts, and so would be a memory made of its first layers, "
            "which vllm-memdec cannot serve: give a dense model with --init FOLDER, and "
            "--adapt-tokenizer if it has another tokenizer."
        )


def check_init(folder: str) -> None:
    """Raise MemdecError for a model that serving refuses as a memory."""
    config = load_config(folder)
    kind = "a mixture of experts" if has_experts(config) else not_served(config)
    if kind:
        raise MemdecError(
            f"{folder} is {kind}, which vllm-memdec cannot serve as a memory: give another --init."
        )


def has_experts(config: Any) -> bool:
    """Return whether a model has layers with experts."""
    counts = (getattr(config, name, None) for name in EXPERTS)
    return any(isinstance(count, int) and count > 0 for count in counts)


def not_served(config: Any) -> str | None:
    """Return what a model is other than a text decoder with attention; None if that."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if any(getattr(config, name, None) is not None for name in SENSES):
        return "multimodal"
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    layers = getattr(config, "layer_types", None) or ()
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # not a model's own code
    classes = known if isinstance(known, tuple) else (known,)
    if any(getattr(each, "_is_stateful", False) for each in classes) or any(
        word in str(layer) for layer in layers for word in STATES
    ):
        return "a state-space or hybrid model"
    return None
