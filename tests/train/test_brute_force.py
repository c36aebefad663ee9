"""What `memdec verify` measures with, against slower and more obvious ways still."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_memdec.train.data.blocks import pack
from vllm_memdec.train.verify import brute_force as exact
from vllm_memdec.train.verify import fidelity

EXACT = 1e-9  # float64 on both sides


def shards_of(keys, *bounds):
    return [np.asarray(part) for part in np.split(keys, bounds)]


@pytest.fixture
def keys():
    """Return integer keys in fp16, many of them twice, so that distances are often equal."""
    rng = np.random.default_rng(0)
    keys = rng.integers(-3, 4, size=(700, 5)).astype(np.float16)
    keys[350:500] = keys[:150]
    return keys


def test_nearest_is_what_sorting_all_distances_gives(keys, monkeypatch):
    monkeypatch.setattr(exact, "CHUNK", 64)  # shards of several chunks
    own = np.array([0, 3, 360, 699])
    parts = shards_of(keys, 90, 90, 401)  # an empty one among them
    for left_out in (None, own):
        distances, ids = exact.nearest(parts, keys[own], 33, left_out)
        for row, (d, i) in enumerate(zip(distances, ids, strict=True)):
            every = ((keys.astype(float) - keys[own[row]].astype(float)) ** 2).sum(axis=1)
            assert np.allclose(every[i], d, atol=EXACT) and len(set(i)) == 33
            if left_out is not None:
                assert own[row] not in i
                every[own[row]] = np.inf
            assert np.allclose(d, np.sort(every)[:33], atol=EXACT)
    assert exact.nearest(parts, keys[own], 5000, own)[1].shape == (4, 700)


def test_recall_counts_equally_distant_ones_and_nothing_twice(keys):
    parts, queries = shards_of(keys, 300), keys[:3]
    true = exact.nearest(parts, queries, 10)
    every = ((keys[None].astype(float) - queries[:, None].astype(float)) ** 2).sum(axis=2)
    assert exact.recall(parts, queries, true[1], *true) == 1
    reverse = np.argsort(every[:, ::-1], axis=1, kind="stable")[:, :10]  # of ties, the last
    other = len(keys) - 1 - reverse
    assert any(set(a) != set(b) for a, b in zip(other, true[1], strict=True))
    assert exact.recall(parts, queries, other, *true) == 1
    wrong = true[1].copy()
    wrong[:, 5:] = np.argsort(every, axis=1)[:, -5:]  # the furthest
    assert exact.recall(parts, queries, wrong, *true) == 0.5
    for filler in (wrong[:, :1], -1, 10_000):  # one again and again, none, no such row
        wrong[:, 5:] = filler
        assert exact.recall(parts, queries, wrong, *true) == 0.5


def test_target_is_the_softmax_summed_by_token():
    distances, tokens = np.array([4.0, 5, 6, 30]), np.array([7, 2, 7, 1])
    w = np.exp(-distances / 2)
    expected = {7: w[0] + w[2], 2: w[1]}
    total = sum(expected.values())
    probabilities = exact.target(distances, tokens, 2.0, 1e-3)
    assert probabilities == pytest.approx({t: p / total for t, p in expected.items()})
    assert exact.target(np.empty(0), np.empty(0, int), 2.0, 0) == {}


def test_compare_is_what_dense_vectors_give():
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = rng.dirichlet(np.full(60, 0.1))
        ids = np.sort(rng.choice(60, 9, replace=False))
        target = rng.dirichlet(np.ones(9))
        dense = np.zeros(60)
        dense[ids] = target
        agreement, kl, tv, pearson = fidelity.compare(ids, target, p)
        assert agreement == (dense.argmax() == p.argmax())
        assert kl == pytest.approx((target * np.log(target / p[ids])).sum())
        assert tv == pytest.approx(np.abs(dense - p).sum() / 2)
        assert pearson == pytest.approx(np.corrcoef(dense, p)[0, 1])


def test_passages_begin_documents():
    documents = [np.arange(100 * n, 100 * n + length) for n, length in enumerate((3, 9, 20, 8, 31))]
    tokens, positions = pack(documents, 16, 0)
    begun = {tuple(row) for row in fidelity.passages(tokens, positions, 8, 99).tolist()}
    # Each unbroken run of a document within a block of 17 tokens, if it has 8.
    runs = set()
    for row, position in zip(tokens.tolist(), positions.tolist(), strict=True):
        for start in range(10):
            if position[start : start + 8] == list(range(8)):
                runs.add(tuple(row[start : start + 8]))
    assert begun == runs and len(runs) >= 4
    assert len(fidelity.passages(tokens, positions, 8, 2)) == 2
    assert fidelity.passages(tokens, positions, 18, 9).shape == (0, 18)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_recited_is_what_generating_gives(tiny_model, kind):
    """A passage counts iff greedy decoding of its beginning, token by token, repeats the rest."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind)).eval()
    start = torch.randint(2, 1000, (40, fidelity.CONTEXT))
    said = start
    for _ in range(16):
        with torch.inference_mode():
            said = torch.cat([said, model(said).logits[:, -1:].argmax(-1)], dim=1)
    passages = said.numpy()
    assert fidelity.recited(model, passages) == 1
    broken = passages.copy()
    for row, place in enumerate(range(-16, 0)):
        broken[row, place] = (broken[row, place] + 1) % 1000
    assert fidelity.recited(model, broken) == (40 - 16) / 40
