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

from vllm_memdec.errors import MemdecError
from vllm_memdec.kernels.head_loss import LOGITS, Columns

CHECKED_ROWS = 8  # rows on which the head is compared with the model's own logits
# Of the largest logit, by the format that both were computed in.
HEAD_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


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
    scale = scale or getattr(config, "lm_head_multiplier", None)  # Falcon-H1
    divisor = getattr(config, "logits_scaling", None)  # Granite; MiniCPM3 divides hidden states
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
    transform = logits_transform(model.config.get_text_config(decoder=True))
    return logits_NV if transform is None else transform(logits_NV)


@torch.inference_mode()
def check_head(model: Any, folder: str) -> None:
    """Raise MemdecError unless head() gives the model's own logits, on rows of random tokens.

    What an architecture does to its logits is read from the names of its settings, and two may mean
    different things by one name.
    """
    if model.get_output_embeddings() is None:
        raise MemdecError(
            f"{folder} ({type(model).__name__}) has no output head, so it predicts no tokens: give "
            "a causal LM."
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = np.random.default_rng(0).integers(vocabulary, size=(1, CHECKED_ROWS))
    ids = torch.from_numpy(tokens).to(model.device)
    trunk: list[Any] = []
    handle = model.base_model.register_forward_hook(lambda module, given, out: trunk.append(out))
    try:
        own_NV = model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        handle.remove()
    if not trunk or not hasattr(trunk[0], "last_hidden_state"):
        raise MemdecError(
            f"{folder} ({type(model).__name__}) does not call a model without a head, so its "
            "hidden states cannot be found: give another model."
        )
    ours_NV = head(model, trunk[0].last_hidden_state[0]).float()
    finite = own_NV.isfinite()
    if not finite.any():
        raise MemdecError(
            f"{folder} gives no finite logits: copy its weights again, or load it in float32."
        )
    apart = (ours_NV - own_NV)[finite].abs()
    if (apart > HEAD_TOLERANCE.get(model.dtype, 5e-2) * own_NV[finite].abs().max()).any():
        raise MemdecError(
            f"{folder} ({type(model).__name__}) does more to its logits than memdec knows of, so "
            "its probabilities would be wrong: give another model."
        )
