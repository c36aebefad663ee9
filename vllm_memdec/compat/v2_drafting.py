"""Drafting by the memories on the V2 runner.

DraftModelSpeculator.load_model is wrapped; the speculator of a composite becomes a subclass whose
model is the composite's own memories, and which records all passes of a step as one CUDA graph, or
one pass, where the attention backend cannot refresh its metadata within a graph. vLLM runs a draft
model of its own weights, reads every token again, and launches each kernel from the host, which
beside a base of 7B takes longer than the base's step.

May go when vLLM captures standalone draft models and lets one share the target's weights.
Relies on the speculator's buffers and on its private methods that make the inputs of a pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)

from vllm_memdec.compat.hooks import wrap
from vllm_memdec.compat.v2_graphs import MemoryGraphs
from vllm_memdec.compat.v2_runner import MemDecModelState
from vllm_memdec.drafter import Drafter

DRAFTER = "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator:StandaloneARSpeculator"
SIGNATURES = {
    "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.load_model": (
        "self target_model"
    ),
    f"{DRAFTER}.propose": (
        "self input_batch attn_metadata slot_mappings last_hidden_states aux_hidden_states "
        "num_sampled num_rejected last_sampled next_prefill_tokens temperature seeds "
        "dp_sync_state dummy_run skip_attn_for_dummy_run mm_inputs is_profile "
        "num_speculative_tokens"
    ),
    f"{DRAFTER}._accepted_last_indices": "self input_batch num_rejected num_reqs",
    f"{DRAFTER}._copy_request_inputs": "self num_reqs idx_mapping temperature seeds dummy_run",
    f"{DRAFTER}._update_draft_decode_metadata": "self attn_metadata num_reqs",
    f"{DRAFTER}._build_uniform_attn_metadata": (
        "self batch_desc num_reqs num_query_per_req seq_lens_cpu_upper_bound step causal "
        "dcp_local_seq_lens"
    ),
    f"{DRAFTER}.sample_draft": (
        "self hidden_states sample_src_positions idx_mapping temperature seeds draft_step "
        "draft_logits spec_step_idx"
    ),
    "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils:"
    "SpeculatorCudaGraphManager.capture": (
        "self forward_fn model_state input_buffers block_tables attn_groups kv_cache_config "
        "progress_bar_desc specialize_spec_tokens"
    ),
    "vllm.v1.worker.gpu.block_table:BlockTables.compute_slot_mappings": (
        "self idx_mapping query_start_loc positions num_tokens_padded out"
    ),
    "vllm.v1.worker.gpu.attn_utils:build_slot_mappings_by_layer": "slot_mappings kv_cache_config",
    "vllm.v1.worker.utils:AttentionGroup.map_to_kernel_block_table": "self block_table ubatch_idx",
}
CHANGED = {
    (0, 33): {f"{DRAFTER}.sample_draft": SIGNATURES[f"{DRAFTER}.sample_draft"] + " num_steps"},
}
ATTRIBUTES = {
    DRAFTER: (
        "arange_gpu attn_groups block_tables current_draft_step draft_attn_layer_names "
        "draft_logits draft_tokens idx_mapping input_buffers kv_cache_config max_model_len "
        "model_state num_speculative_steps seeds supports_decode_metadata_update temperature"
    ),
    "vllm.v1.worker.gpu.block_table:BlockTables": "input_block_tables",
}


class DraftGraphs(SpeculatorCudaGraphManager, MemoryGraphs):
    """The graphs of drafting, by number of requests and set of memories."""


class MemorySpeculator(StandaloneARSpeculator):
    """vLLM's speculator, with the composite's memories for a model."""

    # vLLM's own reads one token more for each request, so the profile run has so many fewer: a step
    # of few requests, which may be longer, outgrew the workspace of a mixture of experts.
    num_extra_query_per_req = 0
    memory_model: Drafter  # the model, by its own type
    model_state: MemDecModelState  # the composite's, from set_attn() on
    graphs: DraftGraphs  # from init_cudagraph_manager() on

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Plan a graph for each number of requests, where the target decodes by full graphs."""
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE
        self.graphs = DraftGraphs(self.vllm_config, self.device, mode, decode_query_len=1)
        batch = self.memory_model.batch
        self.graphs.adopt(batch, [memories for memories in batch.sets if memories])

    def capture(self) -> None:
        """Record all passes as one graph; one pass, where attention cannot refresh its metadata."""
        self.idx_mapping.zero_()  # what an earlier run left may be out of bounds
        self.graphs.capture(
            self._all_passes if self.supports_decode_metadata_update else self._captured_pass,
            self.model_state,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            progress_bar_desc="Capturing drafts of the memories",
        )

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Return drafts [B, K], arbitrary ones for a request that is not drafted for."""
        B, batch = input_batch.num_reqs, self.memory_model.batch
        drafts_BK = self.draft_tokens[:B]
        if dummy_run:
            if skip_attn_for_dummy_run:  # vLLM's memory profile
                self._pass(0, B, B, None, None)
            return drafts_BK
        drafted_B = self.model_state.drafted_R[input_batch.idx_mapping_np]
        # Requests past the end of their memory use none.
        if num_speculative_tokens == 0 or not drafted_B.any() or not batch.used:
            return drafts_BK
        desc = self.graphs.dispatch(B, B, uniform_token_count=1, num_active_loras=0)
        batch.write_drafting(desc.cg_mode.name)
        self._copy_request_inputs(B, input_batch.idx_mapping, temperature, seeds)
        self._begin(input_batch, num_rejected, last_sampled)
        if desc.cg_mode == CUDAGraphMode.FULL and self.supports_decode_metadata_update:
            for groups in self.attn_groups:
                for group in groups:
                    group.map_to_kernel_block_table(
                        self.block_tables.input_block_tables[group.kv_cache_group_id]
                    )
            self.graphs.run_fullgraph(desc)
            return drafts_BK
        for step in range(self.num_speculative_steps):
            slots = self._slots(B, desc.num_tokens)
            attention = self._build_uniform_attn_metadata(
                batch_desc=desc,
                num_reqs=B,
                num_query_per_req=1,
                seq_lens_cpu_upper_bound=input_batch.seq_lens_cpu_upper_bound,
                step=step + 1,
            )
            if desc.cg_mode == CUDAGraphMode.FULL:
                self.current_draft_step.fill_(step)
                self.graphs.run_fullgraph(desc)
            else:
                self._pass(step, B, B, attention, slots)
        return drafts_BK

    def _begin(
        self, input_batch: Any, num_rejected: torch.Tensor, last_sampled: torch.Tensor
    ) -> None:
        """Put the newest token of each request into the buffers that all passes read.

        The memories have already read all tokens before it, as a part of the target.
        """
        B, buffers, max_length = input_batch.num_reqs, self.input_buffers, self.max_model_len
        index_B = self._accepted_last_indices(input_batch, num_rejected, B)
        positions_B, lengths_B = buffers.positions[:B], buffers.seq_lens[:B]
        torch.add(input_batch.positions[index_B], 1, out=positions_B)
        positions_B.clamp_(max=max_length - 1)
        buffers.input_ids[:B].copy_(last_sampled.view(-1)[input_batch.idx_mapping])
        lengths_B.copy_(input_batch.seq_lens[:B] - num_rejected[:B] + 1)
        lengths_B.clamp_(max=max_length)
        # A graph runs on more rows than there are requests: those have no tokens.
        buffers.seq_lens[B:].zero_()
        torch.clamp(self.arange_gpu, max=B, out=buffers.query_start_loc)

    def _slots(self, num_reqs: int, num_tokens: int) -> dict[str, torch.Tensor]:
        """Write where the next keys and values go, into vLLM's own buffer; return it by layer."""
        slots = self.block_tables.compute_slot_mappings(
            self.idx_mapping[:num_reqs],
            self.input_buffers.query_start_loc[: num_reqs + 1],
            self.input_buffers.positions[:num_reqs],
            num_tokens,
        )
        return build_slot_mappings_by_layer(slots, self.kv_cache_config)

    def _all_passes(
        self,
        num_reqs: int,
        num_tokens: int,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        num_tokens_across_dp: Any,
        cudagraph_runtime_mode: Any,
        num_speculative_steps: int,
    ) -> None:
        """Make all drafts: what a graph records. Arguments are those of vLLM's capture."""
        for step in range(self.num_speculative_steps):
            self._slots(num_reqs, num_tokens)
            self._update_draft_decode_metadata(attn_metadata, num_reqs)
            self._pass(step, num_reqs, num_tokens, attn_metadata, slot_mappings)

    def _captured_pass(
        self,
        num_reqs: int,
        num_tokens: int,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        num_tokens_across_dp: Any,
        cudagraph_runtime_mode: Any,
        num_speculative_steps: int,
    ) -> None:
        """Make one draft, the step of which is set before: what a graph records."""
        self._pass(None, num_reqs, num_tokens, attn_metadata, slot_mappings)

    def _pass(
        self,
        step: int | None,
        num_reqs: int,
        num_tokens: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
    ) -> None:
        """Make one draft of each request, and put it where the next pass reads."""
        buffers = self.input_buffers
        positions_B, lengths_B = buffers.positions[:num_reqs], buffers.seq_lens[:num_reqs]
        if step is not None:
            self.current_draft_step.fill_(step)
        # A memory's own configuration: ranks with experts in common would wait for one another.
        with set_forward_context(
            attn_metadata,
            self.memory_model.memories[0].config,
            num_tokens=num_tokens,
            slot_mapping=slot_mappings,
        ):
            h_TD = self.model(buffers.input_ids[:num_tokens], buffers.positions[:num_tokens])
        tokens_B = self.sample_draft(
            h_TD[:num_reqs],
            positions_B,
            self.idx_mapping[:num_reqs],
            self.temperature,
            self.seeds,
            self.current_draft_step,
            self.draft_logits,
        )
        self.draft_tokens[:num_reqs].index_copy_(
            1, self.current_draft_step.view(1), tokens_B.long()[:, None]
        )
        buffers.input_ids[:num_reqs].copy_(tokens_B)
        positions_B.add_(1).clamp_(max=self.max_model_len - 1)
        lengths_B.add_(1).clamp_(max=self.max_model_len)


def install() -> None:
    """Hook the V2 runner's drafter; called by the composite, before drafters load."""
    wrap(DraftModelSpeculator, "load_model", _loaded)


def _loaded(original: Callable) -> Callable:
    def load_model(self: Any, target_model: Any) -> None:
        if getattr(target_model, "drafter", None) is None:
            # Another engine of this process, with a draft model of its own.
            return original(self, target_model)
        self.__class__ = MemorySpeculator
        self.model = self.memory_model = target_model.drafter
        self.draft_attn_layer_names = set(target_model.memories.layer_names)

    return load_model
