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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

LOGITS = 1 << 25  # that exist at once: 512 rows of a 64k vocabulary


@dataclass(frozen=True)
class Candidates:
    """Columns of the vocabulary: ids ascending in S, then the sample; None stands for all."""

    ids_C: torch.Tensor | None
    log_weight_C: torch.Tensor | None  # 0 on S, log(|R| / |M|) on the sample
    rank_V: torch.Tensor | None  # token id -> column, for tokens of S
    exact: int = 0  # columns of S

    @classmethod
    def draw(
        cls, used: np.ndarray, vocabulary: int, sampled: int | None, seed: list[int]
    ) -> "Candidates":
        """Return all of `used` and `sampled` others, or everything if that is no fewer."""
        n_rest = vocabulary - len(used)
        if sampled is None or sampled >= n_rest:
            return cls(None, None, None)
        rest = np.delete(np.arange(vocabulary), used)
        chosen = np.random.default_rng(seed).choice(rest, size=sampled, replace=False)
        log_weight = np.zeros(len(used) + sampled, dtype=np.float32)
        log_weight[len(used) :] = math.log(n_rest / sampled)
        rank = np.full(vocabulary, -1)
        rank[used] = np.arange(len(used))
        return cls(
            torch.from_numpy(np.r_[used, chosen].astype(np.int64)),
            torch.from_numpy(log_weight),
            torch.from_numpy(rank),
            len(used),
        )

    def to(self, where: torch.device) -> "Candidates":
        """Return the same columns on a device."""
        if self.ids_C is None:
            return self
        ids_C, log_weight_C, rank_V = (
            t.to(where) for t in (self.ids_C, self.log_weight_C, self.rank_V)
        )
        return Candidates(ids_C, log_weight_C, rank_V, self.exact)

    def rank(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the columns of some tokens of S."""
        return tokens if self.rank_V is None else self.rank_V[tokens]

    def rows(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return a parameter's rows of these columns; only those of S pass a gradient on."""
        exact, sample = self.ids_C[: self.exact], self.ids_C[self.exact :]
        return torch.cat([parameter[exact], parameter[sample].detach()])


ALL = Candidates(None, None, None)


def rows_at_once(columns: int) -> int:
    """Return how many rows of logits over so many columns are computed at once."""
    return max(1, LOGITS // columns)


def head(
    model: Any,
    h_ND: torch.Tensor,
    candidates: Candidates = ALL,
    weight_CD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return logits [N, V] or [N, C] of final hidden states, scaled as the architecture wants.

    weight_CD: the head's rows of the candidates, where the caller has them already.
    """
    layer = model.get_output_embeddings()
    if candidates.ids_C is None:
        logits_NC = layer(h_ND)
    else:
        bias = getattr(layer, "bias", None)
        bias_C = None if bias is None else candidates.rows(bias)
        logits_NC = torch.nn.functional.linear(h_ND, weight_CD, bias_C)
    config = model.config
    if getattr(config, "logit_scale", None):  # Cohere
        logits_NC = logits_NC * config.logit_scale
    if getattr(config, "logits_scaling", None):  # Granite
        logits_NC = logits_NC / config.logits_scaling
    if getattr(config, "final_logit_softcapping", None):  # Gemma 2
        cap = config.final_logit_softcapping
        logits_NC = torch.tanh(logits_NC / cap) * cap
    if candidates.ids_C is not None:
        logits_NC = logits_NC + candidates.log_weight_C
    return logits_NC
