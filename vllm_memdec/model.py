"""The composite: a base and its memories on one batch, mixed where vLLM asks for logits.

p = (1 - alpha) * p_base + alpha * p_memory, per row. The models see the same tokens, positions and
block table; each keeps its own KV layers. A memory runs on the tokens of the requests that chose
it, and not at all where none did. vLLM calls compute_logits() for every row it wants to sample from
or report (prompt log-probabilities too), so all of them are the mixture's.

Shapes: T tokens, N selected rows, V base vocabulary, W memory vocabulary, D hidden.
"""

import copy
import functools
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import nn
from vllm import envs
from vllm.compilation.backends import set_model_tag
from vllm.config import CompilationMode, CUDAGraphMode, ModelConfig, VllmConfig, replace
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
)
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.model_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.interfaces import SupportsLoRA, supports_lora
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix
from vllm.utils.torch_utils import aux_stream, set_default_torch_dtype

from vllm_memdec import compat, graphs, v2_drafting
from vllm_memdec.config import MemDecConfig, MemoryConfig, memory_model_config
from vllm_memdec.gate import Gate, read_gate
from vllm_memdec.kernels.interpolate import RowWeights, compile_rows, interpolate
from vllm_memdec.plugin import ARCHITECTURE
from vllm_memdec.state import (
    CONTEXT,
    Batch,
    Choices,
    ContextTable,
    Part,
    decode,
    decode_memory,
    decode_said,
    write_context,
)

logger = init_logger("vllm.plugins.memdec")  # vLLM configures handlers for its own namespace only
SLICE_BYTES = 1 << 28  # of logits of both models at once: 440 rows of a 152k vocabulary in bfloat16
OVERLAPPING = {"FLASH_ATTN", "TRITON_ATTN"}  # attention backends without a workspace in common
MANY_GROUPS = 4  # of KV cache; one is usual, and 50 to 100 us of host time in every step
SOURCE = "memdec_memory."  # and a number: marks a memory among all checkpoint tensors


class MemDecForCausalLM(nn.Module, SupportsLoRA):
    """A base model under `base`, its memories under `memory0`, `memory1`, ..."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.settings = MemDecConfig.from_vllm(vllm_config)
        memories = self.settings.memories
        model_config = vllm_config.model_config
        architectures = model_config.architectures
        device = torch.device(vllm_config.device_config.device)
        assert ARCHITECTURE not in architectures, "the base would be the composite again"
        self.loaded: set[str] = set()

        # The base keeps its usual layer names (no prefix): quantisation settings refer to them.
        self.base = initialize_model(
            vllm_config.with_hf_config(model_config.hf_config, architectures), prefix=prefix
        )
        self.memory_configs = configs = [
            memory_vllm_config(vllm_config, m, number) for number, m in enumerate(memories)
        ]
        models = [config.model_config for config in configs]
        self.memory_sizes = [model.get_hidden_size() for model in models]
        self.vocab_sizes = [model.get_vocab_size() for model in (model_config, *models)]
        base_size, memory_size = model_config.get_hidden_size(), max(self.memory_sizes)
        self.split = (base_size, base_size + memory_size)
        # Rows of both models travel side by side: in the wider of their dtypes, so unchanged.
        self.dtype = functools.reduce(
            torch.promote_types, (model.dtype for model in models), model_config.dtype
        )
        self.dtypes = [model.dtype for model in (model_config, *models)]
        self.batch = Batch(
            len(memories),
            base_size + memory_size,
            vllm_config.scheduler_config.max_num_batched_tokens,
            self.dtype,
            device,
        )
        most = vllm_config.scheduler_config.max_num_batched_tokens
        # By width of a vocabulary that is narrower than the base's: ids that the memory knows.
        self.clamped_T = {
            size: torch.zeros(most, dtype=torch.int32, device=device)
            for size in self.vocab_sizes[1:]
            if size < self.vocab_sizes[0]
        }
        # The V2 runner keeps in it what drafts were drawn from.
        self.draft_dtype = model_config.head_dtype
        speculation = vllm_config.speculative_config
        self.rows_per_request = 1 + (speculation.num_speculative_tokens if speculation else 0)
        # Finding the rows of a memory makes the host wait for the device. On a CPU there is nothing
        # to wait for; elsewhere each head runs on all rows, which few rows make no dearer.
        self.selects_rows = device.type == "cpu" and not vllm_config.use_v2_model_runner
        self.choices = Choices.of(self.settings)
        self.load_gates()

        self.tensor_parallel = [
            compat.whole_on_each_rank if m.tensor_parallel_size == 1 else nullcontext
            for m in memories
        ]
        self.layers: list[list[str]] = []  # names of each memory's attention layers
        for number, config in enumerate(configs):
            name = f"memory{number}"
            before = set(vllm_config.compilation_config.static_forward_context)
            # Its own compile cache, as vLLM gives a draft model, and its own dtype.
            with (
                set_model_tag(name),
                set_default_torch_dtype(config.model_config.dtype),
                self.tensor_parallel[number](),
            ):
                setattr(self, name, initialize_model(config, prefix=maybe_prefix(prefix, name)))
            layers = vllm_config.compilation_config.static_forward_context
            self.layers.append([layer for layer in layers if layer not in before])
            mine = [layers[layer] for layer in self.layers[-1]]
            compat.narrow_attention(mine, number, self.batch, config)
        layers = vllm_config.compilation_config.static_forward_context
        self.beside = self.may_overlap(layers.values())
        self.secondary_weights = [
            DefaultModelLoader.Source(m.model, revision=m.revision, prefix=f"{SOURCE}{number}.")
            for number, m in enumerate(memories)
        ]
        self.make_empty_intermediate_tensors = self.base.make_empty_intermediate_tensors
        mode = vllm_config.compilation_config.mode
        self.compiled = mode != CompilationMode.NONE and device.type == "cpu"
        if vllm_config.lora_config is not None:
            self.prepare_lora()
        drafts = self.settings.speculative_tokens > 0
        if vllm_config.use_v2_model_runner:
            graphs.install()
            if drafts:
                v2_drafting.install()
        else:
            compat.install_v1_runner()
            if drafts:
                compat.install_v1_drafter()
        if vllm_config.speculative_config is not None and device.type == "cpu":
            compat.mend_cpu_speculation()
        self.log_start(vllm_config)

    @staticmethod
    def get_model_state_cls() -> type:
        """Return the class through which the V2 runner tells us what its batch asks for."""
        return compat.v2_model_state_cls()

    @property
    def drafter(self) -> "Drafter | None":
        """The memories as a draft model, if they are to draft."""
        return Drafter(self) if self.settings.speculative_tokens else None

    @property
    def adapts(self) -> bool:
        """Whether the number of drafts is to be what is fastest."""
        return self.settings.adapts

    @property
    def memories(self) -> list[nn.Module]:
        """The memories, in the order of the settings."""
        return [getattr(self, f"memory{number}") for number in range(len(self.memory_sizes))]

    def embed_input_ids(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError("memdec runs on token ids: there is no shared embedding.")

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
    ) -> torch.Tensor:
        """Return [T, D_base + D_memory + A]: base, the row's own memory, and the columns of both.

        D_memory is the widest memory's; what a row does not use is arbitrary.
        """
        assert intermediate_tensors is None and inputs_embeds is None
        width = self.split[1] + self.batch.columns_TA.shape[1]
        out_TD = self.batch.columns_TA.new_empty(len(input_ids), width)
        if self.overlaps():
            main, side = torch.cuda.current_stream(), aux_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                self.run_memories(input_ids, positions, out_TD[:, self.split[0] :])
            out_TD[:, : self.split[0]] = self.base(input_ids, positions)
            main.wait_stream(side)
            return out_TD
        # vLLM holds what a model returns only until another model's CUDA graphs run: both allocate
        # from one pool, and the last graph of a model keeps no reference. So it is copied first.
        out_TD[:, : self.split[0]] = self.base(input_ids, positions)
        self.run_memories(input_ids, positions, out_TD[:, self.split[0] :])
        return out_TD

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
        """Return whether memories can run beside the base; say so where it was asked in vain.

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

    def run_memories(
        self, input_ids: torch.Tensor, positions: torch.Tensor, out_TD: torch.Tensor
    ) -> torch.Tensor:
        """Fill and return [T, D_memory + A]: hidden states of the row's own memory, its columns."""
        columns_TA = self.batch.columns_TA[: len(input_ids)]
        memory_TD, tail_TA = out_TD.tensor_split([self.split[1] - self.split[0]], dim=-1)
        tail_TA.copy_(columns_TA)
        if any(gate is not None and gate.context is not None for gate in self.gates):
            write_context(tail_TA, positions)
        for table in self.tables:
            table.write(tail_TA, positions)
        parts = self.batch.parts
        alone = len(parts) == 1 and all(part.tokens is None for part in parts.values())
        if parts and not alone:
            memory_TD.zero_()  # a row that nobody fills must be finite: its head runs all the same
        if self.batch.said is not None:
            tokens, rows = self.batch.said
            memory_TD[tokens] = self.batch.draft.hidden_RD[rows]
        for number, part in parts.items():
            mine = self.run_memory(number, part, input_ids, positions)
            rows = memory_TD[:, : mine.shape[1]]
            if part.tokens is not None:
                rows[part.tokens] = mine.to(self.dtype)
            elif alone:
                rows.copy_(mine)
            else:  # of these rows some may be another memory's
                own_T1 = decode_memory(columns_TA)[:, None] == number
                rows.copy_(torch.where(own_T1, mine.to(self.dtype), rows))
        return out_TD

    def run_memory(
        self, number: int, part: Part, input_ids: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return the hidden states of one memory on its part of the batch."""
        # A base with more rows than the memory may send it an id that it has no embedding for.
        if (size := self.vocab_sizes[1 + number]) < self.vocab_sizes[0]:
            # Into the same memory every time: a captured graph reads it there.
            ids_T = self.clamped_T[size][: len(input_ids)]
            input_ids = ids_T.copy_(input_ids.clamp(max=size - 1))
        memory = self.memories[number]
        if part.tokens is None:
            return memory(input_ids, positions)
        with compat.narrow_slots(self.layers[number], part.tokens):
            return memory(input_ids[part.tokens], positions[part.tokens])

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return [N, V]: the mixture's log-probabilities plus the base's logsumexp, in float32.

        They behave as logits (penalties keep their meaning). A row without a memory has the base's
        own; so do all, in their own dtype, if no request of the batch has one.
        """
        if not self.batch.used:
            return self.base_logits(hidden_states)
        if self.selects_rows:
            return self.mix_selected(hidden_states)
        N, V, W = len(hidden_states), self.vocab_sizes[0], max(self.vocab_sizes[1:])
        # vLLM's memory profile has one row a request, a step that verifies drafts has more.
        rows = N * self.rows_per_request if self.batch.is_dummy else N
        out_NV = hidden_states.new_empty(rows, V, dtype=torch.float32)[:N]
        if self.batch.is_dummy:  # no request is to wait until the kernels of few rows are compiled
            self.mix(hidden_states[:1], out_NV[:1])
        # Both models' logits exist for a slice of the rows only, the mixture's for all.
        size = max(1, SLICE_BYTES // (self.dtype.itemsize * (V + W)))
        parts = [slice(start, start + size) for start in range(0, N, size)]
        if not all([self.mix(hidden_states[part], out_NV[part]) for part in parts]):
            return None
        return out_NV

    def base_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the base's own logits [N, V]."""
        base_ND = hidden_states[:, : self.split[0]]
        return self.base.compute_logits(base_ND.to(self.dtypes[0]).contiguous())

    def mix(self, hidden_states: torch.Tensor, out_NV: torch.Tensor) -> bool:
        """Write the mixture [N, V] without waiting for the device; False where a rank has none."""
        _, memory_ND, columns_NA = hidden_states.tensor_split(self.split, dim=-1)
        base_NV, others = self.base_logits(hidden_states), "base"
        for number in self.batch.used:
            mine_ND = self.own_rows(number, memory_ND)
            memory_NW = self.head(number, mine_ND)
            gate = self.gates[number]
            score_N = self.score(gate, mine_ND, columns_NA)
            if base_NV is None or memory_NW is None:  # a tensor-parallel rank that does not gather
                continue
            interpolate(
                base_NV,
                memory_NW,
                RowWeights(columns_NA, number, others),
                gate=None if gate is None else (score_N, gate.certainty),
                as_logits=True,
                out=out_NV,
                compiled=self.compiled,
                invariant=envs.VLLM_BATCH_INVARIANT,
            )
            others = "keep"  # the rows of the memories before
        return others == "keep"

    def score(
        self, gate: Gate | None, mine_ND: torch.Tensor, columns_NA: torch.Tensor
    ) -> torch.Tensor | None:
        """Return a gate's scores [N] of rows, the same on all ranks; None without a gate."""
        if gate is None:
            return None
        return self.same_on_all_ranks(gate.score(mine_ND, columns_NA[:, CONTEXT]))

    def own_rows(self, number: int, memory_ND: torch.Tensor) -> torch.Tensor:
        """Return one memory's share of the rows [N, D], in its own dtype, contiguous."""
        mine_ND = memory_ND[:, : self.memory_sizes[number]].to(self.dtypes[1 + number])
        if self.whole_on_each_rank(number):
            return self.same_on_all_ranks(mine_ND)
        return mine_ND.contiguous()

    def head(self, number: int, mine_ND: torch.Tensor) -> torch.Tensor | None:
        """Return one memory's logits [N, W]."""
        with self.tensor_parallel[number]():
            return self.memories[number].compute_logits(mine_ND)

    def whole_on_each_rank(self, number: int) -> bool:
        """Return whether each tensor-parallel rank computes this memory by itself."""
        return self.settings.memories[number].tensor_parallel_size == 1

    def same_on_all_ranks(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the first rank's rows, contiguous: ranks sample each for itself, from one result.

        A bit of difference near a tie would let them go on with different tokens.
        """
        rows = rows.contiguous()
        if get_tensor_model_parallel_world_size() > 1:
            rows = get_tp_group().broadcast(rows, src=0)
        return rows

    def mix_selected(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return what compute_logits() does, each head on the rows of its own requests only."""
        _, memory_ND, columns_NA = hidden_states.tensor_split(self.split, dim=-1)
        base_NV = self.base_logits(hidden_states)
        out_NV = base_NV
        for number, rows, mine_ND, memory_NW in self.selected_logits(memory_ND, columns_NA):
            gate = self.gates[number]
            score_N = self.score(gate, mine_ND, columns_NA[rows])
            if base_NV is None or memory_NW is None:  # a tensor-parallel rank that does not gather
                continue
            # What is asked negative is the most that a gate may give.
            asked_N = decode(columns_NA[rows])
            mixed_NV = interpolate(
                base_NV[rows],
                memory_NW,
                asked_N if gate else asked_N.clamp(min=0),
                gate=(score_N, gate.certainty) if gate else None,
                as_logits=True,
                compiled=self.compiled,
            )
            if self.batch.shared:
                out_NV = mixed_NV
            else:
                out_NV = base_NV.to(torch.float32, copy=True) if out_NV is base_NV else out_NV
                out_NV[rows] = mixed_NV
        return out_NV

    def selected_logits(
        self, memory_ND: torch.Tensor, columns_NA: torch.Tensor
    ) -> Iterator[tuple[int, slice | torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Yield (memory, its rows, hidden states [rows, D], logits [rows, W]) of those in use."""
        for number in self.batch.used:
            rows = slice(None)
            if not self.batch.shared:
                rows = (decode_memory(columns_NA) == number).nonzero().squeeze(1)
                if not len(rows):
                    continue
            mine = self.own_rows(number, memory_ND[rows])
            asked, said_N = mine, None
            if self.batch.said is not None:  # and the batch is this memory's alone
                said_N = decode_said(columns_NA)
                asked = mine[said_N < 0]
            logits = self.head(number, asked)
            if said_N is not None:
                new_NW, logits = logits, self.batch.draft.logits_RW[said_N.clamp(min=0)]
                logits[said_N < 0] = new_NW
            yield number, rows, mine, logits

    def load_gates(self) -> None:
        """Read the gates of those memories that have one, and the weights by context of others."""
        columns_TA = self.batch.columns_TA
        self.gates = [
            Gate(read_gate(memory.gate_file), columns_TA.device) if memory.gate else None
            for memory in self.settings.memories
        ]
        tables = [
            ContextTable(memory.alpha_by_context, number, columns_TA.dtype, columns_TA.device)
            for number, memory in enumerate(self.settings.memories)
            if memory.alpha_by_context
        ]
        if not hasattr(self, "tables"):
            self.tables = tables
        for table, new in zip(self.tables, tables, strict=True):
            table.copy_(new)  # a captured graph reads a table where it lies

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Route one stream of tensors to the models and return the names that were loaded."""
        loaded = set()
        for source, group in groupby(weights, key=lambda item: source_of(item[0])):
            part = "base" if source is None else f"memory{source}"
            cut = len("" if source is None else f"{SOURCE}{source}.")
            names = ((name[cut:], tensor) for name, tensor in group)
            context = nullcontext if source is None else self.tensor_parallel[source]
            with context():
                loaded |= {f"{part}.{name}" for name in getattr(self, part).load_weights(names)}
        self.loaded |= loaded  # later calls may update the base alone
        # Again, and the batch too: what is on a device may have been dropped since.
        self.load_gates()
        self.batch.reset()
        for number in range(len(self.memories)):
            if not any(name.startswith(f"memory{number}.") for name in self.loaded):
                raise ValueError(
                    "This --load-format does not bring the memory's weights: "
                    "use --load-format auto."
                )
        if self.compiled:
            # Loading has the model's dtype as the default one, serving float32: part of the graph.
            with set_default_torch_dtype(torch.float32):
                memories = zip(self.vocab_sizes[1:], self.dtypes[1:], self.gates, strict=True)
                for size, dtype, gate in memories:
                    units = gate.certainty if gate else None
                    compile_rows(self.vocab_sizes[0], size, self.dtypes[0], dtype, units)
        return loaded

    def prepare_lora(self) -> None:
        """Let vLLM put LoRA adapters on the base, and on nothing else."""
        if not supports_lora(self.base):
            raise ValueError(f"vLLM has no LoRA for {type(self.base).__name__}: start without it.")
        compat.install_lora()
        for name in ("is_3d_moe_weight", "is_non_gated_moe", "embedding_modules"):
            setattr(self, name, getattr(self.base, name))
        self.packed_modules_mapping = self.base.packed_modules_mapping
        self.config = self.base.config
        self.lora_skip_prefixes = self.base.lora_skip_prefixes
        mapper = getattr(self.base, "hf_to_vllm_mapper", None) or WeightsMapper()
        self.hf_to_vllm_mapper = mapper | WeightsMapper(orig_to_new_prefix={"": "base."})

    def log_start(self, vllm_config: VllmConfig) -> None:
        """Say which memories are live: the lines to look for in the log."""
        if get_tensor_model_parallel_rank() != 0:
            return
        layers = vllm_config.compilation_config.static_forward_context
        mine = {name for names in self.layers for name in names}
        groups = [[name for name in layers if name not in mine], *self.layers]
        sizes = [compat.kv_bytes_per_token([layers[n] for n in g], vllm_config) for g in groups]
        ranks = get_tensor_model_parallel_world_size()
        described = [
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"
            f"{' per rank' if ranks > 1 else ''}, {size / sum(sizes):.0%} of the KV cache"
            for model, size in zip((self.base, *self.memories), sizes, strict=True)
        ]
        logger.info("memdec: base %s (%s).", vllm_config.model_config.model, described[0])
        for memory, text in zip(self.settings.memories, described[1:], strict=True):
            default = ", the default" if memory.name == self.settings.default else ""
            logger.info(
                "memdec: memory %r %s (%s), alpha %s%s.",
                memory.name,
                memory.model,
                text,
                memory.weight,
                default,
            )

    def log_groups(self, kv_cache_config: Any) -> None:
        """Say so if windows, of base and memories, make many groups of KV cache."""
        groups = len(kv_cache_config.kv_cache_groups)
        if groups > MANY_GROUPS and get_tensor_model_parallel_rank() == 0:
            logger.warning(
                "memdec: the KV cache has %d groups, each of which costs the host time in every "
                "step: beside this base a memory with full attention in all layers makes fewer.",
                groups,
            )


class Drafter:
    """The memories of a composite as a draft model: same weights, same KV cache."""

    def __init__(self, composite: MemDecForCausalLM):
        self.composite = composite
        self.heard: list[torch.Tensor] = []  # logits [N, W] of a memory that had the batch alone

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, inputs_embeds: None = None
    ) -> torch.Tensor:
        """Return [T, D_memory + A], as the composite's second half."""
        composite = self.composite
        columns = composite.batch.columns_TA
        width = composite.split[1] - composite.split[0] + columns.shape[1]
        out_TD = columns.new_empty(len(input_ids), width)
        return composite.run_memories(input_ids, positions, out_TD)

    def modules(self) -> Iterator[nn.Module]:
        """Yield nothing: what there is belongs to the composite, which the V2 runner clears."""
        yield from ()

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return [N, V]: the logits of each row's memory; arbitrary where it has none."""
        composite = self.composite
        width = composite.split[1] - composite.split[0]
        memory_ND, columns_NA = hidden_states.tensor_split([width], dim=-1)
        if composite.selects_rows:
            return self.selected_logits(memory_ND, columns_NA)
        # Of all that ran, not of all that are used: a captured graph computes it for any batch.
        out_NV = None
        for number in composite.batch.parts:
            logits_NV = self.fitted(composite.head(number, composite.own_rows(number, memory_ND)))
            if out_NV is None:
                out_NV = logits_NV
            else:
                own_N1 = decode_memory(columns_NA)[:, None] == number
                out_NV = torch.where(own_N1, logits_NV, out_NV)
        return out_NV

    def fitted(self, logits_NW: torch.Tensor) -> torch.Tensor:
        """Return logits [N, V], as wide as the base's and in the dtype that vLLM keeps them in."""
        V, W = self.composite.vocab_sizes[0], logits_NW.shape[1]
        logits_NV = logits_NW[:, :V].to(self.composite.draft_dtype)
        if W < V:
            logits_NV = torch.nn.functional.pad(logits_NV, (0, V - W), value=-torch.inf)
        return logits_NV

    def selected_logits(self, memory_ND: torch.Tensor, columns_NA: torch.Tensor) -> torch.Tensor:
        """Return [N, V], each head on the rows of its own requests; zeros where a row has none."""
        composite = self.composite
        shape = len(memory_ND), composite.vocab_sizes[0]
        out_NV = memory_ND.new_zeros(shape, dtype=composite.draft_dtype)
        for _, rows, _, memory_NW in composite.selected_logits(memory_ND, columns_NA):
            if composite.batch.shared:
                self.heard.append(memory_NW)
                return self.fitted(memory_NW)
            out_NV[rows] = self.fitted(memory_NW)
        return out_NV


def is_attention(layer: Any) -> bool:
    """Return whether a layer of vLLM's forward context has an attention backend."""
    return hasattr(layer, "attn_backend")


def source_of(name: str) -> int | None:
    """Return the number of the memory that a checkpoint tensor belongs to; None for the base."""
    return int(name.removeprefix(SOURCE).split(".")[0]) if name.startswith(SOURCE) else None


def memory_vllm_config(vllm_config: VllmConfig, memory: MemoryConfig, number: int) -> VllmConfig:
    """Return the configuration under which vLLM builds a memory beside the base."""
    base = vllm_config.model_config
    model_config = memory_model_config(memory, base, base.max_model_len)
    # One window for all layers travels in the cache config; the memory must not get the base's.
    cache_config = copy.copy(vllm_config.cache_config)
    cache_config.sliding_window = uniform_sliding_window(model_config)
    if memory.kv_cache_dtype is not None:
        cache_config.cache_dtype = memory.kv_cache_dtype
    # Its own: vLLM writes into it whether the model is a mixture of experts.
    parallel_config = copy.copy(vllm_config.parallel_config)
    if memory.tensor_parallel_size == 1:
        parallel_config.tensor_parallel_size = 1  # whose heads vLLM counts by it
    # quant_config None: vLLM derives the memory's own, if its config.json names one.
    return replace(
        vllm_config,
        model_config=model_config,
        cache_config=cache_config,
        parallel_config=parallel_config,
        # Part of vLLM's key of compiled code: no memory is to load what was compiled for another.
        additional_config=vllm_config.additional_config | {"memdec_memory": number},
        quant_config=None,
        lora_config=None,
    )


def uniform_sliding_window(model_config: ModelConfig) -> int | None:
    """Return the window of a model whose layers all have it, as vLLM decides for the base."""
    layer_types = getattr(model_config.hf_text_config, "layer_types", None)
    if layer_types is not None and any(kind != "sliding_attention" for kind in layer_types):
        return None
    return model_config.get_sliding_window()
