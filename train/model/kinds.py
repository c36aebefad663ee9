"""Which models can be served, and of which a memory can be made: told before the first stage.

The rules are those of vllm_memdec/startup.py, read from Hugging Face's configurations and classes.
"""

import inspect
from typing import Any

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.model.huggingface import load_config, skeleton, text_config

EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
EXPERTS_USED = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k")
STATES = ("linear", "conv", "mamba", "hybrid", "recurrent")  # in names of kinds of layers
# Of models whose layers use something of other layers, or of a table for all of them.
ENTANGLED = ("num_kv_shared_layers", "hidden_size_per_layer_input")


def check_base(folder: str) -> None:
    """Raise MemdecError for a base that serving refuses, or that transformers has no class for."""
    config = load_config(folder)
    text = text_config(config)
    kind = None
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, text)):
        kind = "an encoder-decoder"
    elif has_state(text) and not hasattr(text, "num_attention_heads"):
        kind = "a model without attention"
    else:
        kind = no_causal_lm(config) or no_text_model(config)
    if kind:
        raise MemdecError(f"{folder} is {kind}, which vllm-memdec cannot serve: take another base.")


def check_init(folder: str) -> None:
    """Raise MemdecError for a model that serving refuses as a memory: it is a dense decoder."""
    config = load_config(folder)
    kind = None
    if has_experts(text_config(config)):
        kind = "a mixture of experts"
    elif text_config(config) is not config:
        kind = "multimodal"
    elif getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder"
    elif has_state(config):
        kind = "a state-space or hybrid model"
    else:
        kind = no_causal_lm(config)
    if kind:
        raise MemdecError(
            f"{folder} is {kind}, which vllm-memdec cannot serve as a memory: give another --init."
        )


def why_not_its_layers(config: Any) -> str | None:
    """Return why a memory cannot be made of a base's first layers, or None if it can."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = text_config(config)
    quantised = (getattr(part, "quantization_config", None) for part in (config, text))
    reasons = {
        "not all of its layers are attention": has_state(text),
        "it is a mixture of experts": has_experts(text),
        "it is quantised": any(quantised),
        "its layers share parts": any(getattr(text, name, None) for name in ENTANGLED),
        "its text decoder is no model by itself": text is not config
        and type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING,
    }
    return next((reason for reason, is_so in reasons.items() if is_so), None)


def no_causal_lm(config: Any) -> str | None:
    """Return what a model is that predicts no next token, as its config says; None if it does."""
    if any(str(name).endswith("ForMaskedLM") for name in config.architectures or ()):
        return "a masked language model"
    if not has_class(config):
        return f"a {config.model_type} model, of which transformers has no causal LM"
    return None


def no_text_model(config: Any) -> str | None:
    """Return what a model is that gives no logits of tokens alone; None if it does."""
    model = skeleton(config)
    if model.get_output_embeddings() is None:
        return "a model without an output head"
    given = inspect.signature(model.forward).parameters.values()
    needed = [
        each.name
        for each in given
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    if more := [name for name in needed if name != "input_ids"]:
        return f"a model that needs {more[0]} beside tokens"
    return None


def has_class(config: Any) -> bool:
    """Return whether transformers, or a model's own code, has a class that predicts tokens."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    known = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    return any(type(config) in each for each in known) or hasattr(config, "auto_map")


def has_experts(text: Any) -> bool:
    """Return whether a text decoder has layers with experts."""
    return count_of(text, EXPERTS) > 0


def share_of_experts(text: Any) -> float:
    """Return which share of its experts a token goes through, 1 of those without."""
    return (count_of(text, EXPERTS_USED) or 1) / (count_of(text, EXPERTS) or 1)


def count_of(text: Any, names: tuple[str, ...]) -> int:
    """Return the number that a text decoder has by one of some names, 0 if none."""
    parts = (text, getattr(text, "ffn_config", None))  # DBRX's
    counts = (getattr(part, name, None) for part in parts for name in names)
    return next((count for count in counts if isinstance(count, int) and count > 0), 0)


def has_state(text: Any) -> bool:
    """Return whether a text decoder has layers with a state in place of attention."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    layers = getattr(text, "layer_types", None) or ()
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)  # not a model's own code
    classes = known if isinstance(known, tuple) else (known,)
    return any(getattr(each, "_is_stateful", False) for each in classes) or any(
        word in str(layer) for layer in layers for word in STATES
    )
