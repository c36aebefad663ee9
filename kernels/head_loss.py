"""The loss of Memory Decoder through an output head, a chunk of rows at a time, for autograd.

    logits = transform(h W^T + bias),    L of sparse_kl.py

Neither logits nor their gradient ever exist for the whole batch: a chunk's gradient is written over
its logits and multiplied out at once. What autograd would do for the head (a leaf per chunk, the
weight's gradient made anew, widened and added each time) is one product added in place. Autograd
gets the finished gradients, so that tied embeddings, DDP, FSDP and checkpointing work as elsewhere.

Test: `pytest tests/kernels/test_head_loss.py`; measure: `python -m benchmarks.speed.loss`.
Shape suffixes: N rows, P rows of a chunk, V vocabulary, D hidden, C columns, S columns that learn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_memdec.kernels.sparse_kl import Mixture, SparseRows, sparse_kl

LOGITS = 1 << 25  # logits that exist at once on a CPU: 512 rows of a 64k vocabulary
# The same on CUDA. By an H100's published 3.35 TB/s and 989 TFLOP/s, V = 151,936, D = 2,048, bf16
# products and a float32 gradient (not measured):
#   a chunk, whatever its rows: two products read the head, 1.24 GB; scratch is written and read,
#       1.24 GB; the sink is read and written, 2.49 GB: 5.0 GB, 1.5 ms
#   a row: three products, 6 V D = 1.87 GFLOP, 2.5 us at 75 % of the FLOP/s
# 2^25 logits are 220 rows, so a chunk adds 6.7 us to each row; 2^28 are 1,766 and add 0.84 us; 2^29
# are 3,533 and add 0.42 us, a sixth of the products, for 1 GB of logits (float32: 2 GB).
LOGITS_CUDA = 1 << 29


def logits_at_once(device: torch.device) -> int:
    """Return how many logits a chunk of rows may have on a device."""
    return LOGITS_CUDA if device.type == "cuda" else LOGITS


@dataclass(frozen=True)
class Columns:
    """Some columns of the vocabulary: ids [C], all different, and what their logits gain [C].

    The head's rows of the first `trained` ids learn, those of the others are constants.
    """

    ids: Tensor
    log_weight: Tensor
    trained: int


def head_loss(
    h_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    targets: SparseRows,
    beta: float,
    *,
    bias_V: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    columns: Columns | None = None,
    mixture: Mixture | None = None,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return scale * L, summed over rows, and the sums [2] of KL and cross-entropy, float64.

    With a mixture, a third sum is of its negative log-likelihoods. The first has a gradient with
    respect to hidden states, weight and bias; for the second none is made. With `columns`, labels
    and targets count among them, not in the vocabulary. `dtype`: of the matrix products, by default
    that of `h_ND`; sums over chunks are kept in each parameter's. `accumulate`: add the gradients
    of weight and bias, leaves, to .grad at once, past autograd. It saves a pass or two over [V, D]
    a micro-batch, and is right if all that follows is loss.backward(), and no hook waits for these
    gradients as those of DDP and FSDP do.
    """
    rows = labels_N, targets, beta, mixture
    how = (rows, transform, columns, dtype or h_ND.dtype, scale, accumulate)
    return _HeadLoss.apply(h_ND, weight_VD, bias_V, how)


class _HeadLoss(torch.autograd.Function):
    """The loss, whose gradients are made while its logits exist: backward() hands them out."""

    @staticmethod
    def forward(ctx, h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, how: tuple):
        *ctx.gradients, sums = _gradients(h_ND, weight_VD, bias_V, how)
        ctx.mark_non_differentiable(sums)
        (_, _, beta, mixture), *_, scale, _ = how
        kl, label, *mixed = sums
        if mixture is not None:
            label = (1 - mixture.share) * label + mixture.share * mixed[0]
        return (scale * (beta * kl + (1 - beta) * label)).float(), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor, _grad_sums: None):
        # Given away, so that autograd may keep the weight's as .grad, or add to it, without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of a head loss were handed out already.")
        # On CUDA the question would wait for the GPU, and a pass over the gradients is cheap there.
        if grad_loss.is_cuda or grad_loss != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_loss)
        return *gradients, None


def _gradients(
    h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, how: tuple
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Return the gradients of hidden states, weight and bias, and the sums of head_loss().

    None stands for what has none, or where it was added to .grad.
    """
    (labels_N, targets, beta, mixture), transform, columns, dtype, scale, accumulate = how
    parameters = [weight_VD] if bias_V is None else [weight_VD, bias_V]
    sums = torch.zeros(2 if mixture is None else 3, dtype=torch.float64, device=h_ND.device)
    grad_ND = torch.empty_like(h_ND)
    chosen = [x if columns is None else x[columns.ids] for x in parameters]
    trained = len(chosen[0]) if columns is None else columns.trained
    whole = [_grad(x) for x in parameters] if accumulate else []
    if accumulate and columns is None:
        sinks = whole
    else:
        sinks = [torch.zeros_like(x[:trained]) for x in chosen]
    weight_CD = chosen[0].to(dtype)
    bias_C = None if bias_V is None else chosen[1].to(dtype)
    scratch = torch.empty_like(weight_CD[:trained])
    log_weight_C = None if columns is None else columns.log_weight
    # Chunks of equal size: a small last one would cost as much as a whole one.
    chunks = max(1, -(-len(h_ND) * len(weight_CD) // logits_at_once(h_ND.device)))
    P = max(1, -(-len(h_ND) // chunks))
    buffer_PC = weight_CD.new_empty(min(P, len(h_ND)), len(weight_CD))
    for start in range(0, len(h_ND), P):
        part = slice(start, start + P)
        h_PD = h_ND[part].to(dtype)
        logits_PC = buffer_PC[: len(h_PD)]
        if bias_C is None:
            torch.mm(h_PD, weight_CD.t(), out=logits_PC)
        else:
            torch.addmm(bias_C, h_PD, weight_CD.t(), out=logits_PC)
        stop = start + len(h_PD)
        mixture_P = None if mixture is None else mixture.slice(start, stop)
        rows = (labels_N[part], targets.slice(start, stop), beta, mixture_P)
        losses = list(_gradient(logits_PC, transform, rows, log_weight_C))
        if mixture_P is not None:
            losses.append(mixture_P.loss(losses[1]))
        sums += torch.stack([loss_P.sum(dtype=torch.float64) for loss_P in losses])
        torch.mul((logits_PC @ weight_CD).to(h_ND.dtype), scale, out=grad_ND[part])
        learning_PS = logits_PC[:, :trained]
        _add_product(sinks[0], learning_PS, h_PD, scale, scratch)
        for sink in sinks[1:]:
            sink.add_(learning_PS.sum(0, dtype=sink.dtype), alpha=scale)
    if columns is not None:
        for n, (parameter, sink) in enumerate(zip(parameters, sinks, strict=True)):
            grad = whole[n] if accumulate else torch.zeros_like(parameter)
            sinks[n] = grad.index_add_(0, columns.ids[:trained], sink)
    return grad_ND, *([None, None] if accumulate else [*sinks, None][:2]), sums


def _grad(parameter: Tensor) -> Tensor:
    """Return the gradient of a parameter, zeros if it has none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _gradient(
    logits_PC: Tensor,
    transform: Callable[[Tensor], Tensor] | None,
    rows: tuple[Tensor, SparseRows, float, Mixture | None],
    log_weight_C: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Write the gradient with respect to h W^T + bias over it; return KL and CE [P]."""
    labels_P, targets, beta, mixture = rows
    if transform is None:
        return sparse_kl(
            logits_PC,
            labels_P,
            targets,
            beta,
            log_weight_V=log_weight_C,
            mixture=mixture,
            out=logits_PC,
        )
    # Autograd keeps some eight float32 copies of its logits, so it gets a CPU's chunk at a time.
    P, max_rows = len(logits_PC), -(-LOGITS // logits_PC.shape[1])
    if max_rows < P:
        parts = []
        for n in range(0, P, max_rows):
            stop = min(n + max_rows, P)
            mixture_P = None if mixture is None else mixture.slice(n, stop)
            chunk = labels_P[n:stop], targets.slice(n, stop), beta, mixture_P
            parts.append(_gradient(logits_PC[n:stop], transform, chunk, log_weight_C))
        kl_P, ce_P = (torch.cat(x) for x in zip(*parts, strict=True))
        return kl_P, ce_P
    with torch.enable_grad():
        leaf_PC = logits_PC.to(torch.float32, copy=True).requires_grad_()
        scaled_PC = transform(leaf_PC)
    grad_PC = torch.empty_like(leaf_PC)
    losses = sparse_kl(
        scaled_PC.detach(),
        labels_P,
        targets,
        beta,
        log_weight_V=log_weight_C,
        mixture=mixture,
        out=grad_PC,
    )
    logits_PC.copy_(torch.autograd.grad(scaled_PC, leaf_PC, grad_PC)[0])
    return losses


def _add_product(
    sink_SD: Tensor, grad_PS: Tensor, h_PD: Tensor, scale: float, scratch_SD: Tensor
) -> None:
    """Add scale * grad^T h to a sum of wider type than the product may have."""
    if sink_SD.dtype == grad_PS.dtype:
        sink_SD.addmm_(grad_PS.t(), h_PD, alpha=scale)
    else:
        sink_SD.add_(torch.mm(grad_PS.t(), h_PD, out=scratch_SD), alpha=scale)
