"""The loss against a dense float64 oracle, and the sampled head against the whole vocabulary."""

import math

import numpy as np
import pytest
import torch

from vllm_memdec.train.head import ALL, Candidates, head
from vllm_memdec.train.loss import CACHE_ROWS, SparseRows, sparse_loss

VOCABULARY = 503
# float32 sums of a few hundred terms; bf16 gradients have 8 bits, values are still float32.
TOLERANCES = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (1e-5, 2**-8)}


def sparse_rows(rows, per_row=5, empty=(), seed=0):
    """Return targets with a varying number of tokens a row, some rows without any."""
    rng = np.random.default_rng(seed)
    row, token, probability = [], [], []
    for r in range(rows):
        n = 0 if r in empty else int(rng.integers(1, per_row + 1))
        row += [r] * n
        token += rng.choice(VOCABULARY, n, replace=False).tolist()
        probability += rng.dirichlet(np.ones(n)).tolist() if n else []
    return SparseRows(torch.tensor(row), torch.tensor(token), torch.tensor(probability))


def dense_loss(logits_NV, labels_N, targets, beta):
    """Return (total, KL, cross-entropy) by dense targets and log_softmax, float64."""
    p_NV = torch.zeros(logits_NV.shape, dtype=torch.float64)
    p_NV[targets.row, targets.token] = targets.probability.double()
    log_q_NV = logits_NV.double().log_softmax(-1)
    kl = (torch.xlogy(p_NV, p_NV) - p_NV * log_q_NV).sum()
    ce = -log_q_NV[torch.arange(len(labels_N)), labels_N].sum()
    return beta * kl + (1 - beta) * ce, kl, ce


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rows", [1, 7, CACHE_ROWS, 2 * CACHE_ROWS + 3])
def test_loss_equals_the_dense_one(rows, beta, dtype):
    torch.manual_seed(rows)
    logits = (4 * torch.randn(rows, VOCABULARY)).to(dtype)
    before = logits.clone()
    labels = torch.randint(VOCABULARY, (rows,))
    targets = sparse_rows(rows, empty={3, CACHE_ROWS})
    leaf = logits.requires_grad_()
    (sparse_loss(leaf, labels, targets, beta)[0] / 3).backward()
    found = sparse_loss(leaf, labels, targets, beta)
    exact = logits.detach().double().requires_grad_()
    expected = dense_loss(exact, labels, targets, beta)
    (expected[0] / 3).backward()
    value, gradient = TOLERANCES[dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=value, abs=value)
    assert (leaf.grad.double() - exact.grad).abs().max() < gradient
    assert torch.equal(logits, before)  # the logits are an input, not scratch space


def test_shift_of_logits_changes_nothing_and_large_logits_are_safe():
    logits, labels, targets = torch.randn(4, VOCABULARY), torch.tensor([1, 2, 3, 4]), sparse_rows(4)
    a = sparse_loss(logits, labels, targets, 0.5)[0]
    b = sparse_loss(logits + 1000, labels, targets, 0.5)[0]
    assert b.isfinite() and a.item() == pytest.approx(b.item(), rel=1e-3)


def test_slices_are_the_rows_of_the_whole():
    targets = sparse_rows(20, empty={0, 7, 8, 19})
    dense = torch.zeros(20, VOCABULARY).index_put((targets.row, targets.token), targets.probability)
    for start, stop in [(0, 20), (0, 1), (5, 9), (7, 9), (19, 20), (10, 25)]:
        part = targets.slice(start, stop)
        found = torch.zeros(min(stop, 20) - start, VOCABULARY)
        found[part.row, part.token] = part.probability
        assert torch.equal(found, dense[start:stop])


class Head(torch.nn.Module):
    """What head() needs of a model: an output layer, with a bias, and a config."""

    config = type("Config", (), {"vocab_size": VOCABULARY})

    def __init__(self, width=8):
        super().__init__()
        self.layer = torch.nn.Linear(width, VOCABULARY)

    def get_output_embeddings(self):
        return self.layer


def test_all_others_sampled_is_the_full_softmax():
    model, h = Head(), torch.randn(40, 8)
    used = np.unique(np.random.default_rng(0).integers(0, VOCABULARY, 60))
    rest = np.random.default_rng(1).permutation(np.setdiff1d(np.arange(VOCABULARY), used))
    rank = torch.full((VOCABULARY,), -1)
    rank[used] = torch.arange(len(used))
    every = Candidates(
        torch.from_numpy(np.r_[used, rest]), torch.zeros(VOCABULARY), rank, len(used)
    )
    rng = np.random.default_rng(2)
    labels = torch.from_numpy(rng.choice(used, 40))
    targets = SparseRows(torch.arange(40), torch.from_numpy(rng.choice(used, 40)), torch.ones(40))
    ranked = SparseRows(targets.row, every.rank(targets.token), targets.probability)
    full_leaf, part_leaf = h.clone().requires_grad_(), h.clone().requires_grad_()
    full = sparse_loss(head(model, full_leaf), labels, targets, 0.5)
    weight = every.rows(model.layer.weight)
    part = sparse_loss(head(model, part_leaf, every, weight), every.rank(labels), ranked, 0.5)
    for a, b in zip(full, part, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-6)
    full[0].backward()
    part[0].backward()
    assert torch.allclose(full_leaf.grad, part_leaf.grad, atol=1e-6)


def test_sampled_normaliser_is_unbiased():
    """Over many draws the mean of the estimated sum of exponentials is the true sum."""
    model, h = Head(), 2 * torch.randn(6, 8)
    used = np.arange(0, VOCABULARY, 9)
    true = head(model, h).double().exp().sum(-1)
    draws = []
    for step in range(3000):
        some = Candidates.draw(used, VOCABULARY, 20, [1, step])
        with torch.no_grad():
            draws.append(head(model, h, some, some.rows(model.layer.weight)).double().exp().sum(-1))
    estimates = torch.stack(draws)
    error = estimates.std(0) / math.sqrt(len(draws))
    assert ((estimates.mean(0) - true).abs() < 4 * error).all()
    assert (error < 0.01 * true).all()  # sharp enough to see a wrong weight


def test_draw_keeps_what_is_used_and_samples_others_once():
    used = np.array([2, 3, 50, 400])
    some = Candidates.draw(used, VOCABULARY, 30, [0, 1])
    ids = some.ids_C.tolist()
    assert ids[:4] == used.tolist() and len(set(ids)) == len(ids) == 34
    assert some.ids_C[some.rank(torch.tensor([400, 2, 50]))].tolist() == [400, 2, 50]
    assert some.log_weight_C[:4].tolist() == [0] * 4
    assert np.allclose(some.log_weight_C[4:], math.log((VOCABULARY - 4) / 30))
    assert torch.equal(some.ids_C, Candidates.draw(used, VOCABULARY, 30, [0, 1]).ids_C)
    assert not torch.equal(some.ids_C, Candidates.draw(used, VOCABULARY, 30, [0, 2]).ids_C)


@pytest.mark.parametrize("sampled", [None, VOCABULARY - 4, VOCABULARY])
def test_draw_of_everything_is_the_whole_vocabulary(sampled):
    assert Candidates.draw(np.array([2, 3, 50, 400]), VOCABULARY, sampled, [0]) == ALL
