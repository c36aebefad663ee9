"""Sampling of the V1 runner beside drafts: what requests ask for is applied as without drafts.

RejectionSampler.forward  min_tokens counts the drafts before the token that follows them all. vLLM
    counts what earlier steps gave, so that an answer which may end there goes on.
RejectionSampler.apply_logits_processors  Adds logit_bias to the rows that verify drafts.
rejection_sampler.apply_sampling_constraints  Applies min_p to these rows. Without rows it does
    nothing: a step that only reads prompts has none, and on a CPU top_k dies of that in vLLM.

The runner's logits processors become those of a start without speculation: vLLM leaves min_p and
logit_bias out beside any speculation, and refuses them (see front_end.py).

May go when vLLM applies min_p and logit_bias to drafts.
Relies on the state of vLLM's own processors, and on what its samplers apply in which order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.utils.torch_utils import PIN_MEMORY, async_tensor_h2d
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.rejection_sampler import RejectionSampler

from vllm_memdec.compat.hooks import wrap

SAMPLER = "vllm.v1.sample.rejection_sampler"
BUILTIN = "vllm.v1.sample.logits_processor.builtin"
SIGNATURES = {
    f"{SAMPLER}:RejectionSampler.forward": "self metadata draft_probs logits sampling_metadata",
    f"{SAMPLER}:RejectionSampler.apply_logits_processors": (
        "self logits sampling_metadata metadata"
    ),
    f"{SAMPLER}:apply_sampling_constraints": "logits cu_num_draft_tokens sampling_metadata",
    f"{BUILTIN}:MinTokensLogitsProcessor": "vllm_config device is_pin_memory",
    f"{BUILTIN}:MinTokensLogitsProcessor.apply": "self logits",
    f"{BUILTIN}:MinTokensLogitsProcessor.apply_with_spec_decode": "self logits num_draft_tokens",
    f"{BUILTIN}:LogitBiasLogitsProcessor": "_ device is_pin_memory",
    f"{BUILTIN}:MinPLogitsProcessor": "vllm_config device is_pin_memory",
    "vllm.utils.torch_utils:async_tensor_h2d": "data device dtype out",
}
ATTRIBUTES = {
    f"{BUILTIN}:MinTokensLogitsProcessor": "min_toks",
    f"{BUILTIN}:LogitBiasLogitsProcessor": "biases",
    f"{BUILTIN}:MinPLogitsProcessor": "min_p min_p_count",
    "vllm.v1.sample.logits_processor.state:LogitsProcessors": (
        "argmax_invariant non_argmax_invariant"
    ),
    "vllm.v1.sample.metadata:SamplingMetadata": "all_greedy logitsprocs temperature",
    "vllm.v1.spec_decode.metadata:SpecDecodeMetadata": "num_draft_tokens",
}


class MinTokens(MinTokensLogitsProcessor):
    """vLLM's processor; each token that follows all drafts of a request counts these."""

    num_draft_tokens: Sequence[int] = ()  # by request, in the step that is verified

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask stop tokens in rows [B, V] of what follows the drafts of each request."""
        known, drafts = self.min_toks, self.num_draft_tokens
        self.min_toks = {
            row: (least - drafts[row], sampled, stops, structured)
            for row, (least, sampled, stops, structured) in known.items()
        }
        try:
            return self.apply_with_spec_decode(logits, [1] * len(logits))
        finally:
            self.min_toks = known


def install() -> None:
    """Hook what verifies drafts; called by the composite, so only in a worker that serves it."""
    wrap(RejectionSampler, "forward", _counted)
    wrap(RejectionSampler, "apply_logits_processors", _biased)
    wrap(rejection_sampler, "apply_sampling_constraints", _limited)


def complete(processors: Any, vllm_config: Any, device: torch.device) -> None:
    """Put into a runner's processors those that vLLM leaves out; before there are requests."""
    made = (vllm_config, device, PIN_MEMORY)
    processors.argmax_invariant[:] = [MinPLogitsProcessor(*made)]
    processors.non_argmax_invariant[:] = [MinTokens(*made), LogitBiasLogitsProcessor(*made)]


def _counted(original: Callable) -> Callable:
    def forward(
        self: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any
    ) -> Any:
        for processor in sampling_metadata.logitsprocs.non_argmax_invariant:
            if isinstance(processor, MinTokens):
                processor.num_draft_tokens = metadata.num_draft_tokens
        return original(self, metadata, draft_probs, logits, sampling_metadata)

    return forward


def _biased(original: Callable) -> Callable:
    def apply_logits_processors(
        self: Any, logits: torch.Tensor, sampling_metadata: Any, metadata: Any
    ) -> torch.Tensor:
        for processor in sampling_metadata.logitsprocs.non_argmax_invariant:
            if isinstance(processor, LogitBiasLogitsProcessor) and processor.biases:
                # Before penalties, as without drafts.
                add_biases(logits, processor.biases, metadata.num_draft_tokens)
        return original(self, logits, sampling_metadata, metadata)

    return apply_logits_processors


def add_biases(
    logits_NV: torch.Tensor, biases: dict[int, dict[int, float]], num_draft_tokens: Sequence[int]
) -> None:
    """Add to the rows of each request's drafts its bias by token, in place."""
    start = 0
    for number, count in enumerate(num_draft_tokens):
        if (bias := biases.get(number)) and count:
            # The host waits for no copy.
            tokens = async_tensor_h2d([*bias], logits_NV.device, torch.int64)
            values = async_tensor_h2d([*bias.values()], logits_NV.device, torch.float32)
            logits_NV[start : start + count, tokens] += values
        start += count


def _limited(original: Callable) -> Callable:
    def apply_sampling_constraints(
        logits: torch.Tensor, cu_num_draft_tokens: torch.Tensor, sampling_metadata: Any
    ) -> torch.Tensor:
        if not len(logits):
            return logits
        temperature = None if sampling_metadata.all_greedy else sampling_metadata.temperature
        for processor in sampling_metadata.logitsprocs.argmax_invariant:
            limits = isinstance(processor, MinPLogitsProcessor) and processor.min_p_count
            if limits and temperature is not None:
                lengths = cu_num_draft_tokens.diff(prepend=cu_num_draft_tokens.new_zeros(1))
                limit(logits, processor.min_p[:, 0], temperature, lengths)
        return original(logits, cu_num_draft_tokens, sampling_metadata)

    return apply_sampling_constraints


def limit(
    logits_NV: torch.Tensor,
    min_p_B: torch.Tensor,
    temperature_B: torch.Tensor,
    lengths_B: torch.Tensor,
) -> None:
    """Mask, in place, tokens less likely than min_p times the likeliest, at each temperature.

    lengths_B: how many of the N rows are each request's. The temperature 0 is greedy: it stays so.
    """
    # p / p_max < min_p, where p = softmax(logits / temperature).
    distance_B = temperature_B * min_p_B.log()
    distance_N = distance_B.repeat_interleave(lengths_B, output_size=len(logits_NV))
    lowest_N1 = logits_NV.amax(-1, keepdim=True) + distance_N[:, None]
    logits_NV.masked_fill_(logits_NV < lowest_N1, -torch.inf)
