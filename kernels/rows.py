"""What the ops on rows of logits share: the guard around Triton, tile sizes, the normaliser.

Test: `pytest tests/kernels`.
"""

from __future__ import annotations

import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only installation
    triton = tl = None

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# 16 warps read 4,096 bf16 columns as one 16-byte load per thread.
BLOCK = 4096
NUM_WARPS = 16


def jit(function):
    return triton.jit(function) if triton is not None else function


@jit
def normaliser(row, width, BLOCK: tl.constexpr, shift=None):
    """Return (peak, log sum exp(x - peak)) of a row: kept apart, float32 resolves 1e4 + log 2.

    shift: if given, what is added to each column first.
    """
    # One running peak and sum per lane: no reduction across threads inside the loop. Starting at
    # the lowest finite number, not at -inf, keeps exp(-inf - peak) a plain 0.
    peak = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
        if shift is not None:
            x += tl.load(shift + columns, mask=columns < width, other=0.0)
        higher = tl.maximum(peak, x)
        total = total * tl.exp(peak - higher) + tl.exp(x - higher)
        peak = higher
    row_peak = tl.max(peak, axis=0)
    row_total = tl.sum(total * tl.exp(peak - row_peak), axis=0)
    # No mass: both parts 0, so that -inf - lse stays -inf.
    empty = row_total == 0
    return tl.where(empty, 0.0, row_peak), tl.log(tl.where(empty, 1.0, row_total))
