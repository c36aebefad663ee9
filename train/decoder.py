"""Build the untrained memory: a causal LM that shares the base's tokenizer."""

from pathlib import Path
from typing import Any

import torch

from vllm_memdec.checkpoint import tokenizer_fingerprint
from vllm_memdec.train.config import MemorySettings
from vllm_memdec.train.datastore import load_model

WEIGHT_FILES = ("*.safetensors", "*.bin")


def truncated_config(base: str, layers: int) -> Any:
    """Return the base's config cut to its first `layers` transformer blocks."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    if layers > config.num_hidden_layers:
        raise ValueError(
            f"memory.layers is {layers}, but {base} has only {config.num_hidden_layers} layers."
        )
    for name, value in vars(config).items():  # per-layer lists, such as layer_types
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
    return config


def build_memory(settings: MemorySettings, base: str) -> Any:
    """Return the memory before training, float32, on the CPU; ValueError if init does not fit."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(settings.seed)  # a fresh model's weights
    if settings.init == "base":
        config = truncated_config(base, settings.layers)
        return AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
    folder = Path(settings.init)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"memory.init: {folder} holds no config.json: give `base`, or a folder with a "
            "causal LM or its config."
        )
    tokenizer = AutoTokenizer.from_pretrained(base)
    if (folder / "tokenizer_config.json").exists() and tokenizer_fingerprint(
        AutoTokenizer.from_pretrained(str(folder))
    ) != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"memory.init: {folder} has another tokenizer than {base}.")
    if any(path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
        model = load_model(str(folder), where=torch.device("cpu"))
    else:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(str(folder)), dtype=torch.float32
        )
    if model.config.vocab_size < len(tokenizer):
        raise ValueError(
            f"memory.init: {folder} has {model.config.vocab_size} vocabulary rows, "
            f"the tokenizer of {base} needs {len(tokenizer)}."
        )
    return model
