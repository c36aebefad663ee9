"""Models, configurations and tokenizers, read from Hugging Face folders."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vllm_memdec.errors import MemdecError, said_by
from vllm_memdec.train.faults import reraise
from vllm_memdec.train.model.devices import default_device, product_dtype
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
    text = text_config(config)
    if not all(hasattr(text, name) for name in ("vocab_size", "num_hidden_layers")):
        raise MemdecError(f"{folder} is {config.model_type}, no text decoder: give another model.")
    return config


def text_config(config: Any) -> Any:
    """Return the part of a config that is the text decoder's: of most models all of it."""
    return config.get_text_config(decoder=True)


def load_text_config(folder: str) -> Any:
    """Return the config of the text decoder in a model folder; MemdecError as load_config()."""
    return text_config(load_config(folder))


def auto_class(config: Any) -> Any:
    """Return the class of transformers that reads a model: of a multimodal one not all do."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForMultimodalLM,
    )

    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    multimodal = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    return AutoModelForMultimodalLM if multimodal and not known else AutoModelForCausalLM


def skeleton(config: Any) -> Any:
    """Return the model of a config without weights, or raise MemdecError in one sentence."""
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=code_allowed())
    except Exception as error:  # libraries check little: any class may come
        reraise(error, config.name_or_path)
        raise MemdecError(
            f"transformers makes no causal LM of the config of {config.name_or_path} "
            f"({config.model_type}): {said_by(error)}."
        ) from error


def check_positions(config: Any, folder: str, block_tokens: int) -> None:
    """Raise MemdecError unless a model has positions for a block."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < block_tokens:
        raise MemdecError(
            f"{folder} has {positions} positions: lower corpus.block_tokens from {block_tokens}."
        )


def read_model(folder: str, config: Any = None, **more: Any) -> Any:
    """Return the model of a folder in eval mode, or raise MemdecError in one sentence.

    config: in place of the folder's own; it may leave out layers, but nothing may be missing.
    more: for from_pretrained().
    """
    config = config or load_config(folder)
    try:
        # Any, at its source: an argument decides whether a model or a pair is returned.
        loaded: Any = auto_class(config).from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            trust_remote_code=code_allowed(),
            **more,
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
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, *_ in report["mismatched_keys"]:  # of what has to do with layers some may be
        if any(part is not None and model.get_parameter(name) is part.weight for part in ends):
            raise MemdecError(
                f"{folder} has a weight {name} of another shape than its config.json says: copy "
                "the whole model again."
            )
    return model.eval()


def load_model(
    folder: str, dtype: str = "float32", device: torch.device | None = None, config: Any = None
) -> Any:
    """Return the causal LM of a folder on a device, its head checked; MemdecError if it is none.

    dtype: of its weights, and of its products where the device has them; config: as in
    read_model().
    """
    device, own = device or default_device(), getattr(torch, dtype)
    model = read_model(folder, config, dtype=own).to(device)
    products = product_dtype(dtype, device)
    # Only where it must be: what a model keeps in float32 is not rounded, and a quantised one
    # multiplies as it does.
    if products is not own and getattr(model.config, "quantization_config", None) is None:
        model = model.to(products)
    check_head(model, folder)
    return model


def is_tied(model: Any) -> bool:
    """Return whether a model's head is its embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def layers_of(model: Any) -> torch.nn.ModuleList:
    """Return the layers of the text decoder: its longest list of modules that is in no other."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    lists: dict[str, torch.nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        within = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, torch.nn.ModuleList) and not within:
            lists[name] = module
    return max(lists.values(), key=len)
