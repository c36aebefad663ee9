"""Attention of both runners: a memory's layers see their own requests of a batch, and no others.

AttentionBackend.get_builder_cls is answered by a subclass of the backend, as vLLM's fast prefill
does it: the memory's layers get their attention metadata for their own requests only, and by the
memory's own heads and dtypes. ForwardContext.slot_mapping is narrowed alike while a memory runs.
vLLM makes metadata of the whole batch for every layer.

May go when vLLM lets a layer take part in some requests of a batch.
Relies on every field of CommonAttentionMetadata: the record says of each whether it is narrowed.
"""

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    subclass_attention_backend,
)

from vllm_memdec.batch import Batch, MemoryShare

# Fields of vLLM's CommonAttentionMetadata: of requests or tokens, and those that stay or
# belong to what is refused at start (context parallelism, fast prefill, encoders, Mamba).
NARROWED = (
    "query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens",
    "max_query_len", "block_table_tensor", "slot_mapping", "positions", "is_prefilling",
    "seq_lens_cpu_upper_bound", "req_idx", "rswa_prefix_lens", "_num_computed_tokens_cache",
    "_token_to_req_indices_cache", "mm_req_doc_ranges",
)  # fmt: skip
NOT_NARROWED = (
    "max_seq_len", "causal", "logits_indices_padded", "num_logits_indices", "max_logits_per_req",
    "encoder_seq_lens", "encoder_seq_lens_cpu", "dcp_local_seq_lens",
    "dcp_local_seq_lens_cpu_upper_bound", "replayssm_decode_base_cpu",
)  # fmt: skip
BUILDER = "vllm.v1.attention.backend:AttentionMetadataBuilder"
SIGNATURES = {
    BUILDER: "kv_cache_spec layer_names vllm_config device",
    f"{BUILDER}.build": "self common_prefix_len common_attn_metadata fast_build",
    f"{BUILDER}.build_for_cudagraph_capture": "self common_attn_metadata",
    f"{BUILDER}.update_draft_decode_metadata": "self metadata",
    "vllm.v1.attention.backend:subclass_attention_backend": (
        "name_prefix attention_backend_cls builder_cls"
    ),
    "vllm.forward_context:override_forward_context": "forward_context",
}
ATTRIBUTES = {
    BUILDER: "supports_update_block_table",
    # All of it: what vLLM keeps for each request or token has to be narrowed.
    "vllm.v1.attention.backend:CommonAttentionMetadata": " ".join((*NARROWED, *NOT_NARROWED)),
    "vllm.forward_context:ForwardContext": "slot_mapping",
}


def narrow_attention(layers: Iterable[Any], number: int, batch: Batch, memory: VllmConfig) -> None:
    """Let a memory's attention layers see their own share of each batch.

    `memory` is the configuration it was built with: heads, dtype and KV-cache dtype are its own.
    """

    @functools.cache
    def narrowed(backend: type[AttentionBackend]) -> type[AttentionBackend]:
        own = {"memdec_number": number, "memdec_batch": batch, "memdec_config": memory}
        builder = type("NarrowBuilder", (NarrowBuilder, backend.get_builder_cls()), own)
        return subclass_attention_backend(f"Memory{number}", backend, builder)

    for layer in layers:
        if is_attention(layer):
            layer.attn_backend = narrowed(layer.attn_backend)


def is_attention(layer: Any) -> bool:
    """Return whether a layer of vLLM's forward context has an attention backend."""
    return hasattr(layer, "attn_backend")


class NarrowBuilder(AttentionMetadataBuilder):
    """Stands before a backend's builder: metadata of one memory's requests."""

    # It would put the whole batch's block table into metadata of a share of it.
    supports_update_block_table = False
    memdec_number: int
    memdec_batch: Batch
    memdec_config: VllmConfig

    def __init__(
        self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any, **more: Any
    ):
        # What the running engine has, but the memory's heads, dtype and KV-cache dtype.
        own = copy.copy(vllm_config)
        own.model_config = copy.copy(self.memdec_config.model_config)
        # The requests' lengths, which buffers are made for: a memory may have fewer positions.
        own.model_config.max_model_len = vllm_config.model_config.max_model_len
        own.parallel_config = self.memdec_config.parallel_config
        own.cache_config = copy.copy(vllm_config.cache_config)
        own.cache_config.cache_dtype = self.memdec_config.cache_config.cache_dtype
        super().__init__(kv_cache_spec, layer_names, own, device, **more)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        share = self.memdec_batch.shares.get(self.memdec_number)
        if share is None:
            return None  # no request of this batch runs these layers
        if share.requests is not None:
            common_attn_metadata = _narrowed(common_attn_metadata, share)
        # Where a base's image tokens see those after them, a memory's, which are ids, do not.
        if common_attn_metadata.mm_req_doc_ranges is not None:
            common_attn_metadata = common_attn_metadata.replace(mm_req_doc_ranges=None)
        # The backend's own comes next among the bases; mypy sees the abstract one alone.
        return super().build(  # type: ignore[safe-super]
            common_prefix_len, common_attn_metadata, fast_build
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        if self.memdec_number not in self.memdec_batch.shares:
            return None  # nor does this graph
        return super().build_for_cudagraph_capture(common_attn_metadata)

    def update_draft_decode_metadata(self, metadata: Any) -> None:
        if metadata is not None:
            super().update_draft_decode_metadata(metadata)


def _narrowed(common: CommonAttentionMetadata, share: MemoryShare) -> CommonAttentionMetadata:
    """Return the metadata of some requests of a batch."""
    requests, lengths, tokens = share.requests, share.lengths, share.tokens
    assert requests is not None and lengths is not None and tokens is not None

    def pick(name: str) -> Any:
        value = getattr(common, name)
        if value is None:
            return None
        return value[requests if value.is_cpu else share.rows]

    return common.replace(
        query_start_loc=share.starts,
        query_start_loc_cpu=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        seq_lens=pick("seq_lens"),
        num_reqs=len(requests),
        num_actual_tokens=len(tokens),
        max_query_len=int(lengths.max()),
        block_table_tensor=pick("block_table_tensor"),
        slot_mapping=common.slot_mapping[tokens],
        positions=None if common.positions is None else common.positions[tokens],
        is_prefilling=pick("is_prefilling"),
        seq_lens_cpu_upper_bound=pick("seq_lens_cpu_upper_bound"),
        req_idx=None if common.req_idx is None else common.req_idx[requests.numpy()],
        rswa_prefix_lens=pick("rswa_prefix_lens"),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


@contextlib.contextmanager
def narrow_slots(layers: Iterable[str], tokens: torch.Tensor) -> Iterator[None]:
    """Let a memory's layers write the keys and values of these tokens of the batch only."""
    context = copy.copy(get_forward_context())
    narrowed: dict[int, torch.Tensor] = {}  # layers share their tensors
    # A list only under dual-batch overlap, which is refused.
    slot_mapping = dict(cast(dict[str, torch.Tensor], context.slot_mapping))
    context.slot_mapping = slot_mapping
    for name in layers:
        if (slots := slot_mapping.get(name)) is not None:
            if id(slots) not in narrowed:
                narrowed[id(slots)] = slots[tokens]
            slot_mapping[name] = narrowed[id(slots)]
    with override_forward_context(context):
        yield


def kv_bytes_per_token(layers: Iterable[Any], vllm_config: VllmConfig) -> float:
    """Return the bytes that layers of a forward context keep for each token of a request."""
    specs = [
        spec
        for layer in layers
        if hasattr(layer, "get_kv_cache_spec") and (spec := layer.get_kv_cache_spec(vllm_config))
    ]
    return sum(spec.page_size_bytes / spec.block_size for spec in specs)
