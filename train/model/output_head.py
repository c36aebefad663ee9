"""The output head: final hidden states -> logits, over all of the vocabulary or over candidates.

A corpus of a small domain uses a small part S of a large vocabulary, and every label and kNN
target lies in S. The other tokens R enter the loss only through the normaliser, which a fresh
uniform sample M of R can estimate each step (sampled softmax, arXiv 1412.2007, with S exact):

    lse(z) ~ log( sum_S exp(z_y) + |R| / |M| * sum_M exp(z_y) )

On a CPU, where a wide head takes most of a step, this trains more than twice as fast. The head's
rows of M are constants of the step: a row that gets a gradient once in many steps is moved far too
much by Adam, whatever the gradient's size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_memdec.kernels.head_loss import LOGITS, Columns


@dataclass(frozen=True)
class Candidates:
    """Columns of the vocabulary: those of S ascending, then the sample; None stands for all."""

    columns: Columns | None
    rank_V: torch.Tensor | None  # token id -> column, for tokens of S

    @classmethod
    def draw(
        cls, used: np.ndarray, vocabulary: int, sampled: int | None, seed: list[int]
    ) -> "Candidates":
        """Return all of `used` and `sampled` others, or everything if that is no fewer."""
        n_rest = vocabulary - len(used)
        if sampled is None or sampled >= n_rest:
            return ALL
        rest = np.delete(np.arange(vocabulary), used)
        chosen = np.random.default_rng(seed).choice(rest, size=sampled, replace=False)
        log_weight = np.zeros(len(used) + sampled, dtype=np.float32)
        log_weight[len(used) :] = math.log(n_rest / sampled)
        rank = np.full(vocabulary, -1)
        rank[used] = np.arange(len(used))
        ids = torch.from_numpy(np.r_[used, chosen].astype(np.int64))
        return cls(Columns(ids, torch.from_numpy(log_weight), len(used)), torch.from_numpy(rank))

    def to(self, device: torch.device) -> "Candidates":
        """Return the same columns on a device."""
        if self.columns is None or self.rank_V is None:
            return self
        ids, log_weight = self.columns.ids.to(device), self.columns.log_weight.to(device)
        return Candidates(Columns(ids, log_weight, self.columns.trained), self.rank_V.to(device))

    def rank(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the columns of some tokens of S."""
        return tokens if self.rank_V is None else self.rank_V[tokens]


ALL = Candidates(None, None)


def rows_at_once(columns: int) -> int:
    """Return how many rows of logits over so many columns are computed at once."""
    return max(1, LOGITS // columns)


def logits_transform(config: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return what an architecture does to hidden states times head, None if nothing."""
    scale = getattr(config, "logit_scale", None)  # Cohere
    divisor = getattr(config, "logits_scaling", None)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    if not (scale or divisor or cap):
        return None

    def transform(logits: torch.Tensor) -> torch.Tensor:
        logits = logits * (scale or 1) / (divisor or 1)
        return torch.tanh(logits / cap) * cap if cap else logits

    return transform


def head(model: Any, h_ND: torch.Tensor) -> torch.Tensor:
    """Return logits [N, V] of final hidden states, scaled as the architecture wants."""
    logits_NV = model.get_output_embeddings()(h_ND)
    transform = logits_transform(model.config)
    return logits_NV if transform is None else transform(logits_NV)
