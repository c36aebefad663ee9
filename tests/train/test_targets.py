"""The targets stage against brute force: numpy distances and a Python dictionary per row."""

from collections import defaultdict

import numpy as np
import pytest
from support.datastores import BUDGET, clustered, run, store

from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.settings import IndexSettings, TargetSettings
from vllm_memdec.train.stages import targets as targets_stage
from vllm_memdec.train.stages.index import PQ_KEYS, build_index
from vllm_memdec.train.stages.search import Index
from vllm_memdec.train.stages.targets import (
    aggregate,
    build_targets,
    fit_temperature,
    neighbour_weights,
    neighbours_without_self,
)

FP16 = 1e-3  # relative: probabilities are stored in fp16


def oracle(keys, labels, k, temperature, min_probability=0.0):
    """Return rows {token: p}: every distance, own row out, k nearest, summed by label."""
    x = keys.astype(np.float64)
    rows = []
    for i in range(len(x)):
        distance = ((x - x[i]) ** 2).sum(axis=1)
        distance[i] = np.inf
        nearest = np.argsort(distance, kind="stable")[:k]
        mass = defaultdict(float)
        for j in nearest:
            if j != i:
                mass[int(labels[j])] += np.exp(-(distance[j] - distance[nearest[0]]) / temperature)
        total = sum(mass.values())
        kept = {t: m / total for t, m in mass.items() if m / total >= min_probability}
        rows.append({t: p / sum(kept.values()) for t, p in kept.items()})
    return rows


def assert_same(made, expected):
    for row, (a, b) in enumerate(zip(made, expected, strict=True)):
        big = {t for t, p in b.items() if p > 1e-6}  # below, fp16 has few digits
        assert big <= set(a) and all(abs(a[t] - b.get(t, 0)) < FP16 for t in a), row
        assert not b or abs(sum(a.values()) - 1) < 2 * FP16, row


def test_exact_search_equals_brute_force(tmp_path):
    keys, labels = clustered(900)
    made, temperature = run(
        tmp_path, keys, labels, neighbours=20, temperature=2.0, min_probability=0
    )
    assert temperature == 2.0
    assert_same(made, oracle(keys, labels, 20, 2.0))


def test_threshold_drops_the_small_and_renormalises(tmp_path):
    keys, labels = clustered(500)
    made, _ = run(tmp_path, keys, labels, neighbours=30, temperature=1.0, min_probability=0.05)
    # A probability on the threshold may fall on either side: compare rows that have none.
    without = oracle(keys, labels, 30, 1.0)
    clear = [i for i, row in enumerate(without) if all(abs(p - 0.05) > 1e-4 for p in row.values())]
    expected = oracle(keys, labels, 30, 1.0, 0.05)
    assert len(clear) > 400
    assert_same([made[i] for i in clear], [expected[i] for i in clear])
    assert all(set(made[i]) == set(expected[i]) for i in clear)


def test_more_neighbours_than_keys(tmp_path):
    keys, labels = clustered(30)
    made, _ = run(tmp_path, keys, labels, neighbours=1000, temperature=3.0, min_probability=0)
    assert_same(made, oracle(keys, labels, 29, 3.0))


@pytest.mark.parametrize("kind", ["flat", "sq8"])
def test_own_label_never_leaks_through_duplicate_keys(tmp_path, kind):
    """Each key exists four times; only a row's own entry has its label, so it may not be there."""
    keys = np.repeat(clustered(100)[0], 4, axis=0)
    labels = np.arange(len(keys), dtype=np.int32)
    made, _ = run(tmp_path, keys, labels, IndexSettings(kind=kind), neighbours=3, temperature=1.0)
    for row, target in enumerate(made):
        assert row not in target
    if kind == "flat":  # the three others at distance 0 share the mass
        for row, target in enumerate(made):
            twins = set(range(row - row % 4, row - row % 4 + 4)) - {row}
            assert set(target) == twins
            assert np.allclose(list(target.values()), 1 / 3, atol=FP16)


def test_own_label_never_leaks_where_codes_are_coarse(tmp_path):
    """Product codes put other rows nearer than the query itself: its rank says nothing."""
    keys = np.random.default_rng(0).normal(size=(PQ_KEYS, 67)).astype(np.float16)  # one byte a key
    labels = np.arange(len(keys), dtype=np.int32)
    made, _ = run(tmp_path, keys, labels, IndexSettings(kind="pq"), neighbours=8, temperature=9.0)
    assert not any(row in target for row, target in enumerate(made))
    ids = Index(tmp_path / "index", 10_000, BUDGET).search(keys[:500], 9)[1]
    assert ((ids[:, 0] != np.arange(500)) & (ids == np.arange(500)[:, None]).any(1)).mean() > 0.02


def test_self_is_dropped_by_id_else_the_furthest_goes():
    ids = np.array([[7, 0, 3], [5, 1, 4], [8, 9, 6]])
    distances = np.array([[0.0, 0.1, 0.2]] * 3)
    d, kept = neighbours_without_self(distances, ids, own=np.array([0, 1, 2]))
    assert kept.tolist() == [[7, 3], [5, 4], [8, 9]]
    assert d.tolist() == [[0.0, 0.2], [0.0, 0.2], [0.0, 0.1]]


def test_missing_neighbours_have_no_mass(tmp_path):
    ids = np.array([[3, -1], [-1, -1]])
    weights = neighbour_weights(np.array([[1.0, 3.4e38], [3.4e38, 3.4e38]]), ids, 1.0)
    assert weights.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    offsets, tokens, probs = aggregate(weights, np.array([[9, 9], [9, 9]]), 0.0)
    assert offsets.tolist() == [0, 1, 1] and tokens.tolist() == [9] and probs.tolist() == [1.0]
    # One list visited of many returns fewer neighbours than asked for.
    keys, labels = clustered(400)
    sq8 = IndexSettings(kind="sq8")
    made, _ = run(tmp_path, keys, labels, sq8, probes=1, neighbours=300, temperature=1.0)
    ids = Index(tmp_path / "index", 1, BUDGET).search(keys, 301)[1]
    assert (ids == -1).any()
    for row, target in enumerate(made):
        others = set(labels[[i for i in ids[row] if i not in (-1, row)]].tolist())
        assert set(target) <= others
        assert not others or abs(sum(target.values()) - 1) < 2 * FP16


def test_no_stored_probability_is_zero(tmp_path):
    """fp16 has no 1e-9: its log would make the loss infinite times zero."""
    keys, labels = clustered(300, spread=1.0)
    made, _ = run(tmp_path, keys, labels, neighbours=50, temperature=0.05, min_probability=0)
    assert min(p for row in made for p in row.values()) > 0
    assert min(min(row.values()) for row in oracle(keys, labels, 50, 0.05)) < 1e-9


def test_fitted_temperature_is_the_generating_one():
    """Labels drawn from softmax(-d / 5) over the neighbours: the fit must come close to 5."""
    rng = np.random.default_rng(0)
    distances = np.sort(rng.uniform(0, 60, size=(4000, 64)), axis=1)
    ids = np.broadcast_to(np.arange(64), distances.shape)
    p = neighbour_weights(distances, ids, 5.0).astype(np.float64)
    chosen = [rng.choice(64, p=row / row.sum()) for row in p]
    temperature, warning = fit_temperature(distances, ids, ids == np.array(chosen)[:, None])
    assert 4 < temperature < 6.3 and warning is None


@pytest.mark.parametrize("copies", [0.0, 1e-4])  # what float32 leaves of 0
def test_temperature_of_a_text_with_many_copies(copies):
    """Exact copies say nothing of the scale of distances between rows that differ."""
    rng = np.random.default_rng(0)
    distances = np.sort(rng.uniform(200, 2000, (400, 40)), axis=1)
    ids = rng.integers(0, 50, distances.shape)
    p = np.exp(-(distances - distances[:, :1]) / 300)
    p /= p.sum(axis=1, keepdims=True)
    chosen = np.array([row[rng.choice(40, p=w)] for row, w in zip(ids, p, strict=True)])
    hit = ids == chosen[:, None]
    distances[:, :24] = copies  # in most rows they are right, in some not
    hit[:, :24] = rng.random((400, 1)) < 0.5
    temperature, _ = fit_temperature(distances, ids, hit)
    assert 50 < temperature < 6000


def test_temperature_at_an_end_of_the_grid_is_told():
    distances = np.tile(np.arange(1.0, 33), (50, 1))
    ids = np.tile(np.arange(32), (50, 1))
    for first, says in ((True, "text twice"), (False, "is the key right")):
        hit = np.broadcast_to((ids == 0) == first, ids.shape)
        temperature, warning = fit_temperature(distances, ids, hit)
        assert says in warning and f"{temperature:.3g}" in warning


def test_fitted_temperature_predicts_better_than_far_ones(tmp_path):
    keys, labels = clustered(1500)

    def likelihood(temperature):
        rows = oracle(keys, labels, 32, temperature)
        return np.mean(
            [np.log(0.999 * r.get(int(t), 0) + 2e-5) for r, t in zip(rows, labels, strict=True)]
        )

    _, temperature = run(tmp_path, keys, labels, neighbours=32)
    assert likelihood(temperature) > max(likelihood(temperature * 8), likelihood(temperature / 8))


def test_what_is_made_ahead_is_the_same(tmp_path, monkeypatch):
    """As beside a GPU: keys are read in one thread, searched in another, summed in a third."""
    assert list(targets_stage.ahead(iter(range(5)))) == list(range(5))
    broken = (1 // n for n in (1, 0))
    with pytest.raises(ZeroDivisionError):
        list(targets_stage.ahead(broken))
    keys, labels = clustered(1000)
    yielded = []
    for name in ("plain", "ahead"):
        (tmp_path / name).mkdir()
        yielded.append(run(tmp_path / name, keys, labels, neighbours=9, temperature=1.0)[0])
        monkeypatch.setattr(Index, "on_cpu", lambda self, k: "")
    assert yielded[0] == yielded[1]


def test_the_index_is_read_once_for_a_group_of_shards(tmp_path, monkeypatch):
    """Parts that do not stay open: not once a shard. What a killed run finished is kept."""
    keys, labels = clustered(4000)
    for name in ("datastore", "index", "targets"):
        (tmp_path / name).mkdir()
    source = store(tmp_path / "datastore", keys, labels)  # ten shards
    budget = 1 << 18
    build_index(IndexSettings(), source, tmp_path / "index", Context(ram_budget=budget))
    index, opened = Index(tmp_path / "index", 1, budget), []
    plain = Index._open
    monkeypatch.setattr(Index, "_open", lambda self, n: opened.append(n) or plain(self, n))
    monkeypatch.setattr(targets_stage, "GROUPS_A_WORKER", 2)
    monkeypatch.setattr(Index, "group_rows", lambda self, k: 2000)
    arguments = (TargetSettings(neighbours=9, temperature=1.0), source, index)
    build_targets(*arguments, tmp_path / "targets", Context())
    assert len(index.passes) == 5
    assert opened == [0, 1, 2, 3, 4, 1, 2, 3, 4]  # two groups of five shards; the first part stays
    expected = [p.read_bytes() for p in sorted((tmp_path / "targets").glob("*.npy"))]
    for shard in (1, 4, 9):
        (tmp_path / f"targets/probs-{shard:05d}.npy").unlink()
    opened.clear()
    build_targets(*arguments, tmp_path / "targets", Context())
    assert opened == [1, 2, 3, 4] * 3  # three left are too few to share
    assert [p.read_bytes() for p in sorted((tmp_path / "targets").glob("*.npy"))] == expected
