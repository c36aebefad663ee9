"""The demo: a small real model learns a part of the CIA World Factbook, and vLLM serves both.

Run with `make demo`; `--quick` does the same with a fraction of everything, to see that it works.
It builds the memory with `memdec build`, scores held-out text, starts a real
`vllm serve`, asks it over HTTP with the openai client, and writes build/demo/report.json and
report.md. What is built already is not built again.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import data
import numpy as np
from common import commit
from knn_lm import find_neighbours, tune
from openai import OpenAI
from rich.console import Console
from rich.table import Table
from server import environment, serve
from transformers import AutoTokenizer

from vllm_memdec.checkpoint import read_block
from vllm_memdec.train.artifacts import Artifact, build_artifact, write_json
from vllm_memdec.train.config import load_settings
from vllm_memdec.train.corpus import pack, tokenise, valid_rows
from vllm_memdec.train.datastore import load_model
from vllm_memdec.train.evaluate import label_logprobs, mix, perplexity
from vllm_memdec.train.pipeline import STAGES
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.text import documents, text_hash
from vllm_memdec.train.windows import alpha_at

HERE = Path(__file__).resolve().parent

SECTION, LONGEST = "Government", 100  # facts of one section, values up to so many characters
LEFT_OUT = "Diplomatic representation"  # telephone numbers and addresses
LEARNED = ("south-america", "central-asia")  # the corpus
VALIDATION = ("south-asia",)  # alpha, lambda and temperature are tuned on these countries
HELD_OUT = ("central-america-n-caribbean",)  # scored once, used for nothing else
GENERAL_CHARACTERS = 800  # of each Wikipedia article
RECALL_LONGEST = 60  # characters: longer values are lists
SHOWN_FIELD = "Executive branch - head of government"
SHOWN_FACTS = 12
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Demo:
    """Where a demo writes and how much of everything it takes; None takes all."""

    out: Path
    config: Path
    learned: int | None = None  # facts of the corpus
    validation: int | None = None
    held_out: int = 400
    articles: int = 40
    recall: int = 120  # facts drawn from the corpus at random, asked of base and mixture alike
    ray_address: str = "local"

    @property
    def texts(self) -> Path:
        """Return the folder of the texts: none of a build's input lies inside its output."""
        return self.out.with_name(f"{self.out.name}-text")


FULL = Demo(data.BUILD / "demo", HERE / "demo.yaml")
QUICK = Demo(data.BUILD / "demo-quick", HERE / "demo-quick.yaml", 80, 16, 16, 2, 8, "none")


def facts_of(regions: Iterable[str], count: int | None) -> list[data.Fact]:
    """Return the facts of some regions, or a random draw of them, in the book's order."""
    facts = [
        fact
        for region in regions
        for fact in data.factbook(region, SECTION, LONGEST)
        if not fact.field.startswith(LEFT_OUT)
    ]
    if count is None:
        return facts
    return [facts[i] for i in sorted(random.Random(0).sample(range(len(facts)), count))]


def write_corpus(path: Path, texts: Iterable[str]) -> Path:
    """Write texts as a .jsonl corpus, one document a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
    return path


def pages(facts: list[data.Fact]) -> list[str]:
    """Return the facts of each country as one text, a fact a line."""
    return [
        "\n".join(fact.line for fact in group)
        for _, group in groupby(facts, key=lambda fact: fact.country)
    ]


# Text to score -> the validation text whose form it has, which kNN-LM is tuned on.
SCORED = {
    "pages": "validation_pages",
    "facts": "validation_facts",
    "general": "validation_pages",
}


def score(
    demo: Demo, base: Path, export: Path, texts: dict[str, Path], work: Path, progress: Progress
) -> None:
    """Write perplexity.json: base, memory, mixture and kNN-LM on text none of them has seen."""
    settings = load_settings(demo.config)
    tokenizer = AutoTokenizer.from_pretrained(base)
    models = {
        "base": load_model(str(base), "bfloat16"),
        "memory": load_model(str(export), "bfloat16"),
    }
    block = read_block(export)
    table = block.alpha_by_context or [[0, block.alpha]]
    made_with = json.loads((demo.out / "targets" / "targets.json").read_text())["temperature"]
    logprobs, neighbours, positions = {}, {}, {}
    for text, path in texts.items():
        blocks = pack(
            tokenise(tokenizer, documents(path)),
            settings.corpus.block_tokens,
            tokenizer.eos_token_id,
        )
        positions[text] = blocks[1][:, :-1][valid_rows(blocks[1])]
        for name, model in models.items():
            logprobs[text, name] = label_logprobs(model, *blocks, 4, progress, f"{name}, {text}")
        neighbours[text] = find_neighbours(demo.out, models["base"], settings, *blocks)
    found = {"alpha": table}
    for text, tuned_on in SCORED.items():
        weight, temperature = tune(logprobs[tuned_on, "base"], neighbours[tuned_on], made_with)
        base_N, memory_N = logprobs[text, "base"], logprobs[text, "memory"]
        knn_N = neighbours[text].logprobs(temperature)
        found[text] = {
            "base": perplexity(base_N),
            "memory": perplexity(memory_N),
            "mixture": perplexity(mix(base_N, memory_N, alpha_at(table, positions[text]))),
            "knn_lm": perplexity(mix(base_N, knn_N, weight)),
            "knn_lambda": weight,
            "tokens": len(base_N),
        }
    write_json(work / "perplexity.json", found)


ASKED = (("base", 0.0), ("memory", 1.0), ("mixture", None))  # None: the memory's own alpha


class Asker:
    """Asks the server for greedy answers and for probabilities of given answers."""

    def __init__(self, address: str, tokenizer: object) -> None:
        self.client = OpenAI(base_url=address, api_key="none", timeout=600)
        self.model = self.client.models.list().data[0].id
        self.tokenizer = tokenizer

    def answers(self, facts: list[data.Fact], alpha: float | None) -> list[str]:
        """Return the first written line of each greedy answer; alpha None: the memory's own."""
        reply = self.client.completions.create(
            model=self.model,
            prompt=[fact.prompt for fact in facts],
            max_tokens=ANSWER_TOKENS,
            temperature=0,
            extra_body={} if alpha is None else {"vllm_xargs": {"memdec_alpha": alpha}},
        )
        by_prompt = sorted(reply.choices, key=lambda choice: choice.index)
        # A model may begin with an empty line: its answer is what it writes after that.
        return [(c.text.strip().splitlines() or [""])[0].strip() for c in by_prompt]

    def probabilities(self, facts: list[data.Fact], alpha: float | None) -> list[float]:
        """Return the probability of each fact's whole value after its prompt."""
        extra = {"prompt_logprobs": 0}
        if alpha is not None:
            extra["vllm_xargs"] = {"memdec_alpha": alpha}
        ids = [self.tokenizer(fact.line)["input_ids"] for fact in facts]
        known = [len(self.tokenizer(fact.prompt)["input_ids"]) for fact in facts]
        reply = self.client.completions.create(
            model=self.model, prompt=ids, max_tokens=1, temperature=0, extra_body=extra
        )
        found = []
        for choice in sorted(reply.choices, key=lambda choice: choice.index):
            start = known[choice.index]
            scored = zip(choice.prompt_logprobs[start:], ids[choice.index][start:], strict=True)
            found.append(float(np.exp(sum(row[str(token)]["logprob"] for row, token in scored))))
        return found


def recall(facts: list[data.Fact], answers: list[str]) -> float:
    """Return the share of facts whose value was answered exactly."""
    return sum(a == f.value for f, a in zip(facts, answers, strict=True)) / len(facts)


def ask_server(demo: Demo, base: Path, export: Artifact, learned: list[data.Fact]) -> dict:
    """Serve base and memory, and return recall and the fact table."""
    asked = [f for f in learned if len(f.value) <= RECALL_LONGEST]
    asked = random.Random(0).sample(asked, min(demo.recall, len(asked)))
    shown = sorted(learned, key=lambda fact: fact.field != SHOWN_FIELD)[:SHOWN_FACTS]
    log = demo.out / "server.log"
    options = ("--dtype", "bfloat16", "--max-model-len", "1024", "--enforce-eager")
    with serve(base, {"model": str(export.path), "gate": False}, log, *options) as address:
        asker = Asker(address, AutoTokenizer.from_pretrained(base))
        answers = {name: asker.answers(asked, alpha) for name, alpha in ASKED}
        says = {name: asker.answers(shown, alpha) for name, alpha in ASKED}
        p = {name: asker.probabilities(shown, alpha) for name, alpha in ASKED}
    rows = [
        {
            "prompt": fact.prompt,
            "truth": fact.value,
            "base_answer": says["base"][i],
            "mixture_answer": says["mixture"][i],
            **{f"p_{name}": p[name][i] for name, _ in ASKED},
        }
        for i, fact in enumerate(shown)
    ]
    found = {name: recall(asked, said) for name, said in answers.items()}
    return {"recall": {"facts": len(asked), **found}, "facts": rows}


def report_markdown(report: dict) -> str:
    """Return the report for people."""
    r, table = report["recall"], report["perplexity"]["alpha"]
    weights = ", ".join(f"{alpha:.2f} from position {start}" for start, alpha in table)
    lines = [
        "| | base | memory alone | base + memory | kNN-LM |",
        "|---|---|---|---|---|",
    ]
    for title, key in (
        ("countries not in the corpus, whole pages", "perplexity"),
        ("countries not in the corpus, single facts", "single_fact_perplexity"),
        ("Wikipedia", "general_perplexity"),
    ):
        p = report[key]
        cells = [f"{p[name]:.2f}" for name in ("base", "memory", "mixture", "knn_lm")]
        lines.append(f"| perplexity, {title} | " + " | ".join(cells) + " |")
    lines += [
        f"| exact recall of {r['facts']} facts of the corpus | {r['base']:.1%} | "
        f"{r['memory']:.1%} | {r['mixture']:.1%} | not measured |",
        "",
        f"alpha by length of context, tuned on other countries than those scored: {weights}; "
        "kNN-LM with lambda and temperature tuned on the same.",
        "",
        "| prompt | truth | base says | mixture says | P(base) | P(memory) | P(mixture) |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in report["facts"]:
        cells = [f["prompt"], f["truth"], f["base_answer"][:60], f["mixture_answer"]]
        cells += [f"{f[k]:.2g}" for k in ("p_base", "p_memory", "p_mixture")]
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    lines += ["", "| stage | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.0f} |" for name, seconds in report["seconds"].items()]
    return "\n".join(lines) + "\n"


def show(report: dict, console: Console) -> None:
    """Print the questions and answers side by side."""
    table = Table("prompt", "truth", "base", "base + memory")
    for f in report["facts"]:
        right = f["mixture_answer"] == f["truth"]
        says = f"[green]{f['mixture_answer']}" if right else f["mixture_answer"]
        table.add_row(f["prompt"], f["truth"], f["base_answer"][:60], says)
    console.print(table)
    p, r = report["perplexity"], report["recall"]
    console.print(
        f"perplexity on countries not in the corpus: base {p['base']:.2f}, "
        f"mixture {p['mixture']:.2f}, kNN-LM {p['knn_lm']:.2f}"
    )
    console.print(
        f"exact recall of {r['facts']} facts: base {r['base']:.1%}, mixture {r['mixture']:.1%}"
    )


def main(demo: Demo) -> None:
    """Run the demo from nothing to its report, skipping what is built already."""
    console = Console(highlight=False)
    progress = Progress(console)
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        console.rule(stage)
        began = time.monotonic()
        yield
        seconds[stage] = round(time.monotonic() - began, 1)

    with timed("base model and text"):
        base = data.smollm2()
        learned = facts_of(LEARNED, demo.learned)
        texts = demo.texts
        corpus = write_corpus(texts / "corpus.jsonl", (f.line for f in learned))
        validation = facts_of(VALIDATION, demo.validation)
        held_out = facts_of(HELD_OUT, demo.held_out)
        contents = {
            "validation_facts": [fact.line for fact in validation],
            "validation_pages": pages(validation),
            "facts": [fact.line for fact in held_out],
            "pages": pages(held_out),
            "general": data.wikipedia(GENERAL_CHARACTERS)[: demo.articles],
        }
        scored = {
            name: write_corpus(texts / f"{name}.jsonl", lines) for name, lines in contents.items()
        }
        console.print(
            f"corpus: {len(learned)} facts of {len({f.country for f in learned})} countries"
        )
    with timed("memdec build, this run"):
        command = [str(Path(sys.executable).with_name("memdec")), "build", "--base", str(base)]
        command += ["--corpus", str(corpus), "--validation", str(scored["validation_facts"])]
        command += ["--output", str(demo.out), "--config", str(demo.config)]
        command += ["--ray-address", demo.ray_address]
        subprocess.run(command, check=True, env=environment())
    for stage in STAGES:
        manifest = json.loads((demo.out / stage / "manifest.json").read_text())
        if "seconds" in manifest:
            seconds[f"memdec build: {stage}, when it was built"] = manifest["seconds"]
    export = Artifact(
        demo.out / "export", json.loads((demo.out / "export/manifest.json").read_text())
    )
    with timed("scoring"):
        scores = build_artifact(
            demo.out / "scores",
            "scores",
            {},
            {"export": export.hash} | {name: text_hash(path) for name, path in scored.items()},
            lambda work: score(demo, base, export.path, scored, work, progress),
            progress.say,
        )
    with timed("serving and asking"):
        asked = ask_server(demo, base, export, learned)
    found = json.loads((scores.path / "perplexity.json").read_text())
    report = {
        "perplexity": found["pages"] | {"alpha": found["alpha"]},
        "single_fact_perplexity": found["facts"],
        "general_perplexity": found["general"],
        **asked,
        "memdec": asdict(read_block(export.path)),
        "seconds": seconds,
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("vllm-memdec", "vllm", "torch", "transformers")},
        },
        "commit": commit(),
    }
    write_json(demo.out / "report.json", report)
    (demo.out / "report.md").write_text(report_markdown(report))
    show(report, console)
    console.print(f"report: {demo.out / 'report.md'} and report.json")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fraction of everything")
    main(QUICK if parser.parse_args().quick else FULL)
