"""A trained memory against the targets it was taught, and how much of the text it can recite.

Fidelity is measured as in arXiv 2607.27919: top-1 agreement, KL(target || memory), total variation
and Pearson correlation over the vocabulary, each the mean over rows.
"""

from typing import Any

import numpy as np
import torch

from vllm_memdec.train.data.blocks import unmarked, valid_rows
from vllm_memdec.train.data.shards import Sharded
from vllm_memdec.train.model.hidden_states import hidden_states, states_of_rows
from vllm_memdec.train.model.output_head import head
from vllm_memdec.train.verify.brute_force import StoredTargets, evenly

MEASURES = ("agreement", "kl", "tv", "pearson")
ROWS_EACH = 16  # rows compared in each block
CONTEXT = 16  # tokens with which a passage is prompted
RECITED = (16, 32)  # tokens that have to follow exactly, in either of two tests
BATCH = 16  # passages of a forward pass


@torch.inference_mode()
def fidelity(
    models: dict[str, Any],
    tokens: np.ndarray | Sharded,
    positions: np.ndarray | Sharded,
    row_start: np.ndarray,
    stored: StoredTargets,
    unigram_V: np.ndarray,
    max_rows: int,
) -> dict[str, dict[str, float]]:
    """Return agreement, kl, tv and pearson of each model on up to `max_rows` of blocks [B, T+1].

    row_start [B+1] numbers each block's rows. unigram_V are the corpus's token frequencies, a
    baseline that knows no context: "unigram".
    """
    figures: dict[str, list[tuple[float, ...]]] = {name: [] for name in (*models, "unigram")}
    for block in evenly(len(tokens), -(-max_rows // ROWS_EACH)).tolist():
        block_T, position_T = (np.asarray(a[block], np.int64) for a in (tokens, positions))
        mask_T = valid_rows(position_T[None])[0]
        rows = evenly(row_start[block + 1] - row_start[block], ROWS_EACH)
        targets = [stored.row(row_start[block] + row) for row in rows.tolist()]
        p_NV = {"unigram": torch.from_numpy(unigram_V).expand(len(rows), -1)}
        for name, model in models.items():
            inputs = block_T[None, :-1], unmarked(position_T[None, :-1]), mask_T[None]
            h_ND = states_of_rows(model, "final_hidden", *inputs)
            chosen_ND = h_ND[torch.from_numpy(rows).to(model.device)]
            p_NV[name] = head(model, chosen_ND).double().softmax(-1).cpu()
        for name, p in p_NV.items():
            figures[name] += [
                compare(ids, probs, p_V)
                for (ids, probs), p_V in zip(targets, p.numpy(), strict=True)
                if len(ids)  # a row may have found no neighbour
            ]
    return {
        name: dict(zip(MEASURES, np.mean(values, axis=0).tolist(), strict=True))
        | {"rows": len(values)}
        for name, values in figures.items()
    }


def compare(ids: np.ndarray, target: np.ndarray, p_V: np.ndarray) -> tuple[float, ...]:
    """Return (agreement, KL, total variation, Pearson) of a sparse target and a distribution."""
    p = p_V[ids]
    with np.errstate(divide="ignore"):
        kl = (target * (np.log(target) - np.log(p))).sum()
    tv = (np.abs(target - p).sum() + 1 - p.sum()) / 2
    # Both sum to 1 over V tokens, so both have the mean 1 / V.
    mean = 1 / len(p_V)
    spread = ((target**2).sum() - mean) * ((p_V**2).sum() - mean)
    pearson = ((target * p).sum() - mean) / np.sqrt(spread) if spread > 0 else 0.0
    return float(p_V.argmax() == ids[target.argmax()]), float(kl), float(tv), float(pearson)


def passages(
    tokens: np.ndarray | Sharded, positions: np.ndarray | Sharded, length: int, max_passages: int
) -> np.ndarray:
    """Return beginnings [N, length] of documents (or of their parts in a block), N at most so many.

    Looks at up to four times as many blocks, so that of a large corpus little is read.
    """
    chosen = evenly(len(tokens), 4 * max_passages)
    tokens, positions = np.asarray(tokens[chosen]), np.asarray(positions[chosen])
    if length > tokens.shape[1]:
        return np.empty((0, length), np.int64)
    place = unmarked(positions)
    last = place[:, length - 1 :] == length - 1
    block, start = np.nonzero(last & (place[:, : last.shape[1]] == 0))
    # What is not predicted is not recited either.
    after = start[:, None] + np.arange(CONTEXT, length)
    predicted = (positions[block[:, None], after] >= 0).all(axis=1)
    block, start = block[predicted], start[predicted]
    kept = evenly(len(block), max_passages) if len(block) else np.empty(0, np.int64)
    return tokens[block[kept, None], start[kept, None] + np.arange(length)].astype(np.int64)


@torch.inference_mode()
def recited(model: Any, passages_NT: np.ndarray) -> float:
    """Return the share of passages whose tokens after CONTEXT the model's greedy answer repeats.

    A greedy answer is exact iff each of its tokens is the likeliest after the true ones before
    it, so one forward pass over the passage tells, without generating.
    """
    exact = []
    for start in range(0, len(passages_NT), BATCH):
        part_BT = torch.from_numpy(passages_NT[start : start + BATCH]).to(model.device)
        read_BT = part_BT[:, :-1]
        position_BT = torch.arange(read_BT.shape[1], device=model.device).expand_as(read_BT)
        h_BTD = hidden_states(model, "final_hidden", read_BT, position_BT)
        greedy_BT = head(model, h_BTD[:, CONTEXT - 1 :]).argmax(dim=-1)
        exact.append((greedy_BT == part_BT[:, CONTEXT:]).all(dim=1).cpu())
    return float(torch.cat(exact).double().mean())
