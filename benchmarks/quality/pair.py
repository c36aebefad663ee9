"""The pairs of models that are compared: a base, and where its memory starts from.

smollm2: SmolLM2-135M-Instruct, the memory its first layers. smollm2-whole: the memory begins as the
whole of it, as large as the base. qwen2.5-coder: Qwen2.5-Coder 1.5B Instruct, the memory the
pretrained 0.5B of the same tokenizer, whole or its first layers; the keys of the datastore are
states of either.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.corpora.download import BUILD, made, qwen, smollm2
from vllm_memdec.train.model.decoder import first_layers
from vllm_memdec.train.model.huggingface import load_tokenizer
from vllm_memdec.train.settings import Settings

BUDGETS = ("today", "paper")
KEYS = ("base", "small")


@dataclass(frozen=True)
class Pair:
    """A base, and a smaller model of its tokenizer that the memory starts from."""

    name: str
    base: str  # a folder
    small: str | None = None  # a folder; None: the memory is cut out of the base
    layers: int | None = None  # first layers that are kept of small; None: all
    keys: str = "base"  # whose states are the datastore's keys, one of KEYS
    # The FLOPs of every training: today, those of memory.epochs; paper, those of one epoch of the
    # base over the corpus.
    budget: str = "today"
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # tried, by system

    def __post_init__(self) -> None:
        assert self.budget in BUDGETS and self.keys in KEYS
        if self.small is None and (self.layers or self.keys == "small"):
            raise ValueError(f"{self.name} has one model: leave --layers and --keys out.")

    @property
    def label(self) -> str:
        """Return its name in tables and folders, with what is not its usual."""
        layers = f", {self.layers} layers" if self.layers else ""
        keys = ", keys of the base" if self.small and self.keys == "base" else ""
        return f"{self.name}{layers}{keys}"

    @property
    def key_model(self) -> str:
        """Return the folder of the model whose states are the keys."""
        return self.small if self.small and self.keys == "small" else self.base

    def place(self, work: Path) -> Path:
        """Return the folder of what is made for the pair, whatever its budget."""
        return (
            work if self.small is None else work / self.label.replace(", ", "-").replace(" ", "-")
        )

    def budgeted(self, name: str) -> str:
        """Return the name of an artifact that depends on the budget."""
        return name if self.budget == "today" else f"{name}-{self.budget}"

    @cached_property
    def init(self) -> str:
        """Where the memory starts: `base`, or a folder, made once if it has fewer layers."""
        small = self.small
        if small is None or not self.layers:
            return small or "base"

        def cut(work: Path) -> None:
            first_layers(small, self.layers or 0).save_pretrained(work)
            load_tokenizer(small).save_pretrained(work)

        return str(made(BUILD / f"{Path(small).name}-{self.layers}-layers", cut))

    def settings(self, settings: Settings) -> Settings:
        """Return the settings of a build of this pair."""
        if self.small is None:
            return settings
        return settings.changed({"memory": {"init": self.init, "layers": None}})


# A pretrained model forgets at the rates that a cut one needs.
PRETRAINED_RATES = {
    "memory": (1e-4, 3e-4),
    "ce_only": (1e-4, 3e-4),
    "dapt": (3e-5, 1e-4),
    "lora": (3e-4, 1e-3),
}
WHOLE_RATES = {"memory": (3e-4, 1e-3), "ce_only": (3e-4, 1e-3)}
PAIRS = ("smollm2", "smollm2-whole", "qwen2.5-coder")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a pair."""
    parser.add_argument("--pair", choices=PAIRS, default=PAIRS[0])
    parser.add_argument(
        "--budget", choices=BUDGETS, default=BUDGETS[0],
        help="FLOPs of every training: memory.epochs (today), or one epoch of the base (paper)",
    )  # fmt: skip
    parser.add_argument(
        "--keys", choices=KEYS, help="whose states are the keys (default: the small one's)"
    )
    parser.add_argument("--layers", type=int, help="first layers of the small model, else all")


def chosen(options: argparse.Namespace) -> Pair:
    """Return the pair of the options, its models downloaded and converted."""
    if options.pair == "smollm2":
        pair = Pair("smollm2", str(smollm2()), budget=options.budget)
        return replace(pair, keys=options.keys or "base", layers=options.layers)
    if options.pair == "smollm2-whole":
        if options.keys:
            raise ValueError("smollm2-whole has one model: leave --keys out.")
        base = str(smollm2())
        pair = Pair(options.pair, base, base, keys="small", rates=WHOLE_RATES)
        return replace(pair, layers=options.layers, budget=options.budget)
    return Pair(
        options.pair,
        str(qwen("1.5B")),
        str(qwen("0.5B")),
        options.layers,
        options.keys or "small",
        options.budget,
        PRETRAINED_RATES,
    )


def columns(pair: Pair) -> dict[str, Any]:
    """Return what rows of tables say of the pair."""
    return {"pair": pair.label, "budget": pair.budget}
