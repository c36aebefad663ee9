"""Build the untrained memory: a dense causal LM that shares the base's tokenizer.

It is made of the base's first layers where those are attention with dense MLPs, those of the text
decoder in a multimodal base, too; else it starts fresh (fresh.py), or from what memory.init gives.
One compiled for another tokenizer is adapted if memory.adapt_tokenizer says so: see
vocabulary_transfer.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_memdec.checkpoint import TEKKEN, tokenizer_fingerprint
from vllm_memdec.errors import MemdecError
from vllm_memdec.train.model.fresh import cut, fresh_config, fresh_memory
from vllm_memdec.train.model.hidden_states import check_isolation
from vllm_memdec.train.model.huggingface import (
    check_positions,
    is_tied,
    load_config,
    load_model,
    load_text_config,
    load_tokenizer,
    skeleton,
    text_config,
)
from vllm_memdec.train.model.kinds import why_not_its_layers
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


def layers_wanted(settings: MemorySettings, config: Any) -> int:
    """Return how many layers a memory gets that a base with such a config starts."""
    return settings.layers or min(DEFAULT_LAYERS, text_config(config).num_hidden_layers)


def why_fresh(settings: MemorySettings, base: str) -> str | None:
    """Return why a memory starts fresh; None if with the base's first layers, or memory.init's."""
    if settings.init != "base":
        return None
    config = load_config(base)
    layers, has = layers_wanted(settings, config), text_config(config).num_hidden_layers
    if why := why_not_its_layers(config):
        return why
    if layers > has:
        raise MemdecError(f"memory.layers is {layers}, but {base} has only {has} layers: lower it.")
    return None if can_be_read(text_config(cut(config, layers))) else "they are none by themselves"


def can_be_read(config: Any) -> bool:
    """Return whether a config is the same where it is written and read again."""
    written = config.to_dict()
    try:
        return type(config).from_dict(written).to_dict() == written
    except Exception:  # libraries check little: any class may come
        return False


def own_config(settings: MemorySettings, base: str) -> Any:
    """Return the config of a memory that the base itself starts, with its first layers or none."""
    fresh, config = why_fresh(settings, base), load_config(base)
    layers = layers_wanted(settings, config)
    return fresh_config(base, layers) if fresh else text_config(cut(config, layers))


def starts_from(settings: MemorySettings, base: str) -> str:
    """Return in one sentence what a memory is before training."""
    config = memory_config(settings, base)
    shape = f"{config.num_hidden_layers} layers of width {config.hidden_size:,}"
    weights = sum(p.numel() for p in skeleton(config).parameters())
    shape += f", {weights / 1e6:,.4g} M weights"
    if settings.init != "base":
        return f"memory: starts from {settings.init}: {shape}"
    if why := why_fresh(settings, base):
        return (
            f"memory: the layers of {base} cannot be taken ({why}), so it starts fresh around its "
            f"embedding: {shape}; a dense model of the same tokenizer, given with --init, may be a "
            "better start"
        )
    return (
        f"memory: starts from the first layers of {base}: {shape}; a whole pretrained model of the "
        "same tokenizer, given with --init, may be the better start"
    )


def memory_config(settings: MemorySettings, base: str, block_tokens: int = 0) -> Any:
    """Return the memory's config; MemdecError if memory.init or memory.layers cannot work."""
    adapting = other_vocabulary(settings, base)
    if settings.init == "base":
        return own_config(settings, base)
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
    needed = min(len(tokenizer), load_text_config(base).vocab_size)
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
    sizes = (load_text_config(folder).vocab_size for folder in (settings.init, base))
    how = transfer(old, new, *sizes)
    epochs = settings.epochs * settings.transfer_fraction
    say(f"memory: adapting {settings.init} to the tokenizer of {base}: {how}")
    say(
        f"memory: training {epochs:g} epochs, memory.transfer_fraction "
        f"{settings.transfer_fraction:g} of memory.epochs {settings.epochs:g}"
    )
    return settings.changed(epochs=epochs)


def build_memory(
    settings: MemorySettings, base: str, block_tokens: int, restored: bool = False
) -> Any:
    """Return the memory before training, float32, on the CPU; MemdecError if init does not fit.

    restored: its weights will be a checkpoint's, so a fresh one need not have the base's.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = memory_config(settings, base, block_tokens)
    folder = base if settings.init == "base" else settings.init
    if why_fresh(settings, base):
        model = fresh_memory(base, config, settings.seed, restored)
    elif settings.init == "base":
        model = first_layers(base, config.num_hidden_layers)
    elif has_any(folder, WEIGHT_FILES):
        model = load_model(folder, device=torch.device("cpu"), config=config)
    else:
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=code_allowed()
        )
    if other_vocabulary(settings, base):
        rows = load_text_config(base).vocab_size
        exchange(model, load_tokenizer(folder), load_tokenizer(base), rows)
    check_isolation(model.eval())
    # The base's may be one that transformers reads but refuses to write, after all the training.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def first_layers(base: str, layers: int) -> Any:
    """Return the first layers of a base as a causal LM of text, float32, on the CPU."""
    from transformers import AutoModelForCausalLM

    model = load_model(base, device=torch.device("cpu"), config=cut(load_config(base), layers))
    config = text_config(model.config)
    if config is model.config:
        return model
    config.tie_word_embeddings = is_tied(model)
    text: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    text.base_model.load_state_dict(model.get_decoder().state_dict())
    text.get_output_embeddings().load_state_dict(model.get_output_embeddings().state_dict())
    return text
