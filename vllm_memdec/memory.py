"""One memory of the composite: its module, its shapes, its gate, and how ranks share it.

Shapes: T tokens, N rows, D width of the memory, W its vocabulary, A columns.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.model_executor.model_loader import DefaultModelLoader

from vllm_memdec.batch import Batch, ContextTable, MemoryShare, decode_context
from vllm_memdec.compat.attention import narrow_attention, narrow_slots
from vllm_memdec.compat.inner_models import build_memory, dtype_of
from vllm_memdec.compat.tensor_parallel import whole_on_each_rank
from vllm_memdec.config import MemoryConfig
from vllm_memdec.gate import UNITS, Gate, read_gate
from vllm_memdec.kernels.interpolate import compile_rows
from vllm_memdec.slot_memory import SlotTable, Spare
from vllm_memdec.tally import MEMORY, Tally

SOURCE = "memdec_memory."  # and a number: marks a memory among all checkpoint tensors


class Memory:
    """A model that vLLM built beside the base, and what it needs to run on a share of a batch."""

    def __init__(
        self,
        number: int,
        settings: MemoryConfig,
        config: VllmConfig,
        vllm_config: VllmConfig,
        batch: Batch,
        tally: Tally,
        prefix: str,
        is_slot: bool = False,
    ):
        """Build the memory; config is its own, see memory_vllm_config(), vllm_config the base's."""
        self.number, self.settings, self.config, self.batch = number, settings, config, batch
        self.name, self.tally = f"memory{number}", tally
        model = config.model_config
        self.width, self.vocabulary = model.get_hidden_size(), model.get_vocab_size()
        self.dtype = dtype_of(model)
        self.is_whole = settings.tensor_parallel_size == 1  # on each tensor-parallel rank
        self.clamped_T: torch.Tensor | None = None  # token ids, where some would be unknown to it
        base = vllm_config.model_config
        # The base itself may have no embedding for the tokens that stand for an image.
        if self.vocabulary < base.get_vocab_size() or base.supports_multimodal_inputs:
            columns_TA = batch.columns_TA
            self.clamped_T = torch.zeros(
                len(columns_TA), dtype=torch.int32, device=columns_TA.device
            )
        self.length = model.max_model_len  # positions that it has, in tokens
        self.ends = self.length < base.max_model_len
        self.clamped_positions_T: torch.Tensor | None = None  # where some would be unknown to it
        if self.ends:
            self.clamped_positions_T = torch.zeros_like(batch.positions_T)
        self.gate: Gate | None = None
        self.table: ContextTable | None = None
        self.is_slot = is_slot  # a place for memories, at first without any
        if is_slot:
            self.any_units = torch.zeros(4, UNITS, device=batch.columns_TA.device)
            self.table = SlotTable(number, batch.columns_TA.dtype, batch.columns_TA.device)
        self.load_gate()
        layers = vllm_config.compilation_config.static_forward_context
        before = set(layers)
        with self.ranks():
            self.module = build_memory(config, self.name, prefix)
        self.layers = [name for name in layers if name not in before]  # of its attention
        narrow_attention([layers[name] for name in self.layers], number, batch, config)

    def ranks(self) -> AbstractContextManager[None]:
        """Return the context in which the memory is built, loaded and run."""
        return whole_on_each_rank() if self.is_whole else nullcontext()

    @property
    def source(self) -> DefaultModelLoader.Source:
        """Where vLLM's loader finds the memory's tensors, and what it puts before their names."""
        return DefaultModelLoader.Source(
            self.settings.model,
            revision=self.settings.revision,
            prefix=f"{SOURCE}{self.number}.",
        )

    @property
    def reads_context(self) -> bool:
        """Whether its gate depends on a token's position, or that of a memory to come may."""
        return self.is_slot or (self.gate is not None and self.gate.context is not None)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors and return their names."""
        with self.ranks():
            return self.module.load_weights(weights)

    def compile_mixing(self, vocabulary: int, dtypes: Iterable[torch.dtype]) -> None:
        """Compile its mixture into bases, or mixtures, of these dtypes ahead of the first request.

        A slot's also with a gate: that of a memory to come.
        """
        units = [None if self.gate is None else self.gate.certainty]
        if self.is_slot:
            units.append(self.any_units)
        for dtype in dtypes:
            for certainty_4K in units:
                compile_rows(vocabulary, self.vocabulary, dtype, self.dtype, certainty_4K)

    def clear(self) -> set[str]:
        """Set the weights of a slot to 0, as it has no memory; return their names."""
        for _, parameter in self.module.named_parameters():
            parameter.data.zero_()
        return {name for name, _ in self.module.named_parameters()}

    def take(self, spare: Spare) -> None:
        """Become the memory that was read into the spare."""
        reading = spare.reading
        assert reading is not None and not reading.error and isinstance(self.table, SlotTable)
        settings, device = reading.settings, self.batch.columns_TA.device
        spare.move(self.module)
        self.gate = None if reading.gate is None else Gate(reading.gate, device)
        self.table.take(settings["alpha_by_context"])
        gate_file = settings["gate_file"] and Path(settings["gate_file"])
        named = {key: settings[key] for key in ("name", "model", "revision")}
        self.settings = replace(self.settings, gate_file=gate_file, **named)
        self.tally.rename(self.number, settings["name"])

    def load_gate(self) -> None:
        """Read the gate if it has one, or its weights by context."""
        columns_TA = self.batch.columns_TA
        if self.settings.gate_file is not None:
            self.gate = Gate(read_gate(self.settings.gate_file), columns_TA.device)
        if not self.settings.alpha_by_context:
            return
        table = ContextTable(
            self.settings.alpha_by_context, self.number, columns_TA.dtype, columns_TA.device
        )
        if self.table is None:
            self.table = table
        else:
            self.table.copy_(table)  # a captured graph reads a table where it lies

    def run(
        self, share: MemoryShare, input_ids: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return hidden states [tokens of the share, D]."""
        # A base with more rows than the memory may send it an id that it has no embedding for.
        if self.clamped_T is not None:
            # Into the same tensor every time: a captured graph reads it there.
            ids_T = self.clamped_T[: len(input_ids)]
            input_ids = ids_T.copy_(input_ids.clamp(max=self.vocabulary - 1))
        # Rows beyond its end have no weight, but read its tables of positions all the same.
        if self.clamped_positions_T is not None:
            places_T = self.clamped_positions_T[: len(positions)]
            positions = places_T.copy_(positions.clamp(max=self.length - 1))
        with self.timed(MEMORY):
            if share.tokens is None:
                return self.module(input_ids, positions)
            with narrow_slots(self.layers, share.tokens):
                return self.module(input_ids[share.tokens], positions[share.tokens])

    def timed(self, figure: str) -> AbstractContextManager[None]:
        """Return the context whose time counts among this memory's seconds."""
        return self.tally.timed(figure, self.number, self.batch.is_dummy)

    def own_rows(self, memory_ND: torch.Tensor) -> torch.Tensor:
        """Return its part of rows as wide as the widest memory [N, D], in its dtype, contiguous."""
        mine_ND = memory_ND[:, : self.width].to(self.dtype)
        return same_on_all_ranks(mine_ND) if self.is_whole else mine_ND.contiguous()

    def logits(self, mine_ND: torch.Tensor) -> torch.Tensor | None:
        """Return logits [N, W]; None on a tensor-parallel rank that does not gather."""
        with self.ranks(), self.timed(MEMORY):
            return self.module.compute_logits(mine_ND)

    def score(
        self, mine_ND: torch.Tensor, columns_NA: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the gate's scores [N] of rows, the same on all ranks, and its units for certainty.

        None without a gate: as interpolate() takes it.
        """
        if self.gate is None:
            # So that the kernels of a gate to come are compiled before requests run.
            if self.is_slot and self.batch.is_dummy and len(mine_ND) > 1:
                return mine_ND.new_zeros(len(mine_ND), dtype=torch.float32), self.any_units
            return None
        score_N = self.gate.score(mine_ND, decode_context(columns_NA, self.batch.at_once))
        return same_on_all_ranks(score_N), self.gate.certainty


def same_on_all_ranks(rows: torch.Tensor) -> torch.Tensor:
    """Return the first rank's rows, contiguous: ranks sample each for itself, from one result.

    A bit of difference near a tie would let them go on with different tokens.
    """
    rows = rows.contiguous()
    if get_tensor_model_parallel_world_size() > 1:
        rows = get_tp_group().broadcast(rows, src=0)
    return rows


def source_of(name: str) -> int | None:
    """Return the number of the memory that a checkpoint tensor belongs to; None for the base."""
    return int(name.removeprefix(SOURCE).split(".")[0]) if name.startswith(SOURCE) else None
