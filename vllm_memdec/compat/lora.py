"""LoRA of both runners: adapters go on the base alone.

LoRAModelRunnerMixin.load_lora_model runs while the composite's memories are taken out of it. vLLM
puts adapters on every layer of a model whose name fits, and a memory has the same names.

May go when vLLM lets a model name the parts that adapters are for.
Relies on load_lora_model going through the modules of the model that it is given.
"""

import re
from collections.abc import Callable
from typing import Any

from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from vllm_memdec.compat.hooks import wrap

SIGNATURES = {
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model": (
        "self model vllm_config device"
    ),
}


def install() -> None:
    """Hook the loading of LoRA; called by the composite, so only in a worker that serves it."""
    wrap(LoRAModelRunnerMixin, "load_lora_model", _on_the_base)


def _on_the_base(original: Callable) -> Callable:
    def load_lora_model(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        names = [name for name in model._modules if re.fullmatch(r"memory\d+", name)]
        hidden = {name: model._modules.pop(name) for name in names}
        try:
            return original(self, model, *args, **kwargs)
        finally:
            model._modules.update(hidden)

    return load_lora_model
