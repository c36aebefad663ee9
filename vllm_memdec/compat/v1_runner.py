"""The V1 runner: it does not tell a model whose tokens it runs, nor how the step is executed.

GPUModelRunner._prepare_inputs  The batch takes over the requests of a step.
GPUModelRunner._dummy_run  The batch takes over that there are none.
GPUModelRunner._determine_batch_execution_and_padding  What is executed how decides which memories
    run; full graphs are chosen by them.
GPUModelRunner._capture_cudagraphs  Full graphs are captured for several sets of memories.
GPUModelRunner.initialize_kv_cache  The composite learns how many groups the KV cache has, the
    drafter whose runner it is, and the sampler gets the logits processors that vLLM leaves out
    beside drafts.

May go with the V1 runner: on V2 a class of the model's own has all this, see v2_runner.py.
Relies on the runner's tables of requests, and on the dictionary of graphs in CUDAGraphWrapper.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_memdec.batch import Batch, Draft
from vllm_memdec.compat import v1_sampling
from vllm_memdec.compat.hooks import wrap

SIGNATURES = {
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs": (
        "self scheduler_output num_scheduled_tokens"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._determine_batch_execution_and_padding": (
        "self num_tokens num_reqs num_scheduled_tokens_np max_num_scheduled_tokens "
        "use_cascade_attn allow_microbatching force_eager force_uniform_decode force_has_lora "
        "force_num_active_loras num_encoder_reqs"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._capture_cudagraphs": (
        "self batch_descriptors cudagraph_runtime_mode profiler"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.initialize_kv_cache": (
        "self kv_cache_config is_profiling kv_cache_allocation_context"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.get_model": "self",
}
ATTRIBUTES = {
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": (
        "_dummy_run device drafter input_batch max_model_len positions query_start_loc requests "
        "uses_mrope vllm_config"
    ),
    "vllm.compilation.cuda_graph:CUDAGraphWrapper": "concrete_cudagraph_entries",
    "vllm.v1.worker.gpu_input_batch:InputBatch": (
        "logitsprocs num_computed_tokens_cpu num_reqs req_ids token_ids_cpu"
    ),
    "vllm.v1.worker.gpu_input_batch:CachedRequestState": (
        "mm_features num_tokens output_token_ids sampling_params"
    ),
}


def install() -> None:
    """Hook the runner; called by the composite, so only in a worker that serves it."""
    wrap(GPUModelRunner, "_prepare_inputs", _inputs)
    wrap(GPUModelRunner, "_dummy_run", _dummy_run)
    wrap(GPUModelRunner, "_determine_batch_execution_and_padding", _mode)
    wrap(GPUModelRunner, "_capture_cudagraphs", _capture)
    wrap(GPUModelRunner, "initialize_kv_cache", _groups)


def _batch(runner: Any) -> Batch | None:
    batch = getattr(runner.get_model(), "batch", None)
    return batch if isinstance(batch, Batch) else None


def _inputs(original: Callable) -> Callable:
    def _prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if (batch := _batch(self)) is not None:
            choices = self.get_model().choices
            names = self.input_batch.req_ids[: self.input_batch.num_reqs]
            states = [self.requests[name] for name in names]
            chosen = [
                choices.placed(state.sampling_params.extra_args, state.mm_features)
                for state in states
            ]
            memory_BS, alpha_BS = zip(*chosen, strict=True)
            starts = torch.from_numpy(self.query_start_loc.np[: len(names) + 1])
            lengths_B = starts.diff()
            if self.uses_mrope:
                batch.write_positions(self.positions[: starts[-1]])
            reusable = None
            if batch.draft is not None:
                reusable = _reusable_rows(self.input_batch, batch.draft, lengths_B)
            computed_B = torch.from_numpy(self.input_batch.num_computed_tokens_cpu[: len(names)])
            batch.write(
                torch.tensor(memory_BS),
                torch.tensor(alpha_BS),
                lengths_B,
                reusable,
                starts_B=self.get_model().first_positions(computed_B),
            )
            if choices.drafts:
                ends = batch.length_M[[first for first, *_ in memory_BS]].tolist()
                left = [_remaining(self, choices, *each) for each in zip(states, ends, strict=True)]
                batch.track(names, left)
        return result

    return _prepare_inputs


def _remaining(runner: Any, choices: Any, state: Any, length: int) -> int:
    """Return how many tokens a request may still get, 0 if it is not drafted for.

    length: the positions of its memory, whose drafts end with them.
    """
    params = state.sampling_params
    if not choices.drafted(params, state.mm_features):
        return 0
    # A step gives a token more than drafts, and the last position of the memory drafts one.
    in_all = min(runner.max_model_len, length + 2) - state.num_tokens
    return max(0, min(params.max_tokens - len(state.output_token_ids), in_all))


def _reusable_rows(input_batch: Any, draft: Draft, lengths_B: torch.Tensor) -> list[range]:
    """Return for each request of a batch the draft's rows of its first tokens."""
    rows = []
    for number, length in enumerate(lengths_B.tolist()):
        start = int(input_batch.num_computed_tokens_cpu[number])
        tokens = input_batch.token_ids_cpu[number, start : start + length].tolist()
        rows.append(draft.reusable_rows(input_batch.req_ids[number], start, tokens))
    return rows


def _dummy_run(original: Callable) -> Callable:
    def _dummy_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (batch := _batch(self)) is not None:
            batch.reset()
        return original(self, *args, **kwargs)

    return _dummy_run


def _mode(original: Callable) -> Callable:
    def _determine_batch_execution_and_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode, *rest = original(self, *args, **kwargs)
        if (batch := _batch(self)) is not None:
            if not batch.is_dummy:
                batch.plan(mode.name)
            # What was captured for the memories that this batch runs.
            if (sets := getattr(self.model, "memdec_sets", None)) is not None:
                self.model.concrete_cudagraph_entries = sets.setdefault((*batch.shares,), {})
        return mode, *rest

    return _determine_batch_execution_and_padding


def _groups(original: Callable) -> Callable:
    def initialize_kv_cache(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        if _batch(self) is not None:
            self.get_model().log_groups(kv_cache_config)
            if self.get_model().drafter is not None:
                self.drafter.runner = self  # whose block tables it reads
                v1_sampling.complete(self.input_batch.logitsprocs, self.vllm_config, self.device)
        return original(self, kv_cache_config, *args, **kwargs)

    return initialize_kv_cache


def _capture(original: Callable) -> Callable:
    def _capture_cudagraphs(
        self: Any, batch_descriptors: Any, cudagraph_runtime_mode: Any, *args: Any, **kwargs: Any
    ) -> None:
        batch = _batch(self)
        if batch is None or cudagraph_runtime_mode.name != "FULL":
            return original(self, batch_descriptors, cudagraph_runtime_mode, *args, **kwargs)
        # By set of memories, in place of the wrapper's one dictionary of graphs.
        sets = self.model.__dict__.setdefault("memdec_sets", {})
        try:
            for memories in batch.sets:
                batch.run_dummies_with(memories)
                for descriptor in batch_descriptors:  # of an earlier capture
                    sets.get(memories, {}).pop(descriptor, None)
                original(self, batch_descriptors, cudagraph_runtime_mode, *args, **kwargs)
        finally:
            batch.run_dummies_with(batch.sets[0])

    return _capture_cudagraphs
