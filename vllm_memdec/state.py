"""The weight of each request, from its extra_args to the row of logits that needs it.

Both runners hand compute_logits() a selection of hidden-state rows and do not say whose they are.
So the weight travels inside the row, in extra columns behind the two models' hidden states. They
have the dtype of the model: three numbers of 8 significant bits (bfloat16) hold the 24 bits of a
float32, so the sum is the float32 weight again, not a rounding of it.

Shapes: B requests, T tokens, N rows, A columns.
"""

from typing import Any

import torch
import torch.nn.functional as F

from vllm_memdec.checkpoint import check_alpha

KEY = "memdec_alpha"
PREFIX = "memdec_"
PARTS = 3
STEP = 256.0  # between parts: a power of two, so exact, and float16 does not underflow


def check_extra_args(extra_args: dict[str, Any] | None, serving: bool) -> None:
    """Raise ValueError for a wrong memdec argument of a request; every other key is let through."""
    for key, value in (extra_args or {}).items():
        if not key.startswith(PREFIX):
            continue
        if key != KEY:
            raise ValueError(f"Unknown extra argument {key!r}: did you mean {KEY!r}?")
        if not serving:
            raise ValueError(f"{KEY} was given, but this server runs without a memory.")
        check_alpha(value, KEY)


def request_alpha(extra_args: dict[str, Any] | None, default: float) -> float:
    """Return the weight of a request whose arguments were checked."""
    return float((extra_args or {}).get(KEY, default))


def encode(alpha_B: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Split float32 weights into PARTS columns [B, PARTS] of dtype, without loss."""
    parts = []
    rest_B = alpha_B
    for _ in range(PARTS):
        part_B = rest_B.to(dtype)
        parts.append(part_B)
        rest_B = (rest_B - part_B.float()) * STEP
    return torch.stack(parts, dim=-1)


def decode(columns_NA: torch.Tensor) -> torch.Tensor:
    """Put the float32 weights [N] together again."""
    alpha_N = columns_NA[:, PARTS - 1].float()
    for part in reversed(range(PARTS - 1)):
        alpha_N = columns_NA[:, part].float() + alpha_N / STEP
    return alpha_N.clamp(0, 1)  # vLLM's profile run sends random rows


class AlphaRows:
    """The columns of every token of the running batch, in one buffer that graphs may capture."""

    def __init__(self, hidden_size: int, max_tokens: int, dtype: torch.dtype, device: Any):
        # The head's GEMM wants rows that are a multiple of 8 elements long.
        width = PARTS + -(hidden_size + PARTS) % 8
        self.columns_TA = torch.zeros(max_tokens, width, dtype=dtype, device=device)

    def write(self, alpha_B: torch.Tensor, lengths_B: torch.Tensor) -> None:
        """Give each request's tokens, in batch order, its weight; both arguments on the host."""
        rows_BA = encode(alpha_B, self.columns_TA.dtype)
        rows_TA = rows_BA.repeat_interleave(lengths_B, dim=0)
        rows_TA = F.pad(rows_TA, (0, self.columns_TA.shape[1] - PARTS))
        if not self.columns_TA.is_cpu:
            rows_TA = rows_TA.pin_memory()  # a copy from pageable memory would wait for the device
        # In place: a captured graph reads this very memory.
        self.columns_TA[: len(rows_TA)].copy_(rows_TA, non_blocking=True)
