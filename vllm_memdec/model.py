"""The composite: two decoders on one batch, mixed where vLLM asks for logits.

p = (1 - alpha) * p_base + alpha * p_memory, per row. Both models see the same tokens, positions and
block table; each keeps its own KV layers. vLLM calls compute_logits() for every row it wants to
sample from or report (prompt log-probabilities too), so all of them are the mixture's.

Shapes: T tokens, N selected rows, V base vocabulary, W memory vocabulary, D hidden.
"""

import copy
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import CompilationMode, ModelConfig, VllmConfig, replace
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.logger import init_logger
from vllm.model_executor.model_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import maybe_prefix
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_memdec import compat
from vllm_memdec.config import SPECULATION, MemDecConfig, memory_model_config
from vllm_memdec.kernels.interpolate import compile_rows, interpolate
from vllm_memdec.plugin import ARCHITECTURE
from vllm_memdec.state import AlphaRows, decode

logger = init_logger("vllm.plugins.memdec")  # vLLM configures handlers for its own namespace only
SOURCE = "memdec_memory."  # marks the memory's tensors in the one stream of checkpoint tensors


class MemDecForCausalLM(nn.Module):
    """A base model under `base`, its memory under `memory`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.settings = MemDecConfig.from_vllm(vllm_config)
        model_config = vllm_config.model_config
        architectures = model_config.architectures
        assert ARCHITECTURE not in architectures, "the base would be the composite again"
        check_speculation(vllm_config)

        # The base keeps its usual layer names (no prefix): quantisation settings refer to them.
        self.base = initialize_model(
            vllm_config.with_hf_config(model_config.hf_config, architectures), prefix=prefix
        )
        memory_config = memory_vllm_config(vllm_config, self.settings.model)
        with set_model_tag("memory"):  # its own compile cache, as vLLM gives a draft model
            self.memory = initialize_model(memory_config, prefix=maybe_prefix(prefix, "memory"))
        self.secondary_weights = [
            DefaultModelLoader.Source(self.settings.model, revision=None, prefix=SOURCE)
        ]
        self.make_empty_intermediate_tensors = self.base.make_empty_intermediate_tensors

        sizes = (model_config.get_hidden_size(), memory_config.model_config.get_hidden_size())
        self.split = (sizes[0], sum(sizes))
        # A base with more rows than the memory may send it an id that it has no embedding for.
        memory_vocab = memory_config.model_config.get_vocab_size()
        self.last_memory_id = memory_vocab - 1
        self.clamp_ids = model_config.get_vocab_size() > memory_vocab
        self.alpha_rows = AlphaRows(
            sum(sizes),
            vllm_config.scheduler_config.max_num_batched_tokens,
            model_config.dtype,
            vllm_config.device_config.device,
        )
        self.vocab_sizes = (model_config.get_vocab_size(), memory_vocab)
        mode, device = vllm_config.compilation_config.mode, vllm_config.device_config.device
        self.compiled = mode != CompilationMode.NONE and torch.device(device).type == "cpu"
        compat.install_v1_runner()
        self.log_start(model_config.model)

    @staticmethod
    def get_model_state_cls() -> type:
        """Return the class through which the V2 runner tells us the weights of its batch."""
        return compat.v2_model_state_cls()

    def embed_input_ids(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError("memdec runs on token ids: there is no shared embedding.")

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
    ) -> torch.Tensor:
        """Return [T, D_base + D_memory + A]: both hidden states and the columns of the weight."""
        assert intermediate_tensors is None and inputs_embeds is None
        base_TD = self.base(input_ids, positions)
        memory_ids_T = input_ids.clamp(max=self.last_memory_id) if self.clamp_ids else input_ids
        memory_TD = self.memory(memory_ids_T, positions)
        columns_TA = self.alpha_rows.columns_TA[: len(base_TD)]
        return torch.cat([base_TD, memory_TD, columns_TA], dim=-1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return float32 [N, V]: the mixture's log-probabilities plus the base's logsumexp.

        They behave as logits (penalties keep their meaning); weight 0 gives the base's own.
        """
        base_ND, memory_ND, columns_NA = hidden_states.tensor_split(self.split, dim=-1)
        base_NV = self.base.compute_logits(base_ND.contiguous())
        memory_NW = self.memory.compute_logits(memory_ND.contiguous())
        if base_NV is None:  # a tensor-parallel rank that does not gather
            return None
        return interpolate(
            base_NV, memory_NW, decode(columns_NA), as_logits=True, compiled=self.compiled
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Route one stream of tensors to the two models and return the names that were loaded."""
        loaded = set()
        for is_memory, group in groupby(weights, key=lambda item: item[0].startswith(SOURCE)):
            part = "memory" if is_memory else "base"
            names = ((name.removeprefix(SOURCE), tensor) for name, tensor in group)
            loaded |= {f"{part}.{name}" for name in getattr(self, part).load_weights(names)}
        if not any(name.startswith("memory.") for name in loaded):
            raise ValueError(
                "This --load-format does not bring the memory's weights: use --load-format auto."
            )
        if self.compiled:
            # Loading has the model's dtype as the default one, serving float32: part of the graph.
            with set_default_torch_dtype(torch.float32):
                compile_rows(*self.vocab_sizes, self.alpha_rows.columns_TA.dtype)
        return loaded

    def log_start(self, base_name: str) -> None:
        """Say that the memory is live: the line to look for in the log."""
        if get_tensor_model_parallel_rank() == 0:
            base, memory = (
                sum(p.numel() for p in m.parameters()) for m in (self.base, self.memory)
            )
            logger.info(
                "memdec: base %s (%.1fM parameters%s) + memory %s (%.1fM), alpha %g.",
                base_name,
                base / 1e6,
                " per rank" if get_tensor_model_parallel_world_size() > 1 else "",
                self.settings.model,
                memory / 1e6,
                self.settings.alpha,
            )


def memory_vllm_config(vllm_config: VllmConfig, folder: str) -> VllmConfig:
    """Return the configuration under which vLLM builds the memory beside the base."""
    base = vllm_config.model_config
    model_config = memory_model_config(folder, base, base.max_model_len)
    # One window for all layers travels in the cache config; the memory must not get the base's.
    cache_config = copy.copy(vllm_config.cache_config)
    cache_config.sliding_window = uniform_sliding_window(model_config)
    # quant_config None: vLLM derives the memory's own, if its config.json names one.
    return replace(
        vllm_config, model_config=model_config, cache_config=cache_config, quant_config=None
    )


def uniform_sliding_window(model_config: ModelConfig) -> int | None:
    """Return the window of a model whose layers all have it, as vLLM decides for the base."""
    layer_types = getattr(model_config.hf_text_config, "layer_types", None)
    if layer_types is not None and any(kind != "sliding_attention" for kind in layer_types):
        return None
    return model_config.get_sliding_window()


def check_speculation(vllm_config: VllmConfig) -> None:
    """Refuse a drafter that vLLM resolved to a method which reads hidden states."""
    speculation = vllm_config.speculative_config
    if speculation is not None and speculation.method not in SPECULATION:
        raise ValueError(
            f"vllm-memdec does not support speculation by {speculation.method!r} yet: "
            "use the method draft_model."
        )
