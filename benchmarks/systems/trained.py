"""What trained systems share: equal FLOPs, and a learning rate tuned in short runs."""

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality.domain import Domain, made_in
from benchmarks.systems.base import LineReader
from benchmarks.systems.system import System
from vllm_memdec.train.data.artifacts import Artifact
from vllm_memdec.train.data.blocks import load_used
from vllm_memdec.train.data.completeness import model_files
from vllm_memdec.train.data.inputs import model_hash
from vllm_memdec.train.model.decoder import memory_config
from vllm_memdec.train.model.huggingface import load_config
from vllm_memdec.train.model.scoring import perplexity
from vllm_memdec.train.settings import MemorySettings
from vllm_memdec.train.training.batches import Batches

LEAST = 10  # optimiser steps of a trial of a learning rate


def parameters(config: Any) -> tuple[int, int]:
    """Return how many weights a token passes: those of the layers, and those of the head."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding = model.get_input_embeddings().weight.numel()
    layers = sum(p.numel() for p in model.base_model.parameters()) - embedding
    return layers, model.get_output_embeddings().weight.numel()


def memory_cost(domain: Domain) -> tuple[float, float]:
    """Return the FLOPs of a memory's training: before it begins (the keys), and a token.

    Two a weight and token forward, four backward; of a frozen weight two. Attention, the search,
    the optimiser and what is computed twice to save RAM are not counted.
    """
    config = memory_config(domain.settings.memory, domain.base)
    layers, _ = parameters(load_config(domain.pair.key_model))
    small, _ = parameters(config)
    used = len(load_used(domain.corpus, "train"))
    sampled = domain.settings.memory.sampled_negatives or config.vocab_size
    columns = min(config.vocab_size, used + sampled) * config.hidden_size
    return 2 * layers * domain.corpus_tokens, 6 * (small + columns)


def budget(domain: Domain) -> float:
    """Return the FLOPs that each training may take: the memory's, or an epoch of the base."""
    if domain.pair.budget == "paper":
        return 6 * sum(parameters(load_config(domain.base))) * domain.corpus_tokens
    before, token = memory_cost(domain)
    epochs = domain.sizes.epochs or domain.settings.memory.epochs
    return before + token * epochs * domain.corpus_tokens


def trial_share(share: float, steps: float) -> float:
    """Return the share of a training of so many steps that tries a rate: so much, or LEAST steps.

    A training of fewer than twice as many is tried whole.
    """
    if round(share * steps) >= LEAST:
        return share
    return round(LEAST / steps, 4) if round(steps) >= 2 * LEAST else 1.0


class Trained(System):
    """A system with weights of its own."""

    usual_rates: ClassVar[tuple[float, ...]]  # learning rates that are tried, if the pair has none
    beta: ClassVar[float] = 0.0  # weight of the KL term of the loss
    trained = True

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that are tried."""
        return self.domain.pair.rates.get(self.name, self.usual_rates)

    @property
    @abstractmethod
    def cost(self) -> tuple[float, float]:
        """FLOPs of the training: before it begins, and a token."""

    @abstractmethod
    def write(self, settings: MemorySettings, work: Path) -> None:
        """Train and write the model's folder."""

    @abstractmethod
    def served(self, scores: dict[str, np.ndarray], text: str) -> np.ndarray:
        """Return log p [rows] as it is served, from the model's own log p of the texts."""

    def settings(self, rate: float, epochs: float) -> MemorySettings:
        """Return the settings of a training."""
        return self.domain.settings.memory.changed(
            beta=self.beta, learning_rate=rate, epochs=epochs
        )

    def plan(self, settings: MemorySettings) -> dict[str, Any]:
        """Return what the model's artifact depends on, beside its inputs."""
        init = Path(settings.init).name
        return settings.recorded() | {"system": self.name, "init": init} | made_in(settings.dtype)

    def epochs(self, share: float = 1.0) -> float:
        """Return how many epochs a share of a training has.

        share: of the FLOPs that are left of the budget by what comes before the training.
        """
        before, token = self.cost
        left = budget(self.domain) - before
        return round(share * left / token / self.domain.corpus_tokens, 4)

    def flops(self, epochs: float) -> float:
        """Return the FLOPs that so many epochs take, with what comes before the training."""
        before, token = self.cost
        return before + token * epochs * self.domain.corpus_tokens

    @cached_property
    def trial(self) -> float:
        """The share of a training that tries a learning rate."""
        settings = self.settings(self.rates[0], self.epochs())
        batches = Batches(settings, self.domain.corpus, self.domain.targets.path)
        steps = settings.epochs * len(batches.tokens) / batches.size
        return trial_share(self.domain.sizes.trial, steps)

    def train(self, rate: float, share: float = 1.0) -> Artifact:
        """Return a model trained for a share of a training; see epochs()."""
        settings = self.settings(rate, self.epochs(share))
        inputs = {"targets": self.domain.targets.hash, "base": self.domain.base_hash}
        if settings.init not in ("base", self.domain.base):
            inputs["init"] = model_hash(settings.init, "the memory's start")
        return self.domain.artifact(
            self.domain.pair.budgeted(f"{self.name}-{rate:g}-{share:g}"),
            self.plan(settings),
            inputs,
            lambda work: self.write(settings, work),
            model_files,
        )

    @cached_property
    def rate(self) -> float:
        """The learning rate with the lowest perplexity on validation text in short runs."""
        tried = {}
        for rate in self.rates:
            short = self.train(rate, self.trial)
            name = f"{self.name}-{rate:g}-trial"
            scores = self.domain.scores(
                self.domain.pair.budgeted(name), str(short.path), ("validation",)
            )
            tried[rate] = perplexity(self.served(scores, "validation"))
            self.domain.progress.say(
                f"{self.name}: learning rate {rate:g}: perplexity {tried[rate]:.3f}"
            )
        return min(tried, key=tried.__getitem__)

    @cached_property
    def folder(self) -> str:
        """The model's folder."""
        return str(self.train(self.rate).path)

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """The model's own log p of the texts."""
        return self.domain.scores(self.domain.pair.budgeted(self.name), self.folder)

    @cached_property
    def reader(self) -> LineReader:
        return LineReader(self.folder)

    def fit(self) -> dict[str, float]:
        return {"learning_rate": self.rate}

    def logprobs(self, text: str) -> np.ndarray:
        return self.served(self.scores, text)

    def inputs(self) -> dict[str, str]:
        return {self.name: model_hash(self.folder, self.name)}
