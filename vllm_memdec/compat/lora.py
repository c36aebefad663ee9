"""LoRA of both runners: adapters go on the base alone.

LoRAModelRunnerMixin.load_lora_model runs while the composite's memories are taken out of it. vLLM
puts adapters on every layer of a model whose name fits, and a memory has the same names. Of a model
that sees images it asks where the language model is, and puts them there: so it is told whether the
base does, and where the composite has its parts.

May go when vLLM lets a model name the parts that adapters are for.
Relies on load_lora_model going through the modules of the model that it is given.
"""

import re
from collections.abc import Callable
from typing import Any

from vllm.model_executor.models.interfaces import supports_multimodal
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from vllm_memdec.compat.hooks import wrap

SIGNATURES = {
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model": (
        "self model vllm_config device"
    ),
    "vllm.model_executor.models.interfaces:supports_multimodal": "model",
}


def install() -> None:
    """Hook the loading of LoRA; called by the composite, so only in a worker that serves it."""
    wrap(LoRAModelRunnerMixin, "load_lora_model", _on_the_base)


def _on_the_base(original: Callable) -> Callable:
    def load_lora_model(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        names = [name for name in model._modules if re.fullmatch(r"memory\d+", name)]
        if not names:  # a model of another engine in this process
            return original(self, model, *args, **kwargs)
        hidden = {name: model._modules.pop(name) for name in names}
        # Only here: elsewhere vLLM would ask a model that sees images for its language model.
        model.supports_multimodal = supports_multimodal(model.base)
        try:
            return original(self, model, *args, **kwargs)
        finally:
            del model.supports_multimodal
            model._modules.update(hidden)

    return load_lora_model


def parts_of(base: Any) -> MultiModelKeys:
    """Return where a composite has the language model, connector and towers of its base."""
    parts = vars(base.get_mm_mapping())
    return MultiModelKeys(**{kind: [f"base.{name}" for name in parts[kind]] for kind in parts})
