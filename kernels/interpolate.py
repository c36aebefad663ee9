"""Mix two rows of logits: log((1 - a) softmax(base) + a softmax(memory)), one launch per step.

    out = logaddexp(log(1-a) + base - lse(base), log a + memory - lse(memory))

On a GPU one Triton program per row sweeps the columns twice: once for both normalisers, once to
write the mixture. Nothing of size N x V exists beside inputs and output. On a CPU the same formula
runs in PyTorch, compiled unless vLLM was started eager. The launcher is a plain function, not a
torch.library op: vLLM calls compute_logits eagerly, outside CUDA graphs and compiled code.

A gate (vllm_memdec/gate.py) may give the weights of some rows. It goes by how sure the memory is,
its top probability t and its entropy e in nats, which come out of the first sweep:

    alpha = LARGEST * sigmoid(score + sum_k out_k gelu(t_k t + e_k e + bias_k))

Rules all implementations share (kernels/reference.py is the oracle):
  * logits form, `as_logits=True`: the base's logsumexp is added back, so that penalties, which look
    at the sign of a logit, act as on the base alone. Rows with a = 0 are the base's, bit for bit;
  * the memory is cut or padded with -inf to the base's width before its softmax;
  * a row of nothing but -inf carries no mass: its softmax is 0 everywhere and its logsumexp 0,
    its top probability 1 and its entropy 0;
  * NaN or +inf in a row, or `a` outside [0, 1], makes that row NaN and leaves the others alone
    (rows with a = 0 in the logits form do not look at the memory).

Test: `pytest tests/kernels/test_interpolate.py`; measure: `python benchmarks/kernel.py`.
Shape suffixes: N rows, V vocabulary of the base (and of the output), W width of the memory, K units
of a gate.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only installation
    triton = tl = None

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST = 0.999  # of a gate: a sure memory that is wrong costs at most ln(1000) nats more

# 16 warps read 4,096 bf16 columns as one 16-byte load per thread.
BLOCK = 4096
NUM_WARPS = 16

# Elements of one group of rows on the CPU. Smaller groups stay in a smaller cache, larger ones meet
# fewer thread barriers, which are what hurts when other processes want the cores.
GROUP = 2**17


def interpolate(
    base_NV: Tensor,
    memory_NW: Tensor,
    alpha_N: Tensor,
    *,
    gate: tuple[Tensor, Tensor] | None = None,
    as_logits: bool = False,
    out: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """Return the mixture [N, V] in float32, as log-probabilities or in the logits form.

    gate: scores [N] and, a row each, t, e, bias and out [4, K] of the formula above, in float32. A
    row with a negative weight then takes what the gate gives, -alpha at most.

    Rows may be strided, each input may be bf16, fp16 or fp32, and `out` may be `base_NV` itself.
    `compiled` is for the CPU: torch.compile, which needs a C++ compiler and seconds on first use.
    """
    out_NV = _check(base_NV, memory_NW, alpha_N, gate, out)
    if len(out_NV):  # CUDA refuses an empty grid
        if INTERPRETED or (triton is not None and base_NV.is_cuda):
            interpolate_triton(base_NV, memory_NW, alpha_N, gate, as_logits, out_NV)
        else:
            interpolate_torch(base_NV, memory_NW, alpha_N, gate, as_logits, out_NV, compiled)
    return out_NV


# -- Triton ---------------------------------------------------------------------------------------


def jit(function):
    return triton.jit(function) if triton is not None else function


@jit
def normaliser(row, width, BLOCK: tl.constexpr, shift=None):
    """Return (peak, log sum exp(x - peak)) of a row: kept apart, float32 resolves 1e4 + log 2.

    shift: if given, what is added to each column first.
    """
    # One running peak and sum per lane: no reduction across threads inside the loop. Starting at
    # the lowest finite number, not at -inf, keeps exp(-inf - peak) a plain 0.
    peak = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
        if shift is not None:
            x += tl.load(shift + columns, mask=columns < width, other=0.0)
        higher = tl.maximum(peak, x)
        total = total * tl.exp(peak - higher) + tl.exp(x - higher)
        peak = higher
    row_peak = tl.max(peak, axis=0)
    row_total = tl.sum(total * tl.exp(peak - row_peak), axis=0)
    # No mass: both parts 0, so that -inf - lse stays -inf.
    empty = row_total == 0
    return tl.where(empty, 0.0, row_peak), tl.log(tl.where(empty, 1.0, row_total))


@jit
def normaliser_and_entropy(row, width, BLOCK: tl.constexpr):
    """Return (peak, log sum exp(x - peak), entropy in nats) of a row."""
    peak = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)  # sum (x - peak) exp(x - peak)
    LEAST: tl.constexpr = -200.0  # exp() of it is 0, and times `total` it is finite
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, x)
        # -inf has no share in the entropy: its difference must not be multiplied by 0.
        down = tl.maximum(peak - higher, LEAST)
        below = tl.where(x == float("-inf"), 0.0, x - higher)
        share = tl.exp(x - higher)
        moment = (moment + down * total) * tl.exp(down) + below * share
        total = total * tl.exp(down) + share
        peak = higher
    row_peak = tl.max(peak, axis=0)
    down = tl.maximum(peak - row_peak, LEAST)
    row_total = tl.sum(total * tl.exp(down), axis=0)
    row_moment = tl.sum((moment + down * total) * tl.exp(down), axis=0)
    empty = row_total == 0
    row_total = tl.where(empty, 1.0, row_total)
    logsum = tl.log(row_total)
    return tl.where(empty, 0.0, row_peak), logsum, logsum - row_moment / row_total


@jit
def certainty_score(certainty, top, entropy, K, UNITS: tl.constexpr):
    """Return what a gate adds to a row's score for the memory's certainty."""
    k = tl.arange(0, UNITS)
    x = tl.load(certainty + k, mask=k < K, other=0.0) * top
    x += tl.load(certainty + K + k, mask=k < K, other=0.0) * entropy
    x += tl.load(certainty + 2 * K + k, mask=k < K, other=0.0)
    x *= 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    return tl.sum(x * tl.load(certainty + 3 * K + k, mask=k < K, other=0.0), axis=0)


@jit
def _mixture_kernel(
    base,  # [N, V]
    memory,  # [N, W]
    alpha,  # [N]
    score,  # [N]
    certainty,  # [4, K]
    out,  # [N, V]
    base_stride,
    memory_stride,
    alpha_stride,
    out_stride,
    V,
    shared,  # min(V, W): columns both models have
    K,
    GATED: tl.constexpr,
    LARGEST: tl.constexpr,
    UNITS: tl.constexpr,  # K, or the next power of 2
    AS_LOGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # 16k rows of 152k columns pass 2^31 elements
    base += n * base_stride
    memory += n * memory_stride
    out += n * out_stride
    a = tl.load(alpha + n * alpha_stride)

    base_peak, base_logsum = normaliser(base, V, BLOCK)
    if GATED:
        memory_peak, memory_logsum, entropy = normaliser_and_entropy(memory, shared, BLOCK)
        rise = certainty_score(certainty, tl.exp(-memory_logsum), entropy, K, UNITS)
        given = LARGEST * tl.sigmoid(tl.load(score + n) + rise)
        # A NaN of the gate's is kept: the row is broken.
        a = tl.where(a < 0, tl.minimum(given, -a, propagate_nan=tl.PropagateNan.ALL), a)
    else:
        memory_peak, memory_logsum = normaliser(memory, shared, BLOCK)
    # log(1-a), log a. The zeros are replaced before the log: the interpreter warns of log(0).
    log_keep = tl.where(a == 1, float("-inf"), tl.log(tl.where(a == 1, 1.0, 1 - a)))
    log_take = tl.where(a == 0, float("-inf"), tl.log(tl.where(a == 0, 1.0, a)))
    if AS_LOGITS:
        # Only the difference of the normalisers is needed. Its rounding error is carried along:
        # between peaks of 1e4 and 3 it is 5e-4, and the memory's best token may end up near 3.
        gap = memory_peak.to(tl.float64) - base_peak.to(tl.float64)
        base_shift, memory_shift = 0.0, gap.to(tl.float32)
        rounded = (gap - memory_shift.to(tl.float64)).to(tl.float32)
        base_scale, memory_scale = log_keep, log_take + base_logsum - memory_logsum - rounded
    else:
        base_shift, memory_shift = base_peak, memory_peak
        base_scale, memory_scale = log_keep - base_logsum, log_take - memory_logsum

    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < V
        b = tl.load(base + columns, mask=mask, other=float("-inf")).to(tl.float32)
        m = tl.load(memory + columns, mask=columns < shared, other=float("-inf")).to(tl.float32)
        x = (b - base_shift) + base_scale
        y = (m - memory_shift) + memory_scale
        # logaddexp = max + log(1 + exp(-|x - y|)); equal terms, -inf among them, differ by 0.
        apart = tl.abs(tl.where(x == y, 0.0, x) - tl.where(x == y, 0.0, y))
        mixed = tl.maximum(x, y) + tl.log(1 + tl.exp(-apart))
        if AS_LOGITS:
            mixed = tl.where(a == 0, b, mixed)
        tl.store(out + columns, mixed, mask=mask)


def interpolate_triton(
    base_NV: Tensor,
    memory_NW: Tensor,
    alpha_N: Tensor,
    gate: tuple[Tensor, Tensor] | None,
    as_logits: bool,
    out_NV: Tensor,
) -> None:
    """Run the kernel, on a GPU or, under TRITON_INTERPRET=1, in the interpreter."""
    N, V = base_NV.shape
    score_N, certainty_4K = gate or (alpha_N, alpha_N[:, None])  # not looked at without a gate
    K = certainty_4K.shape[1]
    with torch.cuda.device_of(base_NV):
        _mixture_kernel[(N,)](
            base_NV,
            memory_NW,
            alpha_N,
            score_N,
            certainty_4K,
            out_NV,
            base_NV.stride(0),
            memory_NW.stride(0),
            alpha_N.stride(0),
            out_NV.stride(0),
            V,
            min(V, memory_NW.shape[1]),
            K,
            GATED=gate is not None,
            LARGEST=LARGEST,
            UNITS=triton.next_power_of_2(K),
            AS_LOGITS=as_logits,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )


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


def gate_weights(score_N: Tensor, certainty_4K: Tensor, top_N: Tensor, entropy_N: Tensor) -> Tensor:
    """Return a gate's weights [N] by the formula above."""
    sure_N2 = torch.stack([top_N, entropy_N], -1)
    x_NK = torch.addmm(certainty_4K[2], sure_N2, certainty_4K[:2])
    score_N = torch.addmv(score_N, torch.nn.functional.gelu(x_NK), certainty_4K[3])
    return LARGEST * score_N.sigmoid()


def _mixture_rows(
    base_NV: Tensor,
    memory_NW: Tensor,
    alpha_N: Tensor,
    score_N: Tensor | None,
    certainty_4K: Tensor | None,
    as_logits: bool,
) -> Tensor:
    """Return the mixture of rows, [N, V] in float32; the kernel above says why each step is so."""
    b, m = base_NV.float(), memory_NW[:, : base_NV.shape[1]].float()
    if m.shape[1] < b.shape[1]:
        m = torch.nn.functional.pad(m, (0, b.shape[1] - m.shape[1]), value=-torch.inf)
    base_peak, base_logsum, _ = _normaliser_rows(b)
    memory_peak, memory_logsum, moment_N = _normaliser_rows(m, moment=score_N is not None)
    if score_N is not None:
        top_N = (-memory_logsum[:, 0]).exp()
        given_N = gate_weights(score_N, certainty_4K, top_N, memory_logsum[:, 0] - moment_N * top_N)
        alpha_N = torch.where(alpha_N < 0, torch.minimum(given_N, -alpha_N), alpha_N)
    a = alpha_N[:, None]
    if not as_logits:
        x = (b - base_peak) + (torch.log1p(-a) - base_logsum)
        return torch.logaddexp(x, (m - memory_peak) + (a.log() - memory_logsum))
    gap = memory_peak.double() - base_peak
    shift = gap.float()
    rounded = (gap - shift).float()
    y = (m - shift) + (a.log() + base_logsum - memory_logsum - rounded)
    return torch.where(a == 0, b, torch.logaddexp(b + torch.log1p(-a), y))


@functools.cache
def _compiled_rows():
    """Return _mixture_rows compiled: one graph for every shape, and one more for a single row."""
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
    alpha_N: Tensor,
    gate: tuple[Tensor, Tensor] | None,
    as_logits: bool,
    out_NV: Tensor,
    compiled: bool,
) -> None:
    """Run the formula in PyTorch: compiled, or a few rows at a time so that they stay in cache."""
    score_N, certainty_4K = gate or (None, None)
    if compiled:
        rows = (base_NV, memory_NW, alpha_N, score_N, certainty_4K)
        out_NV.copy_(_compiled_rows()(*rows, as_logits))
        return
    step = max(1, GROUP // base_NV.shape[1])
    for start in range(0, len(out_NV), step):
        part = slice(start, start + step)
        rows = (base_NV[part], memory_NW[part], alpha_N[part])
        score_n = None if score_N is None else score_N[part]
        out_NV[part] = _mixture_rows(*rows, score_n, certainty_4K, as_logits)


def _check(
    base_NV: Tensor,
    memory_NW: Tensor,
    alpha_N: Tensor,
    gate: tuple[Tensor, Tensor] | None,
    out: Tensor | None,
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
    if memory_NW.shape[0] != N or alpha_N.shape != (N,):
        raise ValueError(
            f"base has {N} rows, memory {memory_NW.shape[0]}, and alpha has shape "
            f"{tuple(alpha_N.shape)}: give one memory row and one weight per base row."
        )
    if alpha_N.dtype != torch.float32:
        raise ValueError(f"alpha must be float32, got {alpha_N.dtype}.")
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
    devices = {x.device for x in (*named.values(), alpha_N, *(gate or ()))}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(map(str, devices))}.")
    return base_NV.new_empty(base_NV.shape, dtype=torch.float32) if out is None else out
