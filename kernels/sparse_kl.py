"""The loss of Memory Decoder on sparse targets (arXiv 2508.09874, section 3.2), with its gradient.

    L = beta * KL(p_kNN || p) + (1 - beta) * (-log p(label)),    p = softmax(logits)

Per row, with sparse p_kNN of mass m (1; 0 for a row without neighbours, which its label teaches):

    KL = sum_y p_kNN(y) (log p_kNN(y) - logit_y + lse(logits))
    dL/dlogit_y = (beta m + 1 - beta) p(y) - beta p_kNN(y) - (1 - beta) [y = label]

Beside a base whose p_base(label) is known, a share s of the cross-entropy may be the mixture's:

    L = beta * KL + (1 - beta) * ((1 - s) * -log p(label) + s * -log((1 - a) p_base + a p)(label))

whose gradient is the cross-entropy's times u = 1 - s + s * a p / ((1 - a) p_base + a p), p and
p_base the label's: a row that the base predicts well teaches little.

So a row needs its logsumexp and a few logits, and its gradient is a softmax with a few numbers
taken off: no rows x vocabulary target ever exists, and the gradient may be written over the logits.
On a GPU one Triton program per row does all of it; on a CPU groups of rows stay in cache.

Rules they share (kernels/reference.py is the oracle): a logit of -inf is a token without mass, a
row of nothing but -inf has softmax 0 and logsumexp 0; a target of probability 0 costs nothing;
NaN stays in its row.

Test: `pytest tests/kernels/test_sparse_kl.py`; measure: `python -m benchmarks.speed.loss`.
Shape suffixes: N rows, P rows of a group, V columns: the vocabulary, or some of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_memdec.kernels.rows import (
    BLOCK,
    INTERPRETED,
    LOGIT_DTYPES,
    NUM_WARPS,
    jit,
    normaliser,
    tl,
    triton,
)

TARGETS = 128  # targets of a row that a program reads at once
NOTHING = -1e30  # the logarithm of a probability of 0, which may be taken from itself
# Elements of one group of rows on the CPU: 4 MB in float32, far from too large for a cache. Smaller
# groups lose more to calls and thread barriers than they win by a faster cache.
GROUP = 2**20


@dataclass(frozen=True)
class SparseRows:
    """Compressed sparse rows: row n has entries offsets[n] to offsets[n + 1] of the other two.

    Tokens int64, those of a row all different; probabilities float32.
    """

    offsets: Tensor
    token: Tensor
    probability: Tensor

    def slice(self, start: int, stop: int) -> SparseRows:
        """Return rows start..stop, without a copy."""
        return SparseRows(self.offsets[start : stop + 1], self.token, self.probability)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (row, token, probability) of each entry, rows counted from 0."""
        part = slice(*self.offsets[[0, -1]].tolist())
        rows = torch.arange(len(self.offsets) - 1, device=self.offsets.device)
        row = rows.repeat_interleave(self.offsets.diff(), output_size=part.stop - part.start)
        return row, self.token[part], self.probability[part]


@dataclass(frozen=True)
class Mixture:
    """A base beside which the label's likelihood counts, for a share of the cross-entropy.

    base: the base's log p(label) [N] float32; alpha: the weight of p in the mixture.
    """

    base: Tensor
    alpha: float
    share: float

    def slice(self, start: int, stop: int) -> Mixture:
        """Return rows start..stop, without a copy."""
        return Mixture(self.base[start:stop], self.alpha, self.share)

    def odds(self) -> Tensor:
        """Return log((1 - a) p_base / a) [N], finite from below: 0 / 0 is nobody's merit."""
        return (self.base + math.log((1 - self.alpha) / self.alpha)).clamp(min=NOTHING)

    def loss(self, ce_N: Tensor) -> Tensor:
        """Return -log((1 - a) p_base + a p) [N] of rows with such cross-entropies."""
        return -torch.logaddexp(self.odds(), -ce_N) - math.log(self.alpha)


def sparse_kl(
    logits_NV: Tensor,
    labels_N: Tensor,
    targets: SparseRows,
    beta: float,
    *,
    log_weight_V: Tensor | None = None,
    mixture: Mixture | None = None,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return KL and cross-entropy of each row, [N] float32, and write the gradient of L to `out`.

    `out` may be `logits_NV` itself. `log_weight_V` (float32) is added to every row of logits:
    columns drawn at random to stand for others count for more than one in the logsumexp.
    """
    _check(logits_NV, labels_N, targets, log_weight_V, mixture, out)
    N, V = out.shape
    kl_N, ce_N = torch.empty(2, N, dtype=torch.float32, device=out.device)
    if N == 0:  # CUDA refuses an empty grid
        return kl_N, ce_N
    if not INTERPRETED and (triton is None or not out.is_cuda):
        columns = log_weight_V, mixture
        _sparse_kl_torch(logits_NV, labels_N, targets, beta, *columns, out, kl_N, ce_N)
        return kl_N, ce_N
    sparse = (targets.offsets, targets.token, targets.probability)
    saved = torch.empty_like(targets.probability)
    strides = (logits_NV.stride(0), out.stride(0))
    odds_N, share = (None, 0.0) if mixture is None else (mixture.odds(), mixture.share)
    sizes = {"BLOCK": BLOCK, "TARGETS": TARGETS, "num_warps": NUM_WARPS}
    with torch.cuda.device_of(out):
        _loss_kernel[(N,)](
            logits_NV, out, labels_N, *sparse, saved, log_weight_V, odds_N, kl_N, ce_N, *strides, V,
            beta, share, **sizes,
        )  # fmt: skip
    return kl_N, ce_N


@jit
def _loss_kernel(
    logits,  # [N, V]
    out,  # [N, V], perhaps the logits
    labels,  # [N]
    offsets,  # [N + 1]
    tokens,  # [entries]
    probabilities,  # [entries]
    saved,  # [entries]: logits at the tokens, before `out` is written over them
    log_weight,  # [V] or None
    odds,  # [N] or None
    kl,  # [N]
    ce,  # [N]
    logits_stride,
    out_stride,
    V,
    beta,
    share,
    BLOCK: tl.constexpr,
    TARGETS: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # 16k rows of 152k columns pass 2^31 elements
    row = logits + n * logits_stride
    grad = out + n * out_stride
    first = tl.load(offsets + n)
    last = tl.load(offsets + n + 1)
    label = tl.load(labels + n)
    peak, logsum = normaliser(row, V, BLOCK, log_weight)

    label_logit = tl.load(row + label).to(tl.float32)
    if log_weight is not None:
        label_logit += tl.load(log_weight + label)
    entropy = logsum - (label_logit - peak)
    tl.store(ce + n, entropy)
    weight = 1 - beta  # of the label
    if odds is not None:
        # e to 80 is a float32 still, and one by it is nothing.
        weight *= 1 - share + share / (1 + tl.exp(tl.minimum(entropy + tl.load(odds + n), 80.0)))
    mass = 0.0
    divergence = 0.0
    for start in range(first, last, TARGETS):
        entry = start + tl.arange(0, TARGETS)
        mask = entry < last
        y = tl.load(tokens + entry, mask=mask, other=0)
        p = tl.load(probabilities + entry, mask=mask, other=0.0)
        x = tl.load(row + y, mask=mask, other=0.0).to(tl.float32)
        if log_weight is not None:
            x += tl.load(log_weight + y, mask=mask, other=0.0)
        tl.store(saved + entry, x, mask=mask)
        # p (log p - log q), and 0 log 0 = 0 even where log q is -inf.
        x = tl.where(p > 0, x, peak)
        divergence += tl.sum(p * (tl.log(tl.where(p > 0, p, 1.0)) - (x - peak) + logsum), axis=0)
        mass += tl.sum(p, axis=0)
    tl.store(kl + n, divergence)
    tl.debug_barrier()  # all threads have read the few logits

    scale = (beta * mass + weight) * tl.exp(-logsum)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        if log_weight is not None:
            x += tl.load(log_weight + columns, mask=columns < V, other=0.0)
        tl.store(grad + columns, scale * tl.exp(x - peak), mask=columns < V)
    tl.debug_barrier()  # the softmax is written: now what is taken off it, rounded once

    tl.store(grad + label, scale * tl.exp(label_logit - peak) - weight)
    tl.debug_barrier()  # the label may be a target
    for start in range(first, last, TARGETS):
        entry = start + tl.arange(0, TARGETS)
        mask = entry < last
        y = tl.load(tokens + entry, mask=mask, other=0)
        p = tl.load(probabilities + entry, mask=mask, other=0.0)
        x = tl.load(saved + entry, mask=mask, other=0.0)
        g = scale * tl.exp(x - peak) - beta * p - tl.where(y == label, weight, 0.0)
        tl.store(grad + y, g, mask=mask)


def _sparse_kl_torch(
    logits_NV: Tensor,
    labels_N: Tensor,
    targets: SparseRows,
    beta: float,
    log_weight_V: Tensor | None,
    mixture: Mixture | None,
    out_NV: Tensor,
    kl_N: Tensor,
    ce_N: Tensor,
) -> None:
    """Run the same formulas in PyTorch, the dense ones on a few rows at a time."""
    N, V = logits_NV.shape
    row, token, p = targets.entries()
    n = torch.arange(N, device=row.device)
    label_logit_N, x = logits_NV[n, labels_N].float(), logits_NV[row, token].float()
    if log_weight_V is not None:
        label_logit_N, x = label_logit_N + log_weight_V[labels_N], x + log_weight_V[token]
    mass_N = torch.zeros_like(kl_N).index_add_(0, row, p).mul_(beta)

    peak_N, total_N, weight_N = (torch.empty_like(kl_N) for _ in range(3))
    odds_N, share = (None, 0.0) if mixture is None else (mixture.odds(), mixture.share)
    step = max(1, GROUP // V)
    for part in (slice(start, start + step) for start in range(0, N, step)):
        z = logits_NV[part].to(torch.float32, copy=True)  # overwritten below
        if log_weight_V is not None:
            z += log_weight_V
        peak_P1 = z.amax(-1, keepdim=True)
        peak_P1.masked_fill_(peak_P1 == -torch.inf, 0)
        # sum() adds pairwise; the sum inside softmax does not, see interpolate.py.
        total_P1 = z.sub_(peak_P1).exp_().sum(-1, keepdim=True)
        total_P1.masked_fill_(total_P1 == 0, 1)
        peak_N[part], total_N[part] = peak_P1[:, 0], total_P1[:, 0]
        ce_N[part] = total_N[part].log() - (label_logit_N[part] - peak_N[part])
        weight_N[part] = 1 - beta  # of the label
        if odds_N is not None:
            weight_N[part] *= 1 - share + share * torch.sigmoid(-ce_N[part] - odds_N[part])
        out_NV[part] = z.mul_((mass_N[part] + weight_N[part])[:, None] / total_P1)

    label_x_N, x = label_logit_N - peak_N, x - peak_N[row]
    logsum_N, scale_N = total_N.log(), (mass_N + weight_N) / total_N
    # p (log p - log q), and 0 log 0 = 0 even where log q is -inf.
    kl_N.zero_().index_add_(0, row, torch.where(p > 0, p * (p.log() - x + logsum_N[row]), 0))
    hit = (token == labels_N[row]) * weight_N[row]
    out_NV[n, labels_N] = (scale_N * label_x_N.exp() - weight_N).to(out_NV.dtype)
    out_NV[row, token] = (scale_N[row] * x.exp() - beta * p - hit).to(out_NV.dtype)


def _check(
    logits_NV: Tensor,
    labels_N: Tensor,
    targets: SparseRows,
    log_weight_V: Tensor | None,
    mixture: Mixture | None,
    out_NV: Tensor,
) -> None:
    """Raise ValueError unless the arguments fit together."""
    if logits_NV.ndim != 2 or logits_NV.shape[1] == 0:
        raise ValueError(f"logits must be rows, [N, V], got {tuple(logits_NV.shape)}.")
    N, V = logits_NV.shape
    wanted = {
        "logits": (logits_NV, (N, V), LOGIT_DTYPES),
        "out": (out_NV, (N, V), LOGIT_DTYPES),
        "labels": (labels_N, (N,), (torch.int64,)),
        "offsets": (targets.offsets, (N + 1,), (torch.int64,)),
        "tokens": (targets.token, targets.token.shape[:1], (torch.int64,)),
        "probabilities": (targets.probability, targets.token.shape, (torch.float32,)),
    }
    if log_weight_V is not None:
        wanted["log weights"] = (log_weight_V, (V,), (torch.float32,))
    if mixture is not None:
        wanted["log p of the base"] = (mixture.base, (N,), (torch.float32,))
    for name, (x, shape, dtypes) in wanted.items():
        if x.shape != shape or x.dtype not in dtypes or (x.stride(-1) != 1 and x.shape[-1] > 1):
            raise ValueError(
                f"{name} must be {' or '.join(map(str, dtypes))} {tuple(shape)} with contiguous "
                f"rows, got {x.dtype} {tuple(x.shape)}, strides {x.stride()}."
            )
    devices = {x.device for x, *_ in wanted.values()}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(map(str, devices))}.")
