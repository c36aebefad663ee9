"""Index stage: datastore keys -> a faiss index whose ids are row numbers.

Squared L2 distance, as in the paper. Small datastores are searched exactly; larger ones get
inverted lists with 8-bit scalar quantisation, very large ones product quantisation.
"""

from pathlib import Path
from typing import Any

import faiss
import numpy as np

from vllm_memdec.train.artifacts import write_atomic
from vllm_memdec.train.config import IndexSettings
from vllm_memdec.train.datastore import shards
from vllm_memdec.train.progress import Progress

FLAT_BELOW = 10_000  # keys: brute force is faster than training lists
PQ_ABOVE = 20_000_000  # keys: 8-bit scalars no longer fit in memory comfortably
PQ_KEYS = 39 * 256  # faiss's minimum for sound codes of 8 bits
PQ_BYTES = 64  # a key, as in the paper
POINTS_PER_LIST = 256  # faiss samples no more for k-means


def factory_string(kind: str, n_keys: int, width: int) -> str:
    """Return the faiss factory string for a kind of index, "auto" choosing by the key count."""
    if kind == "auto":
        kind = "flat" if n_keys < FLAT_BELOW else "sq8" if n_keys < PQ_ABOVE else "pq"
    if kind == "flat":
        return "Flat"
    # About sqrt(n) lists; at least 40 keys each, faiss's minimum for a sound centroid.
    lists = max(1, min(int(n_keys**0.5), n_keys // 40))
    if kind == "sq8":
        return f"IVF{lists},SQ8"
    if n_keys < PQ_KEYS:
        raise ValueError(
            f"index.kind pq needs {PQ_KEYS} keys to train on, this corpus has {n_keys}: choose sq8."
        )
    codes = max(m for m in range(1, PQ_BYTES + 1) if width % m == 0)
    return f"OPQ{codes},IVF{lists},PQ{codes}"


def to_gpu(index: Any) -> Any:
    """Return the index on all GPUs if this faiss has any, else unchanged."""
    if getattr(faiss, "get_num_gpus", lambda: 0)() == 0:
        return index
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    return faiss.index_cpu_to_all_gpus(index, options)


def to_cpu(index: Any) -> Any:
    """Return the index in host memory, where it can be written."""
    return faiss.index_gpu_to_cpu(index) if hasattr(faiss, "index_gpu_to_cpu") else index


def build_index(settings: IndexSettings, datastore: Path, work: Path, progress: Progress) -> None:
    """Write index.faiss, trained on an even sample of the keys and filled with all of them."""
    keys = shards(datastore, "keys")
    n_keys, width = sum(len(k) for k in keys), keys[0].shape[1]
    trained = work / "trained.faiss"
    if (work / "index.faiss").exists():  # killed just before the end
        trained.unlink(missing_ok=True)
        return
    if not trained.exists():
        description = factory_string(settings.kind, n_keys, width)
        index = faiss.index_factory(width, description)
        if not index.is_trained:
            ivf = faiss.extract_index_ivf(index)
            ivf.cp.seed = settings.seed
            stride = max(1, n_keys // (POINTS_PER_LIST * ivf.nlist))
            sample = np.concatenate([k[::stride].astype(np.float32) for k in keys])
            with progress.task(f"index: training {description}", 1, "pass") as advance:
                index = to_gpu(index)
                index.train(sample)
                index = to_cpu(index)
                advance(1)
        write_atomic(trained, lambda p: faiss.write_index(index, str(p)))
    index = to_gpu(faiss.read_index(str(trained)))
    with progress.task("index: adding", n_keys, "keys") as advance:
        for shard in keys:
            index.add(shard.astype(np.float32))
            advance(len(shard))
    index = to_cpu(index)
    write_atomic(work / "index.faiss", lambda p: faiss.write_index(index, str(p)))
    trained.unlink()


def load_index(folder: Path, probes: int) -> Any:
    """Return the index of an artifact, on GPUs where there are any, visiting `probes` lists."""
    index = faiss.read_index(str(folder / "index.faiss"))
    if not isinstance(index, faiss.IndexFlat):
        faiss.extract_index_ivf(index).nprobe = probes
    return to_gpu(index)
