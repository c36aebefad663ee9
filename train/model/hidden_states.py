"""Hidden states of a base on token blocks: the keys of the datastore."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.blocks import load_blocks, unmarked, valid_rows
from vllm_memdec.train.data.shards import load_shard
from vllm_memdec.train.model.devices import EMBEDDED, blocks_at_once, to_device
from vllm_memdec.train.model.huggingface import layers_of, load_config, load_model
from vllm_memdec.train.settings import DatastoreSettings


class _KeyReached(Exception):
    """Ends a forward pass at the key layer: what follows it is not needed."""


def last_mlp(model: Any) -> torch.nn.Module:
    """Return the MLP of the last transformer block, whatever the architecture calls it."""
    last = layers_of(model)[-1]
    for name in ("mlp", "feed_forward", "ffn", "block_sparse_moe"):
        if hasattr(last, name):
            return getattr(last, name)
    raise MemdecError(
        f"{type(model).__name__} has no MLP module known here: set datastore.key to final_hidden."
    )


def hidden_keys(
    model: Any, key: str | float, tokens: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Return keys [B, T, D] of blocks [B, T], the forward pass stopped where they are known.

    key: the last MLP's input, the final hidden state, or what a share of the layers puts out.
    """
    if key == "final_hidden":
        out = model.base_model(input_ids=tokens, position_ids=positions, use_cache=False)
        return out.last_hidden_state
    reached = []

    def stop_before(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        reached.append(args[0] if args else kwargs["hidden_states"])
        raise _KeyReached

    def stop_after(module: torch.nn.Module, args: tuple, output: Any) -> None:
        reached.append(output[0] if isinstance(output, tuple) else output)
        raise _KeyReached

    if key == "last_mlp_input":
        handle = last_mlp(model).register_forward_pre_hook(stop_before, with_kwargs=True)
    else:
        layers = layers_of(model)
        handle = layers[math.ceil(float(key) * len(layers)) - 1].register_forward_hook(stop_after)
    try:
        with contextlib.suppress(_KeyReached):
            model.base_model(input_ids=tokens, position_ids=positions, use_cache=False)
    finally:
        handle.remove()
    return reached[0].reshape(*tokens.shape, -1)


@torch.inference_mode()
def check_isolation(model: Any, key: str | float = "final_hidden") -> None:
    """Raise MemdecError unless documents packed into a block leave each other alone.

    Not every architecture of transformers takes the restart of positions for a boundary.
    """
    n = 8
    tokens = torch.arange(2 * n, device=model.device)[None] % model.config.vocab_size
    positions = torch.arange(2 * n, device=model.device)[None] % n
    packed_nD = hidden_keys(model, key, tokens, positions)[0, n:].float()
    alone_nD = hidden_keys(model, key, tokens[:, n:], positions[:, n:])[0].float()
    if ((packed_nD - alone_nD).norm(dim=-1) > 0.05 * alone_nD.norm(dim=-1)).any():
        raise MemdecError(
            f"{type(model).__name__} of transformers lets packed documents see each other, so it "
            "is not supported: give another model."
        )


@torch.inference_mode()
def embed(
    model: Any, key: str | float, tokens: np.ndarray, positions: np.ndarray, batch: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (keys [rows, D] fp16, labels [rows] int32) of each batch of blocks [B, T+1]."""
    device = model.device
    batch = blocks_at_once(batch, tokens.shape[1] - 1, device, EMBEDDED)
    for start in range(0, len(tokens), batch):
        block = tokens[start : start + batch].astype(np.int64)
        position = positions[start : start + batch].astype(np.int64)
        valid = valid_rows(position)
        inputs = (to_device(x[:, :-1], device) for x in (block, unmarked(position)))
        kept = hidden_keys(model, key, *inputs)[to_device(valid, device)].to(torch.float16)
        host = kept.cpu().numpy()
        # An H100 has the keys of 1.5B sooner than one core has checked them, by arithmetic.
        if not (kept.isfinite() if kept.is_cuda else np.isfinite(host)).all():
            raise MemdecError("a key is too large for fp16: set datastore.key to the other layer.")
        yield host, block[:, 1:][valid].astype(np.int32)


@dataclass
class Keys:
    """The keys of a shard of blocks, by its number: read where they are kept, else computed."""

    settings: DatastoreSettings
    base: str
    corpus: Path
    datastore: Path

    @cached_property
    def model(self) -> Any:
        return load_model(self.base, self.settings.dtype)

    @property
    def width(self) -> int:
        """Return how many numbers a key has, without making one."""
        if self.settings.keep_keys:
            return load_shard(self.datastore, "keys", 0).shape[1]
        return load_config(self.base).hidden_size

    def __call__(self, shard: int) -> np.ndarray:
        """Return keys [rows, D] fp16."""
        if self.settings.keep_keys:
            return load_shard(self.datastore, "keys", shard)
        return self.compute(shard)[0]

    def compute(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (keys [rows, D] fp16, labels [rows] int32) of a shard, from the base."""
        tokens, positions = (array.shard(shard) for array in load_blocks(self.corpus, "train"))
        batches = embed(
            self.model, self.settings.key_layer, tokens, positions, self.settings.batch_blocks
        )
        keys, labels = zip(*batches, strict=True)
        return np.concatenate(keys), np.concatenate(labels)
