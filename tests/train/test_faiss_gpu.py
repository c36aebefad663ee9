"""What faiss does on a GPU, and what is known of it where there is none."""

import faiss
import numpy as np
import psutil
import pytest
import torch
from support.datastores import BUDGET, clustered, store

from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.executor.executor import LocalExecutor
from vllm_memdec.train.settings import IndexSettings
from vllm_memdec.train.stages import faiss_gpu
from vllm_memdec.train.stages.faiss_gpu import check_width
from vllm_memdec.train.stages.index import PQ_KEYS, build_index
from vllm_memdec.train.stages.search import Index


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
    chosen = faiss_gpu.gpu_options(faiss.index_factory(width, kind))
    assert chosen == {"use_cuvs": False} | options


def test_a_faiss_without_kernels_for_the_gpu_is_not_used():
    """It ends its process by abort(), which is what is tried elsewhere."""
    assert faiss_gpu.failure("pass") == ""
    assert faiss_gpu.failure("raise ValueError('no kernel')") == "ValueError: no kernel"
    assert faiss_gpu.failure("import os; os.abort()").startswith("faiss ended with -")
    if not torch.cuda.is_available():
        assert faiss_gpu.no_gpu() == "there is no GPU"
        assert faiss_gpu.failure(faiss_gpu.GPU_TRIAL)


def test_the_graph_that_a_gpu_does_not_use_is_freed(tmp_path):
    """All lists are compared in its place; else 512 links a centroid would stay every time."""
    centroids, path = clustered(4000)[0].astype(np.float32), str(tmp_path / "index.faiss")
    index = faiss.index_factory(centroids.shape[1], f"IVF{len(centroids)}_HNSW256,SQ8")
    index.quantizer.add(centroids)
    faiss.write_index(index, path)
    taken = []
    for _ in range(8):
        index = faiss.read_index(path)
        faiss_gpu.compare_all_lists(index)
        quantizer = faiss.downcast_index(index.quantizer)
        assert isinstance(quantizer, faiss.IndexFlat)
        assert np.array_equal(quantizer.reconstruct_n(0, len(centroids)), centroids)
        del index, quantizer
        taken.append(psutil.Process().memory_info().rss / 1e6)
    assert taken[-1] - taken[2] < 5


@pytest.mark.parametrize(("neighbours", "probes"), [(2048, 32), (256, 2049)])
def test_a_build_too_wide_for_its_gpus_is_refused_early(monkeypatch, neighbours, probes):
    monkeypatch.setattr(faiss_gpu, "no_gpu", lambda: "there is no GPU")
    check_width(neighbours, probes, LocalExecutor())
    monkeypatch.setattr(faiss_gpu, "no_gpu", lambda: "")
    check_width(2047, 2048, LocalExecutor())
    with pytest.raises(ValueError, match=f"neighbours is {neighbours} .* at most 2047 and visits"):
        check_width(neighbours, probes, LocalExecutor())


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
    build_index(IndexSettings(kind=kind), source, folder, Context(ram_budget=BUDGET))
    ours = Index(folder, 8, BUDGET).search(keys[:200], 9)
    theirs = Index(folder, 8, BUDGET, gpu=False).search(keys[:200], 9)
    same = [len(set(a) & set(b)) / 9 for a, b in zip(ours[1], theirs[1], strict=True)]
    assert np.mean(same) >= recall
