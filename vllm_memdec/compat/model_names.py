"""The model's name in a request to the HTTP server: a memory is a model of its own.

OpenAIServingModels.__init__  Memories are served names beside the base's: listed, known, and taken,
    so that vLLM refuses an adapter of that name.
BaseServing._check_model  Every endpoint that reads `model` asks here whether it is known. Where it
    is a memory, that becomes the request's own vllm_xargs, which all else reads.
OpenAIServingModels.model_name  An answer says the name that was asked for. vLLM asks for it in the
    task that checked the model, and does not say for which request.

May go when a plugin can name models that share an engine, each with arguments of its own.
Relies on the names in base_model_paths, on requests that are turned into SamplingParams only after
that check, and on the classes of requests that are not.
"""

from collections.abc import Callable, Collection
from contextvars import ContextVar
from typing import Any

from vllm_memdec.compat.hooks import wrap
from vllm_memdec.request import Choices, check_extra_args, choices_of

PASS_ON = "to_chat_completion_request"  # of requests that hand over what they do not know

SIGNATURES = {
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.__init__": (
        "self engine_client base_model_paths lora_modules"
    ),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.model_name": "self lora_request",
    "vllm.entrypoints.serve.engine.serving:BaseServing._check_model": "self request",
}
ATTRIBUTES = {
    "vllm.entrypoints.openai.models.protocol:BaseModelPath": "name model_path",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": (
        "base_model_paths input_processor"
    ),
    "vllm.entrypoints.serve.engine.serving:BaseServing": "models create_error_response",
    "vllm.entrypoints.scale_out.derender.serving:ServingDerender": "_check_model",
    "vllm.entrypoints.serve.tokenize.serving:ServingTokenization": "_check_model",
}

_asked: ContextVar[str | None] = ContextVar("memdec_model", default=None)


def install() -> None:
    """Hook the server's models; called by server.py."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing

    wrap(OpenAIServingModels, "__init__", _with_memories)
    wrap(OpenAIServingModels, "model_name", _as_asked)
    wrap(BaseServing, "_check_model", _chosen_by_name)


def _with_memories(original: Callable) -> Callable:
    from vllm.entrypoints.openai.models.protocol import BaseModelPath

    def __init__(
        self: Any, engine_client: Any, base_model_paths: Any, *, lora_modules: Any = None
    ) -> None:
        if choices := choices_of(engine_client):
            names = [each.name for each in (*base_model_paths, *(lora_modules or ()))]
            for holder in (engine_client, engine_client.input_processor):
                if known := choices_of(holder):
                    known.give_up(names)
            choices.check_served([path.name for path in base_model_paths], "the base")
            choices.check_served([lora.name for lora in lora_modules or ()], "a LoRA adapter")
            folder = base_model_paths[0].model_path
            memories = [BaseModelPath(name, folder) for name in choices.served]
            base_model_paths = [*base_model_paths, *memories]
        original(self, engine_client, base_model_paths, lora_modules=lora_modules)

    return __init__


def offer(models: Any, before: Collection[str], now: Collection[str]) -> None:
    """Name the memories of a server as they are now; models: its OpenAIServingModels."""
    from vllm.entrypoints.openai.models.protocol import BaseModelPath

    paths = [path for path in models.base_model_paths if path.name not in before]
    paths += [BaseModelPath(name, paths[0].model_path) for name in now]
    models.base_model_paths[:] = paths  # the list that vLLM's registry has, too


def _as_asked(original: Callable) -> Callable:
    def model_name(self: Any, lora_request: Any = None) -> str:
        return _asked.get() or original(self, lora_request)

    return model_name


def _chosen_by_name(original: Callable) -> Callable:
    async def _check_model(self: Any, request: Any) -> Any:
        _asked.set(None)
        error = await original(self, request)
        processor = getattr(self.models, "input_processor", None)  # vLLM's render server has none
        choices = processor and choices_of(processor)
        if error is not None or not choices:
            return error
        try:
            _choose(self, request, choices)
        except ValueError as refusal:
            return self.create_error_response(str(refusal))
        _asked.set(request.model if request.model in choices.served else None)
        return None

    return _check_model


def _choose(handler: Any, request: Any, choices: Choices) -> None:
    """Put what a request's model stands for where the request's own arguments are."""
    from vllm.entrypoints.scale_out.derender.serving import ServingDerender
    from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
    from vllm.sampling_params import SamplingParams

    if isinstance(handler, (ServingTokenization, ServingDerender)):
        return  # no weight decides their answers
    params: Any = getattr(request, "sampling_params", None)
    in_params = isinstance(params, SamplingParams)
    given = params.extra_args if in_params else getattr(request, "vllm_xargs", None)
    if not isinstance(given, dict | None):  # where a request passes on what its class does not know
        raise ValueError("vllm_xargs must be an object of names and values.")
    asked = choices.asked(request.model, given)
    check_extra_args(asked, choices)
    own = choices.resolve(asked) != choices.resolve(None)
    if asked and any(name in choices.without_images for name in choices.running(asked)):
        own = True  # off for requests with images, which a named one is refused for
    if own and getattr(request, "use_beam_search", False):
        raise ValueError(
            "Beam search has the server's memory and weight, not those of a request's model or "
            "vllm_xargs: leave them out, or do without use_beam_search."
        )
    if request.model not in choices.served:
        return
    if in_params:
        params.extra_args = asked
    elif "vllm_xargs" in type(request).model_fields or hasattr(type(request), PASS_ON):
        request.vllm_xargs = asked
    elif own:
        raise ValueError(
            f"The model {request.model!r} asks for a memory or weight, but this endpoint has the "
            "server's own: name the base's model, or ask /v1/completions or /v1/chat/completions."
        )
