"""Mix two rows of logits: log((1 - a) softmax(base) + a softmax(memory)).

    out = logaddexp(log(1-a) + base - lse(base), log a + memory - lse(memory))

On a GPU Triton kernels do it (interpolate_kernel.py): they sweep the columns twice, once for both
normalisers, once to write the mixture. Nothing of size N x V exists beside inputs and output. On a
CPU the same formula runs in PyTorch, compiled unless vLLM was started eager. The launcher is a
plain function, not a torch.library op: vLLM calls compute_logits eagerly, outside CUDA graphs and
compiled code. Neither path makes the host wait for the device.

The weight `a` of each row is given, or decoded from columns of the row (weights.py), or comes from
a gate (vllm_memdec/gate.py). A gate depends on the memory's confidence, its top probability t and
its entropy e in nats, which come out of the first sweep:

    alpha = LARGEST * sigmoid(score + sum_k out_k gelu(t_k t + e_k e + bias_k))

Rules all implementations share (kernels/reference.py is the oracle):
  * logits form, `as_logits=True`: the base's logsumexp is added back, so that penalties, which look
    at the sign of a logit, act as on the base alone. Rows with a = 0 are the base's, bit for bit;
  * the memory is cut or padded with -inf to the base's width before its softmax;
  * a row of nothing but -inf carries no mass: its softmax is 0 everywhere and its logsumexp 0,
    its top probability 1 and its entropy 0;
  * NaN or +inf in a row, or `a` outside [0, 1], makes that row NaN and leaves the others alone
    (rows with a = 0 in the logits form do not look at the memory).

Test: `pytest tests/kernels/test_interpolate.py`; measure: `python -m benchmarks.speed.interpolate`.
Shape suffixes: N rows, V vocabulary of the base (and of the output), W width of the memory, K units
of a gate.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_memdec.kernels.interpolate_kernel import combine_kernel, partial_kernel, whole_kernel
from vllm_memdec.kernels.rows import INTERPRETED, LOGIT_DTYPES, triton
from vllm_memdec.kernels.weights import LARGEST, RowWeights, gate_scores

# Columns of one iteration, and warps: a thread reads 2 vectors of each model.
SLICE, SLICE_WARPS = 4096, 8
WHOLE, WHOLE_WARPS = 16384, 32  # fills a multiprocessor: fewer rows compete for the L2 cache

# Elements of one group of rows on the CPU. Smaller groups stay in a smaller cache, larger ones meet
# fewer thread barriers, which cost time when other processes want the cores.
GROUP = 2**17


def interpolate(
    base_NV: Tensor,
    memory_NW: Tensor,
    weights: Tensor | RowWeights,
    *,
    gate: tuple[Tensor, Tensor] | None = None,
    as_logits: bool = False,
    out: Tensor | None = None,
    tally_2: Tensor | None = None,
    used_N: Tensor | None = None,
    compiled: bool = False,
    invariant: bool = False,
    split: bool | None = None,
) -> Tensor:
    """Return the mixture [N, V] in float32, as log-probabilities or in the logits form.

    weights: float32 [N], or what decodes to them.
    gate: scores [N] and, a row each, t, e, bias and out [4, K] of the formula above, in float32. A
    row with a negative weight then takes what the gate gives, -alpha at most.

    tally_2: float64 [2]; the sum of this memory's weights, and of how many rows, are added to it. A
    weight of NaN is not.

    used_N: contiguous float32 [N]; the weight that each row was mixed with is written there, as a
    gate gave it. Rows that `others="keep"` keeps are not written there either.

    Rows may be strided, each input may be bf16, fp16 or fp32, and `out` may be `base_NV` itself.
    `compiled` is for the CPU: torch.compile, which needs a C++ compiler and seconds on first use.

    On a GPU `split` says whether several programs share a row; by default they share a wide one.
    With `invariant` the bits of a row do not depend on that.
    """
    out_NV = _check(base_NV, memory_NW, weights, gate, out, tally_2, used_N)
    if len(out_NV):  # CUDA refuses an empty grid
        rows = (base_NV, memory_NW, weights, gate, as_logits, out_NV, tally_2, used_N)
        if INTERPRETED or (triton is not None and base_NV.is_cuda):
            interpolate_triton(*rows, invariant, split)
        else:
            interpolate_torch(*rows, compiled)
    return out_NV


# -- Triton ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a kernel cuts the columns of a row."""

    slices: int
    blocks: int  # iterations of a slice
    flags: dict[str, int]  # the kernel's compile-time constants
    warps: int

    @classmethod
    def of(cls, V: int, shared: int, dtypes: tuple[torch.dtype, ...], sliced: bool) -> Plan:
        """Return the plan for V columns, of which the memory has the first `shared`.

        sliced: a slice is one block, not the row.
        """
        block, warps = (SLICE, SLICE_WARPS) if sliced else (WHOLE, WHOLE_WARPS)
        if torch.float32 in dtypes:
            block //= 2  # keeps the bytes: registers would spill
        blocks = -(-V // block)
        slices, edges = blocks if sliced else 1, V % 8 != 0 or shared % 8 != 0
        flags = {"BLOCK": block, "EDGES": edges}
        flags["PARTIALS"] = triton.next_power_of_2(slices + edges)
        return cls(slices, blocks // slices, flags, warps)


def interpolate_triton(
    base_NV: Tensor,
    memory_NW: Tensor,
    weights: Tensor | RowWeights,
    gate: tuple[Tensor, Tensor] | None,
    as_logits: bool,
    out_NV: Tensor,
    tally_2: Tensor | None,
    used_N: Tensor | None,
    invariant: bool,
    split: bool | None,
) -> None:
    """Run the kernels, on a GPU or, under TRITON_INTERPRET=1, in the interpreter."""
    N, V = base_NV.shape
    shared = min(V, memory_NW.shape[1])
    if isinstance(weights, RowWeights):
        columns, keep, weights_NA = True, weights.others == "keep", weights.columns_NA
        number = float(weights.memory)  # a float: one compiled kernel for all
    else:
        columns, keep, weights_NA, number = False, False, weights, 0.0
    score_N, certainty_4K = gate or (out_NV, out_NV)  # not looked at without a gate
    sums_2 = out_NV if tally_2 is None else tally_2
    told_N = out_NV if used_N is None else used_N
    K = certainty_4K.shape[1] if gate else 1
    if split is None:
        # Even with 1,024 rows on an H100 (benchmarks/results/kernel.csv). A row that is one slice
        # needs no second launch.
        split = invariant or V > SLICE
    plan = Plan.of(V, shared, (base_NV.dtype, memory_NW.dtype), sliced=split or invariant)
    S = plan.slices
    flags = plan.flags | {
        "COLUMNS": columns,
        "KEEP": keep,
        "GATED": gate is not None,
        "AS_LOGITS": as_logits,
        "num_warps": plan.warps,
        # The compiler may fuse other operations in one kernel than in another.
        "enable_fp_fusion": not invariant,
    }
    units = {"UNITS": triton.next_power_of_2(K)}
    units |= {"COUNT": tally_2 is not None, "TELL": used_N is not None}
    strides = (base_NV.stride(0), memory_NW.stride(0), weights_NA.stride(0))
    with torch.cuda.device_of(base_NV):
        if not split:
            whole_kernel[(N,)](
                base_NV, memory_NW, weights_NA, score_N, certainty_4K, sums_2, told_N, out_NV,
                *strides, out_NV.stride(0), number, V, shared, K, S, plan.blocks, **units, **flags,
            )  # fmt: skip
            return
        size = (N, flags["PARTIALS"], 8)
        partials = torch.empty(size, dtype=torch.float32, device=base_NV.device)
        partial_kernel[(N * S,)](
            base_NV, memory_NW, weights_NA, partials, *strides, number, V, shared, S, **flags
        )
        combine_kernel[(N * S,)](
            base_NV, memory_NW, weights_NA, score_N, certainty_4K, sums_2, told_N, partials,
            out_NV, *strides, out_NV.stride(0), number, V, shared, K, S, **units, **flags,
        )  # fmt: skip


# -- PyTorch --------------------------------------------------------------------------------------


def _normaliser_rows(x_NV: Tensor, moment: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (peak, log sum exp(x - peak)) of each row, [N, 1] each; zeros for rows of -inf.

    moment: whether to return sum (x - peak) exp(x - peak) [N], too.
    """
    peak_N1 = x_NV.amax(-1, keepdim=True)
    peak_N1 = torch.where(peak_N1 == -torch.inf, 0, peak_N1)
    # sum() adds pairwise; the sum inside log_softmax does not, and is off by 1e-5 at V = 262,144.
    below_NV = x_NV - peak_N1
    share_NV = below_NV.exp()
    total_N1 = share_NV.sum(-1, keepdim=True)
    moment_N = None
    if moment:
        # Not below -200, where exp() is 0: 0 times -inf would be NaN.
        moment_N = share_NV.mul_(below_NV.clamp_(min=-200)).sum(-1)
    return peak_N1, torch.where(total_N1 == 0, 1, total_N1).log(), moment_N


def _mixture_rows(
    base_NV: Tensor,
    memory_NW: Tensor,
    alpha_N: Tensor,
    score_N: Tensor | None,
    certainty_4K: Tensor | None,
    as_logits: bool,
) -> tuple[Tensor, Tensor]:
    """Return the mixture of rows, [N, V] in float32, and their weights [N].

    The kernel says why each step is so.
    """
    b, m = base_NV.float(), memory_NW[:, : base_NV.shape[1]].float()
    if m.shape[1] < b.shape[1]:
        m = torch.nn.functional.pad(m, (0, b.shape[1] - m.shape[1]), value=-torch.inf)
    base_peak, base_logsum, _ = _normaliser_rows(b)
    memory_peak, memory_logsum, moment_N = _normaliser_rows(m, moment=score_N is not None)
    if score_N is not None:
        assert certainty_4K is not None and moment_N is not None
        top_N = (-memory_logsum[:, 0]).exp()
        entropy_N = memory_logsum[:, 0] - moment_N * top_N
        z_N = gate_scores(score_N, certainty_4K, top_N, entropy_N)
        given_N, cap_N = LARGEST * z_N.sigmoid(), -alpha_N
        free_N = given_N < cap_N
        alpha_N = torch.where(alpha_N < 0, torch.minimum(given_N, cap_N), alpha_N)
    a = alpha_N[:, None]
    log_keep = torch.log1p(-a)
    if score_N is not None:
        # A weight close to 1 has lost the bits of 1 - weight.
        rest_N = (1 - LARGEST) + LARGEST * (-z_N).sigmoid()
        log_keep = torch.where(free_N[:, None], rest_N.log()[:, None], log_keep)
    if not as_logits:
        x = (b - base_peak) + (log_keep - base_logsum)
        return torch.logaddexp(x, (m - memory_peak) + (a.log() - memory_logsum)), alpha_N
    gap = memory_peak.double() - base_peak
    shift = gap.float()
    rounded = (gap - shift).float()
    y = (m - shift) + (a.log() + base_logsum - memory_logsum - rounded)
    return torch.where(a == 0, b, torch.logaddexp(b + log_keep, y)), alpha_N


@functools.cache
def _compiled_rows():
    """Return _mixture_rows compiled: one graph for every shape, and one more for a single row."""
    # Two numbers of rows, gated or not, two dtypes of the base, memories as wide as it or not: with
    # its 8 graphs dynamo would go on without compiling.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 32)
    return torch.compile(_mixture_rows, dynamic=True)


def compile_rows(
    V: int,
    W: int,
    base_dtype: torch.dtype,
    memory_dtype: torch.dtype,
    certainty_4K: Tensor | None = None,
) -> None:
    """Compile the CPU path for widths V and W ahead of the first request; takes seconds.

    certainty_4K: of the memory's gate, if it has one.
    """
    for N in (2, 1):
        rows = (torch.zeros(N, V, dtype=base_dtype), torch.zeros(N, W, dtype=memory_dtype))
        alpha_N = torch.zeros(N, dtype=torch.float32)
        gate = None if certainty_4K is None else (alpha_N.clone(), certainty_4K)
        interpolate(*rows, alpha_N, gate=gate, as_logits=True, compiled=True)


def interpolate_torch(
    base_NV: Tensor,
    memory_NW: Tensor,
    weights: Tensor | RowWeights,
    gate: tuple[Tensor, Tensor] | None,
    as_logits: bool,
    out_NV: Tensor,
    tally_2: Tensor | None,
    used_N: Tensor | None,
    compiled: bool,
) -> None:
    """Run the formula in PyTorch: compiled, or a few rows at a time so that they stay in cache."""
    score_N, certainty_4K = gate or (None, None)
    kept_N, mine_N = None, None
    if isinstance(weights, RowWeights):
        alpha_N, mine_N = weights.decode(gated=gate is not None)
        if weights.others == "keep":
            kept_N = ~mine_N
    else:
        alpha_N = weights
    mixture, step = _mixture_rows, max(1, GROUP // base_NV.shape[1])
    if compiled:
        mixture, step = _compiled_rows(), len(out_NV)
    for start in range(0, len(out_NV), step):
        part = slice(start, start + step)
        rows = (base_NV[part], memory_NW[part], alpha_N[part])
        score_n = None if score_N is None else score_N[part]
        mixed, given_N = mixture(*rows, score_n, certainty_4K, as_logits)
        if tally_2 is not None:
            right_N = given_N == given_N
            if mine_N is not None:
                right_N &= mine_N[part]
            total = torch.where(right_N, given_N, 0).sum(dtype=tally_2.dtype)
            tally_2 += torch.stack([total, right_N.sum(dtype=tally_2.dtype)])
        if used_N is not None:
            used = used_N[part]
            used.copy_(given_N if kept_N is None else torch.where(kept_N[part], used, given_N))
        # Choosing rows by a mask would make the host wait for their number.
        out = out_NV[part]
        out.copy_(mixed if kept_N is None else torch.where(kept_N[part, None], out, mixed))


def _check(
    base_NV: Tensor,
    memory_NW: Tensor,
    weights: Tensor | RowWeights,
    gate: tuple[Tensor, Tensor] | None,
    out: Tensor | None,
    tally_2: Tensor | None,
    used_N: Tensor | None,
) -> Tensor:
    """Raise ValueError unless the arguments fit together; return `out`, allocated if None."""
    named = {"base": base_NV, "memory": memory_NW}
    if out is not None:
        named["out"] = out
    for name, x in named.items():
        if x.ndim != 2 or 0 in x.shape[1:]:
            raise ValueError(f"{name} must be rows of logits, [N, V], got {tuple(x.shape)}.")
        if x.stride(1) != 1 and x.shape[1] > 1:
            raise ValueError(f"{name} must have contiguous rows, got column stride {x.stride(1)}.")
        if x.dtype not in LOGIT_DTYPES:
            raise ValueError(f"{name} must be bfloat16, float16 or float32, got {x.dtype}.")
    N = base_NV.shape[0]
    if memory_NW.shape[0] != N:
        raise ValueError(f"base has {N} rows, memory {memory_NW.shape[0]}: give as many.")
    if isinstance(weights, RowWeights):
        weights.check(N)
        if weights.others == "keep" and out is None:
            raise ValueError('others="keep" needs `out`, whose other rows it keeps.')
        weights = weights.columns_NA
    elif weights.shape != (N,) or weights.dtype != torch.float32:
        raise ValueError(
            f"weights must be float32, one for each of {N} rows, got {weights.dtype} "
            f"{tuple(weights.shape)}."
        )
    if gate is not None:
        score_N, certainty_4K = gate
        if score_N.shape != (N,) or certainty_4K.ndim != 2 or len(certainty_4K) != 4:
            raise ValueError(
                f"a gate needs {N} scores, one a row, and 4 rows of units, got shapes "
                f"{tuple(score_N.shape)} and {tuple(certainty_4K.shape)}."
            )
        if any(x.dtype != torch.float32 or not x.is_contiguous() for x in gate):
            raise ValueError("a gate's scores and units must be contiguous, in float32.")
    if out is not None and (out.shape != base_NV.shape or out.dtype != torch.float32):
        raise ValueError(f"out must be float32 and shaped like base, got {out.dtype} {out.shape}.")
    if tally_2 is not None and (
        tally_2.shape != (2,) or tally_2.dtype != torch.float64 or not tally_2.is_contiguous()
    ):
        raise ValueError(f"a tally must be float64 [2], got {tally_2.dtype} {tally_2.shape}.")
    if used_N is not None and (
        used_N.shape != (N,) or used_N.dtype != torch.float32 or not used_N.is_contiguous()
    ):
        raise ValueError(f"used weights must be float32 [{N}], got {used_N.dtype} {used_N.shape}.")
    counted = [x for x in (tally_2, used_N) if x is not None]
    devices = {x.device for x in (*named.values(), weights, *(gate or ()), *counted)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(map(str, devices))}.")
    return base_NV.new_empty(base_NV.shape, dtype=torch.float32) if out is None else out
