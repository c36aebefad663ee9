"""Base + memory with one tuned weight; the memory trained on kNN targets, or on tokens alone."""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from benchmarks.systems.base import Base
from benchmarks.systems.trained import Trained, memory_cost
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model.scoring import ALPHAS, best_alpha, mix, perplexity
from vllm_memdec.train.settings import MemorySettings
from vllm_memdec.train.stages.training import train_memory


class Memory(Trained):
    """Base + memory."""

    name, title = "memory", "base + memory"
    usual_rates, beta = (1e-3, 3e-3), 0.5

    @cached_property
    def cost(self) -> tuple[float, float]:
        return memory_cost(self.domain)

    def write(self, settings: MemorySettings, work: Path) -> None:
        domain = self.domain
        files = (domain.base, domain.corpus, domain.targets.path, work)
        train_memory(settings, *files, Context(domain.progress))

    @cached_property
    def base(self) -> Base:
        return self.domain.system(Base)

    def tuned(self, scores: dict[str, np.ndarray]) -> float:
        """Return the weight with the lowest perplexity on validation text."""
        return best_alpha(self.base.logprobs("validation"), scores["validation"])

    @cached_property
    def alpha(self) -> float:
        return self.tuned(self.scores)

    def served(self, scores: dict[str, np.ndarray], text: str) -> np.ndarray:
        return mix(self.base.logprobs(text), scores[text], self.tuned(scores))

    def curve(self, text: str) -> list[float]:
        """Return the perplexity of a text for each of ALPHAS."""
        return [perplexity(mix(self.base.logprobs(text), self.scores[text], a)) for a in ALPHAS]

    def fit(self) -> dict[str, float]:
        return super().fit() | {"alpha": self.alpha}

    def next_token(self, prompt: list[int], line: list[int]) -> torch.Tensor:
        own = self.reader.p(line, len(line) - len(prompt))
        return self.alpha * own + (1 - self.alpha) * self.base.next_token(prompt, line)


class TokenMemory(Memory):
    """Base + a memory that was trained on the tokens alone, without kNN targets."""

    name, title = "ce_only", "base + memory, CE only"
    beta = 0.0

    @cached_property
    def cost(self) -> tuple[float, float]:
        return 0, memory_cost(self.domain)[1]
