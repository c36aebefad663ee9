"""Search of an index in its parts: what is found, in which order, and what is told of files."""

import json

import faiss
import numpy as np
import pytest
from support.datastores import BUDGET, WIDTH, clustered, run, store

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.artifacts import write_json
from vllm_memdec.train.data.shards import shards
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model.hidden_states import Keys
from vllm_memdec.train.settings import DatastoreSettings, IndexSettings
from vllm_memdec.train.stages import faiss_gpu
from vllm_memdec.train.stages import index as index_stage
from vllm_memdec.train.stages import search as search_module
from vllm_memdec.train.stages.index import PQ_KEYS, build_index, key_bytes, shape
from vllm_memdec.train.stages.search import Index, by_row


def test_sq8_recall_on_real_keys(pipeline):
    """Default probes, quantised: nine of ten true neighbours are found among the keys of text."""
    keys = np.concatenate(shards(pipeline.output / "datastore", "keys")).astype(np.float32)
    folder = pipeline.output.parent / "sq8"
    folder.mkdir()
    out = pipeline.output
    source = Keys(DatastoreSettings(), pipeline.base, out / "corpus", out / "datastore")
    build_index(IndexSettings(kind="sq8"), source, folder, Context(ram_budget=BUDGET))
    index = Index(folder, IndexSettings().probes, BUDGET)
    assert int(index.facts["kind"].split(",")[0].removeprefix("IVF")) > 32
    queries, k = keys[::97], 32
    ids = index.search(queries, k)[1]
    distances = ((queries[:, None] - keys[None]) ** 2).sum(-1)
    true = np.argsort(distances, axis=1)[:, :k]
    recall = np.mean([len(set(a) & set(b)) / k for a, b in zip(ids, true, strict=True)])
    assert recall > 0.9


@pytest.mark.parametrize("kind", ["flat", "sq8", "fp16"])
def test_parts_of_an_index_merge_to_the_whole(tmp_path, kind):
    """A budget for two shards a part, and for few queries at once: the same rows are found."""
    keys, labels = clustered(3000)
    size = key_bytes(shape(IndexSettings(kind=kind), len(keys), WIDTH).kind, WIDTH)
    settings = {"neighbours": 20, "temperature": 2.0, "min_probability": 0.0}
    results = {}
    for name, budget in (("whole", BUDGET), ("parts", 4 * 900 * size)):
        (tmp_path / name).mkdir()
        results[name], _ = run(
            tmp_path / name, keys, labels, IndexSettings(kind=kind), 8, budget, **settings
        )
    pattern = "index-*" if kind == "flat" else "lists-*"
    assert len(list((tmp_path / "whole/index").glob(pattern))) == 1
    assert len(list((tmp_path / "parts/index").glob(pattern))) == 4
    assert results["whole"] == results["parts"]


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
    build_index(IndexSettings(kind=kind), source, folder, Context(ram_budget=BUDGET))
    index, ivf = whole_index(folder)
    ivf.nprobe = 8
    if kind == "pq":  # tables made in advance, for wider keys only: they round in another way
        ivf.use_precomputed_table = -1
        ivf.precompute_table()
    distances, ids = index.search(keys[:200].astype(np.float32), 5)
    by_row(distances, ids)  # which faiss does not promise

    facts = json.loads((folder / "index.json").read_text())
    facts.pop("parts"), facts.update(first_rows=[0, 4000, 7000])
    write_json(old / "index.json", facts)
    for n, (start, stop) in enumerate([(0, 4000), (4000, 7000), (7000, len(keys))]):
        part = faiss.read_index(str(folder / "trained.faiss"))
        part.add(keys[start:stop].astype(np.float32))
        faiss.write_index(part, str(old / f"index-{n:05d}.faiss"))

    for where, budget, passes in ((folder, BUDGET, 1), (old, BUDGET, 1), (old, 60 << 10, 4)):
        searched = Index(where, 8, budget)
        assert len(searched.passes) == passes
        for _ in range(2):
            nearest = searched.search(keys[:200], 5)
            assert np.array_equal(nearest[0], distances) and np.array_equal(nearest[1], ids)
        # Queries by themselves are rotated by another routine, which rounds in another way.
        nearest = list(searched.search_all([keys[:70], keys[70:71], keys[71:200]], 5))
        assert [len(d) for d, _ in nearest] == [70, 1, 129]
        assert np.array_equal(np.concatenate([i for _, i in nearest]), ids)
        assert np.allclose(np.concatenate([d for d, _ in nearest]), distances, rtol=1e-4, atol=1e-6)


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
    build_index(IndexSettings(), source, folder, Context(ram_budget=budget))
    assert len(list(folder.glob("index-*"))) == (1 if budget == BUDGET else 3)
    ids = Index(folder, 1, budget).search(keys[500:520], 7)[1]
    assert ids.tolist() == [[row % 90 + 90 * n for n in range(7)] for row in range(500, 520)]


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


@pytest.mark.parametrize(("kind", "probes", "k"), [("flat", 1, 2049), ("sq8", 4096, 9)])
def test_what_is_too_wide_for_a_gpu_is_found(tmp_path, monkeypatch, kind, probes, k):
    keys, labels = clustered(3000)
    source, folder = store(tmp_path, keys, labels), tmp_path / "index"
    folder.mkdir()
    build_index(IndexSettings(kind=kind), source, folder, Context(ram_budget=BUDGET))
    expected = Index(folder, probes, BUDGET, gpu=False).search(keys[:20], k)
    monkeypatch.setattr(search_module, "no_gpu", lambda: "")
    index = Index(folder, probes, BUDGET)
    assert index.on_gpu
    nearest = index.search(keys[:20], k)
    assert np.array_equal(nearest[0], expected[0]) and np.array_equal(nearest[1], expected[1])


@pytest.mark.parametrize(
    ("kind", "name"), [("flat", "index-00000.faiss"), ("sq8", "lists-00000.faiss")]
)
def test_a_damaged_part_of_the_index_is_named(tmp_path, kind, name):
    keys, labels = clustered(900)
    run(tmp_path, keys, labels, IndexSettings(kind=kind), neighbours=5)
    part = tmp_path / "index" / name
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{name} is damaged or missing: delete"):
        Index(tmp_path / "index", 1, BUDGET).search(keys[:3], 2)


@pytest.mark.parametrize(
    ("size", "how"), [(None, "damaged or missing"), (0, "cut off"), (7, "cut off"), (8, "cut off")]
)
def test_damaged_labels_are_named(tmp_path, size, how):
    write_json(tmp_path / "index.json", {"kind": "Flat", "keys": 3})
    if size is not None:
        (tmp_path / "labels.i32").write_bytes(bytes(size))
    with pytest.raises(MemdecError, match=f"labels.i32 is {how}: delete the folder {tmp_path} "):
        Index(tmp_path, 1, BUDGET).labels  # noqa: B018
