"""Build the untrained memory: a causal LM that shares the base's tokenizer.

One compiled for another tokenizer is adapted if memory.adapt_tokenizer says so: see
vocabulary_transfer.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_memdec.checkpoint import TEKKEN, tokenizer_fingerprint
from vllm_memdec.errors import MemdecError
from vllm_memdec.train.model.hidden_states import check_isolation
from vllm_memdec.train.model.huggingface import (
    check_positions,
    load_config,
    load_model,
    load_tokenizer,
)
from vllm_memdec.train.model.vocabulary_transfer import exchange, spelling, transfer
from vllm_memdec.train.settings import PRETRAINED, MemorySettings
from vllm_memdec.train.trust import code_allowed

DEFAULT_LAYERS = 4
WEIGHT_FILES = ("*.safetensors", "*.bin")
TOKENIZER_FILES = (
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "*.model", TEKKEN
)  # fmt: skip


def has_any(folder: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a folder has a file of one of the patterns."""
    return any(path for pattern in patterns for path in Path(folder).glob(pattern))


def truncated_config(base: str, layers: int | None) -> Any:
    """Return the base's config cut to its first `layers` transformer blocks."""
    config = load_config(base)
    if getattr(config, "quantization_config", None):
        raise MemdecError(
            f"{base} is quantised, so it cannot be trained from: set memory.init to a plain model."
        )
    if layers is None:
        layers = min(DEFAULT_LAYERS, config.num_hidden_layers)
    if layers > config.num_hidden_layers:
        raise MemdecError(
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
    """Return the memory's config; MemdecError if memory.init or memory.layers cannot work."""
    adapting = other_vocabulary(settings, base)
    if settings.init == "base":
        return truncated_config(base, settings.layers)
    folder = settings.init
    config, tokenizer = load_config(folder), load_tokenizer(base)
    vars(config).pop("memdec", None)  # what an export says of itself is not so of its descendant
    check_positions(config, folder, block_tokens)
    if adapting:
        if getattr(config, "quantization_config", None):
            raise MemdecError(
                f"memory.init: {folder} is quantised, so it cannot be adapted: give a plain model."
            )
        if not has_any(folder, WEIGHT_FILES):
            raise MemdecError(
                f"memory.init: {folder} has no weights to adapt: copy the whole memory there."
            )
        for each in (load_tokenizer(folder), tokenizer):
            spelling(each)
        return config
    needed = min(len(tokenizer), load_config(base).vocab_size)
    if config.vocab_size < needed:
        raise MemdecError(
            f"memory.init: {folder} has {config.vocab_size} vocabulary rows, the tokenizer of "
            f"{base} needs {needed}: raise vocab_size, or give another model."
        )
    return config


def other_vocabulary(settings: MemorySettings, base: str) -> bool:
    """Return whether memory.init has to be adapted to the base's tokenizer; MemdecError if unasked.

    A folder without tokenizer files is taken to fit, unless it is to be adapted.
    """
    init, given = settings.init, settings.tokenizer
    if init == "base":
        return False
    ours = tokenizer_fingerprint(load_tokenizer(base))
    if given is not None and tokenizer_fingerprint(load_tokenizer(given)) != ours:
        raise MemdecError(
            f"--tokenizer: {given} has another tokenizer than {base}, which the memory is to serve "
            f"beside: give --adapt-tokenizer instead."
        )
    if not settings.adapts and not has_any(init, TOKENIZER_FILES):
        return False
    differs = tokenizer_fingerprint(load_tokenizer(init)) != ours
    if differs and not settings.adapts:
        raise MemdecError(
            f"memory.init: {init} has another tokenizer than {base}: give --adapt-tokenizer "
            "to adapt it, or a model of one family."
        )
    return differs


def with_defaults(
    settings: MemorySettings, base: str, say: Callable[[str], None]
) -> MemorySettings:
    """Return the settings with the defaults that suit memory.init; say which are not the usual.

    A model that is adapted has new rows to learn: its defaults are those of an untrained one.
    """
    if settings.init == "base" or not has_any(settings.init, WEIGHT_FILES):
        return settings
    if other_vocabulary(settings, base):
        return settings
    changed = settings.pretrained()
    missing = [name for name in PRETRAINED if name not in settings.model_fields_set]
    if missing:
        said = (f"memory.{name} {getattr(changed, name):g}" for name in missing)
        say(f"memory: {settings.init} is trained already, so {' and '.join(said)}")
    return changed


def training_budget(
    settings: MemorySettings, base: str, say: Callable[[str], None]
) -> MemorySettings:
    """Return the settings to train with: fewer epochs where a memory is adapted; say what is done.

    What a memory knows is in its trunk, so the rows it gets anew need a tenth of the training.
    """
    if not other_vocabulary(settings, base):
        if settings.adapts:
            say(f"memory: {settings.init} has the tokenizer of {base} already, nothing to adapt")
        return settings
    old, new = load_tokenizer(settings.init), load_tokenizer(base)
    sizes = (load_config(folder).vocab_size for folder in (settings.init, base))
    how = transfer(old, new, *sizes)
    epochs = settings.epochs * settings.transfer_fraction
    say(f"memory: adapting {settings.init} to the tokenizer of {base}: {how}")
    say(
        f"memory: training {epochs:g} epochs, memory.transfer_fraction "
        f"{settings.transfer_fraction:g} of memory.epochs {settings.epochs:g}"
    )
    return settings.changed(epochs=epochs)


def build_memory(settings: MemorySettings, base: str, block_tokens: int) -> Any:
    """Return the memory before training, float32, on the CPU; MemdecError if init does not fit."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = memory_config(settings, base, block_tokens)
    folder = base if settings.init == "base" else settings.init
    if has_any(folder, WEIGHT_FILES):
        model = load_model(folder, device=torch.device("cpu"), config=config)
    else:
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=code_allowed()
        )
    if other_vocabulary(settings, base):
        rows = load_config(base).vocab_size
        exchange(model, load_tokenizer(folder), load_tokenizer(base), rows)
    check_isolation(model.eval())
    # The base's may be one that transformers reads but refuses to write, after all the training.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model
