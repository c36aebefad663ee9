"""The only file that names private symbols of vLLM: what we touch, and how.

Checked by running vLLM 0.32.0; 0.33 was not run. Three methods are wrapped and one class is derived
from. SIGNATURES and ATTRIBUTES record what that relies on; tests/serving/test_compat.py compares
them with the vLLM that is installed.

- EngineArgs.create_model_config (front end): the checks have to run before workers start, and where
  the settings model_impl and additional_config meet. It also swaps in the class to load.
- InputProcessor._validate_params (front end): refuses a bad weight before the engine sees it. A
  logits processor could do the same, but vLLM refuses those beside a draft model.
- GPUModelRunner._model_forward (V1 worker): V1 does not tell a model whose tokens it runs.
- DefaultModelState (V2 worker): V2 does, through a subclass named by get_model_state_cls().
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from vllm_memdec import config, state

SIGNATURES = {
    "vllm.engine.arg_utils:EngineArgs.create_model_config": "self",
    "vllm.v1.engine.input_processor:InputProcessor._validate_params": "self params supported_tasks",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward": (
        "self input_ids positions intermediate_tensors inputs_embeds model_kwargs"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.get_model": "self",
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState": (
        "vllm_config model encoder_cache device"
    ),
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.add_request": (
        "self req_index new_req_data"
    ),
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_inputs": (
        "self input_batch req_states"
    ),
    "vllm.model_executor.model_loader.utils:initialize_model": (
        "vllm_config prefix model_class model_config"
    ),
    "vllm.config:VllmConfig.with_hf_config": "self hf_config architectures",
    "vllm.compilation.backends:set_model_tag": "tag is_encoder",
}
ATTRIBUTES = {
    "vllm.engine.arg_utils:EngineArgs": (
        "additional_config convert decode_context_parallel_size enable_dbo enable_lora "
        "enable_prompt_embeds hf_overrides max_model_len model_impl pipeline_parallel_size "
        "prefill_context_parallel_size runner spec_method speculative_config ubatch_size"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": "input_batch query_start_loc requests",
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
    """Hook the two places every start and every request passes through."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.input_processor import InputProcessor

    wrap(EngineArgs, "create_model_config", _checked_model_config)
    wrap(InputProcessor, "_validate_params", _checked_params)


def _checked_model_config(original: Callable) -> Callable:
    def create_model_config(self: Any) -> Any:
        return config.create_model_config(self, original)

    return create_model_config


def _checked_params(original: Callable) -> Callable:
    from vllm.exceptions import VLLMValidationError

    class RequestError(VLLMValidationError, ValueError):
        """HTTP 400 to a client; the ValueError it is to a caller of LLM."""

    def _validate_params(self: Any, params: Any, supported_tasks: Any) -> Any:
        serving = config.memdec_block(self.vllm_config.additional_config) is not None
        try:
            state.check_extra_args(getattr(params, "extra_args", None), serving)
        except ValueError as error:
            raise RequestError(str(error)) from None
        return original(self, params, supported_tasks)

    return _validate_params


def install_v1_runner() -> None:
    """Hook the V1 runner; called by the composite, so only in a worker that serves it."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "_model_forward", _v1_forward)


def _v1_forward(original: Callable) -> Callable:
    def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = self.get_model()
        # Dummy runs do not come here: they leave whatever weights the buffer holds.
        if isinstance(getattr(model, "alpha_rows", None), state.AlphaRows):
            count = self.input_batch.num_reqs
            alpha_B = [
                state.request_alpha(
                    self.requests[req_id].sampling_params.extra_args, model.settings.alpha
                )
                for req_id in self.input_batch.req_ids[:count]
            ]
            starts = torch.from_numpy(self.query_start_loc.np[: count + 1])
            model.alpha_rows.write(torch.tensor(alpha_B), starts.diff())
        return original(self, *args, **kwargs)

    return _model_forward


@functools.cache
def v2_model_state_cls() -> type:
    """Return the V2 runner's per-request state, extended by the weight."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class MemDecModelState(DefaultModelState):
        supports_prompt_embeds = False

        def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any):
            super().__init__(vllm_config, model, encoder_cache, device)
            self.default_alpha = model.settings.alpha
            self.alpha_rows = model.alpha_rows
            self.alpha_R = torch.full((self.max_num_reqs,), self.default_alpha)  # by slot

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self.alpha_R[req_index] = state.request_alpha(
                new_req_data.sampling_params.extra_args, self.default_alpha
            )

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
            alpha_B = self.alpha_R[torch.from_numpy(input_batch.idx_mapping_np)]
            starts = torch.from_numpy(input_batch.query_start_loc_np[: len(alpha_B) + 1])
            self.alpha_rows.write(alpha_B, starts.diff())
            return super().prepare_inputs(input_batch, req_states)

    return MemDecModelState
