"""Hidden states of a model on token blocks: the keys of the datastore, and what is scored.

The final hidden state is what a model puts out without its head, as in vLLM; check_head() sees to
it that the logits are made of nothing else. So no architecture is named here. Where documents
packed into a block would see each other, as in a recurrent layer, whose state does not restart with
the positions, each is read by itself.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.blocks import load_blocks, unmarked, valid_rows
from vllm_memdec.train.data.shards import load_shard
from vllm_memdec.train.model.devices import EMBEDDED, blocks_at_once, to_device
from vllm_memdec.train.model.huggingface import (
    layers_of,
    load_config,
    load_model,
    load_text_config,
    skeleton,
    text_config,
)
from vllm_memdec.train.model.kinds import has_state
from vllm_memdec.train.model.output_head import head, rows_at_once
from vllm_memdec.train.settings import DatastoreSettings

# The last is of Granite 4, which has it beside its experts, or instead.
MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "mlp_block", "shared_mlp")
APART: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()  # see keeps_apart()
SEEN = 0.03  # of a state's norm: more than rounding changes it

# Token blocks whose documents are sorted by length, where they are read one by one: of so many a
# pass of 2,048 tokens has 5 to 9 % of filler, of 4 blocks 24 to 70 % (documents of 20 to 800).
GATHERED = 64


class _KeyReached(Exception):
    """Ends a forward pass at the key layer: what follows it is not needed."""


def last_mlp(model: Any) -> torch.nn.Module | None:
    """Return the MLP of the last layer, or its experts; None if it has none that is known here."""
    last = layers_of(model)[-1]
    for name in MLPS:
        if getattr(last, name, None) is not None:
            return getattr(last, name)
    return None


def key_fallback(base: str, key: str | float) -> str | None:
    """Return a sentence if a base has not what the key is to be; None if it has. Loads no weights.

    The input of the last MLP is the paper's choice, the final hidden state its successor's.
    """
    if key != "last_mlp_input" or last_mlp(skeleton(load_config(base))) is not None:
        return None
    return (
        f"datastore: the last layer of {base} has no MLP that is known here, so keys are its final "
        "hidden states (datastore.key final_hidden)"
    )


def hidden_states(
    model: Any,
    key: str | float | tuple[str | float, ...],
    tokens: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Return hidden states [B, T, D] of tokens [B, T], the forward pass stopped where they are.

    key: the last MLP's input, the final hidden state, or what a share of the layers puts out; of
    several, in the order in which a pass reaches them, the states stand side by side. MemdecError
    if that is not one state a token.
    """
    keys = key if isinstance(key, tuple) else (key,)
    reached: list[torch.Tensor] = []

    def keep(state: torch.Tensor) -> None:
        last = len(reached) + 1 == len(keys)
        reached.append(state if last else state.clone())  # what follows may write over it
        if last:
            raise _KeyReached

    def before(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    def after(module: torch.nn.Module, args: tuple, output: Any) -> None:
        keep(output if isinstance(output, torch.Tensor) else output[0])

    with contextlib.ExitStack() as stack:
        for each in keys:
            if isinstance(each, float):
                layers = layers_of(model)
                place = layers[math.ceil(each * len(layers)) - 1]
                handle = place.register_forward_hook(after)
            elif each == "last_mlp_input" and (mlp := last_mlp(model)) is not None:
                handle = mlp.register_forward_pre_hook(before, with_kwargs=True)
            else:
                handle = model.base_model.register_forward_hook(after)
            stack.callback(handle.remove)
        with contextlib.suppress(_KeyReached):
            model(input_ids=tokens, position_ids=positions, use_cache=False)
    shape = tokens.shape
    for found in reached:
        if found.shape[:-1] not in (shape, (shape.numel(),)):
            raise MemdecError(
                f"the {type(model).__name__} has {list(found.shape)} states of {list(shape)} "
                "tokens where datastore.key is: set it to final_hidden."
            )
    states = [found.reshape(*shape, -1) for found in reached]
    return states[0] if len(states) == 1 else torch.cat(states, -1)


@torch.inference_mode()
def keeps_apart(model: Any) -> bool:
    """Return whether documents packed into a block leave each other alone, tried once a model.

    A state goes on across positions, and not every attention of transformers takes their restart
    for a boundary. Two blocks of one shape that differ in the first document are compared: all that
    rounding can do is to send a token, or a few, to another expert. So are two of one document that
    differ in the last token: MemdecError if what stands before it sees that.
    """
    if model not in APART:
        text, n = text_config(model.config), 13  # with 19 more, on no kernel's boundary
        place = torch.arange(32, device=model.device)
        changed = place + n * (place < n), place + n * (place == 31)
        packed = torch.where(place < n, place, place - n)

        def median(other: torch.Tensor, positions: torch.Tensor) -> float:
            """Return how far what stands between differs, as a share of its norm."""
            one_nD, other_nD = (
                hidden_states(model, "final_hidden", ids[None] % text.vocab_size, positions[None])
                for ids in (place, other)
            )
            difference_n = (one_nD - other_nD)[0, n:-1].float().norm(dim=-1)
            return float((difference_n / one_nD[0, n:-1].float().norm(dim=-1)).median())

        if median(changed[1], place) >= SEEN:
            raise MemdecError(
                f"in a {type(model).__name__} a token sees those after it, so it predicts none: "
                "give a causal LM."
            )
        APART[model] = not has_state(text) and median(changed[0], packed) < SEEN
    return APART[model]


def check_isolation(model: Any) -> None:
    """Raise MemdecError unless a memory can be trained on documents packed into blocks."""
    if not keeps_apart(model):
        raise MemdecError(
            f"a memory cannot be a {type(model).__name__}, of which transformers lets packed "
            "documents see each other: give another model with --init."
        )


def blocks_gathered(model: Any, batch: int) -> int:
    """Return of how many token blocks states_of_rows() is asked at once, for passes of `batch`."""
    return batch if keeps_apart(model) else max(batch, GATHERED)


def states_of_rows(
    model: Any,
    key: str | float | tuple[str | float, ...],
    tokens: np.ndarray,
    positions: np.ndarray,
    rows: np.ndarray,
    max_tokens: int | None = None,
) -> torch.Tensor:
    """Return hidden states [N, D] of some rows [B, T], a mask, of tokens and positions [B, T].

    A row sees what stands before it, back to position 0. Positions are not marked. max_tokens: of a
    pass where documents are read one by one, if not as many as are given.
    """
    if not keeps_apart(model):
        at_once = max_tokens or tokens.size
        return _states_by_document(model, key, tokens, positions, rows, at_once)
    device = model.device
    inputs = (to_device(x.astype(np.int64), device) for x in (tokens, positions))
    return hidden_states(model, key, *inputs)[to_device(rows, device)]


def _states_by_document(
    model: Any,
    key: str | float | tuple[str | float, ...],
    tokens: np.ndarray,
    positions: np.ndarray,
    rows: np.ndarray,
    max_tokens: int,
) -> torch.Tensor:
    """Return what states_of_rows() does, each document by itself, as long as its last row needs.

    Documents of about one length pass together. What stands after a shorter one is whatever comes
    next: no layer looks ahead.
    """
    begins = positions == 0
    begins[:, 0] = True
    start_M = np.flatnonzero(begins)
    row_N = np.flatnonzero(rows)
    document_N = np.searchsorted(start_M, row_N, side="right") - 1
    length_M = np.zeros(len(start_M), np.int64)
    np.maximum.at(length_M, document_N, row_N - start_M[document_N] + 1)
    order_M = np.argsort(-length_M, kind="stable")[: np.count_nonzero(length_M)]
    place_M = np.empty(len(start_M), np.int64)  # of each document in a pass
    stream, parts, read_N = tokens.ravel(), [], []
    while len(order_M):
        longest = length_M[order_M[0]]
        chosen, order_M = np.split(order_M, [max(1, max_tokens // longest)])
        place_M[:] = -1
        place_M[chosen] = np.arange(len(chosen))
        column = np.arange(longest)
        index = (start_M[chosen][:, None] + column).clip(max=len(stream) - 1)
        inputs = stream[index], np.broadcast_to(column, index.shape)
        given = (to_device(x.astype(np.int64), model.device) for x in inputs)
        states = hidden_states(model, key, *given)
        mine_N = np.flatnonzero(place_M[document_N] >= 0)
        at = place_M[document_N[mine_N]], row_N[mine_N] - start_M[document_N[mine_N]]
        parts.append(states[tuple(to_device(x, model.device) for x in at)])
        read_N.append(mine_N)
    if not parts:
        width = text_config(model.config).hidden_size
        return torch.empty(0, width, dtype=model.dtype, device=model.device)
    order = to_device(np.argsort(np.concatenate(read_N)), model.device)
    return torch.cat(parts)[order]


@torch.inference_mode()
def embed(
    model: Any,
    key: str | float,
    tokens: np.ndarray,
    positions: np.ndarray,
    batch: int | None,
    scored: bool = False,
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield (keys [rows, D] fp16, labels [rows] int32) of each batch of blocks [B, T+1].

    scored: yield the labels' log-probabilities [rows] float32, too: the pass goes on to the head.
    """
    device = model.device
    batch = blocks_at_once(batch, tokens.shape[1] - 1, device, EMBEDDED)
    each, max_tokens = blocks_gathered(model, batch), batch * (tokens.shape[1] - 1)
    for start in range(0, len(tokens), each):
        block = tokens[start : start + each].astype(np.int64)
        position = positions[start : start + each].astype(np.int64)
        valid = valid_rows(position)
        inputs = block[:, :-1], unmarked(position)[:, :-1], valid
        wanted = (key, "final_hidden") if scored else key
        states_ND = states_of_rows(model, wanted, *inputs, max_tokens)
        labels = block[:, 1:][valid]
        logprobs: tuple[np.ndarray, ...] = ()
        if scored:
            width = text_config(model.config).hidden_size
            h_ND, states_ND = states_ND[:, -width:], states_ND[:, :-width]
            logprobs = (label_logprobs_of(model, h_ND, to_device(labels, device)),)
        kept = states_ND.to(torch.float16)
        host = kept.cpu().numpy()
        # An H100 has the keys of 1.5B sooner than one core has checked them, by arithmetic.
        if not (kept.isfinite() if kept.is_cuda else np.isfinite(host)).all():
            raise MemdecError("a key is too large for fp16: set datastore.key to another one.")
        yield host, labels.astype(np.int32), *logprobs


def label_logprobs_of(model: Any, h_ND: torch.Tensor, labels_N: torch.Tensor) -> np.ndarray:
    """Return log p(label) [N] float32 of final hidden states, a chunk of rows at a time."""
    chunk, parts = rows_at_once(text_config(model.config).vocab_size), []
    for h_PD, labels_P in zip(h_ND.split(chunk), labels_N.split(chunk), strict=True):
        logits_PV = head(model, h_PD).float()
        chosen_P = logits_PV.gather(1, labels_P[:, None])[:, 0]
        parts.append(chosen_P - logits_PV.logsumexp(-1))
    return torch.cat(parts).cpu().numpy()


@dataclass
class Keys:
    """The keys of a shard of blocks, by its number: read where they are kept, else computed."""

    settings: DatastoreSettings
    base: str
    corpus: Path
    datastore: Path
    scored: bool = False  # whether the base's log-probabilities of the labels are kept, too

    @cached_property
    def model(self) -> Any:
        return load_model(self.base, self.settings.dtype)

    @property
    def width(self) -> int:
        """Return how many numbers a key has, without making one."""
        if self.settings.keep_keys:
            return load_shard(self.datastore, "keys", 0).shape[1]
        return load_text_config(self.base).hidden_size

    def __call__(self, shard: int) -> np.ndarray:
        """Return keys [rows, D] fp16."""
        if self.settings.keep_keys:
            return load_shard(self.datastore, "keys", shard)
        return self.compute(shard)[0]

    def compute(self, shard: int, scored: bool = False, first: int = 0) -> tuple[np.ndarray, ...]:
        """Return what embed() yields, of a shard, from the base.

        first: the block of the shard to begin with.
        """
        tokens, positions = (
            array.shard(shard)[first:] for array in load_blocks(self.corpus, "train")
        )
        batches = embed(
            self.model,
            self.settings.key_layer,
            tokens,
            positions,
            self.settings.batch_blocks,
            scored=scored,
        )
        return tuple(map(np.concatenate, zip(*batches, strict=True)))
