"""The running batch: memory and weight of each token, from its request to the row of logits.

Both runners hand compute_logits() a selection of hidden-state rows, without their requests. So
memory and weight travel inside the row, in extra columns behind the hidden states. These have
the dtype of the model: three numbers of 8 significant bits (bfloat16) hold the 24 bits of a
float32, so their sum is the float32 weight again, not a rounding of it; the memory's number is a
small integer, exact in any of them. A request that mixes several memories has a place, such
columns, for each, the first of them that of the memory that drafts; others have the first alone.

A memory that drafted has already run on most tokens of the next step. The row of such a token holds
the place of its results in the draft, and the memory does not run on it again.

A request whose memory has a gate travels with its cap, the gate's maximum, as a negative weight. So
does one whose weight depends on the context, until the forward pass, which knows the positions,
puts the row's own weight in its place.

Shapes: B requests, S places, T tokens, N rows, A columns, R rows of a draft, W memory vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_memdec.kernels.weights import PARTS, STEP
from vllm_memdec.request import NO_MEMORY

PLACE = PARTS + 1  # columns of a place: weight and memory; behind all places come DRAFT and CONTEXT
DRAFT, CONTEXT = 0, 1  # of a draft's row, and of log(1 + position)
MAX_REUSED = 256  # rows of a draft: a whole number up to here is exact in bfloat16
MAX_SINGLE_SETS = 8  # memories; with more, capturing each by itself would take minutes


def encode(alpha_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Split float32 weights into PARTS columns [B, PARTS] of dtype, without loss."""
    parts = []
    rest_B = alpha_B
    for _ in range(PARTS):
        part_B = rest_B.to(dtype)
        parts.append(part_B)
        rest_B = (rest_B - part_B.float()) * STEP
    return torch.stack(parts, dim=-1)


def place_of(columns_NA: Tensor, place: int) -> Tensor:
    """Return the columns [N, PLACE] of one place; the functions below take them, or all columns."""
    return columns_NA[:, place * PLACE : (place + 1) * PLACE]


def decode(columns_NA: Tensor) -> Tensor:
    """Return the float32 weights [N] of rows; a negative one is a gate's cap."""
    alpha_N = columns_NA[:, PARTS - 1].float()
    for part in reversed(range(PARTS - 1)):
        alpha_N = columns_NA[:, part].float() + alpha_N / STEP
    return alpha_N.clamp(-1, 1)  # vLLM's profile run sends random rows


def decode_memory(columns_NA: Tensor) -> Tensor:
    """Return the number [N] of the memory of each row."""
    return columns_NA[:, PARTS]


def decode_reused(columns_NA: Tensor, at_once: int = 1) -> Tensor:
    """Return for each row [N] which row of a draft holds its memory's results; -1 if none does."""
    return columns_NA[:, at_once * PLACE + DRAFT].long() - 1


def write_context(columns_NA: Tensor, position_N: Tensor, at_once: int = 1) -> None:
    """Write log(1 + position) into the columns of rows, for the gates."""
    columns_NA[:, at_once * PLACE + CONTEXT] = position_N.float().log1p()


def decode_context(columns_NA: Tensor, at_once: int = 1) -> Tensor:
    """Return log(1 + position) [N] of rows, where it was written."""
    return columns_NA[:, at_once * PLACE + CONTEXT]


class ContextTable:
    """A memory's weights by the position of a row, in the columns' form."""

    def __init__(
        self, table: Sequence[Sequence[float]], number: int, dtype: torch.dtype, device: Any
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


def end_memory(
    columns_NA: Tensor, position_N: Tensor, number: int, length: int, at_once: int = 1
) -> None:
    """Write weight 0 into the rows of a memory at positions that it does not have."""
    for own_NA in (place_of(columns_NA, j) for j in range(at_once)):
        beyond_N = (position_N >= length) & (decode_memory(own_NA) == number)
        own_NA[:, :PARTS].masked_fill_(beyond_N[:, None], 0)


@dataclass(frozen=True)
class MemoryShare:
    """The share of a batch that runs through one memory; None means all of it."""

    requests: Tensor | None = None  # positions in the batch, on the host
    lengths: Tensor | None = None  # their tokens, on the host
    tokens: Tensor | None = None  # positions in the batch, on the device
    rows: Tensor | None = None  # requests, on the device
    starts: Tensor | None = None  # of each request's tokens among these [requests + 1], there too


@dataclass(frozen=True)
class Draft:
    """Results of one memory's last K passes over B requests, for reuse: R = B * K, by request.

    While drafting, the memory already runs on every token that will be verified except the last.
    """

    requests: dict[str, int]  # their places among the B
    positions: list[int]  # of the first token of each
    tokens: list[list[int]]  # [B, K + 1]: those it read, and the last draft
    hidden_RD: Tensor
    logits_RW: Tensor

    def reusable_rows(self, request: str, position: int, tokens: Sequence[int]) -> range:
        """Return the rows of the first tokens of what is to be verified: all but the last, or none.

        position: that of the first of the tokens.
        """
        number = self.requests.get(request)
        if number is None or position != self.positions[number]:
            return range(0)
        if list(tokens) != self.tokens[number][: len(tokens)]:
            return range(0)
        first = number * (len(self.tokens[number]) - 1)
        return range(first, first + len(tokens) - 1)


def graph_sets(memories: int) -> list[tuple[int, ...]]:
    """Return the sets of memories that full CUDA graphs are captured for, the largest first.

    All of them, each by itself, and none, so that a batch replays few memories in vain.
    """
    everything = tuple(range(memories))
    single = [(number,) for number in everything] if 1 < memories <= MAX_SINGLE_SETS else []
    return [everything, *single, ()]


class Batch:
    """What the running batch asks for: memory and weight of each token, each memory's share."""

    def __init__(
        self,
        memories: int,
        hidden_size: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: Any,
        lengths: Sequence[int] = (),
        at_once: int = 1,
    ):
        """lengths: the positions that each memory has; left out, none of them ends.

        at_once: S, how many memories a request may mix.
        """
        self.at_once = at_once
        self.sets = graph_sets(memories)
        endless = torch.iinfo(torch.int64).max
        # By the number of a memory; the last is that of NO_MEMORY, -1. On the host, as all that
        # write() takes: vLLM builds models with another default device.
        ends = [*(lengths or [endless] * memories), endless]
        self.length_M = torch.tensor(ends, device="cpu")
        # The memories that a dummy run, or the capture of a graph, runs.
        self.dummy_set = self.sets[0]
        # The head's GEMM wants rows that are a multiple of 8 elements long.
        width = at_once * PLACE + CONTEXT + 1
        width += -(hidden_size + width) % 8
        self.columns_TA = torch.zeros(max_tokens, width, dtype=dtype, device=device)
        # Of each token in its request, where the base's own positions have several dimensions.
        self.positions_T = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self.reset()

    def run_dummies_with(self, memories: tuple[int, ...]) -> None:
        """Let reset() ask for these memories from now on, as the capture of a graph for them."""
        self.dummy_set = memories

    def reset(self) -> None:
        """Ask for all of `dummy_set`, as vLLM's dummy runs and captures need it."""
        nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.memory_BS = torch.zeros(0, self.at_once, dtype=torch.int64, device="cpu")
        self.alpha_BS, self.lengths_B = self.memory_BS.float(), nothing
        # Arguments of the last write(): memories, weights, lengths. None where it had drafts.
        self.asked: tuple[Tensor, Tensor, Tensor] | None = None
        self.drafting = False  # whether the memories draft: each request's first alone runs
        self.is_dummy = True
        self.mode = ""  # in which the step is executed, by the name of vLLM's CUDAGraphMode
        self.shares: dict[int, MemoryShare] = dict.fromkeys(self.dummy_set, MemoryShare())
        self.used: list[int] = [*self.dummy_set]  # by any request
        # In which rows may have each memory that runs. A captured graph serves any batch.
        places = [*range(self.at_once if len(self.dummy_set) > 1 else 1)]
        self.places: dict[int, list[int]] = dict.fromkeys(self.dummy_set, places)
        self.shared = True  # each used memory is that of every row
        self.several = self.at_once > 1 and len(self.dummy_set) > 1  # any request mixes several
        self.reused_T = (
            nothing  # the row of the draft of each token, -1 if it has none; on the host
        )
        self.reused: tuple[Tensor, Tensor] | None = None  # tokens that have one, and these rows
        # Where the V1 runner drafts: names, and how many tokens each may still get.
        self.requests: list[str] = []
        self.remaining: list[int] = []
        self.draft: Draft | None = None  # of the tokens that come next

    def track(self, requests: list[str], remaining: list[int]) -> None:
        """Take over the names of the batch's requests, and how many tokens each may still get.

        0 where a request is not drafted for.
        """
        self.requests, self.remaining = requests, remaining

    def keep_draft(self, draft: Draft | None) -> None:
        """Keep what the next step may reuse."""
        self.draft = draft

    def write(
        self,
        memory_BS: Tensor,
        alpha_BS: Tensor,
        lengths_B: Tensor,
        reusable: Sequence[range] | None = None,
        mode: str = "NONE",
        starts_B: Tensor | None = None,
        drafting: bool = False,
    ) -> None:
        """Take over a batch, its requests in order; all arguments on the host.

        memory_BS, alpha_BS: of each place, those that are not used behind the others; [B] for one.
        reusable: the rows of `draft` that hold each request's first tokens. mode: see plan().
        starts_B: positions of these tokens, or lower ones: beyond its memory's a request has none.
        """
        if memory_BS.dim() == 1:
            memory_BS, alpha_BS = memory_BS[:, None], alpha_BS[:, None]
        if starts_B is not None:
            memory_BS, alpha_BS = self._without_ended(memory_BS, alpha_BS, starts_B)
        is_new = not (reusable and any(map(len, reusable)))
        asked = (memory_BS, alpha_BS, lengths_B) if is_new else None
        drafting = drafting and self.at_once > 1
        same = asked and self.asked and all(map(torch.equal, asked, self.asked))
        if same and drafting == self.drafting:
            self.plan(mode)
            return  # step by step a decoding batch asks for the same
        self.is_dummy, self.mode, self.drafting = False, "", drafting
        self.asked, self.memory_BS, self.alpha_BS = asked, memory_BS, alpha_BS
        self.lengths_B = lengths_B
        self.used = memory_BS[memory_BS != NO_MEMORY].unique().tolist()
        self.several = bool((memory_BS[:, 1:] != NO_MEMORY).any())
        self.shared = not self.several and len(memory_BS[:, 0].unique()) <= 1
        self.reused = None
        self.reused_T = reused_T = torch.full([int(lengths_B.sum())], -1)
        if mode == "NONE" and self.shared and reusable and not is_new:
            starts = (lengths_B.cumsum(0) - lengths_B).tolist()
            for start, rows in zip(starts, reusable, strict=True):
                reused_T[start : start + len(rows)] = torch.arange(rows.start, rows.stop)
            known = (reused_T >= 0).nonzero().squeeze(1)
            self.reused = known, reused_T[known]
        self.plan(mode)

        dtype = self.columns_TA.dtype
        rows_BSA = torch.cat([encode(alpha_BS, dtype), memory_BS[..., None].to(dtype)], -1)
        rows_BA = F.pad(rows_BSA.flatten(1), (0, (self.at_once - memory_BS.shape[1]) * PLACE))
        rows_TA = rows_BA.repeat_interleave(lengths_B, dim=0)
        rows_TA = torch.cat([rows_TA, (1 + reused_T[:, None]).to(rows_TA.dtype)], dim=1)
        rows_TA = F.pad(rows_TA, (0, self.columns_TA.shape[1] - rows_TA.shape[1]))
        # In place: a captured graph reads it there.
        self.columns_TA[: len(rows_TA)].copy_(
            pinned(rows_TA, self.columns_TA.device), non_blocking=True
        )

    def plan(self, mode: str) -> None:
        """Choose what runs through each memory, by how vLLM executes the step.

        NONE: the tokens of its own requests. PIECEWISE: all rows, as the pieces were captured with
        them, of each memory that is used (vLLM's breakable graphs replay all memories in any case).
        FULL: all rows of the captured set that serves the batch.
        """
        if mode == self.mode:
            return
        self.mode = mode
        run_BS = self.memory_BS[:, :1] if self.drafting else self.memory_BS
        run = run_BS[run_BS != NO_MEMORY].unique().tolist() if self.drafting else self.used
        if mode == "NONE":
            new_T = self.reused_T < 0
            self.shares = {m: self._share((run_BS == m).any(1), new_T) for m in run}
        elif mode == "PIECEWISE":
            self.shares = dict.fromkeys(run, MemoryShare())
        else:
            self.shares = dict.fromkeys(self.set_of(run), MemoryShare())
        if not self.several or self.drafting:
            self.places = dict.fromkeys(self.shares, [0])
        elif mode == "FULL":
            self.places = dict.fromkeys(self.shares, [*range(self.at_once)])
        else:
            self.places = {m: (run_BS == m).any(0).nonzero().flatten().tolist() for m in run}

    def set_of(self, used: Sequence[int]) -> tuple[int, ...]:
        """Return the smallest captured set that holds all used memories."""
        return tuple(used) if tuple(used) in self.sets else self.sets[0]

    def _without_ended(
        self, memory_BS: Tensor, alpha_BS: Tensor, starts_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return memories and weights without memories that have ended, the others first."""
        ended_BS = starts_B[:, None] >= self.length_M[memory_BS]
        memory_BS = memory_BS.masked_fill(ended_BS, NO_MEMORY)
        alpha_BS = alpha_BS.masked_fill(ended_BS, 0)
        if memory_BS.shape[1] > 1 and ended_BS.any():
            order_BS = (memory_BS == NO_MEMORY).int().argsort(dim=1, stable=True)
            memory_BS, alpha_BS = memory_BS.gather(1, order_BS), alpha_BS.gather(1, order_BS)
        return memory_BS, alpha_BS

    def write_positions(self, positions_T: Tensor) -> None:
        """Take over the place of each token in its request, on the device."""
        self.positions_T[: len(positions_T)].copy_(positions_T)  # where a captured graph reads it

    def write_drafting(self, mode: str = "NONE") -> None:
        """Take over the same requests with one token each, as memories draft.

        All of them: prompt log-probabilities may be asked for after this, by the same memories.
        """
        ones_B = torch.ones_like(self.lengths_B)
        self.write(self.memory_BS, self.alpha_BS, ones_B, mode=mode, drafting=True)

    def _share(self, mine_B: Tensor, new_T: Tensor) -> MemoryShare:
        if mine_B.all() and new_T.all():
            return MemoryShare()
        requests = mine_B.nonzero().squeeze(1)
        request_T = torch.arange(len(mine_B)).repeat_interleave(self.lengths_B)
        tokens = (mine_B[request_T] & new_T).nonzero().squeeze(1)
        lengths = request_T[tokens].bincount(minlength=len(mine_B))[requests]
        starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        device = self.columns_TA.device
        return MemoryShare(
            requests, lengths, *(copied(x, device) for x in (tokens, requests, starts))
        )


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor from which a copy to the device does not wait for the device."""
    return tensor if device.type == "cpu" else tensor.pin_memory()


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on a device; the host does not wait."""
    return pinned(tensor, device).to(device, non_blocking=True)
