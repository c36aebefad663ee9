"""A memory of a base whose layers cannot be taken: untrained layers around the base's embedding.

The rule. It is a dense decoder of Qwen3's architecture: Llama's layers with normalised queries and
keys, which bear the learning rate of a memory without trained weights, and a class that vLLM serves
on every device, split over GPUs, quantised and with LoRA. Its width is the base's, at most
MAX_WIDTH; it has memory.layers layers, by default as many as a cut of a base has; 8 or 16 heads of
64 or 128, a fourth as many for keys and values; an MLP of three times the width; the base's
vocabulary and positions. A base of width 2,048 and 152,000 tokens gives 0.2 B weights in layers and
0.3 B in each of embedding and head; wider ones, up to a trillion weights, give the same.

Embedding and head are the base's, tied as there: what tokens mean to each other need not be learnt
again. Their scale is the architecture's own, as bases multiply embeddings or logits by this or
that. Of a base wider than MAX_WIDTH they are projected on their principal directions, those of the
largest eigenvalues of E'E, which keeps the products of rows as well as any projection can.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from vllm_memdec.train.model.devices import default_device
from vllm_memdec.train.model.huggingface import (
    is_tied,
    load_config,
    read_model,
    skeleton,
    text_config,
)

MAX_WIDTH = 2048
GROUP = 4  # query heads of a head of keys and values


def fresh_config(base: str, layers: int) -> Any:
    """Return the config of a fresh memory with so many layers; see the rule above."""
    from transformers import Qwen3Config

    whole = load_config(base)
    text = text_config(whole)
    width = min(text.hidden_size, MAX_WIDTH)
    head = 128 if width >= 1024 else 64
    heads = -(-width // head // 8) * 8  # a multiple of 8 can be split over GPUs
    config = Qwen3Config(
        vocab_size=text.vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // GROUP,
        head_dim=head,
        max_position_embeddings=getattr(text, "max_position_embeddings", None) or 32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        # Not all configs say it; of some, as Mistral 3's, one part says other than the weights.
        tie_word_embeddings=is_tied(skeleton(cut(whole, 0))) and is_tied(without_layers(base)),
    )
    for name in ("bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(text, name, None))
    return config


def fresh_memory(base: str, config: Any, seed: int, restored: bool = False) -> Any:
    """Return a memory of fresh_config() with the base's embedding and head, float32, on the CPU.

    restored: its weights will be a checkpoint's, so the base's are not read.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    memory: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if restored:
        return memory
    theirs = without_layers(base)
    parts = [(memory.get_input_embeddings(), theirs.get_input_embeddings())]
    if not config.tie_word_embeddings:
        parts.append((memory.get_output_embeddings(), theirs.get_output_embeddings()))
    with torch.no_grad():
        for ours, source in parts:
            rows_VD = principal(source.weight.float(), config.hidden_size)
            scale = config.initializer_range / rows_VD.square().mean().sqrt()
            ours.weight.copy_(rows_VD * scale)
    return memory


def principal(rows_VD: torch.Tensor, width: int) -> torch.Tensor:
    """Return rows [V, width] in the directions in which they are largest; as they are if narrow."""
    if rows_VD.shape[1] <= width:
        return rows_VD
    rows_VD = rows_VD.to(default_device())
    directions_DW = torch.linalg.eigh(rows_VD.T @ rows_VD)[1][:, -width:]
    # Either sign is right: machines, and the ranks of a training, are to choose the same.
    largest_1W = directions_DW.abs().argmax(0, keepdim=True)
    directions_DW = directions_DW * directions_DW.gather(0, largest_1W).sign()
    return (rows_VD @ directions_DW).cpu()


def without_layers(base: str) -> Any:
    """Return a base without its layers, of which nothing is read, however large it is."""
    config = cut(load_config(base), 0)
    for part in (config, text_config(config)):  # embeddings are not quantised
        vars(part).pop("quantization_config", None)
    # Some have a table for all layers, which has no columns then.
    return read_model(base, config, dtype=torch.float32, ignore_mismatched_sizes=True)


def cut(config: Any, layers: int | Sequence[int]) -> Any:
    """Return a copy of a base's config with some layers of its decoder: the first, or those."""
    config, chosen = copy.deepcopy(config), range(layers) if isinstance(layers, int) else layers
    text = text_config(config)
    has = text.num_hidden_layers
    for name, value in vars(text).items():  # lists of an entry a layer, such as layer_types
        if name.endswith("_token_id"):  # may be a list of as many, by chance
            continue
        if isinstance(value, list) and len(value) == has:
            setattr(text, name, [value[n] for n in chosen if n < has])
    text.num_hidden_layers = len(chosen)
    return config
