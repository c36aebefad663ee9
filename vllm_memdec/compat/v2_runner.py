"""The V2 runner: a model's own class keeps memory and weight of each request.

The class that vLLM chooses for the base is derived from: DefaultModelState, or that of hybrids. The
composite names the subclass by get_model_state_cls(), which vLLM offers for this. Nothing is
wrapped.

May go never: it is vLLM's own way. It is recorded because the methods are not documented.
Relies on the order in which the runner calls the methods, which stands below.
"""

import functools
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_memdec.request import NO_MEMORY

STATE = "vllm.v1.worker.gpu.model_states.default:DefaultModelState"
SIGNATURES = {
    "vllm.v1.worker.gpu.model_states:resolve_model_state_cls": "vllm_config model",
    STATE: "vllm_config model encoder_cache device",
    f"{STATE}.initialize_kv_cache": "self kv_cache_config block_tables",
    f"{STATE}.add_request": "self req_index new_req_data",
    f"{STATE}.preprocess_state": (
        "self input_batch block_tables kv_cache_config num_computed_tokens"
    ),
    f"{STATE}.prepare_attn": (
        "self input_batch cudagraph_mode block_tables slot_mappings attn_groups kv_cache_config "
        "for_capture ubatch_idx model_specific_attn_metadata"
    ),
    f"{STATE}.prepare_inputs": "self input_batch req_states",
    f"{STATE}.prepare_dummy_inputs": "self num_reqs num_tokens",
}
ATTRIBUTES = {
    STATE: "max_num_reqs rope_state",
    "vllm.v1.worker.gpu.input_batch:InputBatch": (
        "idx_mapping_np num_computed_tokens_np positions query_start_loc_np"
    ),
    "vllm.v1.core.sched.output:NewRequestData": "mm_features sampling_params",
}


def state_class(vllm_config: Any, base: Any) -> type:
    """Return the class of the runner's state for a composite with this base, a module."""
    return _derived(resolve_model_state_cls(vllm_config, base))


@functools.cache
def _derived(chosen: type) -> type:
    if chosen is DefaultModelState:
        return MemDecModelState
    return type(f"MemDec{chosen.__name__}", (MemDecModelState, chosen), {})


class MemDecModelState(DefaultModelState):
    """The runner's state of each request, extended by memory and weight."""

    supports_prompt_embeds = False

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.composite, self.choices, self.batch = model, model.choices, model.batch
        # By the request's slot in the runner's table, and the places of its rows.
        size = self.max_num_reqs, self.choices.at_once
        self.memory_RS, self.alpha_RS = torch.full(size, NO_MEMORY), torch.zeros(size)
        self.drafted_R = np.zeros(self.max_num_reqs, dtype=bool)
        self.is_real = False  # the batch being prepared

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        self.composite.log_groups(kv_cache_config)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        images = new_req_data.mm_features
        numbers, weights = self.choices.placed(params.extra_args, images)
        self.memory_RS[req_index] = torch.tensor(numbers)
        self.alpha_RS[req_index] = torch.tensor(weights)
        self.drafted_R[req_index] = self.choices.drafted(params, images)

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
                self.memory_RS[slots],
                self.alpha_RS[slots],
                starts.diff(),
                mode=cudagraph_mode.name,
                starts_B=self.composite.first_positions(
                    torch.from_numpy(input_batch.num_computed_tokens_np)
                ),
            )
        else:
            self.batch.reset()
        return super().prepare_attn(input_batch, cudagraph_mode, *args, **kwargs)

    def prepare_inputs(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not self.is_real:
            self.batch.reset()
        self.is_real = False
        if self.rope_state is not None:  # what the base gets are positions of several dimensions
            self.batch.write_positions(input_batch.positions)
        return super().prepare_inputs(input_batch, *args, **kwargs)

    def prepare_dummy_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.batch.reset()
        return super().prepare_dummy_inputs(*args, **kwargs)
