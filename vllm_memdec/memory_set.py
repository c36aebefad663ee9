"""The memories of a composite on one batch: each row runs through the memory of its request.

Shapes: T tokens, N rows, S places of a row, D width of the widest memory, X = S * D, W a memory's
vocabulary, A columns.
"""

import functools
from collections.abc import Iterator

import torch
from vllm.config import VllmConfig

from vllm_memdec.batch import (
    Batch,
    decode_memory,
    decode_reused,
    end_memory,
    place_of,
    write_context,
)
from vllm_memdec.compat.inner_models import build_spare, dtype_of
from vllm_memdec.config import MemDecConfig
from vllm_memdec.engine_config import memory_vllm_config
from vllm_memdec.memory import Memory
from vllm_memdec.slot_memory import Spare
from vllm_memdec.tally import Tally


class MemorySet:
    """The memories, in the order of the settings, and the batch that they share."""

    def __init__(self, vllm_config: VllmConfig, settings: MemDecConfig, prefix: str):
        """Build all memories; vllm_config: the base's, which is built before."""
        base = vllm_config.model_config
        configs = [
            memory_vllm_config(vllm_config, memory, number)
            for number, memory in enumerate(settings.built)
        ]
        models = [config.model_config for config in configs]
        self.widest = max(model.get_hidden_size() for model in models)
        self.width = settings.at_once * self.widest  # S * D, of all places of a row
        # Rows of both models travel side by side: in the wider of their dtypes, so unchanged.
        self.dtype = functools.reduce(torch.promote_types, map(dtype_of, models), dtype_of(base))
        device = vllm_config.device_config.device
        assert isinstance(device, (str, torch.device))
        self.device = torch.device(device)
        self.batch = Batch(
            len(models),
            base.get_hidden_size() + self.width,
            vllm_config.scheduler_config.max_num_batched_tokens,
            self.dtype,
            self.device,
            [model.max_model_len for model in models],
            settings.at_once,
        )
        self.tally = Tally([memory.name for memory in settings.built], self.device)
        # Selecting the rows of a memory makes the host wait for the device. On a CPU there is
        # nothing to wait for; elsewhere each head runs on all rows, and few rows cost no more.
        self.selects_rows = self.device.type == "cpu" and not vllm_config.use_v2_model_runner
        built = self.batch, self.tally, prefix
        self.memories = [
            Memory(number, memory, config, vllm_config, *built, memory in settings.slots)
            for number, (memory, config) in enumerate(zip(settings.built, configs, strict=True))
        ]
        self.spare: Spare | None = None
        if settings.slots:
            layers = vllm_config.compilation_config.static_forward_context
            self.spare = Spare(build_spare(configs[-1], layers, prefix), configs[-1])

    def __iter__(self) -> Iterator[Memory]:
        return iter(self.memories)

    def __len__(self) -> int:
        return len(self.memories)

    def __getitem__(self, number: int) -> Memory:
        return self.memories[number]

    @property
    def used(self) -> list[Memory]:
        """The memories that any request of the batch uses."""
        return [self.memories[number] for number in self.batch.used]

    @property
    def layer_names(self) -> list[str]:
        """The names of the attention layers of all memories."""
        return [name for memory in self.memories for name in memory.layers]

    @property
    def max_vocabulary(self) -> int:
        """The width of the widest memory's logits."""
        return max(memory.vocabulary for memory in self.memories)

    def move(self, number: int) -> None:
        """Put the memory that was read into the spare into a slot."""
        assert self.spare is not None
        self.memories[number].take(self.spare)
        self.spare.drop()

    def run(
        self, input_ids: torch.Tensor, positions: torch.Tensor, out_TD: torch.Tensor
    ) -> torch.Tensor:
        """Fill and return [T, S * D + A]: hidden states of each row's own memories, its columns.

        positions: [T], or the base's of several dimensions, in place of which memories get places.
        """
        batch = self.batch
        if positions.dim() > 1:
            positions = batch.positions_T[: len(input_ids)]
        columns_TA = batch.columns_TA[: len(input_ids)]
        memory_TX, tail_TA = out_TD.tensor_split([self.width], dim=-1)
        tail_TA.copy_(columns_TA)
        if any(memory.reads_context for memory in self.memories):
            write_context(tail_TA, positions, batch.at_once)
        for memory in self.memories:
            if memory.table is not None:
                memory.table.write(tail_TA, positions)
            if memory.ends:
                end_memory(tail_TA, positions, memory.number, memory.length, batch.at_once)
        shares = batch.shares
        alone = len(shares) == 1 and all(share.tokens is None for share in shares.values())
        if shares and not alone:
            memory_TX.zero_()  # a head runs on a row without a memory too: it must be finite
        if batch.reused is not None:
            assert batch.draft is not None
            tokens, rows_R = batch.reused
            memory_TX[tokens] = batch.draft.hidden_RD[rows_R]
        for number, share in shares.items():
            mine = self.memories[number].run(share, input_ids, positions)
            places = batch.places[number]
            for place in places:
                rows = memory_TX[:, place * self.widest :][:, : mine.shape[1]]
                if alone:
                    rows.copy_(mine)
                elif share.tokens is not None and len(places) == 1:
                    rows[share.tokens] = mine.to(self.dtype)
                else:  # of these rows some may be another memory's
                    own_T1 = decode_memory(place_of(columns_TA, place))[:, None] == number
                    where = slice(None) if share.tokens is None else share.tokens
                    there = torch.where(own_T1[where], mine.to(self.dtype), rows[where])
                    rows[where] = there
        return out_TD

    def hidden_of(
        self, memory: Memory, memory_NX: torch.Tensor, columns_NA: torch.Tensor
    ) -> torch.Tensor:
        """Return a memory's own part of rows [N, D], in its dtype; arbitrary in those of others."""
        first_ND, *others = memory_NX.split(self.widest, dim=-1)
        if self.batch.several:
            for place, other_ND in enumerate(others, start=1):
                own_N1 = decode_memory(place_of(columns_NA, place))[:, None] == memory.number
                first_ND = torch.where(own_N1, other_ND, first_ND)
        return memory.own_rows(first_ND)

    def selected_logits(
        self, memory_NX: torch.Tensor, columns_NA: torch.Tensor
    ) -> Iterator[tuple[Memory, slice | torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Yield (memory, its rows, hidden states [rows, D], logits [rows, W]) of those in use.

        The rows in which it is the only memory, or the first of several.
        """
        batch = self.batch
        memory_ND = memory_NX[:, : self.widest]
        for memory in self.used:
            rows: slice | torch.Tensor = slice(None)
            if not batch.shared:
                rows = (decode_memory(columns_NA) == memory.number).nonzero().squeeze(1)
                if not len(rows):
                    continue
            mine = memory.own_rows(memory_ND[rows])
            if batch.reused is None:
                yield memory, rows, mine, memory.logits(mine)
                continue
            # The batch is this memory's alone.
            assert batch.draft is not None
            reused_N = decode_reused(columns_NA, batch.at_once)
            new_N = reused_N < 0
            logits_NW = batch.draft.logits_RW[reused_N.clamp(min=0)]
            new_NW = memory.logits(mine[new_N])
            assert new_NW is not None, "drafting across ranks is refused at start"
            logits_NW[new_N] = new_NW
            yield memory, rows, mine, logits_NW
