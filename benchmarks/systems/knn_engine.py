"""kNN-LM (arXiv 1911.00172) inside vLLM: a baseline of the memory, on the same engine.

    p(y|x) = lambda p_kNN(y|x) + (1 - lambda) p_base(y|x)

The base's own hidden states, the same that a build takes its keys from, query the build's index
for every row of logits that vLLM asks for, all rows of a batch in one search. register() makes the
model known to this process, so the engine has to run in it (VLLM_ENABLE_V1_MULTIPROCESSING=0),
without torch.compile: hooks take the keys out of the base.

Shapes: T tokens, N selected rows, V vocabulary, D hidden, k neighbours.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.utils import initialize_model

from vllm_memdec.train.executor.context import RAM_BUDGET
from vllm_memdec.train.model.hidden_states import last_mlp
from vllm_memdec.train.model.huggingface import layers_of
from vllm_memdec.train.stages.search import Index
from vllm_memdec.train.stages.targets import neighbour_weights

ARCHITECTURE = "KNNForCausalLM"


@dataclass(frozen=True)
class KNN:
    """How a datastore is asked, and what its answer weighs."""

    build: str  # output folder of a `memdec build`
    weight: float  # lambda
    temperature: float
    neighbours: int
    probes: int

    def options(self, base: str) -> dict[str, Any]:
        """Return what vLLM's LLM takes to serve a base with this."""
        architectures = json.loads((Path(base) / "config.json").read_text())["architectures"]
        return {
            "hf_overrides": {"architectures": [ARCHITECTURE]},
            "additional_config": {"knn_lm": vars(self) | {"architectures": architectures}},
        }


class KNNForCausalLM(nn.Module):
    """A base that looks up each row's nearest keys, and what followed them."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        settings = dict(vllm_config.additional_config["knn_lm"])
        architectures = settings.pop("architectures")
        self.settings = KNN(**settings)
        hf_config = vllm_config.model_config.hf_config
        self.base = initialize_model(
            vllm_config.with_hf_config(hf_config, architectures), prefix=prefix
        )
        build = Path(self.settings.build)
        self.index = Index(build / "index", self.settings.probes, RAM_BUDGET)
        self.take_keys(json.loads((build / "datastore/manifest.json").read_text())["settings"])
        self.make_empty_intermediate_tensors = self.base.make_empty_intermediate_tensors

    def take_keys(self, datastore: dict[str, Any]) -> None:
        """Keep the hidden states [T, D] that the datastore's keys were made of."""
        self.key_TD: torch.Tensor | None = None
        kind = datastore["key"]

        def before(module: nn.Module, args: tuple) -> None:
            self.key_TD = args[0]

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            # vLLM's layers return the residual stream and what they add to it as two tensors.
            self.key_TD = sum(output) if isinstance(output, tuple) else output

        model = Wrapped(self.base)
        if kind == "last_mlp_input":
            last_mlp(model).register_forward_pre_hook(before)
        elif kind == "layer":
            layers = layers_of(model)
            number = math.ceil(datastore["layer_fraction"] * len(layers)) - 1
            layers[number].register_forward_hook(after)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.base.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
    ) -> torch.Tensor:
        """Return [T, D + D_key]: the base's hidden states and the keys, side by side."""
        h_TD = self.base(input_ids, positions)
        self.width = h_TD.shape[1]
        key_TD = h_TD if self.key_TD is None else self.key_TD
        return torch.cat([h_TD, key_TD[: len(h_TD)].to(h_TD.dtype)], dim=-1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return log p [N, V] in float32."""
        h_ND, key_ND = hidden_states.split([self.width, hidden_states.shape[1] - self.width], 1)
        logits_NV = self.base.compute_logits(h_ND.contiguous()).float()
        base_NV = logits_NV.log_softmax(-1)
        queries = key_ND.float().cpu().numpy()
        distances, ids = self.index.search(queries, self.settings.neighbours)
        weights_Nk = torch.from_numpy(neighbour_weights(distances, ids, self.settings.temperature))
        tokens_Nk = torch.from_numpy(self.index.labels[ids].astype("int64"))
        p_NV = base_NV.exp_().mul_(1 - self.settings.weight)
        weights_Nk, tokens_Nk = (x.to(p_NV.device) for x in (weights_Nk, tokens_Nk))
        return p_NV.scatter_add_(1, tokens_Nk, weights_Nk * self.settings.weight).log_()

    def load_weights(self, weights: Any) -> set[str]:
        return {f"base.{name}" for name in self.base.load_weights(weights)}


class Wrapped:
    """A vLLM model as the datastore's functions know Hugging Face's."""

    def __init__(self, model: nn.Module) -> None:
        self.base_model = model


def register() -> None:
    """Make the model known to vLLM in this process."""
    ModelRegistry.register_model(ARCHITECTURE, KNNForCausalLM)
