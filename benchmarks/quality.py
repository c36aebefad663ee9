"""What a domain's text teaches memory, kNN-LM, RAG, DAPT and LoRA, and what they forget for it.

    python benchmarks/quality.py      # two CPU cores: about seven hours; what is there is kept

For each domain (see domains.py) every system gets the same text. What is trained gets the same
training FLOPs: the memory's, its pass of the base over the corpus included. Learning rates, alpha,
lambda, the retriever's k and kNN-LM's temperature are tuned on validation text. Then, on text that
none has seen and that is no near-duplicate of what they have: perplexity on the domain, and on
general text (what was forgotten); and the share of the corpus's facts that each can say by heart.

Rows go to results/quality.csv, the curves over alpha to build/quality/alpha.png, and
`python benchmarks/tables.py --readme` puts the table into the README.
"""

import argparse
import csv
import json
import random
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import data
import domains
import numpy as np
import rag
import torch
from common import RESULTS, provenance
from knn_lm import find_neighbours, tune
from lora import adapted, train_lora
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_memdec.gate import Gate, features, read_gate, write_gate
from vllm_memdec.train import gate as gates
from vllm_memdec.train.artifacts import Artifact, build_artifact, write_json
from vllm_memdec.train.cluster import Here
from vllm_memdec.train.config import Settings, load_settings
from vllm_memdec.train.corpus import load_config, load_used, pack, tokenise, valid_rows
from vllm_memdec.train.datastore import embed, load_model
from vllm_memdec.train.decoder import truncated_config
from vllm_memdec.train.evaluate import ALPHAS, best_alpha, label_logprobs, mix, perplexity
from vllm_memdec.train.head import head
from vllm_memdec.train.index import Index
from vllm_memdec.train.pipeline import MEMORY_BUDGET, build, model_hash
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.targets import neighbour_weights
from vllm_memdec.train.text import documents
from vllm_memdec.train.trainer import train_memory
from vllm_memdec.train.windows import Windows, window_logprobs, windows

HERE = Path(__file__).resolve().parent
WORK = data.BUILD / "quality"
TABLE = RESULTS / "quality.csv"
PASSAGE = 128  # tokens
CHOOSING_BLOCKS = 8  # of validation text on which it is
WINDOW = 512  # tokens of the longest contexts that a gate is trained on
LORA_RANK = 64
ASKED = 60_000  # tokens of general text, of each kind, for gating.py's questions
VALUE_LONGEST = 60  # characters of a fact that is asked for


@dataclass(frozen=True)
class Sizes:
    """How much of everything: tokens of text, facts, the share of a training that tries a rate."""

    train: int = 60_000
    validation: int = 6_000
    test: int = 8_000
    general: int = 3_000
    gate: int = 40_000  # general text the gate is trained on, of each kind
    learnt: int = 12_000  # and of the domain's training text
    general_train: int = 0  # general text that is trained on too, of each kind
    facts: int = 150
    interval: int = 64  # tokens between retrievals
    trial: float = 0.1
    epochs: float | None = None  # of the memory; None: the settings file's


SIZES = {
    domains.CONTROL: Sizes(train=20_000),  # nothing is to be learned from it
    "finance": Sizes(train=400_000, epochs=2),  # nearly all there is; finance-60k has little
}
QUICK = Sizes(3_000, 600, 600, 400, 1_500, 1_000, 0, 8, 64, 0.5, 0.5)


@dataclass(frozen=True)
class Trained:
    """A system that is trained: from what, on what, and the learning rates that are tried."""

    title: str
    rates: tuple[float, ...]
    beta: float = 0.0
    mixed: bool = False  # with the base, by a weight that is tuned


TRAINED = {
    "memory": Trained("base + memory", (1e-3, 3e-3), beta=0.5, mixed=True),
    "ce_only": Trained("base + memory, CE only", (1e-3, 3e-3), mixed=True),
    "dapt": Trained("DAPT", (1e-4, 3e-4)),
    "lora": Trained("LoRA", (1e-3, 3e-3)),
}


@dataclass(frozen=True)
class Retrieval:
    """A system that reads passages: how they are ranked, and the numbers of them that are tried."""

    title: str
    passages: tuple[int, ...] = (2, 4)
    dense: bool = False


RETRIEVALS = {
    "rag_bm25": Retrieval("RAG (BM25)"),
    "rag_minilm": Retrieval("RAG (MiniLM)", dense=True),
    "rag_bm25_16": Retrieval("RAG (BM25), 16 passages", (16,)),  # whatever it costs
}
GATED = "base + memory, gate"
TITLES = {
    "base": "base",
    "memory": TRAINED["memory"].title,
    "gated": GATED,
    "ce_only": TRAINED["ce_only"].title,
    "knn_lm": "kNN-LM",
    **{system: retrieval.title for system, retrieval in RETRIEVALS.items()},
    "dapt": TRAINED["dapt"].title,
    "lora": TRAINED["lora"].title,
}
TEXTS = ("validation", "test", *domains.GENERAL)


def parameters(config: Any) -> tuple[int, int]:
    """Return how many weights a token passes: those of the layers, and those of the head."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding = model.get_input_embeddings().weight.numel()
    layers = sum(p.numel() for p in model.base_model.parameters()) - embedding
    return layers, model.get_output_embeddings().weight.numel()


def general_texts(tokenizer: Any, sizes: Sizes, use: str) -> list[list[str]]:
    """Return general texts of each kind for one use; none has two, and none is scored."""
    wanted = {"scored": sizes.general, "gate": sizes.gate, "asked": ASKED}
    wanted["trained on"] = sizes.general_train
    kinds = domains.GENERAL.values()
    return [domains.split(read(), tokenizer, wanted)[0][use] for read in kinds]


@dataclass
class Domain:
    """All that is measured of one domain, each part an artifact under its folder."""

    name: str
    base: str
    sizes: Sizes
    settings: Settings
    progress: Progress

    @cached_property
    def folder(self) -> Path:
        name = self.name + "-and-general" * bool(self.sizes.general_train)
        return WORK / ("quick" if self.sizes == QUICK else "full") / name

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.base)

    def artifact(
        self, name: str, settings: dict, inputs: dict[str, str], make: Callable[[Path], None]
    ) -> Artifact:
        """Return one of the folder's artifacts, made if it is not there."""
        return build_artifact(self.folder / name, name, settings, inputs, make, self.progress.say)

    # -- Text -------------------------------------------------------------------------------------

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
                (work / f"{name}.jsonl").write_text(domains.as_jsonl(texts))
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

    def packed(self, ids: Iterable[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        return pack(ids, self.settings.corpus.block_tokens, self.tokenizer.eos_token_id)

    def windows(self, ids: list[np.ndarray]) -> Windows:
        """Return a text of gates in short and in long contexts."""
        return windows(ids, WINDOW, self.tokenizer.eos_token_id, gates.MOST_TOKENS)

    def gate_ids(self, kind: str) -> list[list[int]]:
        """Return the text of a kind that a gate is trained on, none of which is scored.

        Of the domain what alpha is tuned on too; of the corpus a part.
        """
        if kind == "in turn":
            both = (self.gate_ids(kind) for kind in ("domain", "general"))
            return gates.in_turn(*(gates.passages(ids, *gates.PASSAGE) for ids in both))
        return list(tokenise(self.tokenizer, self.gate_text(kind)))

    def gate_text(self, kind: str) -> list[str]:
        """Return the same as texts, of kinds that are made of texts."""
        if kind == "domain":
            return self.documents("validation")
        if kind == "corpus":
            wanted = {"corpus": self.sizes.learnt}
            return domains.split(self.documents("train"), self.tokenizer, wanted)[0]["corpus"]
        return sum(general_texts(self.tokenizer, self.sizes, "gate"), [])

    def general(self, name: str, folder: str) -> Artifact:
        """General text for gates, read by a base: the same for all domains."""

        def make(work: Path) -> None:
            text = self.windows(self.gate_ids("general"))
            model = load_model(folder, "bfloat16")
            found = window_logprobs(model, text, self.progress, f"the {name}, general")
            np.savez(work / "base.npz", text.tokens, text.positions, text.scored, found)

        return build_artifact(
            self.folder.parent / ("general" if name == "base" else f"general-{name}"),
            "general",
            {"tokens": self.sizes.gate, "scored": self.sizes.general, "window": WINDOW},
            {"base": model_hash(folder, f"the {name}")},
            make,
            self.progress.say,
        )

    def read_for_gate(self, models: dict[str, Any], name: str, folder: str) -> dict[str, Any]:
        """Return what the memory and a base, both in models, give to each kind of a gate's text."""

        def read(text: Windows, base_N: np.ndarray, kind: str) -> gates.Scored:
            memory, progress = models["memory"], self.progress
            return gates.read_windows(base_N, memory, self.tokenizer, text, kind, progress)

        with np.load(self.general(name, folder).path / "base.npz") as file:
            *text, base_N = file.values()
        parts = {"general": read(Windows(*text), base_N, "general")}
        for kind in ("domain", "corpus", "in turn"):
            text = self.windows(self.gate_ids(kind))
            said = f"the {name}, {kind}"
            parts[kind] = read(text, window_logprobs(models[name], text, self.progress, said), kind)
        return parts

    # -- Training ---------------------------------------------------------------------------------

    @cached_property
    def targets(self) -> Artifact:
        """The kNN targets; corpus, datastore and index lie beside them."""
        text = self.text.path
        return build(
            self.base,
            text / "train.jsonl",
            self.folder / "build",
            self.settings,
            text / "validation.jsonl",
            self.progress,
            until="targets",
        )

    @property
    def corpus(self) -> Path:
        return self.targets.path.with_name("corpus")

    @cached_property
    def corpus_tokens(self) -> int:
        return json.loads((self.corpus / "corpus.json").read_text())["train"]["tokens"]

    @cached_property
    def costs(self) -> dict[str, tuple[float, float]]:
        """FLOPs of each training: before it begins, and a token.

        Two a weight and token forward, four backward; of a frozen weight two. Attention, the search
        and the optimiser are not counted.
        """
        config = load_config(self.base)
        layers, output = parameters(config)
        small, _ = parameters(truncated_config(self.base, self.settings.memory.layers))
        used = len(load_used(self.corpus, "train"))
        sampled = self.settings.memory.sampled_negatives or config.vocab_size
        columns = min(config.vocab_size, used + sampled) * config.hidden_size
        adapters = sum(
            p.numel() for p in adapted(self.base, LORA_RANK).parameters() if p.requires_grad
        )
        memory = 6 * (small + columns)
        return {
            "memory": (2 * layers * self.corpus_tokens, memory),
            "ce_only": (0, memory),
            "dapt": (0, 6 * (layers + output)),
            "lora": (0, 4 * (layers + output) + 6 * adapters),
        }

    @cached_property
    def budget(self) -> float:
        """FLOPs that each training may take."""
        before, token = self.costs["memory"]
        epochs = self.sizes.epochs or self.settings.memory.epochs
        return before + token * epochs * self.corpus_tokens

    def train(self, system: str, rate: float, share: float = 1.0) -> Artifact:
        """Return a trained model; share: of the FLOPs that a training may take."""
        before, token = self.costs[system]
        epochs = share * (self.budget - before) / token / self.corpus_tokens
        settings = self.settings.memory.changed(
            beta=TRAINED[system].beta,
            learning_rate=rate,
            epochs=round(epochs, 4),
        )
        if system in ("dapt", "lora"):
            settings = settings.changed(init=self.base, layers=None, sampled_negatives=None)

        def make(work: Path) -> None:
            files = (self.base, self.corpus, self.targets.path, work, self.progress)
            if system == "lora":
                train_lora(settings, LORA_RANK, *files)
            else:
                train_memory(settings, *files, Here())

        chosen = settings.model_dump() | {"system": system, "init": Path(settings.init).name}
        if system == "lora":
            chosen["rank"] = LORA_RANK
        inputs = {"targets": self.targets.hash, "base": self.base_hash}
        return self.artifact(f"{system}-{rate:g}-{share:g}", chosen, inputs, make)

    def best_rate(self, system: str) -> float:
        """Return the learning rate with the lowest perplexity on validation text in short runs."""
        found = {}
        for rate in TRAINED[system].rates:
            short = self.train(system, rate, self.sizes.trial)
            scores = self.scores(f"{system}-{rate:g}-trial", str(short.path), ("validation",))
            found[rate] = self.result(system, scores, "validation")[0]
            self.progress.say(f"{system}: learning rate {rate:g}: perplexity {found[rate]:.3f}")
        return min(found, key=found.get)

    # -- Scores -----------------------------------------------------------------------------------

    @cached_property
    def base_hash(self) -> str:
        return model_hash(self.base, "the base")

    def scores(
        self, name: str, folder: str, texts: tuple[str, ...] = TEXTS
    ) -> dict[str, np.ndarray]:
        """Return the log-probabilities of the true tokens of some texts, from a model folder."""

        def make(work: Path) -> None:
            model = load_model(folder, "bfloat16")
            for text in texts:
                found = label_logprobs(model, *self.blocks(text), 4, self.progress, text)
                np.save(work / f"{text}.npy", found)

        inputs = {"text": self.text.hash, "model": model_hash(folder, name)}
        return self.load(self.artifact(f"scores-{name}", {"texts": list(texts)}, inputs, make))

    @staticmethod
    def load(artifact: Artifact) -> dict[str, np.ndarray]:
        return {path.stem: np.load(path) for path in artifact.path.glob("*.npy")}

    @cached_property
    def base_scores(self) -> dict[str, np.ndarray]:
        return self.scores("base", self.base)

    def result(
        self, system: str, scores: dict[str, np.ndarray], text: str
    ) -> tuple[float, float | None]:
        """Return a trained system's perplexity and its weight, tuned on validation text."""
        if not TRAINED[system].mixed:
            return perplexity(scores[text]), None
        base = self.base_scores
        alpha = best_alpha(base["validation"], scores["validation"])
        return perplexity(mix(base[text], scores[text], alpha)), alpha

    def knn_scores(self) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Return log p_kNN of every text's true tokens, and kNN-LM's weight and temperature."""

        def make(work: Path) -> None:
            model = load_model(self.base, "bfloat16")
            near = {
                text: find_neighbours(
                    self.targets.path.parent, model, self.settings, *self.blocks(text)
                )
                for text in TEXTS
            }
            made_with = json.loads((self.targets.path / "targets.json").read_text())["temperature"]
            weight, temperature = tune(
                self.base_scores["validation"], near["validation"], made_with
            )
            for text, neighbours in near.items():
                np.save(work / f"{text}.npy", neighbours.logprobs(temperature))
            write_json(work / "tuned.json", {"lambda": weight, "temperature": temperature})

        inputs = {"text": self.text.hash, "targets": self.targets.hash, "base": self.base_hash}
        artifact = self.artifact("scores-knn_lm", {}, inputs, make)
        return self.load(artifact), json.loads((artifact.path / "tuned.json").read_text())

    def gate(self, memory: str) -> Artifact:
        """Return a memory's gate, and its weights [rows] of every text."""

        def make(work: Path) -> None:
            models = {
                name: load_model(folder, "bfloat16")
                for name, folder in (("base", self.base), ("memory", memory))
            }
            arrays = gates.fit_gate(self.read_for_gate(models, "base", self.base))
            write_gate(work, arrays, "gate.npz")
            for text in TEXTS[1:]:
                tokens, positions = self.blocks(text)
                scored = gates.read_windows(
                    self.base_scores[text],
                    models["memory"],
                    self.tokenizer,
                    Windows(tokens, positions, valid_rows(positions)),
                    text,
                    self.progress,
                )
                np.save(work / f"{text}.npy", gates.weights(arrays, scored))

        inputs = {"text": self.text.hash, "memory": model_hash(memory, "the memory")}
        inputs |= {"base": self.base_hash, "general": self.general("base", self.base).hash}
        settings = {"learnt": self.sizes.learnt, "gate": gates.SETTINGS, "window": WINDOW}
        return self.artifact("gate", settings, inputs, make)

    def retriever(self, system: str, passages: list[str]) -> Any:
        dense = RETRIEVALS[system].dense
        return rag.Dense(passages, data.minilm()) if dense else rag.BM25(passages)

    def rag(self, system: str, k: int) -> rag.Rag:
        """Return a retriever of the corpus with its reader."""
        passages = rag.passages(self.documents("train"), self.tokenizer, PASSAGE)
        return rag.Rag(self.retriever(system, passages), passages, self.tokenizer, k)

    def rag_scores(self, system: str) -> tuple[dict[str, np.ndarray], int]:
        """Return the log-probabilities of every text's true tokens, and the number of passages."""
        choices = RETRIEVALS[system].passages

        def make(work: Path) -> None:
            model = load_model(self.base, "bfloat16")
            reader = self.rag(system, 1)

            def score(k: int, text: str, most: int | None = None) -> np.ndarray:
                reader.k = k
                blocks = (array[:most] for array in self.blocks(text))
                return rag.label_logprobs(
                    model, reader, *blocks, self.sizes.interval, self.progress
                )

            def tried(k: int) -> float:
                return perplexity(score(k, "validation", CHOOSING_BLOCKS))

            k = min(choices, key=tried) if len(choices) > 1 else choices[0]
            for text in TEXTS[1:]:
                np.save(work / f"{text}.npy", score(k, text))
            write_json(work / "tuned.json", {"passages": k})

        settings = {"interval": self.sizes.interval, "passages": list(choices), "tokens": PASSAGE}
        inputs = {"text": self.text.hash, "base": self.base_hash}
        artifact = self.artifact(f"scores-{system}", settings, inputs, make)
        tuned = json.loads((artifact.path / "tuned.json").read_text())
        return self.load(artifact), tuned["passages"]

    # -- Facts ------------------------------------------------------------------------------------

    def facts(self) -> list[data.Fact]:
        """Return facts that the corpus has, drawn at random."""
        if self.name not in domains.FACTS:
            return []
        known = {line for text in self.documents("train") for line in text.splitlines()}
        found = [
            fact
            for fact in domains.facts(domains.FACTS[self.name])
            if len(fact.value) <= VALUE_LONGEST and fact.line in known
        ]
        return random.Random(0).sample(found, min(self.sizes.facts, len(found)))

    def recall(
        self, folders: dict[str, str], tuned: dict[str, dict[str, float]], gate: Artifact
    ) -> dict:
        """Return the share of facts that each greedy answer gets right, to the line's end."""
        facts = self.facts()
        if not facts:
            return {}

        def make(work: Path) -> None:
            said = list(self.say(facts, folders, tuned, gate))
            names = said[0].keys()
            shares = {name: statistics.mean(row[name] for row in said) for name in names}
            write_json(work / "recall.json", shares | {"facts": len(facts)})

        models = {name: model_hash(folder, name) for name, folder in folders.items()}
        settings = {"facts": len(facts), "tuned": tuned}
        inputs = models | {"text": self.text.hash, "gate": gate.hash}
        artifact = self.artifact("recall", settings, inputs, make)
        return json.loads((artifact.path / "recall.json").read_text())

    @torch.inference_mode()
    def say(
        self,
        facts: list[data.Fact],
        folders: dict[str, str],
        tuned: dict[str, dict[str, float]],
        gate: Artifact,
    ) -> Iterator[dict[str, bool]]:
        """Yield for each fact who says it: every token of value and line end is the likeliest."""
        models = {name: load_model(folder, "bfloat16") for name, folder in folders.items()}
        base, weigh = models["base"], Gate(read_gate(gate.path / "gate.npz"))
        index = Index(
            self.targets.path.with_name("index"), self.settings.index.probes, MEMORY_BUDGET
        )
        readers = {name: self.rag(name, int(tuned[name]["passages"])) for name in RETRIEVALS}
        with self.progress.task("asking for facts", len(facts), "facts") as advance:
            for fact in facts:
                prompt, whole = (
                    self.tokenizer(text)["input_ids"] for text in (fact.prompt, f"{fact.line}\n")
                )
                n = len(whole) - len(prompt)
                wanted = torch.tensor(whole[-n:])

                def hidden(model: Any, ids: list[int], n: int = n) -> torch.Tensor:
                    ids_1T = torch.tensor([ids[:-1]])
                    return model.base_model(input_ids=ids_1T).last_hidden_state[0, -n:]

                def p(model: Any, ids: list[int]) -> torch.Tensor:
                    return head(model, hidden(model, ids)).float().softmax(-1)

                found = {name: p(model, whole) for name, model in models.items()}
                position_n = torch.arange(len(whole) - 1 - n, len(whole) - 1)
                h_nD = hidden(models["memory"], whole)
                sure_nF = features(h_nD, found["memory"].log(), position_n)
                alpha_n1 = weigh(sure_nF)[:, None]
                found["gated"] = alpha_n1 * found["memory"] + (1 - alpha_n1) * found["base"]
                for name in (n for n, trained in TRAINED.items() if trained.mixed):
                    alpha = tuned[name]["alpha"]
                    found[name] = alpha * found[name] + (1 - alpha) * found["base"]
                for name, reader in readers.items():
                    found[name] = p(base, [*reader.contexts([prompt])[0], *whole])
                keys = next(
                    embed(
                        base,
                        self.settings.datastore.key_layer,
                        np.array([whole]),
                        np.arange(len(whole))[None],
                        1,
                    )
                )[0][-n:]
                near = index.search(keys, min(self.settings.targets.neighbours, len(index.labels)))
                weights = torch.from_numpy(neighbour_weights(*near, tuned["knn_lm"]["temperature"]))
                labels = torch.from_numpy(index.labels[near[1]].astype(np.int64))
                weight = tuned["knn_lm"]["lambda"]
                found["knn_lm"] = (found["base"] * (1 - weight)).scatter_add(
                    1, labels, weights * weight
                )
                yield {name: bool((row.argmax(-1) == wanted).all()) for name, row in found.items()}
                advance(1)

    # -- Everything -------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each system."""
        tuned: dict[str, dict[str, float]] = {}
        found: dict[str, dict[str, float]] = {
            "base": {text: perplexity(scores) for text, scores in self.base_scores.items()}
        }
        folders = {"base": self.base}
        base = self.base_scores
        scores, tuned["knn_lm"] = self.knn_scores()
        found["knn_lm"] = {
            text: perplexity(mix(base[text], scores[text], tuned["knn_lm"]["lambda"]))
            for text in TEXTS
        }
        for system in RETRIEVALS:
            scores, passages = self.rag_scores(system)
            tuned[system] = {"passages": passages}
            found[system] = {text: perplexity(scores[text]) for text in TEXTS[1:]}
        self.curves = {}
        for system, trained in TRAINED.items():
            rate = self.best_rate(system)
            model = self.train(system, rate)
            folders[system] = str(model.path)
            scores = self.scores(system, folders[system])
            results = {text: self.result(system, scores, text) for text in TEXTS}
            found[system] = {text: result[0] for text, result in results.items()}
            tuned[system] = {"learning_rate": rate}
            if trained.mixed:
                tuned[system]["alpha"] = results["test"][1]
                self.curves[system] = {
                    text: [perplexity(mix(base[text], scores[text], a)) for a in ALPHAS]
                    for text in TEXTS
                }
            if system == "memory":
                gate = self.gate(folders[system])
                alpha = self.load(gate)
                found["gated"] = {
                    text: perplexity(mix(base[text], scores[text], alpha[text]))
                    for text in TEXTS[1:]
                }
            self.progress.say(f"{self.name}, {system}: {found[system]['test']:.2f}")
        recall = self.recall(folders, tuned, gate)
        counts = json.loads((self.text.path / "counts.json").read_text())
        return [
            {
                "domain": self.name,
                "system": TITLES[system],
                "perplexity": round(found[system]["test"], 3),
                "change": round(found[system]["test"] / found["base"]["test"] - 1, 4),
                **{text: round(found[system][text], 3) for text in domains.GENERAL},
                "recall": round(recall[system], 4) if recall else "",
                "facts": recall.get("facts", ""),
                **{
                    name: tuned.get(system, {}).get(name, "")
                    for name in ("alpha", "lambda", "temperature", "passages", "learning_rate")
                },
                "train_tokens": self.corpus_tokens,
                "test_tokens": len(base["test"]),
                "duplicates": counts["duplicates"],
                "tflop": round(self.budget / 1e12, 1) if system in TRAINED else "",
            }
            for system in TITLES
        ]


def draw(domains_: list[Domain], path: Path) -> None:
    """Draw perplexity over alpha, relative to the base's: domain and general text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(domains_), figsize=(3.6 * len(domains_), 3.6), layout="constrained", squeeze=False
    )
    for axis, domain in zip(axes[0], domains_, strict=True):
        for system, style in (("memory", "-"), ("ce_only", ":")):
            for text, colour in (("test", "C0"), ("wiki", "C1"), ("brown", "C2")):
                base = perplexity(domain.base_scores[text])
                label = f"{'domain' if text == 'test' else text}{', CE only' * (style == ':')}"
                axis.plot(
                    ALPHAS[:96],
                    [value / base for value in domain.curves[system][text][:96]],
                    style,
                    color=colour,
                    label=label,
                )
        axis.axhline(1, color="grey", lw=0.8)
        axis.set(title=domain.name, xlabel="alpha", ylim=(0.2, 2.5))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("perplexity / base's")
    axes[0, -1].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the rows, in place of older ones of their domains."""
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = list(csv.DictReader(file))
    new = {row["domain"] for row in rows}
    merged = [row for row in kept if row["domain"] not in new] + rows
    names = list(domains.DOMAINS)
    merged.sort(key=lambda row: names.index(row["domain"]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domains", nargs="+", default=list(domains.DOMAINS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a fraction, to see that it works")
    options = parser.parse_args()
    if wrong := set(options.domains) - set(domains.DOMAINS):
        parser.error(f"no such domain: {', '.join(wrong)}; known: {', '.join(domains.DOMAINS)}.")
    base = str(data.smollm2())
    settings = load_settings(HERE / "quality.yaml")
    progress = Progress()
    measured, rows = [], []
    where = provenance("torch", "transformers")
    for name in options.domains:
        sizes = QUICK if options.quick else SIZES.get(name, Sizes())
        domain = Domain(name, base, sizes, settings, progress)
        found = [row | where for row in domain.rows()]
        measured.append(domain)
        rows += found
        for row in found:
            print(
                f"{row['domain']:<12} {row['system']:<24} {row['perplexity']:>8.2f} "
                f"{row['change']:>+7.1%}  wiki {row['wiki']:>6.2f}  brown {row['brown']:>6.2f}  "
                f"recall {row['recall']}"
            )
        write_table(rows, WORK / "quick.csv" if options.quick else TABLE)
    draw(measured, WORK / "alpha.png")
    print(json.dumps({"rows": len(rows), "csv": str(TABLE)}))


if __name__ == "__main__":
    main()
