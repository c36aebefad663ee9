"""One domain of the comparison: its text by part, its kNN targets, and what models make of it.

Each part is an artifact under the domain's folder in build/quality: what is there is kept.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import AutoTokenizer

from benchmarks.corpora import domains
from benchmarks.corpora.download import BUILD
from benchmarks.corpora.jsonl import write_jsonl
from benchmarks.quality.pair import Pair
from vllm_memdec.train.data.artifacts import Artifact, build_artifact, write_json
from vllm_memdec.train.data.blocks import bos_of, pack, tokenise
from vllm_memdec.train.data.documents import documents
from vllm_memdec.train.data.inputs import model_hash
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model.devices import products
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.model.scoring import label_logprobs
from vllm_memdec.train.pipeline import build
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import Settings

SETTINGS = Path(__file__).resolve().with_name("quality.yaml")
WORK = BUILD / "quality"
ASKED = 60_000  # tokens of general text, of each kind, for gating.py's questions
TEXTS = ("validation", "test", *domains.GENERAL)
S = TypeVar("S")


def made_in(dtype: str = "bfloat16") -> dict[str, str]:
    """Return what a manifest says of the dtype of products, where it is not what was asked for."""
    real = products(dtype)
    return {} if real == dtype else {"products": real}


@dataclass(frozen=True)
class Sizes:
    """How much of everything a domain takes: tokens of each text, and facts."""

    train: int = 60_000
    validation: int = 6_000
    test: int = 8_000
    general: int = 3_000
    gate: int = 40_000  # tokens of general text that the gate is trained on, of each kind
    learnt: int = 12_000  # tokens of the domain's training text that the gate is trained on
    general_train: int = 0  # tokens of general text that is trained on too, of each kind
    facts: int = 150
    interval: int = 64  # tokens between retrievals
    trial: float = 0.1  # share of a training that tries a learning rate; more if it is few steps
    epochs: float | None = None  # epochs of the memory; None: the settings file's
    level: str = "full"  # part of the folder of what is made with these sizes


SIZES = {
    domains.CONTROL: Sizes(train=20_000),  # the control teaches nothing
    "finance": Sizes(
        train=400_000, epochs=2
    ),  # nearly all the text there is; finance-60k takes little of it
}
QUICK = Sizes(3_000, 600, 600, 400, 1_500, 1_000, 0, 8, 64, 0.5, 0.5, "quick")
FEWER = {"validation": 2_000, "test": 4_000, "general": 1_500, "gate": 8_000, "learnt": 4_000}


def sizes_of(name: str, train_tokens: int | None = None) -> Sizes:
    """Return the sizes of a domain; with fewer tokens to train on, the rest in proportion."""
    sizes = SIZES.get(name, Sizes())
    if train_tokens is None:
        return sizes
    share = train_tokens / Sizes().train
    rest = {n: max(least, round(share * getattr(sizes, n))) for n, least in FEWER.items()}
    level = f"{train_tokens}-tokens"
    return replace(sizes, train=train_tokens, facts=100, level=level, epochs=None, **rest)


def general_texts(tokenizer: Any, sizes: Sizes, use: str) -> list[list[str]]:
    """Return general texts of each kind for one use; none has two, and none is scored."""
    wanted = {"scored": sizes.general, "gate": sizes.gate, "asked": ASKED}
    wanted["trained on"] = sizes.general_train
    kinds = domains.GENERAL.values()
    return [domains.split(read(), tokenizer, wanted)[0][use] for read in kinds]


@dataclass
class Domain:
    """A domain, the models that systems start from, and the systems themselves, each made once."""

    name: str
    pair: Pair
    sizes: Sizes
    settings: Settings
    progress: Progress
    systems: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def system(self, kind: Callable[["Domain"], S]) -> S:
        """Return the system of a class over this domain."""
        if kind not in self.systems:
            self.systems[kind] = kind(self)
        return self.systems[kind]

    def __post_init__(self) -> None:
        self.settings = self.pair.settings(self.settings)

    @property
    def base(self) -> str:
        return self.pair.base

    @cached_property
    def folder(self) -> Path:
        name = self.name + "-and-general" * bool(self.sizes.general_train)
        return self.pair.place(WORK) / self.sizes.level / name

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.base)

    @cached_property
    def base_hash(self) -> str:
        return model_hash(self.base, "the base")

    def artifact(
        self,
        name: str,
        settings: dict,
        inputs: dict[str, str],
        make: Callable[[Path], None],
        files: Callable[[Path], Iterable[str]] = lambda work: (),
    ) -> Artifact:
        """Return one of the folder's artifacts, made if it is not there; files: see there."""
        folder = self.folder / name
        return build_artifact(folder, name, settings, inputs, make, self.progress.say, files)

    @staticmethod
    def load(artifact: Artifact) -> dict[str, np.ndarray]:
        """Return the arrays of an artifact by name."""
        return {path.stem: np.load(path) for path in artifact.path.glob("*.npy")}

    @cached_property
    def text(self) -> Artifact:
        """The domain's documents by part, and the general texts."""
        sizes = self.sizes
        tokens = {"train": sizes.train, "validation": sizes.validation, "test": sizes.test}

        def make(work: Path) -> None:
            parts, duplicates = domains.split(domains.DOMAINS[self.name](), self.tokenizer, tokens)
            for name, read in domains.GENERAL.items():
                parts |= domains.split(read(), self.tokenizer, {name: sizes.general})[0]
            parts["train"] += sum(general_texts(self.tokenizer, sizes, "trained on"), [])
            for name, texts in parts.items():
                write_jsonl(work / f"{name}.jsonl", texts)
            write_json(work / "counts.json", {"duplicates": duplicates})

        settings = tokens | {"general": sizes.general}
        if sizes.general_train:
            settings["general_train"] = sizes.general_train
        return self.artifact("text", settings, {}, make)

    def documents(self, part: str) -> list[str]:
        return list(documents(self.text.path / f"{part}.jsonl"))

    def blocks(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and positions [B, T+1] of a text."""
        return self.packed(tokenise(self.tokenizer, self.documents(part)))

    def packed(self, ids: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
        ends = self.tokenizer.eos_token_id, bos_of(self.tokenizer)
        return pack(ids, self.settings.corpus.block_tokens, *ends)

    @cached_property
    def targets(self) -> Artifact:
        """The kNN targets; corpus, datastore and index lie beside them."""
        text = self.text.path
        return build(
            self.pair.key_model,
            text / "train.jsonl",
            self.folder / "build",
            self.settings,
            text / "validation.jsonl",
            Context(self.progress),
            until="targets",
        )

    @property
    def corpus(self) -> Path:
        return self.targets.path.with_name("corpus")

    @cached_property
    def corpus_tokens(self) -> int:
        return json.loads((self.corpus / "corpus.json").read_text())["train"]["tokens"]

    def scores(
        self, name: str, folder: str, texts: tuple[str, ...] = TEXTS, dtype: str = "bfloat16"
    ) -> dict[str, np.ndarray]:
        """Return the log-probabilities of the true tokens of some texts, from a model folder."""

        def make(work: Path) -> None:
            model = load_model(folder, dtype)
            for text in texts:
                logprobs_N = label_logprobs(model, *self.blocks(text), 4, self.progress, text)
                np.save(work / f"{text}.npy", logprobs_N)

        inputs = {"text": self.text.hash, "model": model_hash(folder, name)}
        how = {"texts": list(texts)} | ({} if dtype == "bfloat16" else {"dtype": dtype})
        how |= made_in(dtype)
        return self.load(self.artifact(f"scores-{name}", how, inputs, make))
