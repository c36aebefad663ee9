"""Layers of a base by how much they matter, and a smaller model of some of them.

The influence of a layer is 1 - cos(what goes in, what comes out), the mean over tokens of text
(ShortGPT, arXiv 2403.03853): what hardly turns a state can be left out at the least cost.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_memdec.train.data.blocks import unmarked, valid_rows
from vllm_memdec.train.model.devices import to_device
from vllm_memdec.train.model.fresh import cut
from vllm_memdec.train.model.huggingface import layers_of, load_config, text_config


@torch.inference_mode()
def influences(model: Any, tokens: np.ndarray, positions: np.ndarray, batch: int) -> np.ndarray:
    """Return the influence of each layer [L] float64, over the valid rows of blocks [B, T+1]."""
    layers = layers_of(model)
    sums, rows = np.zeros(len(layers)), 0
    entered: dict[int, torch.Tensor] = {}

    def enter(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        entered[id(module)] = args[0] if args else kwargs["hidden_states"]

    def leave(module: torch.nn.Module, args: tuple, output: Any) -> None:
        after = output if isinstance(output, torch.Tensor) else output[0]
        before_ND, after_ND = (x[mask].double() for x in (entered.pop(id(module)), after))
        cosine_N = torch.nn.functional.cosine_similarity(before_ND, after_ND, dim=-1)
        sums[number[id(module)]] += float((1 - cosine_N).sum())

    number = {id(layer): n for n, layer in enumerate(layers)}
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(leave).remove)
        for start in range(0, len(tokens), batch):
            part = slice(start, start + batch)
            position = positions[part].astype(np.int64)
            mask = to_device(valid_rows(position), model.device)
            inputs = tokens[part, :-1].astype(np.int64), unmarked(position)[:, :-1]
            ids, places = (to_device(x, model.device) for x in inputs)
            model.base_model(input_ids=ids, position_ids=places, use_cache=False)
            rows += int(mask.sum())
    return sums / max(rows, 1)


def most_influential(influence_L: np.ndarray, layers: int) -> list[int]:
    """Return the numbers of so many layers, those of most influence, ascending."""
    return sorted(np.argsort(-influence_L, kind="stable")[:layers].tolist())


def some_layers(model: Any, base: str, chosen: Sequence[int]) -> Any:
    """Return a causal LM of text of chosen layers of a base, float32; model: of all, likewise."""
    from transformers import AutoModelForCausalLM

    config = text_config(cut(load_config(base), chosen))
    config.tie_word_embeddings = model.config.tie_word_embeddings
    small: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    theirs, ours = (_named_layers(each) for each in (model, small))
    state = {}
    for name, value in model.state_dict().items():
        if not name.startswith(theirs):
            state[name] = value  # embedding, norm and head
            continue
        number, rest = name.removeprefix(theirs).split(".", 1)
        if int(number) in chosen:
            state[f"{ours}{chosen.index(int(number))}.{rest}"] = value
    small.load_state_dict(state)
    return small.eval()


def _named_layers(model: Any) -> str:
    """Return what the names of the weights in a model's layers begin with, up to a number."""
    layers = layers_of(model)
    return next(f"{name}." for name, module in model.named_modules() if module is layers)
