"""The targets stage against brute force: numpy distances and a Python dictionary per row."""

import json
from collections import defaultdict

import faiss
import numpy as np
import pytest
import torch

from vllm_memdec.train import faiss_gpu
from vllm_memdec.train import index as index_stage
from vllm_memdec.train import search as search_module
from vllm_memdec.train import targets as targets_stage
from vllm_memdec.train.artifacts import write_json
from vllm_memdec.train.cluster import Here
from vllm_memdec.train.config import DatastoreSettings, IndexSettings, TargetSettings
from vllm_memdec.train.datastore import Keys
from vllm_memdec.train.faiss_gpu import check_width
from vllm_memdec.train.index import (
    PQ_KEYS,
    build_index,
    key_bytes,
    sample_rows,
    shape,
    shaping,
    two_level_kmeans,
)
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.search import Index, by_row
from vllm_memdec.train.shards import save_array, shards
from vllm_memdec.train.targets import (
    aggregate,
    build_targets,
    fit_temperature,
    neighbour_weights,
    neighbours_without_self,
)

WIDTH, VOCABULARY = 16, 50
BUDGET = 2**30
FP16 = 1e-3  # relative: probabilities are stored in fp16


def clustered(rows, seed=0, centres=60, spread=0.3):
    """Return keys around few centres and labels that mostly follow the centre, like real text."""
    rng = np.random.default_rng(seed)
    centre = rng.integers(centres, size=rows)
    keys = rng.normal(size=(centres, WIDTH))[centre] + spread * rng.normal(size=(rows, WIDTH))
    labels = np.where(
        rng.random(rows) < 0.7, centre % VOCABULARY, rng.integers(VOCABULARY, size=rows)
    )
    return keys.astype(np.float16), labels.astype(np.int32)


def store(folder, keys, labels, per_shard=400):
    """Write keys and labels as datastore shards, one block of a corpus each."""
    starts = range(0, len(keys), per_shard)
    for n, start in enumerate(starts):
        save_array(folder / f"keys-{n:05d}.npy", keys[start : start + per_shard])
        save_array(folder / f"labels-{n:05d}.npy", labels[start : start + per_shard])
    rows = np.array([len(keys[start : start + per_shard]) for start in starts], dtype=np.int32)
    save_array(folder / "rows-train.npy", rows)
    write_json(folder / "corpus.json", {"shard_blocks": 1})
    save_array(folder / "used-train.npy", np.unique(labels))
    return Keys(DatastoreSettings(), "", folder, folder)


def run(tmp_path, keys, labels, index=None, probes=10_000, budget=BUDGET, **settings):
    """Build index and targets of a datastore; return (list of rows {token: p}, temperature)."""
    for name in ("datastore", "index", "targets"):
        (tmp_path / name).mkdir()
    source = store(tmp_path / "datastore", keys, labels)
    folder, work = tmp_path / "index", tmp_path / "targets"
    build_index(index or IndexSettings(), source, budget, folder, Progress(), Here())
    searched = Index(folder, probes, budget)
    build_targets(TargetSettings(**settings), source, searched, work, Progress(), Here())
    rows = []
    parts = (shards(work, name) for name in ("offsets", "ids", "probs", "labels"))
    for offsets, ids, probs, stored in zip(*parts, strict=True):
        assert np.array_equal(stored, labels[len(rows) : len(rows) + len(stored)])
        for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
            assert len(set(ids[start:stop].tolist())) == stop - start
            rows.append(
                dict(zip(ids[start:stop].tolist(), probs[start:stop].tolist(), strict=True))
            )
    return rows, json.loads((work / "targets.json").read_text())["temperature"]


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


def assert_same(found, expected):
    for row, (a, b) in enumerate(zip(found, expected, strict=True)):
        big = {t for t, p in b.items() if p > 1e-6}  # below, fp16 has few digits
        assert big <= set(a) and all(abs(a[t] - b.get(t, 0)) < FP16 for t in a), row
        assert not b or abs(sum(a.values()) - 1) < 2 * FP16, row


def test_exact_search_equals_brute_force(tmp_path):
    keys, labels = clustered(900)
    found, temperature = run(
        tmp_path, keys, labels, neighbours=20, temperature=2.0, min_probability=0
    )
    assert temperature == 2.0
    assert_same(found, oracle(keys, labels, 20, 2.0))


def test_threshold_drops_the_small_and_renormalises(tmp_path):
    keys, labels = clustered(500)
    found, _ = run(tmp_path, keys, labels, neighbours=30, temperature=1.0, min_probability=0.05)
    # A probability on the threshold may fall on either side: compare rows that have none.
    without = oracle(keys, labels, 30, 1.0)
    clear = [i for i, row in enumerate(without) if all(abs(p - 0.05) > 1e-4 for p in row.values())]
    expected = oracle(keys, labels, 30, 1.0, 0.05)
    assert len(clear) > 400
    assert_same([found[i] for i in clear], [expected[i] for i in clear])
    assert all(set(found[i]) == set(expected[i]) for i in clear)


def test_more_neighbours_than_keys(tmp_path):
    keys, labels = clustered(30)
    found, _ = run(tmp_path, keys, labels, neighbours=1000, temperature=3.0, min_probability=0)
    assert_same(found, oracle(keys, labels, 29, 3.0))


@pytest.mark.parametrize("kind", ["flat", "sq8"])
def test_own_label_never_leaks_through_duplicate_keys(tmp_path, kind):
    """Each key exists four times; only a row's own entry has its label, so it may not be there."""
    keys = np.repeat(clustered(100)[0], 4, axis=0)
    labels = np.arange(len(keys), dtype=np.int32)
    found, _ = run(tmp_path, keys, labels, IndexSettings(kind=kind), neighbours=3, temperature=1.0)
    for row, target in enumerate(found):
        assert row not in target
    if kind == "flat":  # the three others at distance 0 share the mass
        for row, target in enumerate(found):
            twins = set(range(row - row % 4, row - row % 4 + 4)) - {row}
            assert set(target) == twins
            assert np.allclose(list(target.values()), 1 / 3, atol=FP16)


def test_own_label_never_leaks_where_codes_are_coarse(tmp_path):
    """Product codes put other rows nearer than the query itself: its rank says nothing."""
    keys = np.random.default_rng(0).normal(size=(PQ_KEYS, 67)).astype(np.float16)  # one byte a key
    labels = np.arange(len(keys), dtype=np.int32)
    found, _ = run(tmp_path, keys, labels, IndexSettings(kind="pq"), neighbours=8, temperature=9.0)
    assert not any(row in target for row, target in enumerate(found))
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
    found, _ = run(tmp_path, keys, labels, sq8, probes=1, neighbours=300, temperature=1.0)
    ids = Index(tmp_path / "index", 1, BUDGET).search(keys, 301)[1]
    assert (ids == -1).any()
    for row, target in enumerate(found):
        others = set(labels[[i for i in ids[row] if i not in (-1, row)]].tolist())
        assert set(target) <= others
        assert not others or abs(sum(target.values()) - 1) < 2 * FP16


def test_no_stored_probability_is_zero(tmp_path):
    """fp16 has no 1e-9: its log would make the loss infinite times zero."""
    keys, labels = clustered(300, spread=1.0)
    found, _ = run(tmp_path, keys, labels, neighbours=50, temperature=0.05, min_probability=0)
    assert min(p for row in found for p in row.values()) > 0
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


def test_sq8_recall_on_real_keys(pipeline):
    """Default probes, quantised: nine of ten true neighbours are found among the keys of text."""
    keys = np.concatenate(shards(pipeline.output / "datastore", "keys")).astype(np.float32)
    folder = pipeline.output.parent / "sq8"
    folder.mkdir()
    out = pipeline.output
    source = Keys(DatastoreSettings(), pipeline.base, out / "corpus", out / "datastore")
    build_index(IndexSettings(kind="sq8"), source, BUDGET, folder, Progress(), Here())
    index = Index(folder, IndexSettings().probes, BUDGET)
    assert int(index.facts["kind"].split(",")[0].removeprefix("IVF")) > 32
    queries, k = keys[::97], 32
    found = index.search(queries, k)[1]
    distances = ((queries[:, None] - keys[None]) ** 2).sum(-1)
    true = np.argsort(distances, axis=1)[:, :k]
    recall = np.mean([len(set(a) & set(b)) / k for a, b in zip(found, true, strict=True)])
    assert recall > 0.9


@pytest.mark.parametrize(
    ("kind", "n_keys", "expected"),
    [
        ("auto", 9_999, "Flat"),
        ("auto", 10_000, "IVF100,SQ8"),
        ("auto", 999_999, "IVF999,SQ8"),
        ("auto", 10**6, "IVF1024,SQ8"),
        ("auto", 10**7, "IVF4096,SQ8"),
        ("auto", 30_000_000, "OPQ64,IVF8192,PQ64"),
        ("auto", 10**8, "OPQ64,IVF16384,PQ64"),
        ("auto", 10**9, "OPQ64,IVF65536_HNSW32,PQ64"),
        ("auto", 10**10, "OPQ64,IVF262144_HNSW32,PQ64"),
        ("sq8", 30, "IVF1,SQ8"),
        ("sq8", 400, "IVF10,SQ8"),
    ],
)
def test_kinds_of_index(kind, n_keys, expected):
    """Lists follow the corpus: 40 keys each at least, from a million on about n^0.6 of them."""
    found = shape(IndexSettings(kind=kind), n_keys, 768)
    assert found.kind == expected
    assert found.sample <= n_keys and found.sample >= min(40 * found.lists, n_keys)
    assert shaping(IndexSettings(kind=kind), n_keys, 768)["kind"] == expected
    faiss.index_factory(768, found.kind)


def test_too_few_keys_for_codes():
    with pytest.raises(ValueError, match="needs 9984 keys .* has 9983: choose sq8"):
        shape(IndexSettings(kind="pq"), 9_983, 768)


@pytest.mark.parametrize("kind", ["flat", "sq8", "fp16"])
def test_parts_of_an_index_merge_to_the_whole(tmp_path, kind):
    """A budget for two shards a part, and for few queries at once: the same rows are found."""
    keys, labels = clustered(3000)
    size = key_bytes(shape(IndexSettings(kind=kind), len(keys), WIDTH).kind, WIDTH)
    settings = {"neighbours": 20, "temperature": 2.0, "min_probability": 0.0}
    found = {}
    for name, budget in (("whole", BUDGET), ("parts", 4 * 900 * size)):
        (tmp_path / name).mkdir()
        found[name], _ = run(
            tmp_path / name, keys, labels, IndexSettings(kind=kind), 8, budget, **settings
        )
    pattern = "index-*" if kind == "flat" else "lists-*"
    assert len(list((tmp_path / "whole/index").glob(pattern))) == 1
    assert len(list((tmp_path / "parts/index").glob(pattern))) == 4
    assert found["whole"] == found["parts"]


def whole_index(folder):
    """Return an index of one part as faiss would have made it at once."""
    index = faiss.read_index(str(folder / "trained.faiss"))
    reader = faiss.FileIOReader(str(folder / "lists-00000.faiss"))
    lists = faiss.read_InvertedLists(reader)
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    ivf.replace_invlists(lists, True)
    index.ntotal = ivf.ntotal = lists.compute_ntotal()
    return index, ivf


@pytest.mark.parametrize("kind", ["sq8", "pq"])
def test_parts_find_what_faiss_finds_in_the_whole(tmp_path, monkeypatch, kind):
    """Whatever stands before the lists, in one part or in three, opened once or for every group;

    also where a release before this one wrote the quantiser into every part.
    """
    monkeypatch.setattr(index_stage, "PQ_BYTES", 1)  # faiss trains each for seconds
    keys, labels = clustered(PQ_KEYS)
    keys = keys[:, :2]
    folder, old = tmp_path / "index", tmp_path / "old"
    folder.mkdir(), old.mkdir()
    source = store(tmp_path, keys, labels)
    build_index(IndexSettings(kind=kind), source, BUDGET, folder, Progress(), Here())
    index, ivf = whole_index(folder)
    ivf.nprobe = 8
    if kind == "pq":  # tables made in advance, for wider keys only: they round in another way
        ivf.use_precomputed_table = -1
        ivf.precompute_table()
    distances, ids = index.search(keys[:200].astype(np.float32), 5)
    by_row(distances, ids)  # which faiss does not promise

    facts = json.loads((folder / "index.json").read_text()) | {"first_rows": [0, 4000, 7000]}
    write_json(old / "index.json", facts)
    for n, (start, stop) in enumerate([(0, 4000), (4000, 7000), (7000, len(keys))]):
        part = faiss.read_index(str(folder / "trained.faiss"))
        part.add(keys[start:stop].astype(np.float32))
        faiss.write_index(part, str(old / f"index-{n:05d}.faiss"))

    for where, budget, passes in ((folder, BUDGET, 1), (old, BUDGET, 1), (old, 60 << 10, 4)):
        searched = Index(where, 8, budget)
        assert len(searched.passes) == passes
        for _ in range(2):
            found = searched.search(keys[:200], 5)
            assert np.array_equal(found[0], distances) and np.array_equal(found[1], ids)
        # Queries by themselves are rotated by another routine, which rounds in another way.
        found = list(searched.search_all([keys[:70], keys[70:71], keys[71:200]], 5))
        assert [len(d) for d, _ in found] == [70, 1, 129]
        assert np.array_equal(np.concatenate([i for _, i in found]), ids)
        assert np.allclose(np.concatenate([d for d, _ in found]), distances, rtol=1e-4, atol=1e-6)


def test_equally_near_neighbours_come_by_row():
    distances = np.array([[1.0, 1, 1, 2, 3], [0, 1, 2, 2, 2], [1, 9, np.inf, np.inf, np.inf]])
    ids = np.array([[7, 3, 5, 1, 0], [4, 3, 1, 2, 0], [8, 5, -1, -1, -1]])
    by_row(distances, ids)
    assert ids.tolist() == [[3, 5, 7, 1, 0], [4, 3, 0, 1, 2], [8, 5, -1, -1, -1]]


@pytest.mark.parametrize("budget", [BUDGET, 1 << 17])
def test_equal_keys_are_found_by_row_wherever_they_lie(tmp_path, budget):
    """Twelve copies of each key, far apart, of which few are asked for: the lower rows, in order,

    as brute force has them, however the index is divided.
    """
    keys, labels = np.tile(clustered(90)[0], (12, 1)), np.zeros(1080, np.int32)
    folder = tmp_path / "index"
    folder.mkdir()
    source = store(tmp_path, keys, labels, per_shard=100)
    build_index(IndexSettings(), source, budget, folder, Progress(), Here())
    assert len(list(folder.glob("index-*"))) == (1 if budget == BUDGET else 3)
    ids = Index(folder, 1, budget).search(keys[500:520], 7)[1]
    assert ids.tolist() == [[row % 90 + 90 * n for n in range(7)] for row in range(500, 520)]


def test_two_level_lists_are_as_good_as_one_level(tmp_path):
    """Mean distance of a key to its centroid; no list is empty, and the result repeats itself."""
    keys = clustered(8000, centres=400)[0]
    centroids = two_level_kmeans(keys, 100, seed=1)
    assert centroids.shape == (100, WIDTH)
    assert np.array_equal(centroids, two_level_kmeans(keys, 100, seed=1))
    points = keys.astype(np.float32)
    distances, nearest = faiss.knn(points, centroids, 1)
    assert len(np.unique(nearest)) == 100
    plain = faiss.Kmeans(WIDTH, 100, niter=10, seed=1)
    plain.train(points)
    assert distances.mean() < 1.1 * faiss.knn(points, plain.centroids, 1)[0].mean()


@pytest.mark.parametrize(("kind", "least"), [("sq8", 0.95), ("pq", 0.5)])
def test_a_large_index_with_a_graph_of_centroids(tmp_path, monkeypatch, kind, least):
    """What 1 M and 270 M keys get, made of few: recall, and the same every time."""
    monkeypatch.setattr(index_stage, "TWO_LEVELS_FROM", 5000)
    monkeypatch.setattr(index_stage, "GRAPH_FROM", 128)
    monkeypatch.setattr(index_stage, "PQ_BYTES", 1)
    keys, labels = clustered(PQ_KEYS)
    keys = keys[:, :4]
    source = store(tmp_path, keys, labels)
    contents = []
    for name in ("one", "two") if kind == "sq8" else ("one",):
        (tmp_path / name).mkdir()
        build_index(IndexSettings(kind=kind), source, 1 << 18, tmp_path / name, Progress(), Here())
        contents.append([p.read_bytes() for p in sorted((tmp_path / name).glob("*.faiss"))])
    assert contents[0] == contents[-1] and len(contents[0]) > 2
    index = Index(tmp_path / "one", 32, BUDGET)
    assert "IVF128_HNSW32," in index.facts["kind"]
    queries = keys[::50].astype(np.float32)
    found = index.search(queries, 10)[1]
    true = faiss.knn(queries, keys.astype(np.float32), 10)[1]

    def shared(a, b):
        return np.mean([len(set(x) & set(y)) / 10 for x, y in zip(a, b, strict=True)])

    assert shared(found, true) > least
    # A GPU, which has no such graph, compares with all centroids: nearly the same lists.
    other = Index(tmp_path / "one", 32, BUDGET)
    faiss_gpu.compare_all_lists(other.trained)
    assert isinstance(faiss.downcast_index(other.coarse), faiss.IndexFlat)
    assert shared(found, other.search(queries, 10)[1]) > 0.99


def test_what_is_made_ahead_is_the_same(tmp_path, monkeypatch):
    """As beside a GPU: keys are read in one thread, searched in another, summed in a third."""
    assert list(targets_stage.ahead(iter(range(5)))) == list(range(5))
    broken = (1 // n for n in (1, 0))
    with pytest.raises(ZeroDivisionError):
        list(targets_stage.ahead(broken))
    keys, labels = clustered(1000)
    found = []
    for name in ("plain", "ahead"):
        (tmp_path / name).mkdir()
        found.append(run(tmp_path / name, keys, labels, neighbours=9, temperature=1.0)[0])
        monkeypatch.setattr(Index, "on_cpu", lambda self, k: "")
    assert found[0] == found[1]


@pytest.mark.parametrize("rows", [1, 7, 1000, 2048, 2999, 3000, 4000])
def test_a_sample_has_as_many_rows_as_asked_for(tmp_path, rows):
    keys, labels = clustered(3000)
    source = store(tmp_path, keys, labels)
    numbers, found = sample_rows(source, np.r_[np.arange(0, 3000, 400), 3000], rows)
    assert len(numbers) == len(found) == min(rows, 3000) == len(np.unique(numbers))
    assert np.array_equal(found, keys[numbers])
    assert rows == 1 or (numbers[0] == 0 and numbers[-1] == 2999)


def test_the_budget_shapes_no_index(tmp_path):
    """Lists and centroids are the same for 1 GiB and 1 MiB; only the parts differ."""
    keys, labels = clustered(12_000)
    source = store(tmp_path, keys, labels)
    trained = []
    for budget in (BUDGET, 1 << 19):
        folder = tmp_path / str(budget)
        folder.mkdir()
        build_index(IndexSettings(), source, budget, folder, Progress(), Here())
        trained.append((folder / "trained.faiss").read_bytes())
        assert len(list(folder.glob("lists-*"))) == (1 if budget == BUDGET else 3)
    assert trained[0] == trained[1]


def test_an_index_is_divided_anew_unless_a_part_is_filled(tmp_path, monkeypatch):
    """A budget lowered because a part took too much memory divides what was trained already."""
    keys, labels = clustered(12_000)
    source = store(tmp_path, keys, labels)
    folder, again = tmp_path / "index", tmp_path / "again"
    folder.mkdir(), again.mkdir()
    whole = index_stage.Filler.__call__

    def fails(self, part):
        if len(self.parts) < 3 or part == 2:
            raise RuntimeError("no memory")
        return whole(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(index_stage.Filler, "__call__", fails)
        for budget in (BUDGET, 1 << 19):  # one part, then three
            with pytest.raises(RuntimeError, match="no memory"):
                build_index(IndexSettings(), source, budget, folder, Progress(), Here())
            patch.setattr(index_stage, "train_index", None)  # once is enough
    build_index(IndexSettings(), source, 1 << 16, folder, Progress(), Here())
    assert len(list(folder.glob("lists-*"))) == 3  # two of them were filled before
    build_index(IndexSettings(), source, BUDGET, again, Progress(), Here())
    found, expected = (Index(where, 8, BUDGET).search(keys[:50], 5) for where in (folder, again))
    assert np.array_equal(found[1], expected[1]) and np.array_equal(found[0], expected[0])


def test_the_index_is_read_once_for_a_group_of_shards(tmp_path, monkeypatch):
    """Parts that do not stay open: not once a shard. What a killed run finished is kept."""
    keys, labels = clustered(4000)
    for name in ("datastore", "index", "targets"):
        (tmp_path / name).mkdir()
    source = store(tmp_path / "datastore", keys, labels)  # ten shards
    budget = 1 << 18
    build_index(IndexSettings(), source, budget, tmp_path / "index", Progress(), Here())
    index, opened = Index(tmp_path / "index", 1, budget), []
    plain = Index._open
    monkeypatch.setattr(Index, "_open", lambda self, n: opened.append(n) or plain(self, n))
    monkeypatch.setattr(targets_stage, "GROUPS_A_WORKER", 2)
    monkeypatch.setattr(Index, "group_rows", lambda self, k: 2000)
    arguments = (TargetSettings(neighbours=9, temperature=1.0), source, index)
    build_targets(*arguments, tmp_path / "targets", Progress(), Here())
    assert len(index.passes) == 5
    assert opened == [0, 1, 2, 3, 4, 1, 2, 3, 4]  # two groups of five shards; the first part stays
    expected = [p.read_bytes() for p in sorted((tmp_path / "targets").glob("*.npy"))]
    for shard in (1, 4, 9):
        (tmp_path / f"targets/probs-{shard:05d}.npy").unlink()
    opened.clear()
    build_targets(*arguments, tmp_path / "targets", Progress(), Here())
    assert opened == [1, 2, 3, 4] * 3  # three left are too few to share
    assert [p.read_bytes() for p in sorted((tmp_path / "targets").glob("*.npy"))] == expected


@pytest.mark.parametrize(
    ("width", "kind", "options"),
    [
        (16, "Flat", {}),
        (16, "IVF4,SQ8", {}),
        (1536, "OPQ64,IVF4,PQ64", {"useFloat16": True, "usePrecomputed": False}),
        (896, "OPQ64,IVF4,PQ64", {"useFloat16": True, "usePrecomputed": True}),
        (3584, "IVF4,PQ64", {"useFloat16": True, "usePrecomputed": True}),
    ],
)
def test_options_of_a_gpu_suit_the_index(width, kind, options):
    found = faiss_gpu.gpu_options(faiss.index_factory(width, kind))
    assert found == {"use_cuvs": False} | options


def test_a_faiss_without_kernels_for_the_gpu_is_not_used():
    """It ends its process by abort(), which is what is tried elsewhere."""
    assert faiss_gpu.failure("pass") == ""
    assert faiss_gpu.failure("raise ValueError('no kernel')") == "ValueError: no kernel"
    assert faiss_gpu.failure("import os; os.abort()").startswith("faiss ended with -")
    if not torch.cuda.is_available():
        assert faiss_gpu.no_gpu() == "there is no GPU"
        assert faiss_gpu.failure(faiss_gpu.GPU_TRIAL)


@pytest.mark.parametrize(
    ("kind", "probes", "k", "refused"),
    [
        ("IVF9,SQ8", 32, 2048, False),
        ("IVF9,SQ8", 32, 2049, True),
        ("IVF9,SQ8", 4096, 9, True),
        ("Flat", 4096, 9, False),
    ],
)
def test_a_search_too_wide_for_a_gpu_is_done_on_cpus(
    tmp_path, monkeypatch, kind, probes, k, refused
):
    write_json(tmp_path / "index.json", {"kind": kind})
    index = Index(tmp_path, probes, BUDGET)
    assert index.on_cpu(k) == faiss_gpu.no_gpu()
    monkeypatch.setattr(search_module, "no_gpu", lambda: "")
    assert index.on_cpu(k) == ("a GPU finds at most 2048" if refused else "")


@pytest.mark.parametrize(("neighbours", "probes"), [(2048, 32), (256, 2049)])
def test_a_build_too_wide_for_its_gpus_is_refused_early(monkeypatch, neighbours, probes):
    monkeypatch.setattr(faiss_gpu, "no_gpu", lambda: "there is no GPU")
    check_width(neighbours, probes, Here())
    monkeypatch.setattr(faiss_gpu, "no_gpu", lambda: "")
    check_width(2047, 2048, Here())
    with pytest.raises(ValueError, match=f"neighbours is {neighbours} .* at most 2047 and visits"):
        check_width(neighbours, probes, Here())


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "recall"), [("flat", 0.99), ("sq8", 0.99), ("pq", 0.9)])
def test_a_gpu_finds_what_a_cpu_does(tmp_path, kind, recall):
    """Neighbours of a key whose distances differ by rounding may change places."""
    assert faiss_gpu.no_gpu() == ""
    keys, labels = clustered(PQ_KEYS)
    keys = keys[:, :4]  # as many codes: faiss trains each for seconds
    folder = tmp_path / "index"
    folder.mkdir()
    source = store(tmp_path, keys, labels)
    build_index(IndexSettings(kind=kind), source, BUDGET, folder, Progress(), Here())
    ours = Index(folder, 8, BUDGET).search(keys[:200], 9)
    theirs = Index(folder, 8, BUDGET, gpu=False).search(keys[:200], 9)
    same = [len(set(a) & set(b)) / 9 for a, b in zip(ours[1], theirs[1], strict=True)]
    assert np.mean(same) >= recall


def test_a_damaged_part_of_the_index_is_named(tmp_path):
    keys, labels = clustered(900)
    run(tmp_path, keys, labels, neighbours=5)
    part = tmp_path / "index/index-00000.faiss"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(ValueError, match="index-00000.faiss is damaged or missing: delete"):
        Index(tmp_path / "index", 1, BUDGET).search(keys[:3], 2)
