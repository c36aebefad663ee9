"""The memories of a composite as a draft model: same weights, same KV cache.

Of several memories that a request mixes the first drafts: the heaviest.

Shapes: T tokens, N rows, S places, D width of the widest memory, V base vocabulary, W a memory's,
A columns.
"""

from collections.abc import Iterator

import torch
from torch import nn

from vllm_memdec.batch import Batch, decode_memory
from vllm_memdec.memory_set import MemorySet


class Drafter:
    """What vLLM's drafters run in place of a model of their own."""

    def __init__(self, memories: MemorySet, vocabulary: int, dtype: torch.dtype):
        """vocabulary: V. dtype: of the logits, as the V2 runner keeps them."""
        self.memories, self.vocabulary, self.dtype = memories, vocabulary, dtype
        # Logits [N, W] of each pass of a memory that had the batch alone.
        self.draft_logits: list[torch.Tensor] = []

    @property
    def batch(self) -> Batch:
        """The batch that is drafted for."""
        return self.memories.batch

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, inputs_embeds: None = None
    ) -> torch.Tensor:
        """Return [T, S * D + A], as the composite's second half."""
        columns_TA = self.batch.columns_TA
        width = self.memories.width + columns_TA.shape[1]
        out_TD = columns_TA.new_empty(len(input_ids), width)
        return self.memories.run(input_ids, positions, out_TD)

    def modules(self) -> Iterator[nn.Module]:
        """Yield nothing: what there is belongs to the composite, which the V2 runner clears."""
        yield from ()

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return [N, V]: the logits of each row's memory; arbitrary where it has none."""
        memory_NX, columns_NA = hidden_states.tensor_split([self.memories.width], dim=-1)
        if self.memories.selects_rows:
            return self.selected_logits(memory_NX, columns_NA)
        # Of all that ran, not of all that are used: a captured graph computes it for any batch.
        out_NV = None
        for number in self.batch.shares:
            memory = self.memories[number]
            logits_NV = self.fitted(memory.logits(memory.own_rows(memory_NX)))
            if out_NV is None:
                out_NV = logits_NV
            else:
                own_N1 = decode_memory(columns_NA)[:, None] == number
                out_NV = torch.where(own_N1, logits_NV, out_NV)
        return out_NV

    def fitted(self, logits_NW: torch.Tensor | None) -> torch.Tensor:
        """Return logits [N, V], as wide as the base's and in the dtype that vLLM keeps them in."""
        assert logits_NW is not None, "drafting across ranks is refused at start"
        V, W = self.vocabulary, logits_NW.shape[1]
        logits_NV = logits_NW[:, :V].to(self.dtype)
        if W < V:
            logits_NV = torch.nn.functional.pad(logits_NV, (0, V - W), value=-torch.inf)
        return logits_NV

    def selected_logits(self, memory_NX: torch.Tensor, columns_NA: torch.Tensor) -> torch.Tensor:
        """Return [N, V], each head on the rows of its own requests; zeros where a row has none."""
        out_NV = memory_NX.new_zeros(len(memory_NX), self.vocabulary, dtype=self.dtype)
        for _, rows, _, memory_NW in self.memories.selected_logits(memory_NX, columns_NA):
            logits_NV = self.fitted(memory_NW)
            if self.batch.shared and memory_NW is not None:
                self.draft_logits.append(memory_NW)
                return logits_NV
            out_NV[rows] = logits_NV
        return out_NV
