"""Drafting by the memories on the V1 runner.

DraftModelProposer.load_model is wrapped; the drafter of a composite becomes a subclass whose model
is the composite's own memories. vLLM runs a draft model of its own weights and reads every token
again, and its layers must share one group of KV cache: the memories' may lie in several, as windows
or a hybrid base make them. GPUModelRunner._input_fits_in_drafter is wrapped: vLLM drafts for no
request of a batch while one of them is near the end of its context; here each has drafts up to its
own end.

May go with the V1 runner, or when vLLM lets a draft model share the target's weights.
Relies on the proposer's buffers, and on the runner's groups of attention layers and their block
tables.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.utils import PADDING_SLOT_ID
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.utils import AttentionGroup

from vllm_memdec.batch import MAX_REUSED, Draft
from vllm_memdec.compat.hooks import wrap
from vllm_memdec.draft_length import DraftLength
from vllm_memdec.drafter import Drafter

PROPOSER = "vllm.v1.spec_decode.draft_model:DraftModelProposer"
SIGNATURES = {
    f"{PROPOSER}.load_model": "self target_model",
    f"{PROPOSER}.propose": (
        "self num_speculative_tokens target_token_ids target_positions target_hidden_states "
        "next_token_ids token_indices_to_sample common_attn_metadata sampling_metadata "
        "mm_embed_inputs num_rejected_tokens_gpu slot_mappings"
    ),
    f"{PROPOSER}.initialize_attn_backend": "self kv_cache_config kernel_block_sizes",
    f"{PROPOSER}._sample_draft_tokens": "self hidden_states sampling_metadata",
    "vllm.v1.worker.utils:AttentionGroup.create_metadata_builders": (
        "self vllm_config device kernel_block_size num_metadata_builders"
    ),
    "vllm.v1.worker.utils:AttentionGroup.build_metadata_for_drafting": (
        "self common_attn_metadata draft_index"
    ),
    "vllm.v1.worker.block_table:BlockTable.get_device_tensor": "self num_reqs",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._input_fits_in_drafter": (
        "self common_attn_metadata"
    ),
}
ATTRIBUTES = {
    PROPOSER: (
        "_draft_attn_layer_names _last_draft_probs arange dummy_run supports_mm_inputs "
        "token_arange_np"
    ),
    "vllm.v1.worker.block_table:BlockTable": "block_size",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": "attn_groups drafter input_batch",
}


def install() -> None:
    """Let the runner's drafter become ours; called by the composite, before drafters load."""
    wrap(DraftModelProposer, "load_model", _loaded)
    wrap(GPUModelRunner, "_input_fits_in_drafter", _fits)


def _loaded(original: Callable) -> Callable:
    def load_model(self: Any, target_model: Any) -> None:
        if getattr(target_model, "drafter", None) is None:
            # Another engine of this process, with a draft model of its own.
            return original(self, target_model)
        MemoryProposer.adopt(self, target_model)

    return load_model


def _fits(original: Callable) -> Callable:
    def _input_fits_in_drafter(self: Any, common_attn_metadata: Any) -> bool:
        if isinstance(self.drafter, MemoryProposer):
            return common_attn_metadata is not None
        return original(self, common_attn_metadata)

    return _input_fits_in_drafter


class MemoryProposer(DraftModelProposer):
    """vLLM's drafter, with the composite's memories for a model."""

    memory_model: Drafter  # the model, by its own type
    runner: GPUModelRunner  # from initialize_kv_cache() on, see v1_runner.py

    def adopt(self, target_model: Any) -> None:
        """Become this drafter: the runner makes its own before there is a model to ask."""
        self.__class__ = MemoryProposer
        self.model = self.memory_model = target_model.drafter
        self._draft_attn_layer_names = set(target_model.memories.layer_names)
        self.supports_mm_inputs = False  # memories read token ids
        # With asynchronous scheduling vLLM has planned the drafts before they are made.
        self.ragged = not self.vllm_config.scheduler_config.async_scheduling
        self.length: DraftLength | None = None
        if target_model.settings.adapts:
            self.length = DraftLength(self.num_speculative_tokens)
        self.drafted: dict[str, int] = {}  # by request, in the last step
        self.ended = 0.0  # when that step's drafts were done, by time.perf_counter()

    def initialize_attn_backend(
        self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None
    ) -> None:
        """Keep builders of attention metadata of our own, for each group of the memories' layers.

        Each memory has backends of its own, see attention.py, so a group of the runner's has one's.
        """
        names = self._draft_attn_layer_names
        self.draft_attn_groups = []
        for groups in self.runner.attn_groups:
            for theirs in groups:
                if not names.issuperset(theirs.layer_names):
                    continue
                number = theirs.kv_cache_group_id
                group = AttentionGroup(
                    theirs.backend, theirs.layer_names, theirs.kv_cache_spec, number
                )
                sizes = kernel_block_sizes or []
                group.create_metadata_builders(
                    self.vllm_config, self.device, sizes[number] if number < len(sizes) else None
                )
                self.draft_attn_groups.append(group)
        assert {n for group in self.draft_attn_groups for n in group.layer_names} == names

    def dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Run nothing: memories have run with the target already, and drafts use no graphs."""

    # It may return lists, of several lengths, as vLLM's n-gram drafter does.
    def propose(  # type: ignore[override]
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: Any,
        sampling_metadata: Any,
        mm_embed_inputs: None = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings: Any = None,
    ) -> torch.Tensor | list[list[int]]:
        """Return drafts [B, K], or a list for each request, empty where it is not drafted for."""
        began = time.perf_counter()
        self._last_draft_probs = None
        if target_positions.dim() > 1:  # the base's; memories have places in the request
            target_positions = self.memory_model.batch.positions_T
        last_B = token_indices_to_sample
        if last_B is None:
            last_B = common_attn_metadata.query_start_loc[1:] - 1
        newest = (next_token_ids, target_positions[last_B.long()])
        batch = self.memory_model.batch
        names = batch.requests
        if not self.ragged:
            if not any(batch.remaining):  # no request is drafted for
                return next_token_ids.new_zeros(len(next_token_ids), num_speculative_tokens)
            return self.draft(
                num_speculative_tokens, *newest, common_attn_metadata, sampling_metadata
            )
        accepted = self.accepted(names, common_attn_metadata, num_rejected_tokens_gpu)
        # This step gave one token more than it accepted, the next will do so too.
        max_lengths = [
            max(0, left - accepted - 2)
            for left, accepted in zip(batch.remaining, accepted, strict=True)
        ]
        wanting = [name for name, limit in zip(names, max_lengths, strict=True) if limit]
        K = min(num_speculative_tokens, max(max_lengths, default=0))
        if self.length is not None:
            self.learn(self.length, names, common_attn_metadata, accepted, began)
            K = min(K, self.length.choose(wanting, len(names) - len(wanting))) if K else 0
        lists: list[list[int]] = [[] for _ in names]
        batch.keep_draft(None)
        if K:
            began = time.perf_counter()
            drafts_BK = self.draft(K, *newest, common_attn_metadata, sampling_metadata)
            lists = [row[:n] for row, n in zip(drafts_BK.tolist(), max_lengths, strict=True)]
            if self.length is not None:
                self.length.passes.add(len(wanting), (time.perf_counter() - began) / K)
        self.drafted = {name: len(row) for name, row in zip(names, lists, strict=True)}
        self.ended = time.perf_counter()
        return lists

    def accepted(self, names: list[str], common: Any, rejected_B: torch.Tensor | None) -> list[int]:
        """Return how many of its last drafts the step that has just ended kept for each."""
        lengths = common.query_start_loc_cpu.diff().tolist()
        rejected = [0] * len(names) if rejected_B is None else rejected_B.tolist()
        return [
            length - 1 - refused if self.drafted.get(name) == length - 1 else 0
            for name, length, refused in zip(names, lengths, rejected, strict=True)
        ]

    def learn(
        self,
        draft_length: DraftLength,
        names: list[str],
        common: Any,
        accepted: list[int],
        now: float,
    ) -> None:
        """Measure the step that has just verified the last drafts."""
        lengths = common.query_start_loc_cpu.diff().tolist()
        draft_length.keep(names)
        for name, length, kept in zip(names, lengths, accepted, strict=True):
            if self.drafted.get(name) == length - 1 > 0:
                draft_length.observe(name, length - 1, kept)
        # The time since then is this step's if there was no pause before it. A step that mostly
        # reads prompts teaches nothing.
        went_on = any(name in self.drafted for name in names)
        if went_on and sum(lengths) <= len(names) * (draft_length.max_drafts + 1):
            draft_length.step.add(sum(lengths), now - self.ended)

    def draft(
        self,
        K: int,
        newest_B: torch.Tensor,
        positions_B: torch.Tensor,
        common: Any,
        sampling_metadata: Any,
    ) -> torch.Tensor:
        """Return drafts [B, K] that follow the newest tokens.

        The memories have already read all tokens before these, up to the given positions.
        """
        B = len(newest_B)
        common = common.replace(
            query_start_loc=self.arange[: B + 1],
            query_start_loc_cpu=torch.from_numpy(self.token_arange_np[: B + 1]).clone(),
            num_actual_tokens=B,
            max_query_len=1,
            positions=None,
            is_prefilling=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        batch = self.memory_model.batch
        batch.write_drafting()
        kept_logits = self.memory_model.draft_logits
        kept_logits.clear()
        drafts, hidden = [newest_B], []
        probabilities: list[torch.Tensor] = []
        first: list[int] = []  # positions of the first drafts
        positions_B = positions_B.long()
        if self.ragged:
            first = positions_B.add(1).tolist()
        for number in range(K):
            positions_B = positions_B + 1
            # Beyond the context's end nothing is written: from 0 it would count on, and write into
            # the request's first block, which others may share.
            inside_B = positions_B < self.max_model_len
            clamped_B = positions_B.where(inside_B, 0)
            common.seq_lens = (clamped_B + 1).to(common.seq_lens.dtype)
            common.max_seq_len = min(common.max_seq_len + 1, self.max_model_len)
            if common.seq_lens_cpu_upper_bound is not None:
                common.seq_lens_cpu_upper_bound = common.seq_lens_cpu_upper_bound + 1
            attention, slots = self.prepare_pass(common, clamped_B, inside_B, number)
            # Without graphs: the memory's own were captured on the runner's buffers, not on these.
            # With a memory's configuration: ranks that share experts would wait for one another.
            with set_forward_context(
                attention,
                self.memory_model.memories[0].config,
                num_tokens=B,
                cudagraph_runtime_mode=CUDAGraphMode.NONE,
                slot_mapping=slots,
            ):
                h_BD = self.model(drafts[-1].int(), clamped_B)
            tokens_B, p_BV = self._sample_draft_tokens(h_BD[:B], sampling_metadata)
            drafts.append(tokens_B)
            if p_BV is not None:
                probabilities.append(p_BV)
            hidden.append(h_BD[:B])
        if probabilities:
            self._last_draft_probs = torch.stack(probabilities, dim=1).contiguous()
        drafts_BK = torch.stack(drafts, dim=1)
        # Elsewhere the next step is planned before it is known what it will verify.
        if self.ragged and drafts_BK.is_cpu and len(kept_logits) == K <= MAX_REUSED // B:
            hidden_RD = torch.stack(hidden, dim=1).flatten(0, 1)
            draft = Draft(
                {name: number for number, name in enumerate(batch.requests)},
                first,
                drafts_BK.tolist(),
                hidden_RD[:, : -batch.columns_TA.shape[1]],
                torch.stack(kept_logits, dim=1).flatten(0, 1),
            )
            batch.keep_draft(draft)
        return drafts_BK[:, 1:]

    def prepare_pass(
        self, common: Any, positions_B: torch.Tensor, inside_B: torch.Tensor, number: int
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Return attention metadata and slots of a draft, by layer; of one token a request.

        inside_B: whether its keys and values are to be written.
        """
        attention: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        for group in self.draft_attn_groups:
            table = self.runner.input_batch.block_table[group.kv_cache_group_id]
            blocks_BK = table.get_device_tensor(len(positions_B))
            index_B = positions_B // table.block_size
            block_B = blocks_BK.gather(1, index_B[:, None]).squeeze(1).long()
            slots_B = block_B * table.block_size + positions_B % table.block_size
            slots_B = slots_B.where(inside_B, PADDING_SLOT_ID)
            own = common.replace(block_table_tensor=blocks_BK, slot_mapping=slots_B)
            metadata = group.build_metadata_for_drafting(own, draft_index=number)
            attention |= dict.fromkeys(group.layer_names, metadata)
            slots |= dict.fromkeys(group.layer_names, slots_B)
        return attention, slots

    def _sample_from_logits(
        self, logits_BV: torch.Tensor, sampling_metadata: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return drafts [B] and their distributions [B, V], as vLLM does.

        On a CPU from one random number a row: noise for each token of the vocabulary, as vLLM
        makes it, is a fair part of a small memory's pass.
        """
        if sampling_metadata.all_greedy or not logits_BV.is_cpu:
            return super()._sample_from_logits(logits_BV, sampling_metadata)
        return sample_rows(logits_BV, sampling_metadata.temperature)


def sample_rows(
    logits_BV: torch.Tensor, temperature_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a token [B] drawn from each row at its temperature, and the distributions [B, V].

    Where the temperature is 0 it is the likeliest token, and the distribution that of 1.
    """
    greedy_B = temperature_B < 1e-5  # as vLLM's sampler tells them
    p_BV = (logits_BV / temperature_B.masked_fill(greedy_B, 1)[:, None]).softmax(
        -1, dtype=torch.float32
    )
    cumulative_BV = p_BV.cumsum(-1, dtype=torch.float64)
    chosen_B1 = torch.rand(len(p_BV), 1, dtype=torch.float64) * cumulative_BV[:, -1:]
    # The first token past it: never one of probability 0.
    tokens_B = torch.searchsorted(cumulative_BV, chosen_B1, right=True)[:, 0]
    tokens_B = tokens_B.clamp(max=p_BV.shape[1] - 1)
    return torch.where(greedy_B, p_BV.argmax(-1), tokens_B), p_BV
