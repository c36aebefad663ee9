"""What faiss does on a GPU: whether it can, with which options, and the way there and back."""

import functools
import logging
import subprocess
import sys
from typing import Any

import faiss
import torch

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.executor.executor import Executor

GPU_LARGEST_K = 2048  # neighbours, or lists to visit, that faiss returns on a GPU, at most
# Numbers of a key a byte of its code, for which faiss needs no tables made in advance.
GPU_PQ_WIDTHS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32)
GPU_TRIAL = """
import faiss, numpy
index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, faiss.IndexFlatL2(8))
index.add(numpy.eye(8, dtype="float32"))
assert index.search(numpy.eye(8, dtype="float32"), 1)[1].ravel().tolist() == list(range(8))
"""


@functools.cache
def no_gpu() -> str:
    """Return why faiss uses no GPU in this process, "" if it uses the one that torch has.

    Tried in another process: a faiss without kernels for a GPU ends the process that asks it.
    """
    if not torch.cuda.is_available():
        return "there is no GPU"
    if not hasattr(faiss, "StandardGpuResources"):
        return "this faiss was built without CUDA"
    return failure(GPU_TRIAL)


def failure(code: str) -> str:
    """Return the last line that Python code ends with in another process if it fails, else ""."""
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if tried.returncode == 0:
        return ""
    return (tried.stderr.strip().splitlines() or [f"faiss ended with {tried.returncode}"])[-1]


def check_width(neighbours: int, nprobe: int, executor: Executor) -> None:
    """Refuse, before hours are spent, a search too wide for the GPUs that would do it."""
    if max(neighbours + 1, nprobe) > GPU_LARGEST_K and not executor.call(no_gpu):
        raise MemdecError(
            f"targets.neighbours is {neighbours} and index.probes {nprobe}, on a GPU faiss finds "
            f"at most {GPU_LARGEST_K - 1} and visits {GPU_LARGEST_K} lists: lower them, or hide "
            'the GPUs (CUDA_VISIBLE_DEVICES="") to search on CPUs.'
        )


def gpu_options(index: Any) -> dict[str, bool]:
    """Return the options with which faiss takes an index to a GPU."""
    options = {"use_cuvs": False}  # cuVS knows no 8-bit scalars
    ivf = faiss.try_extract_index_ivf(index)
    lists = None if ivf is None else faiss.downcast_index(ivf)
    if isinstance(lists, faiss.IndexIVFPQ):
        # A query's table of 64-byte codes has 64 x 256 entries: 32 kB in fp16; in float32 it is
        # larger than the 48 kB of shared memory.
        options["useFloat16"] = True
        # Tables made in advance take 32 kB a list, and their fp16 is of larger numbers.
        options["usePrecomputed"] = lists.pq.dsub not in GPU_PQ_WIDTHS
    return options


def compare_all_lists(index: Any) -> None:
    """Replace the graph that finds an index's lists by their centroids: GPUs have no graphs."""
    ivf = faiss.try_extract_index_ivf(index)
    graph = None if ivf is None else faiss.downcast_index(ivf.quantizer)
    if ivf is None or not isinstance(graph, faiss.IndexHNSW):
        return
    graph.own_fields = False  # the centroids stay, as the index's own
    ivf.quantizer = graph.storage
    # To own what faiss made (thisown) ends in a crash: SWIG 4.5 counts its references too low.
    graph.__swig_destroy__(graph)  # type: ignore[attr-defined]  # SWIG's: no stub has it


def to_gpu(index: Any, resources: Any = None) -> Any:
    """Return the index on this process's GPU if faiss has one and takes it there, else unchanged.

    On one only: a worker of ray_executor.py has one. resources: faiss's, 1.5 GB of its memory.
    """
    if no_gpu():
        return index
    options = faiss.GpuClonerOptions()
    for name, value in gpu_options(index).items():
        assert hasattr(options, name), name  # one that faiss does not know it would not miss
        setattr(options, name, value)
    compare_all_lists(index)
    try:
        return faiss.index_cpu_to_gpu(resources or faiss.StandardGpuResources(), 0, index, options)
    except RuntimeError as error:
        logging.getLogger(__name__).warning("an index stays on CPUs: %s", error)
        return index


def to_cpu(index: Any) -> Any:
    """Return the index in host memory, where it can be written."""
    return faiss.index_gpu_to_cpu(index) if hasattr(faiss, "index_gpu_to_cpu") else index
