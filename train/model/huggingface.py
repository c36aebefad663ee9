"""Models, configurations and tokenizers, read from Hugging Face folders."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vllm_memdec.errors import MemdecError, said_by
from vllm_memdec.train.faults import reraise
from vllm_memdec.train.model.devices import default_device
from vllm_memdec.train.model.output_head import check_head
from vllm_memdec.train.trust import check_needs_no_code, code_allowed

NOT_JSON = ("*.model", "*.tiktoken")  # tokenizers that are not in a tokenizer.json
READERS = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf", "tiktoken": "tiktoken"}


def load_tokenizer(folder: str) -> Any:
    """Return the tokenizer of a model folder, or raise MemdecError in one sentence."""
    from vllm_memdec.checkpoint import read_tokenizer, tokenizer_vocabulary

    if not os.path.isdir(folder):
        raise MemdecError(f"{folder} is not a folder: check the path.")
    unreadable = f"{folder} has no readable tokenizer: copy its tokenizer files there."
    try:
        tokenizer = read_tokenizer(folder, trust_remote_code=code_allowed())
        usable = bool(tokenizer_vocabulary(tokenizer)[0])  # some classes start empty without files
    except Exception as error:  # libraries check little: any class may come
        reraise(error, folder)
        check_needs_no_code(folder, error)
        check_readers(folder)
        raise MemdecError(unreadable) from error
    if not usable:
        raise MemdecError(unreadable)
    return tokenizer


def check_readers(folder: str) -> None:
    """Raise MemdecError if a tokenizer's file may be of a kind that no installed package reads."""
    files = [path for pattern in NOT_JSON for path in sorted(Path(folder).glob(pattern))]
    missing = [package for package, module in READERS.items() if not installed(module)]
    if files and missing:
        raise MemdecError(
            f"{files[0]} cannot be read: {' and '.join(missing)} may be what it takes and not "
            f"installed, so run `pip install {' '.join(missing)}`, or copy the model's "
            "tokenizer.json there."
        )


def installed(module: str) -> bool:
    """Return whether a module can be imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


def load_config(folder: str) -> Any:
    """Return the Hugging Face config of a model folder, or raise MemdecError in one sentence."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=code_allowed())
    except Exception as error:  # libraries check little: any class may come
        reraise(error, folder)
        check_needs_no_code(folder, error)
        raise MemdecError(f"{folder} has no usable config.json: {said_by(error)}.") from error
    if not all(hasattr(config, name) for name in ("vocab_size", "num_hidden_layers")):
        raise MemdecError(f"{folder} is {config.model_type}, no text decoder: give another model.")
    return config


def check_positions(config: Any, folder: str, block_tokens: int) -> None:
    """Raise MemdecError unless a model has positions for a block."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < block_tokens:
        raise MemdecError(
            f"{folder} has {positions} positions: lower corpus.block_tokens from {block_tokens}."
        )


def load_model(
    folder: str, dtype: str = "float32", device: torch.device | None = None, config: Any = None
) -> Any:
    """Return the causal LM of a folder in eval mode, or raise MemdecError in one sentence.

    config: in place of the folder's own; it may leave out layers, but nothing may be missing.
    """
    from transformers import AutoModelForCausalLM

    try:
        # Any, at its source: an argument decides whether a model or a pair is returned.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            trust_remote_code=code_allowed(),
        )
    except Exception as error:  # libraries check little: any class may come
        reraise(error, folder)
        check_needs_no_code(folder, error)
        what = said_by(error)
        raise MemdecError(f"no causal LM could be loaded from {folder}: {what}.") from error
    model, report = loaded
    if report["missing_keys"]:  # transformers would go on with random numbers
        raise MemdecError(
            f"{folder} lacks the weight {min(report['missing_keys'])}: copy the whole model again."
        )
    model = model.eval().to(device or default_device())
    check_head(model, folder)
    return model


def layers_of(model: Any) -> torch.nn.ModuleList:
    """Return the transformer blocks."""
    lists = (m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList))
    return max(lists, key=len)
