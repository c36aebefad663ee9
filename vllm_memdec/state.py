"""Memory and weight of each request, from its extra_args to the row of logits that needs them.

Both runners hand compute_logits() a selection of hidden-state rows and do not say whose they are.
So memory and weight travel inside the row, in extra columns behind the hidden states. These have
the dtype of the model: three numbers of 8 significant bits (bfloat16) hold the 24 bits of a
float32, so their sum is the float32 weight again, not a rounding of it; the memory's number is a
small integer, exact in any of them.

Where the memory that drafted has said already what it makes of a token, the row holds the place of
that, too, and the memory does not run on the token again.

A request with weight 0 or the memory "none" has no memory: nothing of it is computed. One whose
memory has a gate travels with its cap, the most that the gate may give, as a negative weight; so
does one whose weight depends on the context, until the forward pass, which knows the positions,
puts the row's own weight in its place.

Shapes: B requests, T tokens, N rows, A columns.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_memdec.checkpoint import brief, check_alpha
from vllm_memdec.config import AUTO, NONE, MemDecConfig
from vllm_memdec.drafting import Draft
from vllm_memdec.kernels.weights import PARTS, STEP

ALPHA, MEMORY = "memdec_alpha", "memdec_memory"
PREFIX = "memdec_"
CONTEXT = PARTS + 2  # the column of log(1 + position), after those of memory and draft
NOBODY = -1  # the memory's number of such a request
MOST_SAID = 256  # rows: a whole number up to here is exact in bfloat16
MAX_SINGLE_SETS = 8  # memories; with more, capturing each by itself would take minutes


def check_extra_args(extra_args: dict[str, Any] | None, choices: "Choices | None") -> None:
    """Raise ValueError for a wrong memdec argument of a request; every other key is let through.

    choices: None on a server that runs without a memory.
    """
    names = choices.names if choices else ()
    for key, value in (extra_args or {}).items():
        if not str(key).startswith(PREFIX):
            continue
        if key not in (ALPHA, MEMORY):
            raise ValueError(
                f"Unknown extra argument {brief(key)}: the arguments are {ALPHA!r} and {MEMORY!r}."
            )
        if not names:
            raise ValueError(f"{key} was given, but this server runs without a memory.")
        if key == ALPHA:
            if value != AUTO:
                check_alpha(value, ALPHA)
        elif not isinstance(value, str) or value not in (*names, NONE):
            raise ValueError(
                f"{MEMORY} must be one of {[*names, NONE]}, the memories of this server, "
                f"got {brief(value)}."
            )
    if choices and (extra_args or {}).get(ALPHA) == AUTO:
        name = extra_args.get(MEMORY, choices.default)
        if name != NONE and name not in choices.gated and name not in choices.by_context:
            raise ValueError(
                f"{ALPHA} {AUTO!r} needs a gate or alpha_by_context, which the memory {name!r} has "
                "not: give a number between 0 and 1, or run memdec calibrate."
            )


class Choices:
    """What requests may choose from; resolves their arguments, once checked."""

    def __init__(
        self,
        alphas: dict[str, float | str],
        default: str,
        gated: Collection[str] = (),
        drafts: bool = False,
        by_context: Collection[str] = (),
    ):
        self.names, self.alphas, self.default, self.gated = (*alphas,), alphas, default, gated
        self.by_context = by_context  # memories with an alpha for each length of context
        self.drafts = drafts  # whether the memories draft

    @classmethod
    def of(cls, config: MemDecConfig) -> "Choices":
        """Return what a server with this configuration offers."""
        alphas = {memory.name: memory.alpha for memory in config.memories}
        gated = {memory.name for memory in config.memories if memory.gate}
        by_context = {memory.name for memory in config.memories if memory.alpha_by_context}
        return cls(alphas, config.default, gated, config.speculative_tokens > 0, by_context)

    def resolve(self, extra_args: dict[str, Any] | None) -> tuple[int, float]:
        """Return the memory's number and the weight; negative: a gate's cap, or one by context.

        Both say "no memory" or neither does.
        """
        extra_args = extra_args or {}
        name = extra_args.get(MEMORY, self.default)
        if name == NONE:
            return NOBODY, 0.0
        asked = extra_args.get(ALPHA, self.alphas[name])
        alpha = 1.0 if asked == AUTO else float(asked)
        if not alpha:
            return NOBODY, 0.0
        capped = name in self.gated or asked == AUTO  # by context a number is the weight itself
        return self.names.index(name), -alpha if capped else alpha

    def name(self, extra_args: dict[str, Any] | None) -> str:
        """Return the name of the memory that runs for a request, or "none"."""
        number, _ = self.resolve(extra_args)
        return NONE if number == NOBODY else self.names[number]


def encode(alpha_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Split float32 weights into PARTS columns [B, PARTS] of dtype, without loss."""
    parts = []
    rest_B = alpha_B
    for _ in range(PARTS):
        part_B = rest_B.to(dtype)
        parts.append(part_B)
        rest_B = (rest_B - part_B.float()) * STEP
    return torch.stack(parts, dim=-1)


def decode(columns_NA: Tensor) -> Tensor:
    """Put the float32 weights [N] together again; a negative one is a gate's cap."""
    alpha_N = columns_NA[:, PARTS - 1].float()
    for part in reversed(range(PARTS - 1)):
        alpha_N = columns_NA[:, part].float() + alpha_N / STEP
    return alpha_N.clamp(-1, 1)  # vLLM's profile run sends random rows


def decode_memory(columns_NA: Tensor) -> Tensor:
    """Return the number [N] of the memory of each row."""
    return columns_NA[:, PARTS]


def decode_said(columns_NA: Tensor) -> Tensor:
    """Return for each row [N] where its memory's draft has it; -1 if it has not."""
    return columns_NA[:, PARTS + 1].long() - 1


def write_context(columns_NA: Tensor, position_N: Tensor) -> None:
    """Write log(1 + position) into the columns of rows, for the gates."""
    columns_NA[:, CONTEXT] = position_N.float().log1p()


class ContextTable:
    """A memory's weights by the position of a row, in the columns' form."""

    def __init__(
        self, table: Sequence[tuple[int, float]], number: int, dtype: torch.dtype, device: Any
    ):
        starts, alphas = zip(*table, strict=True)
        self.number = number
        self.start_K = torch.tensor(starts[1:], dtype=torch.int64, device=device)  # the first is 0
        self.parts_KP = encode(torch.tensor(alphas, dtype=torch.float32), dtype).to(device)

    def copy_(self, other: "ContextTable") -> None:
        """Take over another table of as many weights, at the same addresses."""
        self.start_K.copy_(other.start_K)
        self.parts_KP.copy_(other.parts_KP)

    def write(self, columns_NA: Tensor, position_N: Tensor) -> None:
        """Put the weight of its position in the place of a negative one, in this memory's rows."""
        asks_N = (columns_NA[:, 0] < 0) & (decode_memory(columns_NA) == self.number)
        parts_NP = self.parts_KP[torch.bucketize(position_N, self.start_K, right=True)]
        columns_NA[:, :PARTS] = torch.where(asks_N[:, None], parts_NP, columns_NA[:, :PARTS])


@dataclass(frozen=True)
class Part:
    """The share of a batch that runs through one memory; None means all of it."""

    requests: Tensor | None = None  # positions in the batch, on the host
    lengths: Tensor | None = None  # their tokens, on the host
    tokens: Tensor | None = None  # positions in the batch, on the device
    rows: Tensor | None = None  # requests, on the device
    starts: Tensor | None = None  # of each request's tokens among these [requests + 1], there too


def graph_sets(memories: int) -> list[tuple[int, ...]]:
    """Return the sets of memories that full CUDA graphs are captured for, the largest first.

    All of them, each by itself, and none, so that a batch replays little that nobody asked for.
    """
    everything = tuple(range(memories))
    single = [(number,) for number in everything] if 1 < memories <= MAX_SINGLE_SETS else []
    return [everything, *single, ()]


class Batch:
    """What the running batch asks for: memory and weight of each token, the part of each memory."""

    def __init__(
        self,
        memories: int,
        hidden_size: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: Any,
    ):
        self.sets = graph_sets(memories)
        # The memories that a dummy run, or the capture of a graph, runs.
        self.dummy_set = self.sets[0]
        # The head's GEMM wants rows that are a multiple of 8 elements long.
        width = CONTEXT + 1 + -(hidden_size + CONTEXT + 1) % 8
        self.columns_TA = torch.zeros(max_tokens, width, dtype=dtype, device=device)
        # Where the V1 runner drafts: names, and how many tokens each may still get.
        self.requests: list[str] = []
        self.left: list[int] = []
        self.draft: Draft | None = None  # what was said of the tokens that come next
        self.reset()

    def reset(self) -> None:
        """Ask for all of `dummy_set`, as vLLM's dummy runs and captures need it."""
        # Arguments of the last write(): memories, weights, lengths. None where it had drafts.
        self.asked: tuple[Tensor, Tensor, Tensor] | None = None
        self.is_dummy = True
        self.mode = ""  # in which the step is executed, by the name of vLLM's CUDAGraphMode
        self.parts: dict[int, Part] = dict.fromkeys(self.dummy_set, Part())
        self.used: list[int] = [*self.dummy_set]  # by any request
        self.shared = True  # each used memory is that of every row
        # Tokens that the draft speaks of, and its rows.
        self.said: tuple[Tensor, Tensor] | None = None

    def write(
        self,
        memory_B: Tensor,
        alpha_B: Tensor,
        lengths_B: Tensor,
        said: Sequence[range] | None = None,
        mode: str = "NONE",
    ) -> None:
        """Take over a batch, its requests in order; all arguments on the host.

        said: the rows of `draft` that hold each request's first tokens. mode: see plan().
        """
        asked = None if said and any(map(len, said)) else (memory_B, alpha_B, lengths_B)
        if asked and self.asked and all(map(torch.equal, asked, self.asked)):
            self.plan(mode)
            return  # step by step a decoding batch asks for the same
        self.is_dummy, self.mode = False, ""
        self.asked, self.memory_B, self.alpha_B = asked, memory_B, alpha_B
        self.lengths_B = lengths_B
        self.used = memory_B[memory_B != NOBODY].unique().tolist()
        self.shared = len(memory_B.unique()) <= 1
        self.said = None
        self.said_T = said_T = torch.full([int(lengths_B.sum())], -1)
        if mode == "NONE" and self.shared and asked is None:
            starts = (lengths_B.cumsum(0) - lengths_B).tolist()
            for start, rows in zip(starts, said, strict=True):
                said_T[start : start + len(rows)] = torch.arange(rows.start, rows.stop)
            known = (said_T >= 0).nonzero().squeeze(1)
            self.said = known, said_T[known]
        self.plan(mode)

        rows_BA = torch.cat(
            [encode(alpha_B, self.columns_TA.dtype), memory_B[:, None].to(self.columns_TA.dtype)], 1
        )
        rows_TA = rows_BA.repeat_interleave(lengths_B, dim=0)
        rows_TA = torch.cat([rows_TA, (1 + said_T[:, None]).to(rows_TA.dtype)], dim=1)
        rows_TA = F.pad(rows_TA, (0, self.columns_TA.shape[1] - rows_TA.shape[1]))
        # In place: a captured graph reads this very memory.
        self.columns_TA[: len(rows_TA)].copy_(
            pinned(rows_TA, self.columns_TA.device), non_blocking=True
        )

    def plan(self, mode: str) -> None:
        """Choose what runs through each memory, by how vLLM executes the step.

        NONE: the tokens of its own requests. PIECEWISE: all rows, as the pieces were captured with
        them, of each memory that is used (vLLM's breakable graphs replay all memories whatever is
        said here). FULL: all rows of the captured set that serves the batch.
        """
        if mode == self.mode:
            return
        self.mode = mode
        if mode == "NONE":
            new_T = self.said_T < 0
            self.parts = {m: self._part(self.memory_B == m, new_T) for m in self.used}
        elif mode == "PIECEWISE":
            self.parts = dict.fromkeys(self.used, Part())
        else:
            self.parts = dict.fromkeys(self.set_of(self.used), Part())

    def set_of(self, used: Sequence[int]) -> tuple[int, ...]:
        """Return the smallest captured set that holds all used memories."""
        return tuple(used) if tuple(used) in self.sets else self.sets[0]

    def write_drafting(self, mode: str = "NONE") -> None:
        """Take over the same requests with one token each, as memories draft."""
        self.write(self.memory_B, self.alpha_B, torch.ones_like(self.memory_B), mode=mode)

    def _part(self, mine_B: Tensor, new_T: Tensor) -> Part:
        if mine_B.all() and new_T.all():
            return Part()
        requests = mine_B.nonzero().squeeze(1)
        request_T = torch.arange(len(mine_B)).repeat_interleave(self.lengths_B)
        tokens = (mine_B[request_T] & new_T).nonzero().squeeze(1)
        lengths = request_T[tokens].bincount(minlength=len(mine_B))[requests]
        starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        device = self.columns_TA.device
        return Part(requests, lengths, *(copied(x, device) for x in (tokens, requests, starts)))


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor from which a copy to the device does not wait for the device."""
    return tensor if device.type == "cpu" else tensor.pin_memory()


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on a device; the host does not wait."""
    return pinned(tensor, device).to(device, non_blocking=True)
