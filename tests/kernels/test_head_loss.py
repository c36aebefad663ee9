"""Gradients through an output head, in chunks, against autograd of the whole in float64.

Run: pytest tests/kernels/test_head_loss.py
Shape suffixes: N rows, V vocabulary, D hidden.
"""

import pytest
import torch

from vllm_memdec.kernels import head_loss, sparse_kl
from vllm_memdec.kernels.head_loss import Columns
from vllm_memdec.kernels.sparse_kl import Mixture, SparseRows

V, D, BETA, SCALE = 503, 8, 0.3, 1 / 7
# Relative to the largest entry. float32: sums of a few hundred terms. bf16: hidden states, weight,
# logits of magnitude 10 and gradients are rounded to 8 bits each; as bad as autocast, see below.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
TRANSFORMS = {
    "none": None,
    "scaled": lambda x: x * 0.25,
    "capped": lambda x: torch.tanh(x / 3) * 3,
}


@pytest.fixture(autouse=True)
def in_torch(monkeypatch):
    monkeypatch.setattr(sparse_kl, "INTERPRETED", False)
    monkeypatch.setattr(head_loss, "LOGITS", 10 * V)  # chunks of 10 rows


def make(N, columns=V):
    """Return hidden states, weight, bias, labels and targets, some rows without any."""
    h_ND, weight_VD, bias_V = torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    labels_N = torch.randint(columns, (N,))
    lengths = torch.arange(N) % 4
    token = torch.cat([torch.randperm(columns)[:n] for n in lengths] or [lengths])
    probability = torch.cat([torch.rand(n).softmax(0) for n in lengths] or [torch.zeros(0)])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    leaves = [x.requires_grad_() for x in (h_ND, weight_VD, bias_V)]
    return *leaves, labels_N, SparseRows(offsets, token, probability)


def backpropagate(*arguments, **options):
    """Add the loss's gradients to .grad; return the sums of KL and cross-entropy."""
    loss, (kl, ce) = head_loss.head_loss(*arguments, **options)
    want = options.get("scale", 1) * (BETA * kl + (1 - BETA) * ce)
    assert loss.dtype == torch.float32 and torch.allclose(loss.double(), want, rtol=1e-6)
    loss.backward()
    return kl, ce


def plain(h_ND, weight_VD, bias_V, labels_N, targets, transform, columns=None):
    """Return the sums of KL and cross-entropy, and the gradients, by autograd in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (h_ND, weight_VD, bias_V)]
    logits_NV = leaves[0] @ leaves[1].t() + leaves[2]
    if transform is not None:
        logits_NV = transform(logits_NV)
    if columns is not None:
        logits_NV = logits_NV[:, columns.ids] + columns.log_weight
    row, token, p = targets.entries()
    logq_NV = logits_NV.log_softmax(-1)
    kl = (p.double() * (p.double().log() - logq_NV[row, token])).sum()
    ce = -logq_NV[torch.arange(len(labels_N)), labels_N].sum()
    (SCALE * (BETA * kl + (1 - BETA) * ce)).backward()
    return (kl, ce), [x.grad for x in leaves]


def assert_close(got, want, tolerance):
    assert got.dtype in (torch.float32, torch.float64) and got.shape == want.shape
    if got.numel():
        assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("N", [0, 1, 10, 43])
def test_gradients_are_those_of_the_whole(N, transform, dtype, accumulate):
    h_ND, weight_VD, bias_V, labels_N, targets = make(N)
    want, gradients = plain(h_ND, weight_VD, bias_V, labels_N, targets, TRANSFORMS[transform])
    for times in (1, 2):  # a second micro-batch adds to the first
        losses = backpropagate(
            h_ND, weight_VD, labels_N, targets, BETA,
            bias_V=bias_V, transform=TRANSFORMS[transform], dtype=dtype, scale=SCALE,
            accumulate=accumulate,
        )  # fmt: skip
        for a, b in zip(losses, want, strict=True):
            assert_close(a, b.detach(), TOLERANCE[dtype])
        for leaf, b in zip((h_ND, weight_VD, bias_V), gradients, strict=True):
            assert_close(leaf.grad, times * b, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("chunk", [1, 7, 43])
def test_chunks_of_any_size_give_the_same(monkeypatch, chunk, transform, dtype):
    """So do CUDA's, which are larger than what a transform is gone through at once."""
    monkeypatch.setattr(head_loss, "logits_at_once", lambda device: chunk * V)
    seen = []

    def count(logits_NV, *arguments, **options):
        seen.append(len(logits_NV))
        return sparse_kl.sparse_kl(logits_NV, *arguments, **options)

    monkeypatch.setattr(head_loss, "sparse_kl", count)
    h_ND, weight_VD, bias_V, labels_N, targets = make(43)
    want, gradients = plain(h_ND, weight_VD, bias_V, labels_N, targets, TRANSFORMS[transform])
    losses = backpropagate(
        h_ND, weight_VD, labels_N, targets, BETA,
        bias_V=bias_V, transform=TRANSFORMS[transform], dtype=dtype, scale=SCALE,
    )  # fmt: skip
    assert sum(seen) == 43 and max(seen) == min(chunk, 43 if transform == "none" else 10)
    for a, b in zip(losses, want, strict=True):
        assert_close(a, b.detach(), TOLERANCE[dtype])
    for leaf, b in zip((h_ND, weight_VD, bias_V), gradients, strict=True):
        assert_close(leaf.grad, b, TOLERANCE[dtype])


def test_a_chunk_is_chosen_by_the_device():
    assert head_loss.logits_at_once(torch.device("cpu")) == 10 * V
    assert head_loss.logits_at_once(torch.device("cuda", 3)) == 1 << 29


def test_bfloat16_is_no_worse_than_autocast():
    """Against float64, summed over chunks: the products are rounded, their sums are not."""
    h_ND, weight_VD, bias_V, labels_N, targets = make(400)
    _, exact = plain(h_ND, weight_VD, bias_V, labels_N, targets, None)
    backpropagate(
        h_ND, weight_VD, labels_N, targets, BETA, bias_V=bias_V, dtype=torch.bfloat16, scale=SCALE
    )
    ours = [x.grad for x in (h_ND, weight_VD, bias_V)]
    leaves = [x.detach().requires_grad_() for x in (h_ND, weight_VD, bias_V)]
    row, token, p = targets.entries()
    with torch.autocast("cpu", torch.bfloat16):
        logits_NV = torch.nn.functional.linear(*leaves).float()
    logq_NV = logits_NV.log_softmax(-1)
    kl = (p * (p.log() - logq_NV[row, token])).sum()
    ce = -logq_NV[torch.arange(400), labels_N].sum()
    (SCALE * (BETA * kl + (1 - BETA) * ce)).backward()
    for a, leaf, b in zip(ours, leaves, exact, strict=True):
        assert (a - b).norm() <= 1.1 * (leaf.grad - b).norm()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_columns(dtype, accumulate):
    """Columns in any order; the rows of those that do not learn get no gradient."""
    h_ND, weight_VD, bias_V, labels_N, targets = make(43, columns=60)
    columns = Columns(torch.randperm(V)[:100], torch.rand(100), trained=60)
    want, gradients = plain(h_ND, weight_VD, bias_V, labels_N, targets, None, columns)
    losses = backpropagate(
        h_ND, weight_VD, labels_N, targets, BETA,
        bias_V=bias_V, columns=columns, dtype=dtype, scale=SCALE, accumulate=accumulate,
    )  # fmt: skip
    for a, b in zip(losses, want, strict=True):
        assert_close(a, b.detach(), TOLERANCE[dtype])
    learns = torch.isin(torch.arange(V), columns.ids[:60])
    assert_close(h_ND.grad, gradients[0], TOLERANCE[dtype])
    for leaf, b in zip((weight_VD, bias_V), gradients[1:], strict=True):
        assert_close(leaf.grad[learns], b[learns], TOLERANCE[dtype])
        assert (leaf.grad[~learns] == 0).all() and (b[columns.ids[60:]] != 0).any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_likelihood_of_the_mixture(transform, dtype):
    """Rows that the base predicts well and badly, half of the cross-entropy, over chunks."""
    h_ND, weight_VD, bias_V, labels_N, targets = make(43)
    base_N, alpha, share = torch.linspace(-8, 0, 43), 0.4, 0.5
    loss, sums = head_loss.head_loss(
        h_ND, weight_VD, labels_N, targets, BETA, bias_V=bias_V, transform=TRANSFORMS[transform],
        mixture=Mixture(base_N, alpha, share), dtype=dtype, scale=SCALE,
    )  # fmt: skip
    loss.backward()
    leaves = [x.detach().double().requires_grad_() for x in (h_ND, weight_VD, bias_V)]
    logits_NV = leaves[0] @ leaves[1].t() + leaves[2]
    if transform != "none":
        logits_NV = TRANSFORMS[transform](logits_NV)
    logq_NV = logits_NV.log_softmax(-1)
    row, token, p = targets.entries()
    kl = (p.double() * (p.double().log() - logq_NV[row, token])).sum()
    logq_N = logq_NV[torch.arange(43), labels_N]
    mixed = -((1 - alpha) * base_N.double().exp() + alpha * logq_N.exp()).log().sum()
    want = SCALE * (BETA * kl + (1 - BETA) * (-(1 - share) * logq_N.sum() + share * mixed))
    want.backward()
    for got, exact in zip((loss.double(), *sums), (want, kl, -logq_N.sum(), mixed), strict=True):
        assert_close(got.detach(), exact.detach(), TOLERANCE[dtype])
    for leaf, exact in zip((h_ND, weight_VD, bias_V), leaves, strict=True):
        assert_close(leaf.grad, exact.grad, TOLERANCE[dtype])


@pytest.mark.parametrize("accumulate", [False, True])
def test_history_of_the_hidden_states_is_gone_through(accumulate):
    """A weight that is the embedding too gets the gradients of both uses."""
    h_ND, weight_VD, bias_V, labels_N, targets = make(20)
    tokens_N = torch.randint(V, (20,))
    how = {"scale": SCALE, "accumulate": accumulate}
    backpropagate(weight_VD[tokens_N].tanh(), weight_VD, labels_N, targets, BETA, **how)
    leaf = weight_VD.detach().double().requires_grad_()
    row, token, p = targets.entries()
    logq_NV = (leaf[tokens_N].tanh() @ leaf.t()).log_softmax(-1)
    kl = (p * (p.log() - logq_NV[row, token])).sum()
    ce = -logq_NV[torch.arange(20), labels_N].sum()
    (SCALE * (BETA * kl + (1 - BETA) * ce)).backward()
    assert_close(weight_VD.grad, leaf.grad, TOLERANCE[torch.float32])


def test_it_is_an_ordinary_function_of_autograd():
    """A head that is computed, a loss that is scaled and added to: what wrappers do to a loss."""
    h_ND, weight_VD, _, labels_N, targets = make(43)
    loss, _ = head_loss.head_loss(h_ND, weight_VD.exp() / 3, labels_N, targets, BETA)
    (2.5 * loss + weight_VD.square().sum()).backward()
    leaves = [x.detach().double().requires_grad_() for x in (h_ND, weight_VD)]
    row, token, p = targets.entries()
    logq_NV = (leaves[0] @ (leaves[1].exp() / 3).t()).log_softmax(-1)
    kl = (p * (p.log() - logq_NV[row, token])).sum()
    ce = -logq_NV[torch.arange(43), labels_N].sum()
    (2.5 * (BETA * kl + (1 - BETA) * ce) + leaves[1].square().sum()).backward()
    for leaf, want in zip((h_ND, weight_VD), leaves, strict=True):
        assert_close(leaf.grad, want.grad, TOLERANCE[torch.float32])


def test_checkpointed_hidden_states_give_the_same():
    """Non-reentrant checkpointing runs the trunk again in the backward pass, not the loss."""
    grads = []
    h_ND, weight_VD, _, labels_N, targets = make(43)
    for again in (False, True):
        h_ND.grad = weight_VD.grad = None
        trunk = lambda h: (h @ weight_VD[:D]).tanh()  # noqa: E731, a head that is used twice
        hidden = (
            torch.utils.checkpoint.checkpoint(trunk, h_ND, use_reentrant=False)
            if again
            else trunk(h_ND)
        )
        head_loss.head_loss(hidden, weight_VD, labels_N, targets, BETA)[0].backward()
        grads.append((h_ND.grad, weight_VD.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_gradients_are_handed_out_once_and_not_copied():
    """The weight's is a vocabulary of float32: autograd keeps the one that was summed."""
    h_ND, weight_VD, _, labels_N, targets = make(43)
    loss, _ = head_loss.head_loss(h_ND, weight_VD, labels_N, targets, BETA)
    summed = loss.grad_fn.gradients[1].data_ptr()
    loss.backward(retain_graph=True)
    assert weight_VD.grad.data_ptr() == summed
    with pytest.raises(RuntimeError, match="handed out already"):
        loss.backward()
