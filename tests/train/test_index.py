"""The index stage: its shape, its training, and the parts that it is divided into."""

import json
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from support.datastores import BUDGET, WIDTH, clustered, store

from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.executor.executor import LocalExecutor
from vllm_memdec.train.model.hidden_states import Keys
from vllm_memdec.train.settings import DatastoreSettings, IndexSettings
from vllm_memdec.train.stages import faiss_gpu
from vllm_memdec.train.stages import index as index_stage
from vllm_memdec.train.stages.datastore import sample_rows
from vllm_memdec.train.stages.index import (
    PQ_KEYS,
    Filler,
    build_index,
    inverted,
    shape,
    shaping,
    train_index,
    train_lists,
    two_level_kmeans,
)
from vllm_memdec.train.stages.search import Index


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
    planned = shape(IndexSettings(kind=kind), n_keys, 768)
    assert planned.kind == expected
    assert planned.sample <= n_keys and planned.sample >= min(40 * planned.lists, n_keys)
    assert shaping(IndexSettings(kind=kind), n_keys, 768)["kind"] == expected
    faiss.index_factory(768, planned.kind)


def test_too_few_keys_for_codes():
    with pytest.raises(ValueError, match="needs 9984 keys .* has 9983: choose sq8"):
        shape(IndexSettings(kind="pq"), 9_983, 768)


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


@pytest.mark.parametrize(("kind", "min_recall"), [("sq8", 0.95), ("pq", 0.5)])
def test_a_large_index_with_a_graph_of_centroids(tmp_path, monkeypatch, kind, min_recall):
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
        build_index(IndexSettings(kind=kind), source, tmp_path / name, Context(ram_budget=1 << 18))
        contents.append([p.read_bytes() for p in sorted((tmp_path / name).glob("*.faiss"))])
    assert contents[0] == contents[-1] and len(contents[0]) > 2
    index = Index(tmp_path / "one", 32, BUDGET)
    assert "IVF128_HNSW32," in index.facts["kind"]
    queries = keys[::50].astype(np.float32)
    ids = index.search(queries, 10)[1]
    true = faiss.knn(queries, keys.astype(np.float32), 10)[1]

    def shared(a, b):
        return np.mean([len(set(x) & set(y)) / 10 for x, y in zip(a, b, strict=True)])

    assert shared(ids, true) > min_recall
    # A GPU, which has no such graph, compares with all centroids: nearly the same lists.
    other = Index(tmp_path / "one", 32, BUDGET)
    faiss_gpu.compare_all_lists(other.trained)
    assert isinstance(faiss.downcast_index(other.coarse), faiss.IndexFlat)
    assert shared(ids, other.search(queries, 10)[1]) > 0.99


@pytest.mark.parametrize("rows", [1, 7, 1000, 2048, 2999, 3000, 4000])
def test_a_sample_has_as_many_rows_as_asked_for(tmp_path, rows):
    keys, labels = clustered(3000)
    source = store(tmp_path, keys, labels)
    numbers, sample = sample_rows(source, np.r_[np.arange(0, 3000, 400), 3000], rows)
    assert len(numbers) == len(sample) == min(rows, 3000) == len(np.unique(numbers))
    assert np.array_equal(sample, keys[numbers])
    assert rows == 1 or (numbers[0] == 0 and numbers[-1] == 2999)


def test_the_budget_shapes_no_index(tmp_path):
    """Lists and centroids are the same for 1 GiB and 1 MiB; only the parts differ."""
    keys, labels = clustered(12_000)
    source = store(tmp_path, keys, labels)
    trained = []
    for budget in (BUDGET, 1 << 19):
        folder = tmp_path / str(budget)
        folder.mkdir()
        build_index(IndexSettings(), source, folder, Context(ram_budget=budget))
        trained.append((folder / "trained.faiss").read_bytes())
        assert len(list(folder.glob("lists-*"))) == (1 if budget == BUDGET else 3)
    assert trained[0] == trained[1]


def test_no_key_is_computed_to_learn_their_width(tmp_path, tiny_model, monkeypatch):
    """Where keys are not kept, a shard takes a forward pass of the base."""
    base = tiny_model("llama")
    source = store(tmp_path, *clustered(900))
    source = replace(source, settings=DatastoreSettings(keep_keys=False), base=base)
    monkeypatch.setattr(Keys, "__call__", lambda self, shard: pytest.fail("computed"))
    facts = train_index(IndexSettings(kind="flat"), source, tmp_path)
    width = json.loads((Path(base) / "config.json").read_text())["hidden_size"]
    assert facts == {"kind": "Flat", "width": width, "keys": 900} and width != WIDTH


def test_nobody_holds_tables_that_only_a_search_needs(tmp_path, monkeypatch):
    """faiss makes those of product codes when it trains and when it reads: 64 kB a list."""
    monkeypatch.setattr(index_stage, "PQ_BYTES", 1)
    keys, labels = clustered(PQ_KEYS)
    source = store(tmp_path, keys[:, :2], labels)
    index = faiss.index_factory(2, shape(IndexSettings(kind="pq"), PQ_KEYS, 2).kind)
    trained = train_lists(index, keys[:, :2], shape(IndexSettings(kind="pq"), PQ_KEYS, 2), seed=1)
    assert inverted(trained).precomputed_table.size() == 0
    faiss.write_index(trained, str(tmp_path / "trained.faiss"))
    empty = Filler(source, [], tmp_path).empty(2)
    assert inverted(empty).nlist > 1 and inverted(empty).precomputed_table.size() == 0


def test_what_is_not_filled_is_divided_anew(tmp_path, monkeypatch):
    """A budget lowered because a part took too much RAM keeps the parts that it did not fail."""
    keys, labels = clustered(12_000)
    source = store(tmp_path, keys, labels)
    folder, again = tmp_path / "index", tmp_path / "again"
    folder.mkdir(), again.mkdir()
    whole = index_stage.Filler.__call__
    (folder / "lists-00024.faiss").write_bytes(b"the 25th part, by an earlier release")

    class Backwards(LocalExecutor):
        """As workers that end in another order."""

        def map(self, worker, items):
            yield from map(worker, reversed(items))

    def fails(self, part):
        if len(self.parts) < 3 or part == 1:
            raise RuntimeError("no memory")
        return whole(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(index_stage.Filler, "__call__", fails)
        for budget in (BUDGET, 1 << 19):  # one part, then three
            with pytest.raises(RuntimeError, match="no memory"):
                build_index(
                    IndexSettings(),
                    source,
                    folder,
                    Context(executor=Backwards(), ram_budget=budget),
                )
            patch.setattr(index_stage, "train_index", None)  # once is enough
    [filled] = folder.glob("lists-*")
    written = filled.stat().st_mtime_ns
    build_index(IndexSettings(), source, folder, Context(ram_budget=1 << 18))
    # Of thirty shards the last four were filled: of the others each part takes six.
    names = [f"lists-{shard:05d}.faiss" for shard in (0, 6, 12, 18, 24, 26)]
    assert sorted(path.name for path in folder.glob("lists-*")) == names
    assert filled.name == names[-1] and filled.stat().st_mtime_ns == written
    build_index(IndexSettings(), source, again, Context(ram_budget=BUDGET))
    searched, expected = (Index(where, 8, BUDGET).search(keys[:50], 5) for where in (folder, again))
    assert np.array_equal(searched[1], expected[1]) and np.array_equal(searched[0], expected[0])
