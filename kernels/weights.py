"""The weight of each row of a mixture: given, decoded from columns of the row, or a gate's.

Serving keeps the weight of a row in columns behind its hidden states, which have the model's dtype:
PARTS numbers of 8 significant bits (bfloat16) hold the 24 bits of a float32,

    alpha = c0 + (c1 + c2 / STEP) / STEP    clamped to [-1, 1]

and one more column holds the number of the row's memory. vllm_memdec/batch.py writes them. The
mixture op decodes them itself, so that no launch and no wait of the host comes before it.
Shape suffixes: N rows, A columns, K units of a gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vllm_memdec.kernels.rows import LOGIT_DTYPES

PARTS = 3  # columns of the weight; the memory's number is in the next one
STEP = 256.0  # between parts: a power of two, so exact, and float16 does not underflow
LARGEST = 0.999  # a gate's largest weight: a sure memory that errs costs ln(1000) nats at most


@dataclass(frozen=True)
class RowWeights:
    """Weights [N] of one memory, still in the columns [N, A] of their rows, A > PARTS.

    Rows of other memories have weight 0 under `others="base"`. Under "keep" the op neither reads
    them nor writes them: so memories are mixed one after the other into one output.
    """

    columns_NA: Tensor
    memory: int  # the number of the memory
    others: Literal["base", "keep"] = "base"

    def check(self, N: int) -> None:
        """Raise ValueError unless these are weights of N rows."""
        x = self.columns_NA
        if x.ndim != 2 or len(x) != N or x.shape[1] <= PARTS:
            raise ValueError(
                f"columns must be [{N}, {PARTS + 1} or more], a row for each of the base's, got "
                f"{tuple(x.shape)}."
            )
        if x.dtype not in LOGIT_DTYPES or x.stride(1) != 1:
            raise ValueError(
                f"columns must lie side by side in bfloat16, float16 or float32, got {x.dtype}, "
                f"strides {x.stride()}."
            )
        if self.others not in ("base", "keep"):
            raise ValueError(f'others must be "base" or "keep", got {self.others!r}.')

    def decode(self, gated: bool) -> tuple[Tensor, Tensor]:
        """Return float32 weights [N], 0 in rows of others, and which rows are not [N, bool]."""
        columns_NA = self.columns_NA[:, : PARTS + 1].float()
        alpha_N = columns_NA[:, PARTS - 1]
        for part in reversed(range(PARTS - 1)):
            alpha_N = columns_NA[:, part] + alpha_N / STEP
        # vLLM's profile run sends random rows. A negative weight is the cap of a gate.
        alpha_N = alpha_N.clamp(-1 if gated else 0, 1)
        mine_N = columns_NA[:, PARTS] == self.memory
        return torch.where(mine_N, alpha_N, 0), mine_N


def gate_weights(score_N: Tensor, certainty_4K: Tensor, top_N: Tensor, entropy_N: Tensor) -> Tensor:
    """Return a gate's weights [N] by the formula of interpolate.py."""
    return LARGEST * gate_scores(score_N, certainty_4K, top_N, entropy_N).sigmoid()


def gate_scores(score_N: Tensor, certainty_4K: Tensor, top_N: Tensor, entropy_N: Tensor) -> Tensor:
    """Return scores [N] to which the memory's certainty has been added."""
    sure_N2 = torch.stack([top_N, entropy_N], -1)
    x_NK = torch.addmm(certainty_4K[2], sure_N2, certainty_4K[:2])
    return torch.addmv(score_N, torch.nn.functional.gelu(x_NK), certainty_4K[3])
