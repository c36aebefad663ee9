"""The HTTP server: /v1/models names the memories, and finished requests are counted by memory.

OpenAIServingModels.show_available_models gets a description of base and memories on each card.
metrics.py derives from StatLoggerBase, which vLLM offers to plugins.

May go when a plugin can add fields to /v1/models.
Relies on the server's input processor, which has the configuration, and on what vLLM reports
of finished requests.
"""

from collections.abc import Callable
from typing import Any

from vllm_memdec.compat.hooks import wrap
from vllm_memdec.describe import describe
from vllm_memdec.request import choices_of

SIGNATURES = {
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.show_available_models": "self",
    "vllm.v1.metrics.loggers:StatLoggerBase.record": (
        "self scheduler_stats iteration_stats mm_cache_stats engine_idx"
    ),
}
ATTRIBUTES = {
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": "input_processor",
    "vllm.v1.metrics.stats:FinishedRequestStats": (
        "num_generation_tokens num_prompt_tokens request_id"
    ),
}


def install() -> None:
    """Hook the HTTP server; called by the metrics of an asynchronous engine, which servers have."""
    # An engine without a server does not pay for this import.
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    wrap(OpenAIServingModels, "show_available_models", _described_models)


def _described_models(original: Callable) -> Callable:
    async def show_available_models(self: Any) -> Any:
        models = await original(self)
        if choices_of(self.input_processor):
            if not hasattr(self, "memdec_description"):
                self.memdec_description = describe(self.input_processor.vllm_config)
            for card in models.data:
                card.memdec = self.memdec_description
        return models

    return show_available_models
