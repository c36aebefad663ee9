"""What wraps or exchanges parts of vLLM, beside graphs.py and v2_drafting.py: what, and how.

Checked by running vLLM 0.32.0, and 0.33.0's Python files over the compiled extensions of 0.32.0.
SIGNATURES, CHANGED and ATTRIBUTES record what all three files rely on;
tests/serving/test_compat.py compares them with the vLLM that is installed.

- EngineArgs.create_model_config (front end): the checks have to run before workers start, and where
  the settings model_impl and additional_config meet. It also swaps in the class to load.
- EngineArgs.create_engine_config (front end): what depends on the runner that vLLM has chosen.
- AsyncScheduler._update_after_schedule and Scheduler.update_draft_token_ids (engine core): requests
  without a memory are not drafted for.
- InputProcessor._validate_params (front end): refuses a bad weight before the engine sees it. A
  logits processor could do the same, but vLLM refuses those beside a draft model.
- InputProcessor.process_inputs (front end): the memory becomes part of the request's cache salt.
  Blocks of the KV cache hold keys and values of the memory that ran, and of no other, so a request
  may only reuse those of requests with the same memory.
- OpenAIServingModels.show_available_models (front end): /v1/models names the memories.
- GPUModelRunner._prepare_inputs and ._dummy_run (V1 worker): V1 does not tell a model whose tokens
  it runs; ._determine_batch_execution_and_padding and ._capture_cudagraphs: nor how the step is
  executed. Full graphs are captured for several sets of memories. .initialize_kv_cache: how many
  groups the KV cache has, which V2 tells the class below.
- ModelCudaGraphManager.capture (V2 worker), in graphs.py: the same.
- DefaultModelState (V2 worker): V2 does, through a subclass named by get_model_state_cls().
- AttentionBackend.get_builder_cls (both workers): a memory's layers get their attention metadata
  for their own requests only, through a subclass of the backend, as vLLM's fast prefill does it.
- ForwardContext.slot_mapping: narrowed alike while a memory runs.
- parallel_state._TP: exchanged for a group of one for a memory that every rank has whole.
- LoRAModelRunnerMixin.load_lora_model (both workers): adapters go on the base alone.
- DraftModelProposer.load_model (V1 worker) and DraftModelSpeculator.load_model (V2, in
  v2_drafting.py): the drafter becomes a subclass that drafts with the composite's own memories.
- rejection_sampler.expand_batch_to_tokens (V1 worker on a CPU): mended, see mend_cpu_speculation().
"""

import contextlib
import copy
import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from vllm_memdec import config, state
from vllm_memdec.drafting import Draft, DraftLength
from vllm_memdec.state import MOST_SAID

# Fields of vLLM's CommonAttentionMetadata: of requests or tokens, and those that stay or
# belong to what is refused at start (context parallelism, fast prefill, encoders, images, Mamba).
NARROWED = (
    "query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens",
    "max_query_len", "block_table_tensor", "slot_mapping", "positions", "is_prefilling",
    "seq_lens_cpu_upper_bound", "req_idx", "rswa_prefix_lens", "_num_computed_tokens_cache",
    "_token_to_req_indices_cache",
)  # fmt: skip
NOT_NARROWED = (
    "max_seq_len", "causal", "logits_indices_padded", "num_logits_indices", "max_logits_per_req",
    "encoder_seq_lens", "encoder_seq_lens_cpu", "dcp_local_seq_lens",
    "dcp_local_seq_lens_cpu_upper_bound", "mm_req_doc_ranges", "replayssm_decode_base_cpu",
)  # fmt: skip
GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
V2_DRAFTER = "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator:StandaloneARSpeculator"
SIGNATURES = {
    "vllm.engine.arg_utils:EngineArgs.create_model_config": "self",
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": "self usage_context headless",
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule": (
        "self scheduler_output"
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids": "self draft_token_ids",
    "vllm.v1.engine.input_processor:InputProcessor._validate_params": "self params supported_tasks",
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": (
        "self request_id prompt params supported_tasks arrival_time lora_request "
        "tokenization_kwargs trace_headers priority data_parallel_rank resumable session_id "
        "kv_hints"
    ),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.show_available_models": "self",
    "vllm.v1.metrics.loggers:StatLoggerBase.record": (
        "self scheduler_stats iteration_stats mm_cache_stats engine_idx"
    ),
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
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.initialize_kv_cache": (
        "self kv_cache_config block_tables"
    ),
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_inputs": (
        "self input_batch req_states"
    ),
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_dummy_inputs": (
        "self num_reqs num_tokens"
    ),
    "vllm.v1.worker.gpu.block_table:BlockTables.compute_slot_mappings": (
        "self idx_mapping query_start_loc positions num_tokens_padded out"
    ),
    "vllm.v1.worker.gpu.attn_utils:build_slot_mappings_by_layer": "slot_mappings kv_cache_config",
    "vllm.v1.worker.utils:AttentionGroup.map_to_kernel_block_table": "self block_table ubatch_idx",
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
    "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils:"
    "SpeculatorCudaGraphManager.capture": (
        "self forward_fn model_state input_buffers block_tables attn_groups kv_cache_config "
        "progress_bar_desc specialize_spec_tokens"
    ),
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn": (
        "self input_batch cudagraph_mode block_tables slot_mappings attn_groups kv_cache_config "
        "for_capture ubatch_idx model_specific_attn_metadata"
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build_for_cudagraph_capture": (
        "self common_attn_metadata"
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.update_draft_decode_metadata": (
        "self metadata"
    ),
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model": (
        "self model vllm_config device"
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder": (
        "kv_cache_spec layer_names vllm_config device"
    ),
    "vllm.v1.attention.backend:subclass_attention_backend": (
        "name_prefix attention_backend_cls builder_cls"
    ),
    "vllm.forward_context:override_forward_context": "forward_context",
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build": (
        "self common_prefix_len common_attn_metadata fast_build"
    ),
    "vllm.distributed.parallel_state:init_model_parallel_group": (
        "group_ranks local_rank backend use_message_queue_broadcaster group_name "
        "use_device_communicator use_all2all"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.get_model": "self",
    "vllm.v1.spec_decode.draft_model:DraftModelProposer.load_model": "self target_model",
    "vllm.v1.spec_decode.draft_model:DraftModelProposer.propose": (
        "self num_speculative_tokens target_token_ids target_positions target_hidden_states "
        "next_token_ids token_indices_to_sample common_attn_metadata sampling_metadata "
        "mm_embed_inputs num_rejected_tokens_gpu slot_mappings"
    ),
    "vllm.v1.spec_decode.draft_model:DraftModelProposer._update_positions_dependent_metadata": (
        "self positions common_attn_metadata batch_size input_batch_size block_size"
    ),
    "vllm.v1.spec_decode.draft_model:DraftModelProposer.build_per_group_and_layer_attn_metadata": (
        "self common_attn_metadata draft_index"
    ),
    "vllm.v1.spec_decode.draft_model:DraftModelProposer._sample_draft_tokens": (
        "self hidden_states sampling_metadata"
    ),
    "vllm.v1.spec_decode.draft_model:DraftModelProposer._get_slot_mapping": (
        "self num_tokens slot_mapping"
    ),
    "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.load_model": (
        "self target_model"
    ),
    f"{V2_DRAFTER}._accepted_last_indices": "self input_batch num_rejected num_reqs",
    f"{V2_DRAFTER}._copy_request_inputs": ("self num_reqs idx_mapping temperature seeds dummy_run"),
    f"{V2_DRAFTER}._update_draft_decode_metadata": "self attn_metadata num_reqs",
    f"{V2_DRAFTER}.propose": (
        "self input_batch attn_metadata slot_mappings last_hidden_states aux_hidden_states "
        "num_sampled num_rejected last_sampled next_prefill_tokens temperature seeds "
        "dp_sync_state dummy_run skip_attn_for_dummy_run mm_inputs is_profile "
        "num_speculative_tokens"
    ),
    f"{V2_DRAFTER}._build_uniform_attn_metadata": (
        "self batch_desc num_reqs num_query_per_req seq_lens_cpu_upper_bound step causal "
        "dcp_local_seq_lens"
    ),
    f"{V2_DRAFTER}.sample_draft": (
        "self hidden_states sample_src_positions idx_mapping temperature seeds draft_step "
        "draft_logits spec_step_idx"
    ),
    "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens": (
        "x cu_num_tokens num_tokens replace_from replace_to"
    ),
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState": (
        "vllm_config model encoder_cache device"
    ),
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.add_request": (
        "self req_index new_req_data"
    ),
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.preprocess_state": (
        "self input_batch block_tables kv_cache_config num_computed_tokens"
    ),
    "vllm.model_executor.model_loader.utils:initialize_model": (
        "vllm_config prefix model_class model_config"
    ),
    "vllm.config:VllmConfig.with_hf_config": "self hf_config architectures",
    "vllm.compilation.backends:set_model_tag": "tag is_encoder",
}
# Signatures that a later release changed, in full, by release: what it has in place of the above.
CHANGED = {
    (0, 33): {f"{V2_DRAFTER}.sample_draft": SIGNATURES[f"{V2_DRAFTER}.sample_draft"] + " num_steps"}
}
ATTRIBUTES = {
    "vllm.v1.spec_decode.draft_model:DraftModelProposer": (
        "_draft_attn_layer_names _last_draft_probs arange block_size dummy_run input_ids "
        "token_arange_np"
    ),
    V2_DRAFTER: (
        "arange_gpu attn_groups block_tables current_draft_step draft_attn_layer_names "
        "draft_logits draft_tokens idx_mapping input_buffers kv_cache_config max_model_len "
        "model_state num_speculative_steps seeds supports_decode_metadata_update temperature"
    ),
    f"{GRAPHS}:CudaGraphManager": (
        "_candidates _capture_descs compilation_config cudagraph_mode decode_query_len graphs "
        "lora_capture_cases max_num_reqs"
    ),
    f"{GRAPHS}:BatchExecutionDescriptor": (
        "cg_mode num_active_loras num_reqs num_tokens num_ubatches uniform_token_count "
        "max_query_len"
    ),
    "vllm.compilation.cuda_graph:CUDAGraphWrapper": "concrete_cudagraph_entries",
    "vllm.v1.core.sched.scheduler:Scheduler": "requests vllm_config",
    "vllm.v1.request:Request": "sampling_params spec_token_ids",
    "vllm.v1.worker.gpu.block_table:BlockTables": "input_block_tables",
    "vllm.engine.arg_utils:EngineArgs": (
        "additional_config async_scheduling convert decode_context_parallel_size enable_dbo "
        "enable_prompt_embeds hf_overrides max_model_len model_impl pipeline_parallel_size "
        "prefill_context_parallel_size runner spec_method speculative_config ubatch_size "
        "kv_sharing_fast_prefill tensor_parallel_size spec_model"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": (
        "_dummy_run input_batch query_start_loc requests"
    ),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": "input_processor",
    "vllm.v1.metrics.stats:FinishedRequestStats": (
        "num_generation_tokens num_prompt_tokens request_id"
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder": "supports_update_block_table",
    # All of it: what vLLM keeps for each request or token has to be narrowed.
    "vllm.v1.attention.backend:CommonAttentionMetadata": " ".join((*NARROWED, *NOT_NARROWED)),
    "vllm.forward_context:ForwardContext": "slot_mapping",
    "vllm.v1.engine:EngineCoreRequest": "cache_salt",
    "vllm.v1.worker.gpu_input_batch:InputBatch": "num_reqs req_ids",
    "vllm.v1.worker.gpu_input_batch:CachedRequestState": "sampling_params",
    "vllm.v1.worker.gpu.input_batch:InputBatch": "idx_mapping_np query_start_loc_np",
    "vllm.v1.core.sched.output:NewRequestData": "sampling_params",
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState": "max_num_reqs",
}


def wrap(owner: type, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace owner.name by make(original), once; unwrap() undoes it."""
    original = getattr(owner, name)
    if not hasattr(original, "memdec_original"):
        wrapper = functools.wraps(original)(make(original))
        wrapper.memdec_original = original
        setattr(owner, name, wrapper)


def unwrap(owner: type, name: str) -> None:
    """Put the original method back."""
    wrapper = getattr(owner, name)
    setattr(owner, name, getattr(wrapper, "memdec_original", wrapper))


def install_front_end() -> None:
    """Hook the places that every start and every request pass through."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.input_processor import InputProcessor

    wrap(EngineArgs, "create_model_config", _checked_model_config)
    wrap(EngineArgs, "create_engine_config", _checked_engine_config)
    wrap(InputProcessor, "_validate_params", _checked_params)
    wrap(InputProcessor, "process_inputs", _salted_inputs)


def _checked_model_config(original: Callable) -> Callable:
    def create_model_config(self: Any) -> Any:
        return config.create_model_config(self, original)

    return create_model_config


def _checked_engine_config(original: Callable) -> Callable:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        config.check_engine(vllm_config)
        return vllm_config

    return create_engine_config


def install_scheduler() -> None:
    """Hook the scheduler, in whichever process it is: it plans who is drafted for."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(AsyncScheduler, "_update_after_schedule", _planned_drafts)
    wrap(Scheduler, "update_draft_token_ids", _taken_drafts)


def _planned_drafts(original: Callable) -> Callable:
    def _update_after_schedule(self: Any, scheduler_output: Any) -> None:
        original(self, scheduler_output)
        _drop_drafts(self, scheduler_output.num_scheduled_tokens)

    return _update_after_schedule


def _taken_drafts(original: Callable) -> Callable:
    def update_draft_token_ids(self: Any, draft_token_ids: Any) -> None:
        original(self, draft_token_ids)
        _drop_drafts(self, draft_token_ids.req_ids)

    return update_draft_token_ids


def _drop_drafts(scheduler: Any, names: Iterable[str]) -> None:
    """Plan no drafts for requests without a memory, where the memories draft."""
    if (choices := _choices(scheduler)) is None or not choices.drafts:
        return
    for name in names:
        request = scheduler.requests.get(name)
        if request is None or request.sampling_params is None or not request.spec_token_ids:
            continue
        if choices.resolve(request.sampling_params.extra_args)[0] == state.NOBODY:
            request.spec_token_ids = []


def _checked_params(original: Callable) -> Callable:
    from vllm.exceptions import VLLMValidationError

    class RequestError(VLLMValidationError, ValueError):
        """HTTP 400 to a client; the ValueError it is to a caller of LLM."""

    def _validate_params(self: Any, params: Any, supported_tasks: Any) -> Any:
        choices = _choices(self)
        try:
            state.check_extra_args(getattr(params, "extra_args", None), choices or None)
        except ValueError as error:
            raise RequestError(str(error)) from None
        return original(self, params, supported_tasks)

    return _validate_params


def _choices(processor: Any) -> state.Choices | None:
    """Return what the server of an InputProcessor or scheduler offers; None without a memory."""
    if not hasattr(processor, "memdec_choices"):
        settings = config.memdec_block(processor.vllm_config.additional_config)
        processor.memdec_choices = settings and state.Choices.of(
            config.MemDecConfig.parse(settings)
        )
    return processor.memdec_choices


def _salted_inputs(original: Callable) -> Callable:
    from vllm_memdec import describe

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if (choices := _choices(self)) and request.sampling_params is not None:
            name = choices.name(request.sampling_params.extra_args)
            # A name holds no NUL, so two pairs of name and salt never give the same text.
            request.cache_salt = f"{name}\0{request.cache_salt or ''}"
            describe.remember(request.request_id, name)
        return request

    return process_inputs


def install_server() -> None:
    """Hook the HTTP server; called by the metrics of an asynchronous engine, which servers have."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    wrap(OpenAIServingModels, "show_available_models", _described_models)


def _described_models(original: Callable) -> Callable:
    from vllm_memdec.describe import describe

    async def show_available_models(self: Any) -> Any:
        models = await original(self)
        if _choices(self.input_processor):
            if not hasattr(self, "memdec_description"):
                self.memdec_description = describe(self.input_processor.vllm_config)
            for card in models.data:
                card.memdec = self.memdec_description
        return models

    return show_available_models


def install_v1_runner() -> None:
    """Hook the V1 runner; called by the composite, so only in a worker that serves it."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "_prepare_inputs", _v1_inputs)
    wrap(GPUModelRunner, "_dummy_run", _v1_dummy_run)
    wrap(GPUModelRunner, "_determine_batch_execution_and_padding", _v1_mode)
    wrap(GPUModelRunner, "_capture_cudagraphs", _v1_capture)
    wrap(GPUModelRunner, "initialize_kv_cache", _v1_groups)


def _v1_batch(runner: Any) -> "state.Batch | None":
    batch = getattr(runner.get_model(), "batch", None)
    return batch if isinstance(batch, state.Batch) else None


def _v1_inputs(original: Callable) -> Callable:
    def _prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if (batch := _v1_batch(self)) is not None:
            resolve = self.get_model().choices.resolve
            requests = self.input_batch.req_ids[: self.input_batch.num_reqs]
            chosen = [resolve(self.requests[r].sampling_params.extra_args) for r in requests]
            memory_B, alpha_B = zip(*chosen, strict=True)
            starts = torch.from_numpy(self.query_start_loc.np[: len(requests) + 1])
            lengths_B = starts.diff()
            said = None if batch.draft is None else _said(self.input_batch, batch.draft, lengths_B)
            batch.write(torch.tensor(memory_B), torch.tensor(alpha_B), lengths_B, said)
            states = [self.requests[name] for name in requests]
            batch.requests = requests
            batch.left = [s.sampling_params.max_tokens - len(s.output_token_ids) for s in states]
        return result

    return _prepare_inputs


def _said(input_batch: Any, draft: Draft, lengths_B: torch.Tensor) -> list[range]:
    """Return for each request of a batch the draft's rows of its first tokens."""
    found = []
    for number, length in enumerate(lengths_B.tolist()):
        start = int(input_batch.num_computed_tokens_cpu[number])
        tokens = input_batch.token_ids_cpu[number, start : start + length].tolist()
        found.append(draft.said(input_batch.req_ids[number], start, tokens))
    return found


def _v1_dummy_run(original: Callable) -> Callable:
    def _dummy_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (batch := _v1_batch(self)) is not None:
            batch.reset()
        return original(self, *args, **kwargs)

    return _dummy_run


def _v1_mode(original: Callable) -> Callable:
    def _determine_batch_execution_and_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode, *rest = original(self, *args, **kwargs)
        if (batch := _v1_batch(self)) is not None:
            if not batch.is_dummy:
                batch.plan(mode.name)
            # What was captured for the memories that this batch runs.
            if (sets := getattr(self.model, "memdec_sets", None)) is not None:
                self.model.concrete_cudagraph_entries = sets.setdefault((*batch.parts,), {})
        return mode, *rest

    return _determine_batch_execution_and_padding


def _v1_groups(original: Callable) -> Callable:
    def initialize_kv_cache(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        if _v1_batch(self) is not None:
            self.get_model().log_groups(kv_cache_config)
        return original(self, kv_cache_config, *args, **kwargs)

    return initialize_kv_cache


def _v1_capture(original: Callable) -> Callable:
    def _capture_cudagraphs(
        self: Any, batch_descriptors: Any, cudagraph_runtime_mode: Any, *args: Any, **kwargs: Any
    ) -> None:
        batch = _v1_batch(self)
        if batch is None or cudagraph_runtime_mode.name != "FULL":
            return original(self, batch_descriptors, cudagraph_runtime_mode, *args, **kwargs)
        # By set of memories, in place of the wrapper's one dictionary of graphs.
        sets = self.model.__dict__.setdefault("memdec_sets", {})
        try:
            for memories in batch.sets:
                batch.dummy_set = memories
                for descriptor in batch_descriptors:  # of an earlier capture
                    sets.get(memories, {}).pop(descriptor, None)
                original(self, batch_descriptors, cudagraph_runtime_mode, *args, **kwargs)
        finally:
            batch.dummy_set = batch.sets[0]

    return _capture_cudagraphs


@functools.cache
def v2_model_state_cls() -> type:
    """Return the V2 runner's per-request state, extended by memory and weight."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class MemDecModelState(DefaultModelState):
        supports_prompt_embeds = False

        def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any):
            super().__init__(vllm_config, model, encoder_cache, device)
            self.choices, self.batch = model.choices, model.batch
            # By the request's slot in the runner's table.
            self.memory_R = torch.full((self.max_num_reqs,), state.NOBODY)
            self.alpha_R = torch.zeros(self.max_num_reqs)
            self.is_real = False  # the batch being prepared

        def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
            super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
            self.model.log_groups(kv_cache_config)

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            chosen = self.choices.resolve(new_req_data.sampling_params.extra_args)
            self.memory_R[req_index], self.alpha_R[req_index] = chosen

        # In order of their calls: preprocess_state (real batches only), prepare_attn (not in every
        # dummy run), prepare_inputs; for the capture of a graph prepare_dummy_inputs comes first.

        def preprocess_state(self, input_batch: Any, *args: Any, **kwargs: Any) -> None:
            super().preprocess_state(input_batch, *args, **kwargs)
            self.is_real = True

        def prepare_attn(
            self, input_batch: Any, cudagraph_mode: Any, *args: Any, **kwargs: Any
        ) -> dict[str, Any]:
            if self.is_real:
                slots = torch.from_numpy(input_batch.idx_mapping_np)
                starts = torch.from_numpy(input_batch.query_start_loc_np[: len(slots) + 1])
                self.batch.write(
                    self.memory_R[slots],
                    self.alpha_R[slots],
                    starts.diff(),
                    mode=cudagraph_mode.name,
                )
            else:
                self.batch.reset()
            return super().prepare_attn(input_batch, cudagraph_mode, *args, **kwargs)

        def prepare_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            if not self.is_real:
                self.batch.reset()
            self.is_real = False
            return super().prepare_inputs(*args, **kwargs)

        def prepare_dummy_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            self.batch.reset()
            return super().prepare_dummy_inputs(*args, **kwargs)

    return MemDecModelState


def narrow_attention(layers: list[Any], number: int, batch: state.Batch, memory: Any) -> None:
    """Let a memory's attention layers see their own part of each batch.

    `memory` is the VllmConfig it was built with: heads, dtype and KV-cache dtype are its own.
    """

    @functools.cache
    def narrow(backend: type) -> type:
        return _narrow_backend(backend, number, batch, memory)

    for layer in layers:
        if hasattr(layer, "attn_backend"):
            layer.attn_backend = narrow(layer.attn_backend)


def _narrow_backend(backend: type, number: int, batch: state.Batch, memory: Any) -> type:
    """Return a subclass of an attention backend whose metadata is that of one memory's requests."""
    from vllm.v1.attention.backend import subclass_attention_backend

    class NarrowBuilder(backend.get_builder_cls()):
        # It would put the whole batch's block table into metadata of a part of it.
        supports_update_block_table = False

        def __init__(
            self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any, **more: Any
        ):
            # What the running engine has, but the memory's heads, dtype and KV-cache dtype.
            own = copy.copy(vllm_config)
            own.model_config = memory.model_config
            own.parallel_config = memory.parallel_config
            own.cache_config = copy.copy(vllm_config.cache_config)
            own.cache_config.cache_dtype = memory.cache_config.cache_dtype
            super().__init__(kv_cache_spec, layer_names, own, device, **more)

        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
        ) -> Any:
            part = batch.parts.get(number)
            if part is None:
                return None  # no request of this batch runs these layers
            if part.requests is not None:
                common_attn_metadata = _narrow_metadata(common_attn_metadata, part)
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

        def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
            if number not in batch.parts:
                return None  # nor does this graph
            return super().build_for_cudagraph_capture(common_attn_metadata)

        def update_draft_decode_metadata(self, metadata: Any) -> None:
            if metadata is not None:
                super().update_draft_decode_metadata(metadata)

    return subclass_attention_backend(f"Memory{number}", backend, NarrowBuilder)


def _narrow_metadata(common: Any, part: state.Part) -> Any:
    """Return vLLM's CommonAttentionMetadata of some requests of a batch."""

    def pick(name: str) -> Any:
        value = getattr(common, name)
        if value is None:
            return None
        return value[part.requests if value.is_cpu else part.rows]

    return common.replace(
        query_start_loc=part.starts,
        query_start_loc_cpu=torch.nn.functional.pad(part.lengths.cumsum(0), (1, 0)).int(),
        seq_lens=pick("seq_lens"),
        num_reqs=len(part.requests),
        num_actual_tokens=len(part.tokens),
        max_query_len=int(part.lengths.max()),
        block_table_tensor=pick("block_table_tensor"),
        slot_mapping=common.slot_mapping[part.tokens],
        positions=None if common.positions is None else common.positions[part.tokens],
        is_prefilling=pick("is_prefilling"),
        seq_lens_cpu_upper_bound=pick("seq_lens_cpu_upper_bound"),
        req_idx=None if common.req_idx is None else common.req_idx[part.requests.numpy()],
        rswa_prefix_lens=pick("rswa_prefix_lens"),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


@contextlib.contextmanager
def narrow_slots(layers: list[str], tokens: torch.Tensor) -> Iterator[None]:
    """Let a memory's layers write the keys and values of these tokens of the batch only."""
    from vllm.forward_context import get_forward_context, override_forward_context

    context = copy.copy(get_forward_context())
    narrowed = {}  # layers share their tensors
    context.slot_mapping = dict(context.slot_mapping)
    for name in layers:
        if (slots := context.slot_mapping.get(name)) is not None:
            if id(slots) not in narrowed:
                narrowed[id(slots)] = slots[tokens]
            context.slot_mapping[name] = narrowed[id(slots)]
    with override_forward_context(context):
        yield


@contextlib.contextmanager
def whole_on_each_rank() -> Iterator[None]:
    """Build or run layers as if there were no tensor parallelism: every rank has them whole."""
    from vllm.distributed import parallel_state

    group = parallel_state._TP
    parallel_state._TP = _group_of_one()
    try:
        yield
    finally:
        parallel_state._TP = group


@functools.cache
def _group_of_one() -> Any:
    from vllm.distributed import parallel_state

    world = parallel_state.get_world_group()
    return parallel_state.init_model_parallel_group(
        [[rank] for rank in range(world.world_size)],
        world.local_rank,
        torch.distributed.get_backend(world.device_group),
        group_name="memdec",
    )


def install_v1_drafter() -> None:
    """Let the V1 runner's drafter become ours; called by the composite, before drafters load."""
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    wrap(DraftModelProposer, "load_model", _drafting_memory)


def mend_cpu_speculation() -> None:
    """Exchange what vLLM expands a request's temperature to its drafts with, on a CPU.

    In 0.32 and 0.33 it fills a temporary in place of floating-point results (issue #55005), so
    they are memory that nobody wrote.
    """
    from vllm.v1.sample import rejection_sampler

    wrap(rejection_sampler, "expand_batch_to_tokens", _expanded)


def _expanded(original: Callable) -> Callable:
    def expand_batch_to_tokens(
        x: torch.Tensor,
        cu_num_tokens: torch.Tensor,
        num_tokens: int,
        replace_from: int = 0,
        replace_to: int = 0,
    ) -> torch.Tensor:
        lengths = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        return torch.where(x == replace_from, replace_to, x).repeat_interleave(lengths)

    return expand_batch_to_tokens


def _drafting_memory(original: Callable) -> Callable:
    proposer = _memory_proposer_cls()

    def load_model(self: Any, target_model: Any) -> None:
        if getattr(target_model, "drafter", None) is None:
            # Another engine of this process, with a draft model of its own.
            return original(self, target_model)
        proposer.adopt(self, target_model)

    return load_model


def _memory_proposer_cls() -> type:
    """Return vLLM's drafter of the V1 runner, with the composite's memories for a model."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import set_forward_context
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    class MemoryProposer(DraftModelProposer):
        def adopt(self, target_model: Any) -> None:
            """Become this drafter: the runner makes its own before there is a model to ask."""
            self.__class__ = MemoryProposer
            self.model = target_model.drafter
            self._draft_attn_layer_names = {n for names in target_model.layers for n in names}
            # With asynchronous scheduling vLLM has planned the drafts before they are made.
            self.ragged = not self.vllm_config.scheduler_config.async_scheduling
            self.length = DraftLength(self.num_speculative_tokens) if target_model.adapts else None
            self.drafted: dict[str, int] = {}  # by request, in the last step
            self.ended = 0.0  # when that step's drafts were done, by time.perf_counter()

        def dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> None:
            """Run nothing: memories have run with the target already, and drafts use no graphs."""

        def propose(
            self,
            num_speculative_tokens: int,
            target_token_ids: torch.Tensor,
            target_positions: torch.Tensor,
            target_hidden_states: torch.Tensor,
            next_token_ids: torch.Tensor,
            token_indices_to_sample: torch.Tensor | None,
            common_attn_metadata: Any,
            sampling_metadata: Any,
            mm_embed_inputs: None = None,
            num_rejected_tokens_gpu: torch.Tensor | None = None,
            slot_mappings: Any = None,
        ) -> torch.Tensor | list[list[int]]:
            """Return drafts [B, K], or a list for each request, empty where it has no memory."""
            began = time.perf_counter()
            self._last_draft_probs = None
            last_B = token_indices_to_sample
            if last_B is None:
                last_B = common_attn_metadata.query_start_loc[1:] - 1
            newest = (next_token_ids, target_positions[last_B.long()])
            if not self.ragged:
                if not self.model.composite.batch.used:  # nobody is drafted for
                    return next_token_ids.new_zeros(len(next_token_ids), num_speculative_tokens)
                return self.draft(
                    num_speculative_tokens, *newest, common_attn_metadata, sampling_metadata
                )
            batch = self.model.composite.batch
            names, has_memory = batch.requests, (batch.memory_B != state.NOBODY).tolist()
            accepted = self.accepted(names, common_attn_metadata, num_rejected_tokens_gpu)
            # This step gave one token more than it accepted, the next will do so too.
            most = [
                max(0, left - accepted - 2) if has else 0
                for left, accepted, has in zip(batch.left, accepted, has_memory, strict=True)
            ]
            wanting = [name for name, limit in zip(names, most, strict=True) if limit]
            K = min(num_speculative_tokens, max(most, default=0))
            if self.length is not None:
                self.learn(names, common_attn_metadata, accepted, began)
                K = min(K, self.length.choose(wanting, len(names) - len(wanting))) if K else 0
            lists: list[list[int]] = [[] for _ in names]
            batch.draft = None
            if K:
                began = time.perf_counter()
                drafts_BK = self.draft(K, *newest, common_attn_metadata, sampling_metadata)
                lists = [row[:n] for row, n in zip(drafts_BK.tolist(), most, strict=True)]
                if self.length is not None:
                    self.length.passes.add(len(wanting), (time.perf_counter() - began) / K)
            self.drafted = {name: len(row) for name, row in zip(names, lists, strict=True)}
            self.ended = time.perf_counter()
            return lists

        def accepted(
            self, names: list[str], common: Any, rejected_B: torch.Tensor | None
        ) -> list[int]:
            """Return how many of its last drafts the step that has just ended kept for each."""
            lengths = common.query_start_loc_cpu.diff().tolist()
            rejected = [0] * len(names) if rejected_B is None else rejected_B.tolist()
            return [
                length - 1 - refused if self.drafted.get(name) == length - 1 else 0
                for name, length, refused in zip(names, lengths, rejected, strict=True)
            ]

        def learn(self, names: list[str], common: Any, accepted: list[int], now: float) -> None:
            """Take note of the step that has just verified the last drafts."""
            lengths = common.query_start_loc_cpu.diff().tolist()
            self.length.keep(names)
            for name, length, kept in zip(names, lengths, accepted, strict=True):
                if self.drafted.get(name) == length - 1 > 0:
                    self.length.observe(name, length - 1, kept)
            # The time since then is this step's if there was no pause before it; of one that
            # mostly reads prompts there is nothing to be learned.
            went_on = any(name in self.drafted for name in names)
            if went_on and sum(lengths) <= len(names) * (self.length.most + 1):
                self.length.step.add(sum(lengths), now - self.ended)

        def draft(
            self,
            K: int,
            newest_B: torch.Tensor,
            positions_B: torch.Tensor,
            common: Any,
            sampling_metadata: Any,
        ) -> torch.Tensor:
            """Return drafts [B, K] that follow the newest tokens.

            All before these, up to the given positions, the memories have read already.
            """
            B = len(newest_B)
            common = common.replace(
                query_start_loc=self.arange[: B + 1],
                query_start_loc_cpu=torch.from_numpy(self.token_arange_np[: B + 1]).clone(),
                seq_lens=(positions_B + 1).to(common.seq_lens.dtype),
                num_actual_tokens=B,
                max_query_len=1,
                positions=None,
                is_prefilling=None,
                _num_computed_tokens_cache=None,
                _token_to_req_indices_cache=None,
            )
            batch = self.model.composite.batch
            batch.write_drafting()
            self.model.heard.clear()
            drafts, probabilities, hidden, first = [newest_B], [], [], None
            for number in range(K):
                positions_B = self._update_positions_dependent_metadata(
                    positions_B, common, B, B, self.block_size
                )
                _, attention = self.build_per_group_and_layer_attn_metadata(
                    common, draft_index=number
                )
                first = first or positions_B.tolist()  # a list: vLLM writes into the tensor
                self.input_ids[:B] = drafts[-1].int()
                # Without graphs: the memory's own were captured on the runner's buffers, not these.
                # By a memory's configuration: ranks that share experts would wait for one another.
                with set_forward_context(
                    attention,
                    self.model.composite.memory_configs[0],
                    num_tokens=B,
                    cudagraph_runtime_mode=CUDAGraphMode.NONE,
                    slot_mapping=self._get_slot_mapping(B),
                ):
                    h_BD = self.model(self.input_ids[:B], self._get_positions(B))
                tokens_B, p_BV = self._sample_draft_tokens(h_BD[:B], sampling_metadata)
                drafts.append(tokens_B)
                probabilities.append(p_BV)
                hidden.append(h_BD[:B])
            if probabilities and probabilities[0] is not None:
                self._last_draft_probs = torch.stack(probabilities, dim=1).contiguous()
            drafts_BK = torch.stack(drafts, dim=1)
            # Elsewhere the next step is planned before it is known what it will verify.
            if self.ragged and drafts_BK.is_cpu and len(self.model.heard) == K <= MOST_SAID // B:
                hidden_RD = torch.stack(hidden, dim=1).flatten(0, 1)
                batch.draft = Draft(
                    {name: number for number, name in enumerate(batch.requests)},
                    first,
                    drafts_BK.tolist(),
                    hidden_RD[:, : -batch.columns_TA.shape[1]],
                    torch.stack(self.model.heard, dim=1).flatten(0, 1),
                )
            return drafts_BK[:, 1:]

        def _sample_from_logits(
            self, logits_BV: torch.Tensor, sampling_metadata: Any
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            """Return drafts [B] and their distributions [B, V], as vLLM does.

            On a CPU from one random number a row: noise for each token of the vocabulary, as vLLM
            makes it, is a fair part of a small memory's pass.
            """
            if sampling_metadata.all_greedy or not logits_BV.is_cpu:
                return super()._sample_from_logits(logits_BV, sampling_metadata)
            return sample_rows(logits_BV, sampling_metadata.temperature)

    return MemoryProposer


def sample_rows(
    logits_BV: torch.Tensor, temperature_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a token [B] drawn from each row at its temperature, and the distributions [B, V].

    Where the temperature is 0 it is the likeliest token, and the distribution that of 1.
    """
    greedy_B = temperature_B < 1e-5  # as vLLM's sampler tells them
    p_BV = (logits_BV / temperature_B.masked_fill(greedy_B, 1)[:, None]).softmax(
        -1, dtype=torch.float32
    )
    upto_BV = p_BV.cumsum(-1, dtype=torch.float64)
    chosen_B1 = torch.rand(len(p_BV), 1, dtype=torch.float64) * upto_BV[:, -1:]
    # The first token past it: never one of probability 0.
    tokens_B = torch.searchsorted(upto_BV, chosen_B1, right=True)[:, 0]
    tokens_B = tokens_B.clamp(max=p_BV.shape[1] - 1)
    return torch.where(greedy_B, p_BV.argmax(-1), tokens_B), p_BV


def install_lora() -> None:
    """Hook the loading of LoRA; called by the composite, so only in a worker that serves it."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    wrap(LoRAModelRunnerMixin, "load_lora_model", _lora_on_the_base)


def _lora_on_the_base(original: Callable) -> Callable:
    def load_lora_model(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        names = [name for name in model._modules if re.fullmatch(r"memory\d+", name)]
        hidden = {name: model._modules.pop(name) for name in names}
        try:
            return original(self, model, *args, **kwargs)
        finally:
            model._modules.update(hidden)

    return load_lora_model


def kv_bytes_per_token(layers: list[Any], vllm_config: Any) -> float:
    """Return the bytes that layers of a forward context keep for each token of a request."""
    specs = [
        spec
        for layer in layers
        if hasattr(layer, "get_kv_cache_spec") and (spec := layer.get_kv_cache_spec(vllm_config))
    ]
    return sum(spec.page_size_bytes / spec.block_size for spec in specs)
