"""Datastore stage: token blocks -> (key, next token) of every valid row, in shards.

A key is a hidden state of the base after a context, a value the token that followed. Rows are
numbered through all blocks in order, counting valid pairs only; that number is the row's id in
the index and in the targets.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from vllm_memdec.errors import MemdecError, said_by
from vllm_memdec.train.cluster import Cluster
from vllm_memdec.train.config import DatastoreSettings
from vllm_memdec.train.corpus import load_blocks, load_config, shard_rows, valid_rows
from vllm_memdec.train.faults import reraise
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.shards import load_shard, save_array, shard_path, unfinished
from vllm_memdec.train.trust import check_needs_no_code, code_allowed

# Tokens a forward pass on CUDA, by arithmetic for an H100 (not measured). transformers launches a
# layer's forward pass in about 0.6 ms. The 24 layers of a 0.5B base take 14 ms to launch; on 2,048
# tokens they take 3.5 ms to run at 60 % of 989 TFLOP/s, on 16,384 28 ms, so that the GPU is what is
# waited for. Activations of a layer, the widest of a 7B base: 1.2 GB.
EMBEDDED = 1 << 14
BLOCKS = 4  # a forward pass on a CPU
# A training step of 0.5B on an H100 (speed/training_gpu.py, blocks of 512), without and with
# compiled layers: on 8,192 tokens 67,000 and 84,000 tokens/s in 23 and 18 GB, on 16,384 75,000 and
# 119,000 in 37 and 27 GB, on 24,576 79,000 and 124,000 in 51 and 37 GB.
TRAINED = 1 << 13
LARGE_GPU = 64 * 10**9  # bytes, from which on a training step takes twice as many
SAMPLE_SHARDS = 64  # at least so many, evenly spread, give a sample of keys
MOST_SAMPLE_SHARDS = 2048  # and at most so many: each is a file to open


class _KeyReached(Exception):
    """Ends a forward pass at the key layer: what follows it is not needed."""


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def blocks_at_once(blocks: int | None, block_tokens: int, where: torch.device, tokens: int) -> int:
    """Return how many blocks a forward pass takes: those set, else so many tokens on CUDA."""
    if blocks is not None:
        return blocks
    return max(BLOCKS, tokens // block_tokens) if where.type == "cuda" else BLOCKS


def trained_tokens(where: torch.device) -> int:
    """Return how many tokens a forward pass of the training takes on CUDA."""
    if where.type != "cuda":
        return TRAINED
    large = torch.cuda.get_device_properties(where).total_memory >= LARGE_GPU
    return 2 * TRAINED if large else TRAINED


def to_device(array: np.ndarray, where: torch.device) -> torch.Tensor:
    """Return an array as a tensor on a device; nobody waits until CUDA has it."""
    tensor = torch.from_numpy(array)
    if where.type != "cuda":
        return tensor.to(where)
    return tensor.pin_memory().to(where, non_blocking=True)


def load_model(
    folder: str, dtype: str = "float32", where: torch.device | None = None, config: Any = None
) -> Any:
    """Return the causal LM of a folder in eval mode, or raise MemdecError in one sentence.

    config: in place of the folder's own; it may leave out layers, but nothing may be missing.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            trust_remote_code=code_allowed(),
        )
    except Exception as error:  # of any class: libraries check little
        reraise(error, folder)
        check_needs_no_code(folder, error)
        what = said_by(error)
        raise MemdecError(f"no causal LM could be loaded from {folder}: {what}.") from error
    if report["missing_keys"]:  # transformers would go on with random numbers
        raise MemdecError(
            f"{folder} lacks the weight {min(report['missing_keys'])}: copy the whole model again."
        )
    return model.eval().to(where or device())


def layers_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    """Return the transformer blocks."""
    lists = (m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList))
    return max(lists, key=len)


def last_mlp(model: torch.nn.Module) -> torch.nn.Module:
    """Return the MLP of the last transformer block, whatever the architecture calls it."""
    last = layers_of(model)[-1]
    for name in ("mlp", "feed_forward", "ffn", "block_sparse_moe"):
        if hasattr(last, name):
            return getattr(last, name)
    raise MemdecError(
        f"{type(model).__name__} has no MLP module known here: set datastore.key to final_hidden."
    )


def hidden_keys(
    model: torch.nn.Module, key: str | float, tokens: torch.Tensor, positions: torch.Tensor
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
        handle = layers[math.ceil(key * len(layers)) - 1].register_forward_hook(stop_after)
    try:
        with contextlib.suppress(_KeyReached):
            model.base_model(input_ids=tokens, position_ids=positions, use_cache=False)
    finally:
        handle.remove()
    return reached[0].reshape(*tokens.shape, -1)


@torch.inference_mode()
def check_isolation(model: torch.nn.Module, key: str | float = "final_hidden") -> None:
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
    model: torch.nn.Module, key: str | float, tokens: np.ndarray, positions: np.ndarray, batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (keys [rows, D] fp16, labels [rows] int32) of each batch of blocks [B, T+1]."""
    where = model.device
    batch = blocks_at_once(batch, tokens.shape[1] - 1, where, EMBEDDED)
    for start in range(0, len(tokens), batch):
        block = tokens[start : start + batch].astype(np.int64)
        position = positions[start : start + batch].astype(np.int64)
        valid = valid_rows(position)
        inputs = (to_device(x[:, :-1], where) for x in (block, position))
        kept = hidden_keys(model, key, *inputs)[to_device(valid, where)].to(torch.float16)
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


def sampled(keys: Keys, starts: np.ndarray, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (row numbers, keys fp16) of so many rows in all, evenly spread over the shards."""
    n_shards, n_rows = len(starts) - 1, int(starts[-1])
    most = MOST_SAMPLE_SHARDS
    if not keys.settings.keep_keys:  # each costs a forward pass: take more rows of fewer shards
        most = max(SAMPLE_SHARDS, -(-2 * rows * n_shards // n_rows))
    shards = np.unique(np.linspace(0, n_shards - 1, min(n_shards, most)).astype(int))
    ends = np.cumsum(np.diff(starts)[shards])  # of the shards, one after the other
    wanted = np.linspace(0, int(ends[-1]) - 1, min(rows, int(ends[-1]))).astype(np.int64)
    for shard, end in zip(shards.tolist(), ends.tolist(), strict=True):
        first = end - (starts[shard + 1] - starts[shard])
        local = wanted[slice(*np.searchsorted(wanted, (first, end)))] - first
        if len(local):
            yield local + starts[shard], keys(shard)[local]


def sample_rows(keys: Keys, starts: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (row numbers, keys fp16) of so many rows, or of all, evenly spread over the shards."""
    numbers, found = zip(*sampled(keys, starts, rows), strict=True)
    return np.concatenate(numbers), np.concatenate(found)


@dataclass
class Embedder:
    """Writes the keys and labels of one shard of blocks."""

    gpu: ClassVar[bool] = True
    keys: Keys
    work: Path

    @cached_property
    def checked(self) -> bool:
        check_isolation(self.keys.model, self.keys.settings.key_layer)
        return True

    def __call__(self, shard: int) -> int:
        assert self.checked
        keys, labels = self.keys.compute(shard)
        save_array(shard_path(self.work, "keys", shard), keys)
        save_array(shard_path(self.work, "labels", shard), labels)
        return len(labels)


@dataclass
class Labeller:
    """Writes the labels of one shard of blocks, where its keys are not kept."""

    corpus: Path
    work: Path

    def __call__(self, shard: int) -> int:
        tokens, positions = (array.shard(shard) for array in load_blocks(self.corpus, "train"))
        labels = tokens[:, 1:][valid_rows(positions)]
        save_array(shard_path(self.work, "labels", shard), labels)
        return len(labels)


def build_datastore(keys: Keys, work: Path, progress: Progress, cluster: Cluster) -> None:
    """Write keys-N.npy [rows, D] fp16 and labels-N.npy [rows] int32 for each shard of blocks."""
    starts = shard_rows(keys.corpus)
    n_shards = len(starts) - 1
    names = ("keys", "labels") if keys.settings.keep_keys else ("labels",)
    todo = unfinished(work, names, n_shards)
    worker = Embedder(keys, work) if keys.settings.keep_keys else Labeller(keys.corpus, work)
    with progress.task("datastore", int(starts[-1]), "rows") as advance:
        done = sorted(set(range(n_shards)) - set(todo))
        advance(int(np.diff(starts)[done].sum()), done_before=True)
        for rows in cluster.map(worker, todo):
            advance(rows)
