"""How base, mixture and gate do by the length of the context, on text that none of them has seen.

    make demo && python -m benchmarks.quality.context            # half an hour on two CPU cores
    python -m benchmarks.quality.context --no-demo --domains law   # trains the memory of law

A base gains more from a long context than a small memory does. So the best weight falls with the
context, and one that was tuned on short documents does harm in long requests. Here the demo's
memory, and those of domains of quality.py, read held-out text of the domain and general text in
contexts of up to 1,024 tokens: with one weight for all contexts, with the weights by context of
`memdec build`, and with the gate of `memdec calibrate`. Both are made of other documents than those
that are scored. What was read is kept. Writes results/context.csv; the last line is JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.common import RESULTS, provenance, replace_rows, rounded
from benchmarks.corpora import domains
from benchmarks.corpora.download import BUILD, smollm2
from benchmarks.corpora.jsonl import write_jsonl
from benchmarks.demo.texts import FULL
from benchmarks.quality.domain import SETTINGS, SIZES, Domain, Sizes, general_texts, made_in
from benchmarks.quality.pair import Pair
from benchmarks.systems.memory import Memory
from vllm_memdec.train.data.artifacts import build_artifact
from vllm_memdec.train.data.blocks import tokenise
from vllm_memdec.train.data.documents import documents, text_hash
from vllm_memdec.train.data.inputs import model_hash
from vllm_memdec.train.evaluation import gate_texts
from vllm_memdec.train.evaluation import gate_training as gates
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.model.scoring import mix
from vllm_memdec.train.model.windows import alpha_at, by_context
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import load_settings
from vllm_memdec.train.stages.export import tune

TABLE = RESULTS / "context.csv"
WORK = BUILD / "context"
WINDOW = 1024  # tokens of the longest requests
# Tokens that are read of each kind, in short and long contexts together.
MAX_TOKENS = {"domain": 24_000, "corpus": 12_000, "general": 20_000, "in turn": 16_000}
SYSTEMS = ("base", "memory", "fixed", "mixture", "gate")
NAMES = ["domain", "text", "from", "to", "tokens", *SYSTEMS, "best_alpha", "best"]


class Measured:
    """A memory beside the base: what both give to texts, kept on disk."""

    def __init__(self, name: str, base: Path, memory: Path, progress: Progress):
        self.name, self.progress = name, progress
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.inputs = {
            "base": model_hash(str(base), "the base"),
            "memory": model_hash(str(memory), "the memory"),
        }
        self.folders, self.loaded = (base, memory), None

    @property
    def models(self) -> tuple[Any, Any]:
        """The base and the memory, loaded where they are needed first."""
        if self.loaded is None:
            self.loaded = tuple(load_model(str(folder), "bfloat16") for folder in self.folders)
        return self.loaded

    def ids(self, files: list[Path]) -> list[np.ndarray]:
        return list(tokenise(self.tokenizer, (t for file in files for t in documents(file))))

    def read(self, kind: str, use: str, ids: list[np.ndarray], texts: list[Path]) -> gates.Scored:
        """Return what both models give to a text, in short and in long contexts."""

        def make(work: Path) -> None:
            max_tokens = MAX_TOKENS[kind]
            scored = gates.score(
                self.models,
                self.tokenizer,
                WINDOW,
                ids,
                max_tokens,
                f"{kind}, {use}",
                self.progress,
            )
            rows = scored.base_N, scored.memory_N, scored.features_NF, scored.position_N
            np.savez(work / "rows.npz", *rows)

        kept = build_artifact(
            WORK / self.name / f"{use}-{kind.replace(' ', '-')}",
            "context",
            {"window": WINDOW, "most": MAX_TOKENS[kind]} | made_in(),
            self.inputs | {file.name: text_hash(file) for file in texts},
            make,
            self.progress.say,
        )
        with np.load(kept.path / "rows.npz") as file:
            base_N, memory_N, features_NF, position_N = file.values()
        classes_N = np.zeros(len(base_N), int)
        return gates.Scored(base_N, memory_N, torch.from_numpy(features_NF), classes_N, position_N)

    def rows(
        self, texts: dict[str, list[Path]], scored: dict[str, list[Path]]
    ) -> list[dict[str, Any]]:
        """Return rows by context of scored texts; weights and gate come from the other texts."""
        ids = {kind: self.ids(files) for kind, files in texts.items()}
        both = (
            gate_texts.passages(ids[kind], *gate_texts.PASSAGE) for kind in ("domain", "general")
        )
        ids["in turn"] = gate_texts.in_turn(*both)
        texts = texts | {"in turn": [*texts["domain"], *texts["general"]]}
        read = {kind: self.read(kind, "made of", ids[kind], texts[kind]) for kind in ids}
        domain = read["domain"]
        tuned = tune(domain.position_N, domain.base_N, domain.memory_N, None)
        self.progress.say(f"{self.name}: alpha {tuned['alpha']}, {tuned['alpha_by_context']}")
        arrays = gates.fit_gate(read)
        rows = []
        for kind, files in scored.items():
            part = self.read(kind, "scored", self.ids(files), files)
            pair = part.base_N, part.memory_N
            mixed = {
                "fixed": mix(*pair, tuned["alpha"]),
                "mixture": mix(*pair, alpha_at(tuned["alpha_by_context"], part.position_N)),
                "gate": mix(*pair, gates.weights(arrays, part)),
            }
            rows += [{"text": kind} | row for row in by_context(part.position_N, *pair, mixed)]
        return [{"domain": self.name} | row for row in rows]


def general_text(base: Path, use: str) -> Path:
    """Return a file of general text for one use: of what a gate is trained on none is scored."""
    texts = general_texts(AutoTokenizer.from_pretrained(base), Sizes(), use)
    return write_jsonl(WORK / f"general-{use}.jsonl", sum(texts, []))


def of_demo(base: Path, progress: Progress) -> list[dict[str, Any]]:
    """Return the rows of the demo's memory: countries that it has not learnt."""
    text = FULL.texts
    texts = {
        "domain": [text / f"validation_{name}.jsonl" for name in ("pages", "facts")],
        "corpus": [text / "corpus.jsonl"],
        "general": [general_text(base, "gate")],
    }
    scored = {"domain": [text / "pages.jsonl"], "general": [general_text(base, "scored")]}
    return Measured("demo", base, FULL.out / "memory", progress).rows(texts, scored)


def of_domain(name: str, base: Path, progress: Progress) -> list[dict[str, Any]]:
    """Return the rows of a domain's memory, trained at the first learning rate of quality.py."""
    sizes = SIZES.get(name, Sizes())
    pair = Pair("smollm2", str(base))
    domain = Domain(name, pair, sizes, load_settings(SETTINGS), progress)
    memory = domain.system(Memory).train(Memory.usual_rates[0]).path
    text = domain.text.path
    texts = {
        "domain": [text / "validation.jsonl"],
        "corpus": [text / "train.jsonl"],
        "general": [general_text(base, "gate")],
    }
    scored = {"domain": [text / "test.jsonl"], "general": [general_text(base, "scored")]}
    return Measured(name, base, memory, progress).rows(texts, scored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--no-demo", action="store_true", help="leave the demo's memory out")
    options = parser.parse_args()
    if wrong := set(options.domains) - set(domains.DOMAINS):
        parser.error(f"no such domain: {', '.join(wrong)}; known: {', '.join(domains.DOMAINS)}.")
    if not options.no_demo and not (FULL.out / "memory/config.json").exists():
        parser.error("build/demo is no finished demo: run `make demo` first, or give --no-demo.")
    base, progress = smollm2(), Progress()
    origin = provenance("torch", "transformers")
    rows = [] if options.no_demo else of_demo(base, progress)
    rows += [row for name in options.domains for row in of_domain(name, base, progress)]
    rows = [rounded({name: row[name] for name in NAMES}) for row in rows]
    replace_rows(TABLE, [row | origin for row in rows])
    print(json.dumps({"benchmark": "context", "results": rows}))


if __name__ == "__main__":
    main()
