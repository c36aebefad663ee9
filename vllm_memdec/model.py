"""The composite: a base and its memories on one batch, mixed where vLLM asks for logits.

p = (1 - alpha) * p_base + alpha * p_memory, per row. The models see the same tokens, positions and
block table; each keeps its own KV layers. A memory runs on the tokens of the requests that chose
it, and not at all where none did. vLLM calls compute_logits() for every row it wants to sample from
or report (prompt log-probabilities too), so all of them are the mixture's.

Shapes: T tokens, N selected rows, V base vocabulary, W memory vocabulary, D hidden.
"""

from collections.abc import Iterable
from itertools import groupby
from typing import Any, Literal

import torch
from torch import nn
from vllm import envs
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import (
    SupportsLoRA,
    requires_raw_input_tokens,
    supports_lora,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.utils.torch_utils import aux_stream, set_default_torch_dtype

from vllm_memdec.batch import decode
from vllm_memdec.compat import figures, multimodal
from vllm_memdec.compat.attention import is_attention, kv_bytes_per_token
from vllm_memdec.compat.inner_models import build_base, dtype_of
from vllm_memdec.config import ARCHITECTURE, MemDecConfig
from vllm_memdec.drafter import Drafter
from vllm_memdec.kernels.interpolate import RowWeights, interpolate
from vllm_memdec.memory import SOURCE, source_of
from vllm_memdec.memory_set import MemorySet
from vllm_memdec.request import Choices
from vllm_memdec.several import mix_several
from vllm_memdec.tally import MIXING

logger = init_logger("vllm.plugins.memdec")  # vLLM configures handlers for its own namespace only
SLICE_BYTES = 1 << 28  # of logits of both models at once: 440 rows of a 152k vocabulary in bfloat16
OVERLAPPING = {"FLASH_ATTN", "TRITON_ATTN"}  # attention backends without a workspace in common
MAX_GROUPS = 4  # of KV cache; one is usual, and 50 to 100 us of host time in every step


class MemDecForCausalLM(nn.Module, SupportsLoRA):
    """A base model under `base`, its memories under `memory0`, `memory1`, ..."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.settings = MemDecConfig.from_vllm(vllm_config)
        self.choices = Choices.of(self.settings)
        model_config = vllm_config.model_config
        assert ARCHITECTURE not in model_config.architectures, "the base would be the composite"
        self.loaded: set[str] = set()
        self.vllm_config = vllm_config

        self.base = build_base(vllm_config, prefix)
        self.base_dtype, self.vocabulary = dtype_of(model_config), model_config.get_vocab_size()
        self.memories = MemorySet(vllm_config, self.settings, prefix)
        for memory in self.memories:  # so that the composite has their parameters
            setattr(self, memory.name, memory.module)
        self.batch, self.tally = self.memories.batch, self.memories.tally
        base_width = model_config.get_hidden_size()
        self.split = (base_width, base_width + self.memories.width)
        speculation = vllm_config.speculative_config
        self.rows_per_request = 1 + (speculation.num_speculative_tokens if speculation else 0)
        self.drafter: Drafter | None = None  # the memories as a draft model, if they are to draft
        if self.settings.speculative_tokens:
            # The V2 runner keeps in this dtype what drafts were drawn from.
            self.drafter = Drafter(self.memories, self.vocabulary, model_config.head_dtype)
        layers = vllm_config.compilation_config.static_forward_context
        self.beside = self.may_overlap(layers.values())
        fixed = [memory for memory in self.memories if not memory.is_slot]
        self.secondary_weights = [memory.source for memory in fixed]
        self.make_empty_intermediate_tensors = self.base.make_empty_intermediate_tensors
        multimodal.answer_for(self.base, self)
        # Memories need token ids where the base gets embeddings, of which some are an image's.
        self.requires_raw_input_tokens = True
        mode = vllm_config.compilation_config.mode
        self.compiled = mode != CompilationMode.NONE and self.memories.device.type == "cpu"
        if vllm_config.lora_config is not None:
            self.prepare_lora()
        self.install_seams(vllm_config)
        self.log_start(vllm_config)

    def get_model_state_cls(self) -> type:
        """Return the class through which the V2 runner tells us what its batch asks for."""
        from vllm_memdec.compat.v2_runner import state_class

        return state_class(self.vllm_config, self.base)

    def get_mamba_state_copy_funcs(self, mamba_types: set[Any]) -> Any:
        """Return how vLLM copies the states that a hybrid base keeps: the base's own answer."""
        return self.base.get_mamba_state_copy_funcs(mamba_types)

    def install_seams(self, vllm_config: VllmConfig) -> None:
        """Hook the runner that this worker has; the other one's modules are not imported."""
        if vllm_config.use_v2_model_runner:
            from vllm_memdec.compat import v2_drafting, v2_graphs

            figures.install_v2()
            v2_graphs.install()
            if self.drafter is not None:
                v2_drafting.install()
        else:
            from vllm_memdec.compat import v1_drafting, v1_runner, v1_sampling

            figures.install_v1()
            v1_runner.install()
            if self.drafter is not None:
                v1_drafting.install()
            if vllm_config.speculative_config is not None:
                v1_sampling.install()
        on_cpu = self.memories.device.type == "cpu"
        if vllm_config.speculative_config is not None and on_cpu:
            from vllm_memdec.compat import cpu_speculation

            cpu_speculation.install()

    def embed_input_ids(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the base's embeddings, with those of images in their places."""
        return self.base.embed_input_ids(*args, **kwargs)

    def run_base(
        self, input_ids: torch.Tensor, positions: torch.Tensor, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the base's hidden states [T, D_base], of embeddings where vLLM gives them."""
        if inputs_embeds is None:
            return self.base(input_ids, positions)
        reads_both = requires_raw_input_tokens(self.base)
        return self.base(input_ids if reads_both else None, positions, inputs_embeds=inputs_embeds)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return [T, D_base + S * D_memory + A]: base, the row's own memories, columns of all.

        D_memory is the widest memory's, S how many a row may have; what is not used is arbitrary.
        """
        assert intermediate_tensors is None and input_ids is not None
        width = self.split[1] + self.batch.columns_TA.shape[1]
        out_TD = self.batch.columns_TA.new_empty(len(input_ids), width)
        if self.overlaps():
            main, side = torch.cuda.current_stream(), aux_stream()
            assert side is not None, "see may_overlap()"
            side.wait_stream(main)
            with torch.cuda.stream(side):
                self.memories.run(input_ids, positions, out_TD[:, self.split[0] :])
            out_TD[:, : self.split[0]] = self.run_base(input_ids, positions, inputs_embeds)
            main.wait_stream(side)
            return out_TD
        # vLLM holds what a model returns only until another model's CUDA graphs run: both allocate
        # from one pool, and the last graph of a model keeps no reference. So it is copied first.
        out_TD[:, : self.split[0]] = self.run_base(input_ids, positions, inputs_embeds)
        self.memories.run(input_ids, positions, out_TD[:, self.split[0] :])
        return out_TD

    def first_positions(self, computed_B: torch.Tensor) -> torch.Tensor | None:
        """Return the lowest positions at which requests may go on; None if no memory ends.

        computed_B: their computed tokens, as the host counts them. Where vLLM plans ahead, it takes
        the last drafts for accepted.
        """
        if not any(memory.ends for memory in self.memories):
            return None
        return computed_B.long() - (self.rows_per_request - 1)

    def overlaps(self) -> bool:
        """Return whether memories run beside the base, on a stream of their own.

        Only while a full graph is captured, in whose pool each stream has blocks of its own.
        """
        return (
            self.beside
            and torch.cuda.is_current_stream_capturing()
            and get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE
        )

    def may_overlap(self, layers: Iterable[Any]) -> bool:
        """Return whether memories can run beside the base; warn where the setting has no effect.

        Not across ranks, where both would use one communicator at once, and not with attention
        backends whose layers share a workspace.
        """
        if not self.settings.overlap:
            return False
        backends = {layer.attn_backend.get_name() for layer in layers if is_attention(layer)}
        ranks = get_tensor_model_parallel_world_size()
        may = aux_stream() is not None and ranks == 1 and backends <= OVERLAPPING
        if not may:
            logger.warning(
                "memdec: 'overlap' has no effect here: it needs CUDA, one rank and the attention "
                "backends %s, not %s.",
                sorted(OVERLAPPING),
                sorted(backends),
            )
        return may

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return [N, V]: the mixture's log-probabilities plus the base's logsumexp, in float32.

        They behave as logits (penalties keep their meaning). A row without a memory has the base's
        own; so do all, in their own dtype, if no request of the batch has one.
        """
        if not self.batch.used:
            return self.base_logits(hidden_states)
        # Where bits must not depend on the batch, rows of one memory are mixed as those of several.
        several = self.batch.several or (envs.VLLM_BATCH_INVARIANT and self.settings.at_once > 1)
        if self.memories.selects_rows and not several:
            return self.mix_selected(hidden_states)
        N, V, W = len(hidden_states), self.vocabulary, self.memories.max_vocabulary
        # vLLM's memory profile has one row a request, a step that verifies drafts has more.
        rows = N * self.rows_per_request if self.batch.is_dummy else N
        out_NV = hidden_states.new_empty(rows, V, dtype=torch.float32)[:N]
        if self.batch.is_dummy:  # no request is to wait until the kernels of few rows are compiled
            for each in {False, several}:
                self.mix(hidden_states[:1], out_NV[:1], each)
        # Both models' logits exist for a slice of the rows only, the mixture's for all.
        size = max(1, SLICE_BYTES // (self.memories.dtype.itemsize * (V + W)))
        slices = [slice(start, start + size) for start in range(0, N, size)]
        if not all([self.mix(hidden_states[rows], out_NV[rows], several) for rows in slices]):
            return None
        return out_NV

    def base_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the base's own logits [N, V]."""
        base_ND = hidden_states[:, : self.split[0]]
        return self.base.compute_logits(base_ND.to(self.base_dtype).contiguous())

    def mix(self, hidden_states: torch.Tensor, out_NV: torch.Tensor, several: bool) -> bool:
        """Write the mixture [N, V] without waiting for the device; False where a rank has none.

        several: whether rows may have several memories.
        """
        _, memory_ND, columns_NA = hidden_states.tensor_split(self.split, dim=-1)
        base_NV = self.base_logits(hidden_states)
        options: Any = {"invariant": envs.VLLM_BATCH_INVARIANT, "compiled": self.compiled}
        if several:
            return mix_several(base_NV, memory_ND, columns_NA, self.memories, out_NV, **options)
        others: Literal["base", "keep"] = "base"
        for memory in self.memories.used:
            mine_ND = memory.own_rows(memory_ND)
            memory_NW = memory.logits(mine_ND)
            with memory.timed(MIXING):
                gate = memory.score(mine_ND, columns_NA)
                if base_NV is None or memory_NW is None:  # a rank that does not gather
                    continue
                interpolate(
                    base_NV,
                    memory_NW,
                    RowWeights(columns_NA, memory.number, others),
                    gate=gate,
                    as_logits=True,
                    out=out_NV,
                    tally_2=self.tally.slot(memory.number, self.batch.is_dummy),
                    **options,
                )
            others = "keep"  # the rows of the memories before
        return others == "keep"

    def mix_selected(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return what compute_logits() does, each head on the rows of its own requests only."""
        _, memory_ND, columns_NA = hidden_states.tensor_split(self.split, dim=-1)
        base_NV = self.base_logits(hidden_states)
        out_NV = base_NV
        for memory, rows, mine_ND, memory_NW in self.memories.selected_logits(
            memory_ND, columns_NA
        ):
            with memory.timed(MIXING):
                gate = memory.score(mine_ND, columns_NA[rows])
                if base_NV is None or memory_NW is None:  # a rank that does not gather
                    continue
                # A negative weight is a gate's cap.
                asked_N = decode(columns_NA[rows])
                mixed_NV = interpolate(
                    base_NV[rows],
                    memory_NW,
                    asked_N.clamp(min=0) if gate is None else asked_N,
                    gate=gate,
                    as_logits=True,
                    tally_2=self.tally.slot(memory.number, self.batch.is_dummy),
                    compiled=self.compiled,
                )
            if self.batch.shared:
                out_NV = mixed_NV
            else:
                if out_NV is None or out_NV is base_NV:
                    out_NV = base_NV.to(torch.float32, copy=True)
                out_NV[rows] = mixed_NV
        return out_NV

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Route one stream of tensors to the models and return the names that were loaded."""
        loaded: set[str] = set()
        for source, group in groupby(weights, key=lambda item: source_of(item[0])):
            if source is None:
                loaded |= {f"base.{name}" for name in self.base.load_weights(group)}
                continue
            memory, cut = self.memories[source], len(f"{SOURCE}{source}.")
            names = memory.load((name[cut:], tensor) for name, tensor in group)
            loaded |= {f"{memory.name}.{name}" for name in names}
        for memory in self.memories:
            if memory.is_slot and not self.loaded:  # later calls leave a slot what it has
                loaded |= {f"{memory.name}.{name}" for name in memory.clear()}
        self.loaded |= loaded  # later calls may update the base alone
        # Again, and the batch too: what is on a device may have been dropped since.
        for memory in self.memories:
            memory.load_gate()
        self.batch.reset()
        self.tally.restart()
        for memory in self.memories:
            if not any(name.startswith(f"{memory.name}.") for name in self.loaded):
                raise ValueError(
                    "This --load-format does not bring the memory's weights: "
                    "use --load-format auto."
                )
        if self.compiled:
            mixed = torch.float32 if self.settings.at_once > 1 else self.base_dtype
            # Loading has the model's dtype as the default one, serving float32: part of the graph.
            with set_default_torch_dtype(torch.float32):
                for memory in self.memories:
                    # Where several memories are mixed, one is mixed into a mixture in float32.
                    memory.compile_mixing(self.vocabulary, {self.base_dtype, mixed})
        return loaded

    def prepare_lora(self) -> None:
        """Let vLLM put LoRA adapters on the base, and on nothing else."""
        base = self.base
        if not supports_lora(base):
            raise ValueError(f"vLLM has no LoRA for {type(base).__name__}: start without it.")
        from vllm_memdec.compat import lora

        lora.install()
        for name in ("is_3d_moe_weight", "is_non_gated_moe", "embedding_modules"):
            setattr(self, name, getattr(self.base, name))
        self.packed_modules_mapping = self.base.packed_modules_mapping
        self.config = self.base.config
        # vLLM declares it for a class; here it is the base's.
        self.lora_skip_prefixes = self.base.lora_skip_prefixes  # type: ignore[misc]
        if hasattr(base, "get_mm_mapping"):
            self.get_mm_mapping = lambda: lora.parts_of(base)
        mapper = getattr(self.base, "hf_to_vllm_mapper", None) or WeightsMapper()
        self.hf_to_vllm_mapper = mapper | WeightsMapper(orig_to_new_prefix={"": "base."})

    def log_start(self, vllm_config: VllmConfig) -> None:
        """Log which memories are live: the lines to look for."""
        if get_tensor_model_parallel_rank() != 0:
            return
        layers = vllm_config.compilation_config.static_forward_context
        others = set(self.memories.layer_names)
        models = [(self.base, [name for name in layers if name not in others])]
        models += [(memory.module, memory.layers) for memory in self.memories]
        sizes = [
            kv_bytes_per_token([layers[name] for name in names], vllm_config) for _, names in models
        ]
        ranks = get_tensor_model_parallel_world_size()
        described = [
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"
            f"{' per rank' if ranks > 1 else ''}, {size / sum(sizes):.0%} of the KV cache"
            for (model, _), size in zip(models, sizes, strict=True)
        ]
        logger.info("memdec: base %s (%s).", vllm_config.model_config.model, described[0])
        for memory, text in zip(self.settings.built, described[1:], strict=True):
            if memory in self.settings.slots:
                logger.info("memdec: %s, as %s (%s).", memory.name, memory.model, text)
                continue
            default = ", the default" if memory.name == self.settings.default else ""
            told = memory.name, memory.model, text, memory.weight, default
            logger.info("memdec: memory %r %s (%s), alpha %s%s.", *told)
        if self.settings.at_once > 1:
            logger.info("memdec: a request may mix %d memories.", self.settings.at_once)
        length = vllm_config.model_config.max_model_len
        for shorter in (memory for memory in self.memories if memory.ends):
            logger.info(
                "memdec: the memory %r has %d positions, the server %d: beyond its own, its weight "
                "is 0 and the base answers alone.",
                shorter.settings.name,
                shorter.length,
                length,
            )

    def log_groups(self, kv_cache_config: Any) -> None:
        """Warn if windows, of base and memories, make many groups of KV cache."""
        groups = len(kv_cache_config.kv_cache_groups)
        if groups > MAX_GROUPS and get_tensor_model_parallel_rank() == 0:
            logger.warning(
                "memdec: the KV cache has %d groups, each of which costs the host time in every "
                "step: beside this base a memory with full attention in all layers makes fewer.",
                groups,
            )
