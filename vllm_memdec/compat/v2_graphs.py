"""Full CUDA graphs of the V2 runner: each captured for several sets of memories, replayed by batch.

ModelCudaGraphManager.capture is wrapped; the manager of a composite becomes a subclass that
captures every full graph once for each set of `Batch.sets` and replays the one of the batch. A
graph replays all that ran at its capture, so with one set every memory would run on every row of
every step, also in a server full of requests without a memory.

May go when vLLM lets a model name an axis of its graphs, as it does for the number of LoRAs.
Relies on the manager's lists of what is to be captured and of what fits a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CudaGraphManager,
    ModelCudaGraphManager,
)

from vllm_memdec.batch import Batch
from vllm_memdec.compat.hooks import wrap

GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
SIGNATURES = {
    f"{GRAPHS}:CudaGraphManager.capture": "self create_forward_fn progress_bar_desc",
    f"{GRAPHS}:CudaGraphManager.run_fullgraph": "self desc",
    f"{GRAPHS}:CudaGraphManager.dispatch": (
        "self num_reqs num_tokens uniform_token_count num_active_loras max_query_len num_ubatches"
    ),
    f"{GRAPHS}:ModelCudaGraphManager.capture": (
        "self model model_state input_buffers intermediate_tensors block_tables attn_groups "
        "kv_cache_config pcp_manager has_lora use_aux_hidden_state_outputs lora_capture_hook "
        "progress_bar_desc"
    ),
}
ATTRIBUTES = {
    f"{GRAPHS}:CudaGraphManager": (
        "_candidates _capture_descs compilation_config cudagraph_mode decode_query_len graphs "
        "lora_capture_cases max_num_reqs"
    ),
    f"{GRAPHS}:BatchExecutionDescriptor": (
        "cg_mode num_active_loras num_reqs num_tokens num_ubatches uniform_token_count "
        "max_query_len"
    ),
}


@dataclass(frozen=True)
class MemoryDescriptor(BatchExecutionDescriptor):
    """A full graph of vLLM's, for one set of memories."""

    memories: tuple[int, ...] = ()


class MemoryGraphs(CudaGraphManager):
    """Stands between a manager of vLLM's and its base class: a graph for each set of memories."""

    memdec_batch: Batch | None = None
    memdec_sets: Sequence[tuple[int, ...]] = ()

    def adopt(self, batch: Batch, sets: list[tuple[int, ...]]) -> None:
        """Capture full graphs for these sets, and replay them by what the batch asks for."""
        self.memdec_batch, self.memdec_sets = batch, sets
        if (full := self._capture_descs.get(CUDAGraphMode.FULL)) is None:
            return
        # All memories first: vLLM's memory profile samples the first graphs.
        self._capture_descs[CUDAGraphMode.FULL] = [
            MemoryDescriptor(**vars(desc), memories=memories) for memories in sets for desc in full
        ]

    def capture(self, create_forward_fn: Callable, *args: Any, **kwargs: Any) -> None:
        """Capture, with the batch asking for the memories of each graph."""
        batch = self.memdec_batch
        if batch is None:
            return super().capture(create_forward_fn, *args, **kwargs)

        def create(desc: BatchExecutionDescriptor, warmup: bool) -> Callable:
            batch.run_dummies_with(getattr(desc, "memories", batch.sets[0]))
            return create_forward_fn(desc, warmup)

        try:
            super().capture(create, *args, **kwargs)
        finally:
            batch.run_dummies_with(batch.sets[0])

    def run_fullgraph(self, desc: BatchExecutionDescriptor) -> Any:
        """Replay the graph of the memories that the batch runs."""
        if self.memdec_batch is not None:
            desc = MemoryDescriptor(**vars(desc), memories=tuple(self.memdec_batch.shares))
        return super().run_fullgraph(desc)


# Both bases have capture(), with other arguments: the first calls the second's.
class CompositeGraphs(ModelCudaGraphManager, MemoryGraphs):  # type: ignore[misc]
    """The manager of a composite's graphs."""

    def add_single_tokens(self) -> None:
        """Add graphs of one token a request, for requests that are not drafted for.

        vLLM captures decoding with as many tokens a request as a step verifies.
        """
        mode = self.cudagraph_mode
        if mode.decode_mode() != CUDAGraphMode.FULL or mode.mixed_mode() == CUDAGraphMode.FULL:
            return
        full = self._capture_descs.setdefault(CUDAGraphMode.FULL, [])
        sizes = sorted(self.compilation_config.cudagraph_capture_sizes or [])
        sizes = [size for size in sizes if size <= self.max_num_reqs]
        for loras in self.lora_capture_cases:
            start = 1
            for size in sizes:
                desc = BatchExecutionDescriptor(
                    cg_mode=CUDAGraphMode.FULL,
                    num_tokens=size,
                    num_reqs=size,
                    uniform_token_count=1,
                    num_active_loras=loras,
                )
                full.append(desc)
                for tokens in range(start, size + 1):
                    self._candidates.setdefault((tokens, loras), []).insert(0, desc)
                start = size + 1
        # vLLM allocates the buffer of results by the first graph, which has to be the largest.
        full.sort(key=lambda desc: desc.num_tokens, reverse=True)


def install() -> None:
    """Hook the V2 runner's graphs; called by the composite, so only in a worker that serves it."""
    wrap(ModelCudaGraphManager, "capture", _captured)


def _captured(original: Callable) -> Callable:
    def capture(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        batch = getattr(model, "batch", None)
        if isinstance(batch, Batch) and not isinstance(self, CompositeGraphs):
            self.__class__ = CompositeGraphs
            # Of a hybrid vLLM captures as many tokens as a step verifies, and no fewer.
            if model.drafter is not None and not self.vllm_config.model_config.is_hybrid:
                self.add_single_tokens()
            self.adopt(batch, batch.sets)
        return original(self, model, *args, **kwargs)

    return capture
