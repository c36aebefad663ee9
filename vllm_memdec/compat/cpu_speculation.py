"""Speculation of the V1 runner on a CPU: the temperature of a request reaches each of its drafts.

rejection_sampler.expand_batch_to_tokens is exchanged. In 0.32 and 0.33 it fills a temporary in
place of floating-point results (issue #55005), so these are never written.

May go when the oldest vLLM that plugin.py allows has that issue mended.
Relies on its arguments alone.
"""

import torch
from vllm.v1.sample import rejection_sampler

from vllm_memdec.compat.hooks import wrap

SIGNATURES = {
    "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens": (
        "x cu_num_tokens num_tokens replace_from replace_to"
    ),
}


def install() -> None:
    """Exchange what vLLM expands a request's temperature to its drafts with, on a CPU."""
    wrap(rejection_sampler, "expand_batch_to_tokens", lambda original: expand_batch_to_tokens)


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """Return each request's value once for each of its tokens, `replace_to` for `replace_from`."""
    lengths = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    return torch.where(x == replace_from, replace_to, x).repeat_interleave(lengths)
