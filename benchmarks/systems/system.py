"""What a compared system does. A new one is a file here and a line in registry.py."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch

from benchmarks.quality.domain import Domain


class System(ABC):
    """A way of answering in a domain, fitted on its training and validation text alone."""

    name: ClassVar[str]  # part of its artifacts' names
    title: ClassVar[str]  # name of its row in tables
    trained: ClassVar[bool] = (
        False  # whether it was trained on the FLOPs that every training may take
    )
    beside_base: ClassVar[bool] = True  # whether next_token() asks the base, too

    def __init__(self, domain: Domain) -> None:
        self.domain = domain

    def fit(self) -> dict[str, float]:
        """Train and tune; return what was chosen, by column of the table."""
        return {}

    @abstractmethod
    def logprobs(self, text: str) -> np.ndarray:
        """Return log p [rows] of the true tokens of one of SCORED's texts, as it is served."""

    @abstractmethod
    def next_token(self, prompt: list[int], line: list[int]) -> torch.Tensor:
        """Return p [n, V] of the n tokens by which a line is longer than its prompt."""

    def release(self) -> None:
        """Let go of the model that next_token() loaded."""
        vars(self).pop("reader", None)

    def inputs(self) -> dict[str, str]:
        """Return the hashes of what next_token() depends on beside the text and fit()."""
        return {}
