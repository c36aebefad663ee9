"""Float64 oracle of each op in this folder, one row at a time: slow, and meant to be obvious.

Tests and benchmarks compare against it; nothing in serving or training imports it.
Shape suffixes: N rows, V vocabulary (of the base), W width of the memory.
"""

import math

import torch
from torch import Tensor


def log_softmax_or_nothing(row_V: Tensor) -> tuple[Tensor, Tensor]:
    """Return (log-probabilities [V], logsumexp []); a row of -inf has no mass and logsumexp 0."""
    if (row_V == -torch.inf).all():
        return row_V, row_V.new_zeros(())
    lse = torch.logsumexp(row_V, 0)
    return row_V - lse, lse


def gate_reference(logp_W: Tensor, score: Tensor, certainty_4K: Tensor) -> Tensor:
    """Return a gate's weight [] for a memory's log-probabilities; -inf everywhere: no doubt."""
    some = logp_W > -torch.inf
    top = logp_W.max().exp() if some.any() else 1.0
    entropy = -(logp_W[some].exp() * logp_W[some]).sum()
    top_K, entropy_K, bias_K, out_K = certainty_4K.double()
    x_K = top * top_K + entropy * entropy_K + bias_K
    x_K = x_K * (1 + torch.erf(x_K / math.sqrt(2))) / 2
    return 0.999 * torch.sigmoid(score.double() + (x_K * out_K).sum())


def row_weights_reference(columns_NA: Tensor, memory: int, gated: bool) -> tuple[Tensor, Tensor]:
    """Return the weights [N] in float64 that columns hold, and which rows are the memory's [N]."""
    alpha_N = torch.zeros(len(columns_NA), dtype=torch.float64)
    mine_N = torch.zeros(len(columns_NA), dtype=torch.bool)
    for n, (c0, c1, c2, number, *_) in enumerate(columns_NA.tolist()):
        mine_N[n] = number == memory
        if mine_N[n]:
            alpha_N[n] = min(max(c0 + c1 / 256 + c2 / 65536, -1.0 if gated else 0.0), 1.0)
    return alpha_N, mine_N


def interpolate_reference(
    base_NV: Tensor,
    memory_NW: Tensor,
    alpha_N: Tensor,
    as_logits: bool = False,
    gate: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return log((1-a) softmax(base) + a softmax(memory)) [N, V] in float64."""
    N, V = base_NV.shape
    out_NV = torch.empty(N, V, dtype=torch.float64, device=base_NV.device)
    for n in range(N):
        base_V = base_NV[n].double()
        memory_V = torch.full_like(base_V, -torch.inf)
        shared = min(V, memory_NW.shape[1])
        memory_V[:shared] = memory_NW[n, :shared].double()
        a = alpha_N[n].double()

        base_logp_V, base_lse = log_softmax_or_nothing(base_V)
        memory_logp_V, _ = log_softmax_or_nothing(memory_V)
        if gate is not None and a < 0:
            a = torch.minimum(gate_reference(memory_logp_V, gate[0][n], gate[1]), -a)
        # In log space, because probabilities below 1e-308 would be lost: logits may be +-1e4.
        out_NV[n] = torch.logaddexp(torch.log(1 - a) + base_logp_V, torch.log(a) + memory_logp_V)
        if as_logits:
            out_NV[n] += base_lse
    return out_NV


def several_reference(
    base_NV: Tensor,
    memories: list[Tensor],
    alpha_KN: Tensor,
    gates: list[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Return log((1 - sum a) softmax(base) + sum a_k softmax(memory_k)) [N, V] in float64.

    gates: each memory takes its part of what those before it left, in place of a: a softmax over
    the base, whose score is 0, and the memories, but for the largest weight of a gate.
    """
    out_NV = torch.empty(base_NV.shape, dtype=torch.float64)
    for n in range(len(base_NV)):
        base_V = base_NV[n].double().softmax(0)
        parts = [memory_NV[n].double().softmax(0) for memory_NV in memories]
        if gates is None:
            shares = alpha_KN[:, n].double()
            out_NV[n] = (1 - shares.sum()).clamp(min=0) * base_V
            for share, part_V in zip(shares, parts, strict=True):
                out_NV[n] += share * part_V
        else:
            out_NV[n], rest = base_V, 1.0
            for part_V, (score_N, certainty_4K) in zip(parts, gates, strict=True):
                alone = gate_reference(part_V.log(), score_N[n], certainty_4K)
                b = 0.999 * torch.sigmoid((alone / 0.999).logit() + math.log(rest))
                out_NV[n] = (1 - b) * out_NV[n] + b * part_V
                rest *= 1 - b.item()
    return out_NV.log()


def sparse_kl_reference(
    logits_NV: Tensor,
    labels_N: Tensor,
    target_NV: Tensor,
    beta: float,
    log_weight_V: Tensor | None = None,
    mixture: tuple[Tensor, float, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL [N], cross-entropy [N] and the gradient of L [N, V], for dense targets, float64.

    mixture: the base's log p(label) [N], the weight of the memory, the share of the cross-entropy.
    """
    N, V = logits_NV.shape
    kl_N, ce_N = (torch.empty(N, dtype=torch.float64) for _ in range(2))
    grad_NV = torch.empty(N, V, dtype=torch.float64)
    for n in range(N):
        logits_V = logits_NV[n].double().requires_grad_()
        target_V = target_NV[n].double()
        weighted_V = logits_V if log_weight_V is None else logits_V + log_weight_V.double()
        logp_V, _ = log_softmax_or_nothing(weighted_V)
        some = target_V > 0
        kl = (target_V[some] * (target_V[some].log() - logp_V[some])).sum()
        ce = -logp_V[labels_N[n]]
        label = ce
        if mixture is not None:
            base_N, alpha, share = mixture
            # In log space, because probabilities below 1e-308 would be lost.
            parts = base_N[n].double() + math.log(1 - alpha), math.log(alpha) - ce
            label = (1 - share) * ce - share * torch.logaddexp(*parts)
        grad_NV[n] = torch.autograd.grad(beta * kl + (1 - beta) * label, logits_V)[0]
        kl_N[n], ce_N[n] = kl.detach(), ce.detach()
    return kl_N, ce_N, grad_NV
