"""What an index of a few keys costs to train, fill and search: rates of `memdec plan`."""

import time
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from vllm_memdec.train.settings import Settings
from vllm_memdec.train.stages.faiss_gpu import GPU_LARGEST_K, to_gpu
from vllm_memdec.train.stages.index import (
    CODE_SAMPLE,
    POINTS_PER_LIST,
    PQ_KEYS,
    inverted,
    kmeans,
    shape,
)
from vllm_memdec.train.stages.targets import fit_temperature, sparse_targets

QUERIES = 2048  # queries whose search is timed


def timed(function: Any, *arguments: Any) -> tuple[float, Any]:
    """Return how many seconds a call takes, and what it returns."""
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


def measure_index(
    keys: np.ndarray, labels: np.ndarray, settings: Settings, n_keys: int
) -> dict[str, float]:
    """Return the rates of training, filling and searching an index such as n_keys would get."""
    kind = shape(settings.index, n_keys, keys.shape[1]).kind
    if "PQ" in kind:  # product codes need PQ_KEYS to train on
        keys, labels = (np.resize(a, (max(len(a), PQ_KEYS), *a.shape[1:])) for a in (keys, labels))
    own = np.arange(0, len(keys), -(-len(keys) // QUERIES))
    k = min(settings.targets.neighbours + 1, len(keys))
    searched = time_search(keys, own, kind, k, settings.index.probes)
    ids, rates = searched.ids, {}
    # k-means takes no more of them for a list.
    trained_on = min(len(keys), POINTS_PER_LIST * searched.lists)
    rates["train_index"] = searched.kmeans / (trained_on * searched.lists)
    rates["codes"] = searched.codes / min(len(keys), CODE_SAMPLE)
    rates["compare"] = searched.compare / (len(own) * searched.lists)
    rates["encode"] = max(0.0, searched.add / len(keys) - rates["compare"] * searched.lists)
    rates["merge"] = searched.merge / ids.size
    rates["scan"] = max(0.0, searched.search - searched.compare) / max(searched.visited, 1)
    nprobe = min(settings.index.probes, searched.lists)
    rates["imbalance"] = searched.visited / (len(own) * nprobe * len(keys) / searched.lists)
    hit = labels[ids[:, 1:]] == labels[own][:, None]
    rates["fit"], _ = timed(fit_temperature, searched.distances[:, 1:], ids[:, 1:], hit)
    temperature = float(np.median(searched.distances)) / 10 or 1.0
    used, threshold = np.unique(labels), settings.targets.min_probability
    arguments = (searched.distances, ids, own, labels, used, temperature, threshold)
    rates["aggregate"] = timed(sparse_targets, *arguments)[0] / ids.size
    return rates


@dataclass(frozen=True)
class TimedSearch:
    """Seconds of an index's training, filling and search, and the neighbours."""

    kmeans: float  # training of the lists
    codes: float  # training of the codes of keys
    add: float
    search: float
    compare: float  # the share of the search that looks for the lists
    merge: float  # merging the results of two parts
    lists: int
    visited: int  # keys with which queries were compared
    distances: np.ndarray
    ids: np.ndarray


def time_search(keys: np.ndarray, own: np.ndarray, kind: str, k: int, nprobe: int) -> TimedSearch:
    """Build an index over a few keys, of the codes that a factory string names; search rows own.

    On the GPU, if this process has one that faiss can use for it, as a build would.
    """

    def there(index: Any) -> Any:
        return index if max(k, nprobe) > GPU_LARGEST_K else to_gpu(index)

    data, code = np.asarray(keys, dtype=np.float32), kind.split(",")[-1]
    queries = data[own]
    train = codes = compare = 0.0
    if code == "Flat":
        lists, index, visited = 1, there(faiss.IndexFlatL2(data.shape[1])), len(own) * len(data)
        add, _ = timed(index.add, data)
    else:
        lists = max(1, min(int(len(data) ** 0.5), len(data) // 40))
        index = faiss.index_factory(data.shape[1], f"IVF{lists},{code}")
        train, centroids = timed(kmeans, data, lists, 0)
        ivf = inverted(index)
        ivf.quantizer.add(centroids)
        codes, _ = timed(index.train, data[:CODE_SAMPLE])
        ivf.nprobe = nprobe = min(nprobe, lists)
        index = there(index)
        add, _ = timed(index.add, data)
        quantizer = there(faiss.IndexFlatL2(data.shape[1]))
        quantizer.add(centroids)
        quantizer.search(queries, nprobe)  # warms up
        compare, (_, near) = timed(quantizer.search, queries, nprobe)
        in_lists = np.bincount(quantizer.search(data, 1)[1][:, 0], minlength=lists)
        visited = int(in_lists[near].sum())
        index.nprobe = nprobe
    search, (distances, ids) = timed(index.search, queries, k)
    two = np.stack([distances, distances]), np.stack([ids, ids])
    merge, _ = timed(faiss.merge_knn_results, *two)
    return TimedSearch(train, codes, add, search, compare, merge, lists, visited, distances, ids)
