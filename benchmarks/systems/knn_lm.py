"""kNN-LM (arXiv 1911.00172) on the artifacts of a build: the searched datastore as a baseline.

    p(y|x) = lambda p_kNN(y|x) + (1 - lambda) p_base(y|x)

Only the probability of the true token is needed for perplexity. lambda and the temperature of
p_kNN are tuned on validation text, as the memory's alpha is.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality.domain import TEXTS, made_in
from benchmarks.systems.base import Base, LineReader
from benchmarks.systems.system import System
from vllm_memdec.train.data.artifacts import Artifact, write_json
from vllm_memdec.train.executor.context import RAM_BUDGET
from vllm_memdec.train.model.hidden_states import embed
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.model.scoring import best_alpha, mix, perplexity
from vllm_memdec.train.settings import Settings
from vllm_memdec.train.stages.search import Index
from vllm_memdec.train.stages.targets import neighbour_weights

TEMPERATURES = np.geomspace(0.1, 10, 9)  # multiples of the temperature of the targets


@dataclass(frozen=True)
class Neighbours:
    """The k nearest datastore rows of each scored token: distances, ids, and who is right."""

    distances: np.ndarray  # [rows, k]
    ids: np.ndarray  # [rows, k]
    hit: np.ndarray  # [rows, k]: whether the neighbour's token is the true one

    def logprobs(self, temperature: float) -> np.ndarray:
        """Return log p_kNN of the true tokens [rows]; -inf where no neighbour has it."""
        weights = neighbour_weights(self.distances, self.ids, temperature)
        with np.errstate(divide="ignore"):
            return np.log((weights * self.hit).sum(axis=1, dtype=np.float64))


def find_neighbours(
    build: Path, base: Any, settings: Settings, tokens: np.ndarray, positions: np.ndarray
) -> Neighbours:
    """Search the build's datastore for every valid row of blocks [B, T+1]."""
    index = Index(build / "index", settings.index.probes, RAM_BUDGET)
    k = min(settings.targets.neighbours, len(index.labels))
    batches = []
    for keys, labels in embed(
        base, settings.datastore.key_layer, tokens, positions, settings.datastore.batch_blocks
    ):
        distances, ids = index.search(keys, k)
        batches.append((distances, ids, index.labels[ids] == labels[:, None]))
    return Neighbours(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))


def tune(base_N: np.ndarray, neighbours: Neighbours, temperature: float) -> tuple[float, float]:
    """Return (lambda, temperature) with the lowest perplexity on validation rows."""

    def result(t: float) -> tuple[float, float]:
        knn_N = neighbours.logprobs(t)
        weight = best_alpha(base_N, knn_N)
        return perplexity(mix(base_N, knn_N, weight)), weight

    best = min((temperature * TEMPERATURES).tolist(), key=lambda t: result(t)[0])
    return result(best)[1], best


class KnnLm(System):
    """kNN-LM on the full datastore of the domain's build."""

    name, title = "knn_lm", "kNN-LM"

    @cached_property
    def artifact(self) -> Artifact:
        """log p_kNN of every text's true tokens, and the tuned weight and temperature."""
        domain, base = self.domain, self.domain.system(Base)

        def make(work: Path) -> None:
            model = load_model(domain.pair.key_model, "bfloat16")
            build = domain.targets.path.parent
            near = {
                text: find_neighbours(build, model, domain.settings, *domain.blocks(text))
                for text in TEXTS
            }
            made_with = json.loads((build / "targets/targets.json").read_text())["temperature"]
            weight, temperature = tune(base.logprobs("validation"), near["validation"], made_with)
            for text, neighbours in near.items():
                np.save(work / f"{text}.npy", neighbours.logprobs(temperature))
            write_json(work / "tuned.json", {"lambda": weight, "temperature": temperature})

        inputs = {"text": domain.text.hash, "targets": domain.targets.hash}
        inputs["base"] = domain.base_hash
        return domain.artifact("scores-knn_lm", made_in(), inputs, make)

    @cached_property
    def tuned(self) -> dict[str, float]:
        return json.loads((self.artifact.path / "tuned.json").read_text())

    def fit(self) -> dict[str, float]:
        return self.tuned

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        return self.domain.load(self.artifact)

    def logprobs(self, text: str) -> np.ndarray:
        base_N = self.domain.system(Base).logprobs(text)
        return mix(base_N, self.scores[text], self.tuned["lambda"])

    @cached_property
    def reader(self) -> LineReader:
        """The model whose states are the keys."""
        base = self.domain.system(Base)
        key_model = self.domain.pair.key_model
        return base.reader if key_model == self.domain.base else LineReader(key_model)

    @cached_property
    def index(self) -> Index:
        build = self.domain.targets.path.parent
        return Index(build / "index", self.domain.settings.index.probes, RAM_BUDGET)

    def next_token(self, prompt: list[int], line: list[int]) -> torch.Tensor:
        base, settings = self.domain.system(Base), self.domain.settings
        tokens, positions = np.array([line]), np.arange(len(line))[None]
        n, key = len(line) - len(prompt), settings.datastore.key_layer
        keys = next(embed(self.reader.model, key, tokens, positions, 1))[0][-n:]
        near = self.index.search(keys, min(settings.targets.neighbours, len(self.index.labels)))
        weights = torch.from_numpy(neighbour_weights(*near, self.tuned["temperature"]))
        labels = torch.from_numpy(self.index.labels[near[1]].astype(np.int64))
        weight = self.tuned["lambda"]
        base_nV = base.next_token(prompt, line)
        return (base_nV * (1 - weight)).scatter_add(1, labels, weights * weight)
