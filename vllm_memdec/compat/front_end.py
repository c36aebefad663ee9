"""The front end: every start and every request pass through these five methods.

EngineArgs.create_model_config  The checks run before workers start, and where the settings
    model_impl and additional_config meet. It also swaps in the class to load.
EngineArgs.create_engine_config  Refuses what depends on the runner that vLLM has chosen.
InputProcessor._validate_params  Refuses a bad weight before the engine sees it. A logits processor
    could do the same, but vLLM refuses those beside a draft model.
SamplingParams._validate_spec_decode  Lets min_p and logit_bias through where the memory drafts: the
    V2 runner applies them to drafts, and on V1 we do (see v1_sampling.py).
InputProcessor.process_inputs  The memory becomes part of the request's cache salt. Blocks of the KV
    cache hold keys and values of the memory that ran, and of no other, so a request may only reuse
    those of requests with the same memory, or the same several; vLLM itself tells images apart. It
    also refuses a memory that is off for requests with images, and what would end a worker of the
    V2 runner, whose lists of tokens have limits that only the worker checks. Images of a refused
    request are forgotten:
    vLLM has noted them as sent by then, and the next request with one would go without its data.
    Where requests are logged it logs memory and weight: vLLM's line has what was asked for alone.

May go when vLLM has hooks for a plugin's own model_impl, request arguments and cache salt.
Relies on the attributes of EngineArgs that startup.py checks, on a request's cache_salt, and on the
hashes of its images, by which vLLM notes them.
"""

from collections.abc import Callable
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from vllm_memdec import metrics, startup
from vllm_memdec.compat.hooks import wrap
from vllm_memdec.request import Choices, check_extra_args, check_images, choices_of
from vllm_memdec.request_error import RequestError

logger = init_logger("vllm.plugins.memdec")  # vLLM configures handlers for its own namespace only
SIGNATURES = {
    "vllm.engine.arg_utils:EngineArgs.create_model_config": "self",
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": "self usage_context headless",
    "vllm.v1.engine.input_processor:InputProcessor._validate_params": "self params supported_tasks",
    "vllm.sampling_params:SamplingParams._validate_spec_decode": "self speculative_config",
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": (
        "self request_id prompt params supported_tasks arrival_time lora_request "
        "tokenization_kwargs trace_headers priority data_parallel_rank resumable session_id "
        "kv_hints"
    ),
    "vllm.multimodal.cache:BaseMultiModalProcessorCache.invalidate": "self mm_hash",
}
ATTRIBUTES = {
    "vllm.engine.arg_utils:EngineArgs": (
        "additional_config async_scheduling convert decode_context_parallel_size enable_dbo "
        "enable_lora enable_prompt_embeds enable_sleep_mode hf_overrides mm_encoder_only "
        "model_impl pipeline_parallel_size "
        "prefill_context_parallel_size runner spec_method speculative_config ubatch_size "
        "kv_offloading_size kv_sharing_fast_prefill kv_transfer_config tensor_parallel_size "
        "spec_model"
    ),
    "vllm.config.model:ModelConfig": "max_model_len original_max_model_len",
    "vllm.v1.engine:EngineCoreRequest": "cache_salt mm_features",
    "vllm.v1.engine.input_processor:InputProcessor": "renderer speculative_config vllm_config",
    "vllm.renderers:BaseRenderer": "mm_processor_cache",
    "vllm.sampling_params:SamplingParams": (
        "all_stop_token_ids allowed_token_ids logit_bias min_tokens"
    ),
}


def install() -> None:
    """Hook the places that every start and every request pass through."""
    wrap(EngineArgs, "create_model_config", _checked_model_config)
    wrap(EngineArgs, "create_engine_config", _checked_engine_config)
    wrap(InputProcessor, "_validate_params", _checked_params)
    wrap(SamplingParams, "_validate_spec_decode", _checked_speculation)
    wrap(InputProcessor, "process_inputs", _salted_inputs)


def _checked_model_config(original: Callable) -> Callable:
    def create_model_config(self: Any) -> Any:
        return startup.create_model_config(self, original)

    return create_model_config


def _checked_engine_config(original: Callable) -> Callable:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        startup.check_engine(vllm_config)
        return vllm_config

    return create_engine_config


def _checked_params(original: Callable) -> Callable:
    def _validate_params(self: Any, params: Any, supported_tasks: Any) -> Any:
        choices = choices_of(self)
        try:
            check_extra_args(getattr(params, "extra_args", None), choices)
        except ValueError as error:
            raise RequestError(str(error)) from None
        if choices and choices.drafts:
            self.speculative_config.memdec_drafts = True
        return original(self, params, supported_tasks)

    return _validate_params


def _checked_speculation(original: Callable) -> Callable:
    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if not getattr(speculative_config, "memdec_drafts", False):
            original(self, speculative_config)

    return _validate_spec_decode


def _check_sizes(params: Any) -> None:
    """Raise RequestError for lists longer than the V2 runner has room for: its worker would end."""
    from vllm.v1.worker.gpu.sample import logit_bias as limits

    sizes = {
        "allowed_token_ids": (params.allowed_token_ids, limits.MAX_NUM_ALLOWED_TOKEN_IDS),
        "logit_bias": (params.logit_bias, limits.MAX_NUM_LOGIT_BIAS_TOKENS),
    }
    if params.min_tokens:
        stops = params.all_stop_token_ids, limits.MAX_NUM_STOP_TOKEN_IDS
        sizes["stop_token_ids beside min_tokens"] = stops
    for name, (tokens, most) in sizes.items():
        if len(tokens or ()) > most:
            raise RequestError(
                f"{name}: vLLM's V2 model runner takes at most {most} tokens, got {len(tokens)}: "
                "give fewer."
            )


def _salted_inputs(original: Callable) -> Callable:
    def process_inputs(self: Any, request_id: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            request = original(self, request_id, prompt, *args, **kwargs)
            if (choices := choices_of(self)) and request.sampling_params is not None:
                _salt(self, request, choices, bool(kwargs.get("resumable")))
        except Exception:
            _forget_images(self, prompt)
            raise
        return request

    return process_inputs


def _salt(processor: Any, request: Any, choices: Choices, resumable: bool) -> None:
    """Make the memory part of a request's cache salt, or raise RequestError.

    Where it is in a slot the request carries the slot from here on: names change.
    """
    if processor.vllm_config.use_v2_model_runner:
        _check_sizes(request.sampling_params)
    extra_args, images = request.sampling_params.extra_args, request.mm_features
    try:
        check_extra_args(extra_args, choices)  # again: a slot may be empty since
        if images:
            check_images(extra_args, choices)
        names = choices.running(extra_args, images)
        if resumable and (in_slots := [name for name in names if name in choices.loaded]):
            raise ValueError(
                f"The memory {in_slots[0]!r} is in a slot, which serves no streamed input."
            )
    except ValueError as error:
        raise RequestError(str(error)) from None
    if (settled := choices.settled(extra_args, images)) is not None:
        request.sampling_params.extra_args = settled  # of a copy that is the request's own
    # A name holds no NUL and no plus, so two pairs of names and salt never give the same text.
    request.cache_salt = f"{choices.salt(names)}\0{request.cache_salt or ''}"
    metrics.note_memories(request.request_id, names)
    if getattr(processor, "memdec_logs_requests", False):  # see server.py
        described = choices.described(extra_args, images)
        logger.info("memdec: request %s has %s.", request.request_id, described)


def _forget_images(processor: Any, prompt: Any) -> None:
    """Let the front end send the images of a refused prompt when it is given them again."""
    cache = processor.renderer.mm_processor_cache
    if cache is None or not isinstance(prompt, dict):
        return
    for hashes in (prompt.get("mm_hashes") or {}).values():
        for mm_hash in hashes:
            cache.invalidate(mm_hash)
