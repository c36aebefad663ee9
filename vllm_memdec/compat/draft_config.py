"""The configuration of a draft model, where the memories draft: that of the base.

EngineArgs.create_speculative_config is wrapped; within it, what makes the configuration of a draft
model gives the base's own, with its --hf-overrides, revision and length, but for positions of
several dimensions, which the base may have and memories have not. vLLM reads the folder again
without these: the base may then be another one, or none that can be read.

May go when vLLM lets a drafter go without a draft model of its own.
Relies on SpeculativeConfig making one ModelConfig, by that name in its module.
"""

import copy
from collections.abc import Callable
from typing import Any

from vllm.config import ModelConfig, speculative
from vllm.engine.arg_utils import EngineArgs

from vllm_memdec.compat.hooks import wrap
from vllm_memdec.config import ARCHITECTURE, MemDecConfig, memdec_block

SIGNATURES = {
    "vllm.engine.arg_utils:EngineArgs.create_speculative_config": (
        "self target_model_config target_parallel_config"
    ),
    "vllm.config.speculative:SpeculativeConfig.__post_init__": "self",
}
ATTRIBUTES = {
    "vllm.config.speculative:SpeculativeConfig": "draft_model_config",
    "vllm.config:ModelConfig": "uses_mrope",
}


class MemoriesConfig(ModelConfig):
    """The base's configuration, as it is for what drafts."""

    @property
    def uses_mrope(self) -> bool:
        return False


def install() -> None:
    """Hook where vLLM configures speculation."""
    wrap(EngineArgs, "create_speculative_config", _configured)


def _configured(original: Callable) -> Callable:
    def create_speculative_config(
        self: Any, target_model_config: Any, *args: Any, **kw: Any
    ) -> Any:
        settings = memdec_block(self.additional_config)
        if (
            settings is None
            or target_model_config.hf_config.architectures != [ARCHITECTURE]
            or not MemDecConfig.parse(settings).speculative_tokens
        ):
            return original(self, target_model_config, *args, **kw)

        def base_config(**_: Any) -> Any:
            config = copy.copy(target_model_config)  # vLLM writes the drafter's length into it
            config.__class__ = MemoriesConfig
            config.model = "memories"  # of a path that has "eagle-" in it vLLM makes a method
            return config

        made = speculative.ModelConfig
        speculative.ModelConfig = base_config  # type: ignore  # a class, exchanged for a function
        try:
            config = original(self, target_model_config, *args, **kw)
        finally:
            speculative.ModelConfig = made  # type: ignore  # the class again
        assert config.draft_model_config.hf_config is target_model_config.hf_config
        return config

    return create_speculative_config
