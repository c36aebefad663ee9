"""The loss of Memory Decoder on sparse targets (arXiv 2508.09874, section 3.2).

    L = beta * KL(p_kNN || p) + (1 - beta) * (-log p(label)),    p = softmax(logits)

Per row, with sparse p_kNN: KL = sum_y p_kNN(y) (log p_kNN(y) - logit_y) + lse(logits), so only the
logsumexp and the logits at the targets' ids are needed, and the gradient is softmax(logits) less
the target. No tokens x vocabulary target ever exists.
"""

from dataclasses import dataclass

import torch

CACHE_ROWS = 64  # rows whose float32 logits stay in a CPU's cache


@dataclass(frozen=True)
class SparseRows:
    """Compressed sparse rows: row [n] int64, token [n] int64, probability [n] float32."""

    row: torch.Tensor
    token: torch.Tensor
    probability: torch.Tensor

    def slice(self, start: int, stop: int) -> "SparseRows":
        """Return rows start..stop, renumbered from 0; row ids must ascend."""
        bounds = torch.tensor([start, stop], device=self.row.device)
        low, high = torch.searchsorted(self.row, bounds).tolist()
        return SparseRows(
            self.row[low:high] - start, self.token[low:high], self.probability[low:high]
        )


class _SparseLoss(torch.autograd.Function):
    """Values and gradient in one visit: the softmax is turned into the gradient in place."""

    @staticmethod
    def forward(ctx, logits_NV, labels_N, row, token, probability, beta):
        # Without neighbours a row has no target: its mass is 0 and only the label teaches it.
        mass_N = torch.zeros(len(labels_N), device=row.device).index_add_(0, row, probability)
        weight_N = beta * mass_N + 1 - beta
        grad_NV = torch.empty_like(logits_NV)
        lse_N = torch.empty_like(mass_N)
        for start in range(0, len(labels_N), CACHE_ROWS):
            part = slice(start, start + CACHE_ROWS)
            z_PV = logits_NV[part].to(torch.float32, copy=True)  # overwritten below
            top_P1 = z_PV.amax(dim=-1, keepdim=True)
            e_PV = z_PV.sub_(top_P1).exp_()
            sum_P1 = e_PV.sum(dim=-1, keepdim=True)
            lse_N[part] = (top_P1 + sum_P1.log())[:, 0]
            grad_NV[part] = e_PV.mul_(weight_N[part, None] / sum_P1)
        rows = torch.arange(len(labels_N), device=labels_N.device)
        kl = (probability * (probability.log() - logits_NV[row, token] + lse_N[row])).sum()
        ce = (lse_N - logits_NV[rows, labels_N]).sum()
        grad_NV.index_put_((row, token), (-beta * probability).to(grad_NV.dtype), accumulate=True)
        grad_NV[rows, labels_N] -= 1 - beta
        ctx.save_for_backward(grad_NV)
        ctx.mark_non_differentiable(kl, ce)
        return beta * kl + (1 - beta) * ce, kl, ce

    @staticmethod
    def backward(ctx, grad_total, _kl, _ce):
        (grad_NV,) = ctx.saved_tensors
        return grad_NV * grad_total.to(grad_NV.dtype), None, None, None, None, None


def sparse_loss(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, targets: SparseRows, beta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (total, KL, cross-entropy), each summed over the N rows; only total has a gradient."""
    return _SparseLoss.apply(
        logits_NV, labels_N, targets.row, targets.token, targets.probability, beta
    )
