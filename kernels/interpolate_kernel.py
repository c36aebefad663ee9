"""The mixture on a GPU, by two plans that do the same arithmetic; interpolate.py has the formula.

  * whole: one program a row, one launch. It sweeps the row twice, the second time backwards: what
    it read last is still in the L2 cache;
  * split: one program for SLICE columns of a row, two launches: normalisers of all slices, then
    each slice of the mixture, the last rows first. A few rows alone keep few multiprocessors busy.

Split's slices do not depend on the number of rows. Whole is one slice, or, where bits must not
depend on the plan, combines the same slices in the same order.

Threads hold VECTOR columns side by side and load them at once: 16 bytes in bf16. A mask that cuts a
vector forbids that, so the vectors that V and `shared` cut, the edges, are handled on their own.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vllm_memdec.kernels.rows import jit, tl, triton
from vllm_memdec.kernels.weights import LARGEST, PARTS, STEP, RowWeights

SLICE, SLICE_WARPS = 8192, 8  # 4 vectors of each model in flight a thread
WHOLE, WHOLE_WARPS = 16384, 16  # columns of one iteration: as many, in twice as many warps

if triton is not None:
    VECTOR = tl.constexpr(8)
    LOWEST = tl.constexpr(-3.4028234663852886e38)
    NEGLIGIBLE = tl.constexpr(-200.0)  # exp() of it is 0 in float32
    KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)
    PARTS_, STEP_, LARGEST_ = tl.constexpr(PARTS), tl.constexpr(STEP), tl.constexpr(LARGEST)


@jit
def _columns(start, BLOCK: tl.constexpr):
    """Return BLOCK columns from `start` on as [BLOCK / VECTOR, VECTOR]."""
    vector = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR
    return start + vector + tl.arange(0, VECTOR)[None, :]


@jit
def _masks(columns, V, shared, reach, EDGES: tl.constexpr):
    """Return which columns of base and memory are read in whole vectors, by bounds that divide.

    reach: columns of the memory that are wanted, `shared` or 0.
    """
    base_end, memory_end = V // VECTOR * VECTOR, shared // VECTOR * VECTOR
    inside = columns < base_end
    if EDGES:
        inside &= (columns < memory_end) | (columns >= memory_end + VECTOR)
    return inside, columns < reach // VECTOR * VECTOR


@jit
def _edges(V, shared):
    """Return the columns [2, VECTOR] of the cut vectors, and which of them the base has."""
    base_end, memory_end = V // VECTOR * VECTOR, shared // VECTOR * VECTOR
    ends = tl.where(tl.arange(0, 2) == 0, memory_end, base_end)[:, None]
    again = (tl.arange(0, 2) == 1)[:, None] & (ends == memory_end)  # one vector, not two
    columns = ends + tl.arange(0, VECTOR)[None, :]
    return columns, (columns < V) & ~again


@jit
def _load(row, columns, mask):
    return tl.load(row + columns, mask=mask, other=float("-inf")).to(tl.float32)


@jit
def _add(x, peak, total, moment, MOMENT: tl.constexpr):
    """Add a block [L, VECTOR] to each lane's peak, sum exp(x - peak), sum (x - peak) exp(...)."""
    higher = tl.maximum(peak, tl.max(x, axis=1))
    down = tl.maximum(peak - higher, NEGLIGIBLE)
    below = x - higher[:, None]
    share = tl.exp(below)
    if MOMENT:
        # -inf has no share in the entropy: its difference must not be multiplied by 0.
        lost = tl.sum(tl.maximum(below, NEGLIGIBLE) * share, axis=1)
        moment = (moment + down * total) * tl.exp(down) + lost
    total = total * tl.exp(down) + tl.sum(share, axis=1)
    return higher, total, moment


@jit
def _merge(peak, total, moment, MOMENT: tl.constexpr):
    """Return the peak, sum and moment of all lanes."""
    top = tl.max(peak, axis=0)
    down = tl.maximum(peak - top, NEGLIGIBLE)
    if MOMENT:
        moment = tl.sum((moment + down * total) * tl.exp(down), axis=0)
    else:
        moment = 0.0
    return top, tl.sum(total * tl.exp(down), axis=0), moment


@jit
def _edge_normalisers(base, memory, V, shared, MOMENT: tl.constexpr):
    """Return peak and sum of the base, peak, sum and moment of the memory, over the edges."""
    columns, mine = _edges(V, shared)
    zeros = tl.zeros((2,), tl.float32)
    lowest = zeros + LOWEST
    b_peak, b_total, none = _add(_load(base, columns, mine), lowest, zeros, zeros, False)
    m = _load(memory, columns, mine & (columns < shared))
    m_peak, m_total, m_moment = _add(m, lowest, zeros, zeros, MOMENT)
    b_peak, b_total, none = _merge(b_peak, b_total, zeros, False)
    m_peak, m_total, m_moment = _merge(m_peak, m_total, m_moment, MOMENT)
    return b_peak, b_total, m_peak, m_total, m_moment


@jit
def _normalisers(
    base, memory, start, end, V, shared,
    MOMENT: tl.constexpr, EDGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the same five over the whole vectors of columns start..end."""
    # One running peak a lane: no reduction across threads inside the loop. Starting at the lowest
    # finite number, not at -inf, keeps exp(-inf - peak) a plain 0.
    zeros = tl.zeros((BLOCK // VECTOR,), tl.float32)
    b_peak, b_total, m_peak, m_total, m_moment = zeros + LOWEST, zeros, zeros + LOWEST, zeros, zeros
    for at in range(start, end, BLOCK):
        columns = _columns(at, BLOCK)
        b_mask, m_mask = _masks(columns, V, shared, shared, EDGES)
        # Both loads before the arithmetic of either: more bytes in flight.
        b = _load(base, columns, b_mask)
        m = _load(memory, columns, m_mask)
        b_peak, b_total, none = _add(b, b_peak, b_total, zeros, False)
        m_peak, m_total, m_moment = _add(m, m_peak, m_total, m_moment, MOMENT)
    b_peak, b_total, none = _merge(b_peak, b_total, zeros, False)
    m_peak, m_total, m_moment = _merge(m_peak, m_total, m_moment, MOMENT)
    return b_peak, b_total, m_peak, m_total, m_moment


@jit
def _logsum(total):
    """Return log(total) and total, as those of 1 if a row has no mass, and whether it has none."""
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    return tl.log(total), total, empty


@jit
def _asked(weights, n, stride, number, COLUMNS: tl.constexpr, GATED: tl.constexpr):
    """Return the weight of row n and whether the row is this memory's; see weights.py."""
    row = weights + n * stride
    a = tl.load(row).to(tl.float32)
    mine = True
    if COLUMNS:
        rest = tl.load(row + 1).to(tl.float32) + tl.load(row + 2).to(tl.float32) * (1 / STEP_)
        a = tl.clamp(a + rest * (1 / STEP_), -1.0, 1.0, KEEP_NAN)
        if not GATED:
            a = tl.maximum(a, 0.0, KEEP_NAN)
        mine = tl.load(row + PARTS_).to(tl.float32) == number
        a = tl.where(mine, a, 0.0)
    return a, mine


@jit
def _gate_weight(a, score, top, entropy, certainty, K, UNITS: tl.constexpr):
    """Return the weight: of a negative one the gate's, -a at most."""
    k = tl.arange(0, UNITS)
    x = tl.load(certainty + k, mask=k < K, other=0.0) * top
    x += tl.load(certainty + K + k, mask=k < K, other=0.0) * entropy
    x += tl.load(certainty + 2 * K + k, mask=k < K, other=0.0)
    x *= 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    rise = tl.sum(x * tl.load(certainty + 3 * K + k, mask=k < K, other=0.0), axis=0)
    given = LARGEST_ * tl.sigmoid(tl.load(score) + rise)
    # A NaN of the gate's is kept: the row is broken.
    return tl.where(a < 0, tl.minimum(given, -a, KEEP_NAN), a)


@jit
def _terms(
    a, b_peak, b_total, m_peak, m_total, m_moment, score, certainty, K,
    GATED: tl.constexpr, UNITS: tl.constexpr, AS_LOGITS: tl.constexpr,
):  # fmt: skip
    """Return the weight, and shift and scale of base and memory: out is the log of their sum.

    The numbers of each part of the row [S] are merged first.
    """
    b_peak, b_total, none = _merge(b_peak, b_total, b_total, False)
    m_peak, m_total, m_moment = _merge(m_peak, m_total, m_moment, GATED)
    # No mass: both parts 0, so that -inf - lse stays -inf.
    b_logsum, b_total, b_empty = _logsum(b_total)
    m_logsum, m_total, m_empty = _logsum(m_total)
    b_peak, m_peak = tl.where(b_empty, 0.0, b_peak), tl.where(m_empty, 0.0, m_peak)
    if GATED:
        entropy = m_logsum - m_moment / m_total
        a = _gate_weight(a, score, tl.exp(-m_logsum), entropy, certainty, K, UNITS)
    # log(1-a), log a. The zeros are replaced before the log: the interpreter warns of log(0).
    log_keep = tl.where(a == 1, float("-inf"), tl.log(tl.where(a == 1, 1.0, 1 - a)))
    log_take = tl.where(a == 0, float("-inf"), tl.log(tl.where(a == 0, 1.0, a)))
    if AS_LOGITS:
        # Only the difference of the normalisers is needed. Its rounding error is carried along:
        # between peaks of 1e4 and 3 it is 5e-4, and the memory's best token may end up near 3.
        gap = m_peak.to(tl.float64) - b_peak.to(tl.float64)
        shift = gap.to(tl.float32)
        rounded = (gap - shift.to(tl.float64)).to(tl.float32)
        return a, 0.0, log_keep, shift, log_take + b_logsum - m_logsum - rounded
    return a, b_peak, log_keep - b_logsum, m_peak, log_take - m_logsum


@jit
def _mix(b, m, a, b_shift, b_scale, m_shift, m_scale, AS_LOGITS: tl.constexpr):
    """Return logaddexp of the two, or b itself where the weight is 0."""
    x = (b - b_shift) + b_scale
    y = (m - m_shift) + m_scale
    # max + log(1 + exp(min - max)); where both are -inf, the lowest number stands for the max.
    high = tl.maximum(x, y, KEEP_NAN)
    low = tl.minimum(x, y, KEEP_NAN)
    mixed = high + tl.log(1 + tl.exp(low - tl.maximum(high, LOWEST)))
    if AS_LOGITS:
        mixed = tl.where(a == 0, b, mixed)
    return mixed


@jit
def _write(
    base, memory, out, start, end, V, shared, a, b_shift, b_scale, m_shift, m_scale,
    AS_LOGITS: tl.constexpr, EDGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the mixture of columns start..end, the last ones first, and with them the edges."""
    reach = shared
    if AS_LOGITS:
        reach = tl.where(a == 0, 0, shared)
    blocks = tl.cdiv(end - start, BLOCK)
    for i in range(0, blocks):
        columns = _columns(start + (blocks - 1 - i) * BLOCK, BLOCK)
        b_mask, m_mask = _masks(columns, V, shared, reach, EDGES)
        b, m = _load(base, columns, b_mask), _load(memory, columns, m_mask)
        mixed = _mix(b, m, a, b_shift, b_scale, m_shift, m_scale, AS_LOGITS)
        tl.store(out + columns, mixed, mask=b_mask)
    if EDGES:
        columns, mine = _edges(V, shared)
        mine &= columns < tl.where(end >= V, V, 0)
        b, m = _load(base, columns, mine), _load(memory, columns, mine & (columns < reach))
        mixed = _mix(b, m, a, b_shift, b_scale, m_shift, m_scale, AS_LOGITS)
        tl.store(out + columns, mixed, mask=mine)


@jit
def _whole_kernel(
    base,  # [N, V]
    memory,  # [N, W]
    weights,  # [N], or columns [N, A]
    score,  # [N]
    certainty,  # [4, K]
    out,  # [N, V]
    base_stride,
    memory_stride,
    weights_stride,
    out_stride,
    number,  # of the memory; float32, because the columns are floats
    V,
    shared,  # min(V, W): columns both models have
    K,
    L,  # columns of a slice, a multiple of BLOCK
    S,  # slices
    PARTIALS: tl.constexpr,  # slices and edges, or the next power of 2
    COLUMNS: tl.constexpr,
    KEEP: tl.constexpr,
    GATED: tl.constexpr,
    UNITS: tl.constexpr,  # K, or the next power of 2
    AS_LOGITS: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # 16k rows of 152k columns pass 2^31 elements
    a, mine = _asked(weights, n, weights_stride, number, COLUMNS, GATED)
    if KEEP:
        if not mine:
            return
    base += n * base_stride
    memory += n * memory_stride
    out += n * out_stride
    if AS_LOGITS:
        S = tl.where(a == 0, 0, S)  # the base's own row needs no normalisers

    i = tl.arange(0, PARTIALS)
    zeros = tl.zeros((PARTIALS,), tl.float32)
    b_peak, b_total, m_peak, m_total, m_moment = zeros + LOWEST, zeros, zeros + LOWEST, zeros, zeros
    for s in range(0, S):
        bp, bt, mp, mt, mm = _normalisers(
            base, memory, s * L, tl.minimum(s * L + L, V), V, shared, GATED, EDGES, BLOCK
        )
        b_peak, b_total = tl.where(i == s, bp, b_peak), tl.where(i == s, bt, b_total)
        m_peak, m_total = tl.where(i == s, mp, m_peak), tl.where(i == s, mt, m_total)
        m_moment = tl.where(i == s, mm, m_moment)
    if EDGES:
        bp, bt, mp, mt, mm = _edge_normalisers(base, memory, V, shared, GATED)
        b_peak, b_total = tl.where(i == S, bp, b_peak), tl.where(i == S, bt, b_total)
        m_peak, m_total = tl.where(i == S, mp, m_peak), tl.where(i == S, mt, m_total)
        m_moment = tl.where(i == S, mm, m_moment)
        tl.debug_barrier()  # all threads have read the edges: `out` may be the base
    a, b_shift, b_scale, m_shift, m_scale = _terms(
        a, b_peak, b_total, m_peak, m_total, m_moment, score + n, certainty, K,
        GATED, UNITS, AS_LOGITS,
    )  # fmt: skip
    _write(
        base, memory, out, 0, V, V, shared, a, b_shift, b_scale, m_shift, m_scale,
        AS_LOGITS, EDGES, BLOCK,
    )  # fmt: skip


@jit
def _partial_kernel(
    base, memory, weights, partials,  # [N, S + 1, 8]: the five numbers of each slice, of the edges
    base_stride, memory_stride, weights_stride, number, V, shared, S,
    COLUMNS: tl.constexpr, KEEP: tl.constexpr, GATED: tl.constexpr, AS_LOGITS: tl.constexpr,
    EDGES: tl.constexpr, SLICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // S).to(tl.int64)
    s = tl.program_id(0) % S
    a, mine = _asked(weights, n, weights_stride, number, COLUMNS, GATED)
    if KEEP:
        if not mine:
            return
    if AS_LOGITS:
        if a == 0:
            return
    base += n * base_stride
    memory += n * memory_stride
    partials += n * (S + 1) * 8
    bp, bt, mp, mt, mm = _normalisers(
        base, memory, s * SLICE, s * SLICE + SLICE, V, shared, GATED, EDGES, BLOCK
    )
    _store_partial(partials + s * 8, bp, bt, mp, mt, mm)
    if EDGES:
        if s == S - 1:
            bp, bt, mp, mt, mm = _edge_normalisers(base, memory, V, shared, GATED)
            _store_partial(partials + S * 8, bp, bt, mp, mt, mm)


@jit
def _store_partial(at, b_peak, b_total, m_peak, m_total, m_moment):
    tl.store(at, b_peak)
    tl.store(at + 1, b_total)
    tl.store(at + 2, m_peak)
    tl.store(at + 3, m_total)
    tl.store(at + 4, m_moment)


@jit
def _combine_kernel(
    base, memory, weights, score, certainty, partials, out,
    base_stride, memory_stride, weights_stride, out_stride, number, V, shared, K, S,
    PARTIALS: tl.constexpr, COLUMNS: tl.constexpr, KEEP: tl.constexpr, GATED: tl.constexpr,
    UNITS: tl.constexpr, AS_LOGITS: tl.constexpr, EDGES: tl.constexpr, SLICE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Backwards: the L2 cache still holds the rows that the first launch read last.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    n = (program // S).to(tl.int64)
    s = program % S
    a, mine = _asked(weights, n, weights_stride, number, COLUMNS, GATED)
    if KEEP:
        if not mine:
            return
    i = tl.arange(0, PARTIALS)
    count = S
    if EDGES:
        count += 1
    if AS_LOGITS:
        count = tl.where(a == 0, 0, count)  # none was stored
    there = i < count
    at = partials + n * (S + 1) * 8 + i * 8
    b_peak = tl.load(at, mask=there, other=LOWEST)
    b_total = tl.load(at + 1, mask=there, other=0.0)
    m_peak = tl.load(at + 2, mask=there, other=LOWEST)
    m_total = tl.load(at + 3, mask=there, other=0.0)
    m_moment = tl.load(at + 4, mask=there, other=0.0)
    a, b_shift, b_scale, m_shift, m_scale = _terms(
        a, b_peak, b_total, m_peak, m_total, m_moment, score + n, certainty, K,
        GATED, UNITS, AS_LOGITS,
    )  # fmt: skip
    _write(
        base + n * base_stride, memory + n * memory_stride, out + n * out_stride,
        s * SLICE, s * SLICE + SLICE, V, shared, a, b_shift, b_scale, m_shift, m_scale,
        AS_LOGITS, EDGES, BLOCK,
    )  # fmt: skip


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Return how many a GPU has; an H100's number for the interpreter."""
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 132


def splits(N: int, V: int, multiprocessors: int) -> bool:
    """Return whether N rows of V columns are split: where whole rows leave programs idle."""
    waves = -(-N // multiprocessors)
    return V > SLICE and N < 0.8 * waves * multiprocessors


def interpolate_triton(
    base_NV: Tensor,
    memory_NW: Tensor,
    weights: Tensor | RowWeights,
    gate: tuple[Tensor, Tensor] | None,
    as_logits: bool,
    out_NV: Tensor,
    invariant: bool,
    split: bool | None,
) -> None:
    """Run the kernels, on a GPU or, under TRITON_INTERPRET=1, in the interpreter."""
    N, V = base_NV.shape
    shared = min(V, memory_NW.shape[1])
    columns = isinstance(weights, RowWeights)
    weights_NA = weights.columns_NA if columns else weights
    score_N, certainty_4K = gate or (base_NV, base_NV)  # not looked at without a gate
    K = certainty_4K.shape[1] if gate else 1
    edges = V % 8 != 0 or shared % 8 != 0
    number = float(weights.memory) if columns else 0.0  # a float: one compiled kernel for all
    if split is None:
        split = invariant or splits(N, V, _multiprocessors(base_NV.device))
    S = -(-V // SLICE) if split or invariant else 1
    strides = (base_NV.stride(0), memory_NW.stride(0), weights_NA.stride(0))
    flags = {
        "COLUMNS": columns,
        "KEEP": columns and weights.others == "keep",
        "GATED": gate is not None,
        "AS_LOGITS": as_logits,
        "EDGES": edges,
    }
    terms = {"PARTIALS": triton.next_power_of_2(S + edges), "UNITS": triton.next_power_of_2(K)}
    sliced = {"BLOCK": SLICE, "num_warps": SLICE_WARPS}
    with torch.cuda.device_of(base_NV):
        if not split:
            L = SLICE if invariant else V
            sizes = sliced if invariant else {"BLOCK": WHOLE, "num_warps": WHOLE_WARPS}
            _whole_kernel[(N,)](
                base_NV, memory_NW, weights_NA, score_N, certainty_4K, out_NV,
                *strides, out_NV.stride(0), number, V, shared, K, L, S, **flags, **terms, **sizes,
            )  # fmt: skip
            return
        partials = torch.empty(N, S + 1, 8, dtype=torch.float32, device=base_NV.device)
        _partial_kernel[(N * S,)](
            base_NV, memory_NW, weights_NA, partials,
            *strides, number, V, shared, S, SLICE=SLICE, **flags, **sliced,
        )  # fmt: skip
        _combine_kernel[(N * S,)](
            base_NV, memory_NW, weights_NA, score_N, certainty_4K, partials, out_NV,
            *strides, out_NV.stride(0), number, V, shared, K, S, SLICE=SLICE,
            **flags, **terms, **sliced,
        )  # fmt: skip
