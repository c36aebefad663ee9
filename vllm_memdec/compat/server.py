"""The HTTP server: it names the memories, counts by memory, and reads requests as they came.

register_api_routers: every endpoint that reads JSON depends on validate_json_request, and FastAPI
lets an application put another dependency in its place. Ours then looks into the body, of which
vLLM's own classes keep only what they know, and writes weights of several memories as a string,
for these classes take no object there.
OpenAIServingChat.create_chat_completion and OpenAIServingCompletion.create_completion look again,
into what their classes kept: `vllm run-batch` and Ray Serve call them without that endpoint.
OpenAIServingModels.show_available_models gets a description of base and memories on each card, and
on that of a memory its folder and its base (model_names.py makes it a model).
AsyncLLM.add_request tells the input processor, which knows memory and weight, whether requests are
logged, and notes that a request is on its way, until the engine has it.
metrics.py derives from StatLoggerBase, which vLLM offers to plugins.

May go when a plugin can add fields to /v1/models, and vLLM refuses fields it does not know.
Relies on the server's engine client and input processor, which have the configuration, on that
dependency, on requests that keep unknown fields, and on what vLLM reports of finished requests.
"""

import functools
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

from vllm_memdec.compat import model_names, slot_routes
from vllm_memdec.compat.hooks import wrap
from vllm_memdec.compat.model_names import PASS_ON
from vllm_memdec.config import MemDecConfig
from vllm_memdec.describe import describe, describe_model
from vllm_memdec.request import Choices, choices_of
from vllm_memdec.request_body import check_body, write_weights
from vllm_memdec.request_error import RequestError
from vllm_memdec.slots import adding

# The last part of addresses that only count or convert: no weight decides their answers.
NO_ANSWERS = ("tokenize", "detokenize", "count_tokens", "derender")
# The header by which /invocations has its model: it drops the one of the body.
ADAPTER = "X-Amzn-SageMaker-Adapter-Identifier"

SIGNATURES = {
    "vllm.entrypoints.launchers.app:register_api_routers": (
        "args app supported_tasks model_config"
    ),
    "vllm.entrypoints.serve.utils.api_utils:validate_json_request": "raw_request",
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.create_chat_completion": (
        "self request raw_request"
    ),
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion.create_completion": (
        "self request raw_request"
    ),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.show_available_models": "self",
    "vllm.v1.engine.async_llm:AsyncLLM.add_request": (
        "self request_id prompt params arrival_time lora_request tokenization_kwargs trace_headers "
        "priority data_parallel_rank session_id prompt_text reasoning_ended "
        "reasoning_parser_kwargs kv_hints"
    ),
    "vllm.v1.metrics.loggers:StatLoggerBase.record": (
        "self scheduler_stats iteration_stats mm_cache_stats engine_idx"
    ),
}
ATTRIBUTES = {
    "vllm.entrypoints.openai.chat_completion.protocol:BatchChatCompletionRequest": PASS_ON,
    "vllm.entrypoints.openai.completion.protocol:CompletionRequest": "vllm_xargs",
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion": "engine_client",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": ("engine_client input_processor"),
    "vllm.v1.engine.async_llm:AsyncLLM": "input_processor log_requests",
    "vllm.v1.metrics.stats:FinishedRequestStats": (
        "num_generation_tokens num_prompt_tokens request_id"
    ),
}


def install() -> None:
    """Hook the HTTP server; called by the metrics of an asynchronous engine, which servers have."""
    # An engine without a server does not pay for this import.
    from vllm.entrypoints.launchers import app
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.v1.engine.async_llm import AsyncLLM

    model_names.install()
    wrap(OpenAIServingModels, "show_available_models", _described_models)
    wrap(app, "register_api_routers", _checked_routers)
    wrap(OpenAIServingChat, "create_chat_completion", _checked_request)
    wrap(OpenAIServingCompletion, "create_completion", _checked_request)
    wrap(AsyncLLM, "add_request", _logged)


def _logged(original: Callable) -> Callable:
    async def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.input_processor.memdec_logs_requests = self.log_requests
        with adding(self):
            return await original(self, *args, **kwargs)

    return add_request


def _checked_request(original: Callable) -> Callable:
    async def create(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if (choices := choices_of(self.engine_client)) is not None:
            try:
                check_body(dict(request), type(request).model_fields, False, choices, ())
            except ValueError as error:
                raise RequestError(str(error)) from None
        return await original(self, request, *args, **kwargs)

    return create


def _checked_routers(original: Callable) -> Callable:
    from fastapi import Request
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request

    async def checked_json_request(raw_request: Request) -> None:
        await validate_json_request(raw_request)
        route = raw_request.scope["route"]
        choices = choices_of(raw_request.app.state.engine_client)
        if choices is None or route.path.rsplit("/")[-1] in NO_ANSWERS:
            return
        fields, passes_on = _known_fields(route.endpoint)
        body = await raw_request.json()  # which FastAPI has read before
        if route.path == "/invocations" and isinstance(body, dict):
            _check_header(raw_request.headers.get(ADAPTER), body.get("model"), choices)
        try:
            check_body(body, fields, passes_on, choices, raw_request.query_params)
        except ValueError as error:
            raise RequestError(str(error)) from None
        write_weights(body)  # in place: FastAPI makes vLLM's request of the same object

    def register_api_routers(args: Any, app: Any, *others: Any, **options: Any) -> None:
        original(args, app, *others, **options)
        app.dependency_overrides[validate_json_request] = checked_json_request
        slot_routes.attach(app)

    return register_api_routers


def _check_header(given: str | None, model: Any, choices: Choices) -> None:
    """Raise RequestError for a memory named where /invocations does not read it."""
    if isinstance(model, str) and model in choices.served and model != given:
        raise RequestError(
            f"/invocations reads the model from the header {ADAPTER}, not from the body: name "
            f"{model!r} there."
        )


@functools.cache
def _known_fields(endpoint: Callable) -> tuple[frozenset[str], bool]:
    """Return the fields of an endpoint's request, and whether it hands over what it does not know.

    An endpoint that takes requests of several classes, as SageMaker's does, names none: then those
    of completions and chat completions.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    hints = get_type_hints(endpoint)
    hints.pop("return", None)
    models = [m for hint in hints.values() for m in (hint, *get_args(hint))]
    models = [model for model in models if hasattr(model, "model_fields")]
    models = models or [CompletionRequest, ChatCompletionRequest]
    fields: frozenset[str] = frozenset().union(*(model.model_fields for model in models))
    return fields, any(hasattr(model, PASS_ON) for model in models)


def _described_models(original: Callable) -> Callable:
    async def show_available_models(self: Any) -> Any:
        models = await original(self)
        if choices := choices_of(self.input_processor):
            if not hasattr(self, "memdec_description"):
                vllm_config = self.input_processor.vllm_config
                self.memdec_description = describe(vllm_config)
                for slot in MemDecConfig.from_vllm(vllm_config).slots:
                    del self.memdec_description["memories"][slot.name]  # no memory of a request's
            described = self.memdec_description
            if slots := getattr(self.engine_client, "memdec_slots", None):  # where there was a load
                described = described | {"memories": described["memories"] | slots.described}
            for card in models.data:
                card.memdec = described
                if (asked := choices.served.get(card.id)) is not None:
                    card.memdec = describe_model(described, asked)
                    card.root = card.memdec.get("model", card.root)
                    card.parent = self.base_model_paths[0].name
        return models

    return show_available_models
