"""The base alone: what all others are compared with, and what most of them mix with."""

from functools import cached_property
from typing import Any

import numpy as np
import torch

from benchmarks.systems.system import System
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.model.output_head import head


class LineReader:
    """A model that reads one line at a time and keeps what it found in the last one."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.line: tuple[list[int], int] | None = None  # with the number of its last tokens

    @cached_property
    def model(self) -> Any:
        return load_model(self.folder, "bfloat16")

    def hidden(self, line: list[int], count: int) -> torch.Tensor:
        """Return the hidden states [count, D] before the last tokens of a line."""
        return self._read(line, count)[0]

    def p(self, line: list[int], count: int) -> torch.Tensor:
        """Return the probabilities [count, V] of the last tokens of a line, in float32."""
        return self._read(line, count)[1]

    def _read(self, line: list[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.line != (line, count):
            ids_1T = torch.tensor([line[:-1]], device=self.model.device)
            h_nD = self.model.base_model(input_ids=ids_1T).last_hidden_state[0, -count:]
            self.read = h_nD.cpu(), head(self.model, h_nD).float().softmax(-1).cpu()
            self.line = line, count
        return self.read


class Base(System):
    """The base."""

    name, title = "base", "base"

    @property
    def folder(self) -> str:
        return self.domain.base

    @cached_property
    def reader(self) -> LineReader:
        return LineReader(self.folder)

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        return self.domain.scores(self.name, self.folder)

    def logprobs(self, text: str) -> np.ndarray:
        return self.scores[text]

    def next_token(self, prompt: list[int], line: list[int]) -> torch.Tensor:
        return self.reader.p(line, len(line) - len(prompt))

    def inputs(self) -> dict[str, str]:
        return {"base": self.domain.base_hash}
