"""Base + memory with a weight for each token: the memory's gate, and the text it is made of."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.corpora import domains
from benchmarks.quality.domain import TEXTS, Domain, general_texts, made_in
from benchmarks.systems.base import Base
from benchmarks.systems.memory import Memory
from benchmarks.systems.system import System
from vllm_memdec.gate import Gate, features, read_gate, write_gate
from vllm_memdec.train.data.artifacts import Artifact, build_artifact
from vllm_memdec.train.data.blocks import bos_of, tokenise, valid_rows
from vllm_memdec.train.data.inputs import model_hash
from vllm_memdec.train.evaluation import gate_texts
from vllm_memdec.train.evaluation import gate_training as gates
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.model.scoring import mix
from vllm_memdec.train.model.windows import Windows, window_logprobs, windows

WINDOW = 512  # tokens of the longest contexts that a gate is trained on


def gate_text(domain: Domain, kind: str) -> list[str]:
    """Return the texts of a kind that a gate is trained on, none of which is scored.

    Of the domain what alpha is tuned on too; of the corpus a part.
    """
    if kind == "domain":
        return domain.documents("validation")
    if kind == "corpus":
        wanted = {"corpus": domain.sizes.learnt}
        return domains.split(domain.documents("train"), domain.tokenizer, wanted)[0]["corpus"]
    return sum(general_texts(domain.tokenizer, domain.sizes, "gate"), [])


def gate_ids(domain: Domain, kind: str) -> list[Any]:
    """Return the same as tokens; also of the mixed stream, which is made of two kinds."""
    if kind == "in turn":
        both = (gate_ids(domain, kind) for kind in ("domain", "general"))
        return gate_texts.in_turn(*(gate_texts.passages(ids, *gate_texts.PASSAGE) for ids in both))
    return list(tokenise(domain.tokenizer, gate_text(domain, kind)))


def gate_windows(domain: Domain, ids: Iterable[Any]) -> Windows:
    """Return a text of gates in short and in long contexts."""
    ends = domain.tokenizer.eos_token_id, gates.MAX_TOKENS, bos_of(domain.tokenizer)
    return windows(ids, WINDOW, *ends)


def general(domain: Domain, name: str, folder: str) -> Artifact:
    """Return general text for gates, read by a base: the same for all domains."""

    def make(work: Path) -> None:
        text = gate_windows(domain, gate_ids(domain, "general"))
        model = load_model(folder, "bfloat16")
        base_N = window_logprobs(model, text, domain.progress, f"the {name}, general")
        np.savez(work / "base.npz", text.tokens, text.positions, text.scored, base_N)

    return build_artifact(
        domain.folder.parent / ("general" if name == "base" else f"general-{name}"),
        "general",
        {"tokens": domain.sizes.gate, "scored": domain.sizes.general, "window": WINDOW} | made_in(),
        {"base": model_hash(folder, f"the {name}")},
        make,
        domain.progress.say,
    )


def read_for_gate(
    domain: Domain, models: dict[str, Any], name: str, folder: str
) -> dict[str, gates.Scored]:
    """Return what the memory and a base, both in models, give to each kind of a gate's text."""

    def read(text: Windows, base_N: np.ndarray, kind: str) -> gates.Scored:
        memory, progress = models["memory"], domain.progress
        return gates.read_windows(base_N, memory, domain.tokenizer, text, kind, progress)

    with np.load(general(domain, name, folder).path / "base.npz") as file:
        *arrays, base_N = file.values()
    parts = {"general": read(Windows(*arrays), base_N, "general")}
    for kind in ("domain", "corpus", "in turn"):
        text = gate_windows(domain, gate_ids(domain, kind))
        base_N = window_logprobs(models[name], text, domain.progress, f"the {name}, {kind}")
        parts[kind] = read(text, base_N, kind)
    return parts


class Gated(System):
    """Base + memory, the weight by the memory's gate."""

    name, title = "gated", "base + memory, gate"

    @cached_property
    def memory(self) -> Memory:
        return self.domain.system(Memory)

    @cached_property
    def base(self) -> Base:
        return self.domain.system(Base)

    @cached_property
    def artifact(self) -> Artifact:
        """The memory's gate, and its weights [rows] of every text that is scored."""
        domain, memory, base = self.domain, self.memory.folder, self.base

        def make(work: Path) -> None:
            models = {
                name: load_model(folder, "bfloat16")
                for name, folder in (("base", domain.base), ("memory", memory))
            }
            arrays = gates.fit_gate(read_for_gate(domain, models, "base", domain.base))
            write_gate(work, arrays, "gate.npz")
            for text in TEXTS[1:]:
                tokens, positions = domain.blocks(text)
                scored = gates.read_windows(
                    base.logprobs(text),
                    models["memory"],
                    domain.tokenizer,
                    Windows(tokens, positions, valid_rows(positions)),
                    text,
                    domain.progress,
                )
                np.save(work / f"{text}.npy", gates.weights(arrays, scored))

        inputs = {"text": domain.text.hash, "memory": model_hash(memory, "the memory")}
        inputs |= {"base": domain.base_hash, "general": general(domain, "base", domain.base).hash}
        settings = {"learnt": domain.sizes.learnt, "gate": gates.SETTINGS, "window": WINDOW}
        settings |= made_in()
        return domain.artifact(domain.pair.budgeted("gate"), settings, inputs, make)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return read_gate(self.artifact.path / "gate.npz")

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        return self.domain.load(self.artifact)

    def fit(self) -> dict[str, float]:
        _ = self.artifact
        return {}

    def logprobs(self, text: str) -> np.ndarray:
        base_N = self.base.logprobs(text)
        return mix(base_N, self.memory.scores[text], self.weights[text])

    @cached_property
    def gate(self) -> Gate:
        return Gate(self.arrays)

    def next_token(self, prompt: list[int], line: list[int]) -> torch.Tensor:
        n, reader = len(line) - len(prompt), self.memory.reader
        position_n = torch.arange(len(line) - 1 - n, len(line) - 1)
        memory_nV = reader.p(line, n)
        sure_nF = features(reader.hidden(line, n), memory_nV.log(), position_n)
        alpha_n1 = self.gate(sure_nF)[:, None]
        base_nV = self.base.next_token(prompt, line)
        return alpha_n1 * memory_nV + (1 - alpha_n1) * base_nV

    def inputs(self) -> dict[str, str]:
        return {"gate": self.artifact.hash}
