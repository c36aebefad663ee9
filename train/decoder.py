"""Build the untrained memory: a causal LM that shares the base's tokenizer."""

from pathlib import Path
from typing import Any

import torch

from vllm_memdec.checkpoint import tokenizer_fingerprint
from vllm_memdec.train.config import MemorySettings
from vllm_memdec.train.corpus import check_positions, load_config, load_tokenizer
from vllm_memdec.train.datastore import check_isolation, load_model

DEFAULT_LAYERS = 4
WEIGHT_FILES = ("*.safetensors", "*.bin")


def truncated_config(base: str, layers: int | None) -> Any:
    """Return the base's config cut to its first `layers` transformer blocks."""
    config = load_config(base)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{base} is quantised, so it cannot be trained from: set memory.init to a plain model."
        )
    if layers is None:
        layers = min(DEFAULT_LAYERS, config.num_hidden_layers)
    if layers > config.num_hidden_layers:
        raise ValueError(
            f"memory.layers is {layers}, but {base} has only {config.num_hidden_layers} layers: "
            "lower it."
        )
    for name, value in vars(config).items():  # per-layer lists, such as layer_types
        if name.endswith("_token_id"):  # may be a list of as many, by chance
            continue
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
    return config


def memory_config(settings: MemorySettings, base: str, block_tokens: int) -> Any:
    """Return the memory's config; ValueError if memory.init or memory.layers cannot work."""
    if settings.init == "base":
        return truncated_config(base, settings.layers)
    folder = settings.init
    config, tokenizer = load_config(folder), load_tokenizer(base)
    check_positions(config, folder, block_tokens)
    if (Path(folder) / "tokenizer_config.json").exists() and tokenizer_fingerprint(
        load_tokenizer(folder)
    ) != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"memory.init: {folder} has another tokenizer than {base}: give a model of one family."
        )
    needed = min(len(tokenizer), load_config(base).vocab_size)
    if config.vocab_size < needed:
        raise ValueError(
            f"memory.init: {folder} has {config.vocab_size} vocabulary rows, the tokenizer of "
            f"{base} needs {needed}: raise vocab_size, or give another model."
        )
    return config


def build_memory(settings: MemorySettings, base: str, block_tokens: int) -> Any:
    """Return the memory before training, float32, on the CPU; ValueError if init does not fit."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = memory_config(settings, base, block_tokens)
    folder = base if settings.init == "base" else settings.init
    if any(path for pattern in WEIGHT_FILES for path in Path(folder).glob(pattern)):
        model = load_model(folder, where=torch.device("cpu"), config=config)
    else:
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    check_isolation(model.eval())
    # The base's may be one that transformers reads but refuses to write, after all the training.
    model.generation_config = GenerationConfig.from_model_config(config)
    return model
