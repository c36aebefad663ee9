"""Score text with a causal LM: log-probabilities of the true tokens, and what follows from them."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_memdec.gate import features
from vllm_memdec.train.data.blocks import load_blocks, unmarked, valid_rows
from vllm_memdec.train.model.devices import to_device
from vllm_memdec.train.model.hidden_states import states_of_rows
from vllm_memdec.train.model.huggingface import load_model, text_config
from vllm_memdec.train.model.output_head import head, rows_at_once
from vllm_memdec.train.progress import Progress

ALPHAS = np.linspace(0, 1, 101)


@torch.inference_mode()
def label_logprobs(
    model: Any,
    tokens: np.ndarray,
    positions: np.ndarray,
    batch: int,
    progress: Progress | None = None,
    name: str = "",
    features_NF: torch.Tensor | None = None,
    scored: np.ndarray | None = None,
) -> np.ndarray:
    """Return log p(next token) [rows] float64 for every valid row of blocks [B, T+1].

    Where documents are read one by one, those of a batch alone pass together, sorted by length.
    features_NF: if given, what a gate goes by is written into it, a row of D + 3 for each.
    scored: the rows [B, T] in place of the valid ones, where positions run on across documents.
    """
    scored = valid_rows(positions) if scored is None else scored
    device = model.device
    logprobs, done = [], 0
    with contextlib.ExitStack() as stack:
        advance = None
        if progress is not None:
            task = progress.task(f"scoring with {name}", len(tokens), "blocks")
            advance = stack.enter_context(task)
        for start in range(0, len(tokens), batch):
            block = tokens[start : start + batch].astype(np.int64)
            position = unmarked(positions[start : start + batch].astype(np.int64))
            mask = scored[start : start + batch]
            inputs = block[:, :-1], position[:, :-1], mask
            h_ND = states_of_rows(model, "final_hidden", *inputs)
            of_rows = block[:, 1:][mask], position[:, :-1][mask]
            rows = h_ND, *(to_device(array, device) for array in of_rows)
            chunk = rows_at_once(text_config(model.config).vocab_size)
            for h_PD, labels_P, position_P in zip(*(r.split(chunk) for r in rows), strict=True):
                logits_PV = head(model, h_PD).float()
                chosen_P = logits_PV.gather(1, labels_P[:, None])[:, 0]
                logprobs.append((chosen_P - logits_PV.logsumexp(-1)).double().cpu().numpy())
                if features_NF is not None:
                    features_NF[done : done + len(h_PD)] = features(h_PD, logits_PV, position_P)
                done += len(h_PD)
            if advance is not None:
                advance(len(block))
    return np.concatenate(logprobs)


def sampled_validation(corpus: Path, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and positions of validation blocks, spread evenly if they are too many."""
    tokens, positions = load_blocks(corpus, "validation")
    max_blocks = max(1, max_tokens // (tokens.shape[1] - 1))
    chosen = np.linspace(0, len(tokens) - 1, min(max_blocks, len(tokens))).astype(int)
    return tokens[chosen], positions[chosen]


def validation_logprobs(
    folder: str,
    dtype: str,
    corpus: Path,
    max_tokens: int,
    batch: int,
    progress: Progress | None = None,
    name: str = "the base",
) -> np.ndarray:
    """Return log p(next token) [rows] float64 of a model folder on sampled validation blocks.

    The rows are those of label_logprobs(model, *sampled_validation(corpus, most_tokens), batch) for
    any other model, so both can be mixed row by row. The model is loaded and let go of again.
    """
    model = load_model(folder, dtype)
    return label_logprobs(model, *sampled_validation(corpus, max_tokens), batch, progress, name)


def mix(base_N: np.ndarray, memory_N: np.ndarray, alpha: float | np.ndarray) -> np.ndarray:
    """Return log((1-alpha) p_base + alpha p_memory) [N]; alpha: one weight, or each row's [N]."""
    with np.errstate(divide="ignore"):
        return np.logaddexp(base_N + np.log1p(-alpha), memory_N + np.log(alpha))


def perplexity(logprobs_N: np.ndarray) -> float:
    """Return exp of the mean negative log-probability."""
    return float(np.exp(-logprobs_N.mean()))


def best_alpha(base_N: np.ndarray, memory_N: np.ndarray) -> float:
    """Return the weight of the memory with the lowest perplexity, to two digits.

    The likelihood is concave in alpha, so a grid cannot miss a second optimum.
    """
    best = min(ALPHAS, key=lambda alpha: perplexity(mix(base_N, memory_N, alpha)))
    return float(round(best, 2))
