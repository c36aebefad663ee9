"""kNN-LM (arXiv 1911.00172) on the artifacts of a build: the searched datastore as a rival.

    p(y|x) = lambda p_kNN(y|x) + (1 - lambda) p_base(y|x)

Only the probability of the true token is needed for perplexity. lambda and the temperature of
p_kNN are tuned on validation text, as the memory's alpha is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_memdec.train.config import Settings
from vllm_memdec.train.datastore import embed
from vllm_memdec.train.evaluate import best_alpha, mix, perplexity
from vllm_memdec.train.pipeline import MEMORY_BUDGET
from vllm_memdec.train.search import Index
from vllm_memdec.train.targets import neighbour_weights

TEMPERATURES = np.geomspace(0.1, 10, 9)  # multiples of the one the targets were made with


@dataclass(frozen=True)
class Neighbours:
    """The k nearest datastore rows of each scored token: distances, ids, and who is right."""

    distances: np.ndarray  # [rows, k]
    ids: np.ndarray  # [rows, k]
    hit: np.ndarray  # [rows, k]: the neighbour's token is the true one

    def logprobs(self, temperature: float) -> np.ndarray:
        """Return log p_kNN of the true tokens [rows]; -inf where no neighbour has it."""
        weights = neighbour_weights(self.distances, self.ids, temperature)
        with np.errstate(divide="ignore"):
            return np.log((weights * self.hit).sum(axis=1, dtype=np.float64))


def find_neighbours(
    build: Path, base: Any, settings: Settings, tokens: np.ndarray, positions: np.ndarray
) -> Neighbours:
    """Search the build's datastore for every valid row of blocks [B, T+1]."""
    index = Index(build / "index", settings.index.probes, MEMORY_BUDGET)
    k = min(settings.targets.neighbours, len(index.labels))
    found = []
    for keys, labels in embed(
        base, settings.datastore.key_layer, tokens, positions, settings.datastore.batch_blocks
    ):
        distances, ids = index.search(keys, k)
        found.append((distances, ids, index.labels[ids] == labels[:, None]))
    return Neighbours(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def tune(base_N: np.ndarray, neighbours: Neighbours, temperature: float) -> tuple[float, float]:
    """Return (lambda, temperature) with the lowest perplexity on validation rows."""

    def result(t: float) -> tuple[float, float]:
        knn_N = neighbours.logprobs(t)
        weight = best_alpha(base_N, knn_N)
        return perplexity(mix(base_N, knn_N, weight)), weight

    best = min((temperature * TEMPERATURES).tolist(), key=lambda t: result(t)[0])
    return result(best)[1], best
