"""The mixture where a request of the batch has several memories: one after the other, in turns.

A turn mixes one memory into what the turns before it left, in the order of the memories' numbers:

    p_k = (1 - b_k) p_{k-1} + b_k p_memory_k        p_0 = p_base

Columns hold the raw weights a of a request's memories, not b, so that a memory that ends leaves
its weight to the base. Given ones: b_k = a_k / (1 - the sum of the a after k), which makes
p = (1 - sum a) p_base + sum a_k p_memory_k. Of gates (negative weights, see batch.py): the score
gets + log rest_k, rest_k = (1 - b_1) ... (1 - b_{k-1}), a softmax over base and memories. The share
of a memory in the result is b_k (1 - b_{k+1}) ... (1 - b_K).

Shapes: N rows, S places of a row, M memories in use, V base vocabulary, A columns, X hidden states
of all places.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from vllm_memdec.batch import PLACE, decode, decode_memory
from vllm_memdec.kernels.interpolate import RowWeights, interpolate
from vllm_memdec.memory_set import MemorySet
from vllm_memdec.memory_weights import ROUNDING
from vllm_memdec.request import NO_MEMORY
from vllm_memdec.tally import MIXING


class Turns:
    """The weights of rows with which memories are mixed one after the other."""

    def __init__(self, columns_NA: Tensor, at_once: int, memories: list[int]):
        """memories: the numbers of all that rows may have, in the order of their turns."""
        N = len(columns_NA)
        cells = columns_NA[:, : at_once * PLACE].reshape(N * at_once, PLACE)
        number_NS, alpha_NS = decode_memory(cells).view(N, at_once), decode(cells).view(N, at_once)
        given_NS = alpha_NS.clamp(min=0).double()
        base_N1 = 1 - given_NS.sum(1, keepdim=True)
        # Weights of several that make 1 but for rounding leave the base nothing.
        several_N1 = (given_NS > 0).sum(1, keepdim=True) > 1
        base_N1 = torch.where(several_N1 & (base_N1 < ROUNDING), 0, base_N1)
        # Not 1 - (those after), in which a weight that is left would be no sum of weights.
        before_NSS = number_NS[:, None] <= number_NS[:, :, None]
        mixed_NS = base_N1 + (before_NSS * given_NS[:, None]).sum(-1)
        turn_NS = (given_NS / torch.where(mixed_NS == 0, 1, mixed_NS)).float()
        turn_NS = torch.where(alpha_NS < 0, alpha_NS, turn_NS)
        self.memories = memories
        own = [number_NS == number for number in memories]
        self.mine = [own_NS.any(1) for own_NS in own]  # each memory's rows [N]
        # With which weight a memory is asked for, negative where by its gate; 0 in rows of others.
        self.asked = [torch.where(own_NS, turn_NS, 0).sum(1) for own_NS in own]
        self.used_MN = turn_NS.new_zeros(len(memories), N)  # b, as the turns were mixed
        self.rest_N = turn_NS.new_ones(N)

    def columns(self, turn: int) -> Tensor:
        """Return what a memory is asked for as columns [N, PLACE] in float32, see RowWeights."""
        nothing_N = torch.zeros_like(self.asked[turn])
        number_N = torch.where(self.mine[turn], float(self.memories[turn]), float(NO_MEMORY))
        return torch.stack([self.asked[turn], nothing_N, nothing_N, number_N], 1)

    def end(self, turn: int) -> None:
        """Leave to later gates what a turn left, by its weights in `used_MN`."""
        self.rest_N = self.rest_N * (1 - self.used_MN[turn])

    def sums(self) -> Tensor:
        """Return the sum of each memory's shares of its rows, and how many rows [M, 2], float64.

        A row whose weight is NaN is not counted.
        """
        kept_MN = (1 - self.used_MN.double()).flip(0).cumprod(0).flip(0)
        after_MN = torch.cat([kept_MN[1:], torch.ones_like(kept_MN[:1])])
        share_MN = self.used_MN * after_MN
        right_MN = torch.stack(self.mine) & (share_MN == share_MN)
        return torch.stack([torch.where(right_MN, share_MN, 0).sum(1), right_MN.sum(1)], 1)


def mix_several(
    base_NV: Tensor | None,
    memory_NX: Tensor,
    columns_NA: Tensor,
    memories: MemorySet,
    out_NV: Tensor,
    invariant: bool,
    compiled: bool,
) -> bool:
    """Write the mixture [N, V] of rows, in the logits form; any may have several memories.

    invariant, compiled: as interpolate() takes them. Return False on a tensor-parallel rank that
    does not gather.
    """
    batch, used = memories.batch, memories.used
    if invariant and base_NV is not None:
        base_NV = base_NV.float()  # as what the first turn leaves: a row is in any turn's hands
    options: dict[str, Any] = {"as_logits": True, "compiled": compiled, "invariant": invariant}
    left_NV = base_NV  # by the turns before
    turns = Turns(columns_NA, batch.at_once, [memory.number for memory in used])
    for turn, memory in enumerate(used):
        rows: slice | Tensor = slice(None)
        if memories.selects_rows and not turns.mine[turn].all():
            rows = turns.mine[turn].nonzero().squeeze(1)
            if not len(rows):
                continue
        mine_ND = memories.hidden_of(memory, memory_NX[rows], columns_NA[rows])
        memory_NW = memory.logits(mine_ND)
        with memory.timed(MIXING):
            gate = memory.score(mine_ND, columns_NA[rows])
            if base_NV is None or left_NV is None or memory_NW is None:
                continue
            if gate is not None:
                gate = gate[0] + turns.rest_N[rows].log(), gate[1]
            used_N = turns.used_MN[turn]
            if isinstance(rows, slice):
                weights: Tensor | RowWeights
                if memories.selects_rows:  # all of them are its own
                    weights = turns.asked[turn] if gate else turns.asked[turn].clamp(min=0)
                else:
                    others: Literal["base", "keep"] = "base" if left_NV is base_NV else "keep"
                    weights = RowWeights(turns.columns(turn), memory.number, others)
                interpolate(
                    left_NV, memory_NW, weights, gate=gate, out=out_NV, used_N=used_N, **options
                )
            else:
                if left_NV is base_NV:
                    out_NV.copy_(base_NV)
                asked_n = turns.asked[turn][rows]
                told_n = torch.empty_like(asked_n)
                out_NV[rows] = interpolate(
                    out_NV[rows],
                    memory_NW,
                    asked_n if gate else asked_n.clamp(min=0),
                    gate=gate,
                    used_N=told_n,
                    **options,
                )
                used_N[rows] = told_n
            left_NV = out_NV
            turns.end(turn)
    if base_NV is None:
        return False
    if left_NV is base_NV:
        out_NV.copy_(base_NV)
    for memory, sums_2 in zip(used, turns.sums(), strict=True):
        memories.tally.slot(memory.number, batch.is_dummy).add_(sums_2)
    return True
