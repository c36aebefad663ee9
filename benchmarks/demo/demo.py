"""The demo: a small real model learns a part of the CIA World Factbook, and vLLM serves both.

Run with `make demo`; `--quick` does the same with a fraction of everything, to see that it works.
It builds the memory with `memdec build`, scores held-out text, starts a real `vllm serve`, asks it
over HTTP with the openai client, and writes build/demo/report.json, report.md and report.csv, of
which benchmarks/results/demo.csv is one. What is built already is not built again.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.common import append_csv, commit, device_name
from benchmarks.corpora.download import smollm2
from benchmarks.corpora.factbook import Fact
from benchmarks.csv_rows import grid
from benchmarks.demo.client import SERVER_OPTIONS, Client, recall
from benchmarks.demo.texts import FULL, LEARNED, QUICK, Demo, facts_of, recalled_facts, write_texts
from benchmarks.server import environment, serve
from benchmarks.systems.knn_lm import find_neighbours, tune
from vllm_memdec.checkpoint import read_block
from vllm_memdec.train.data.artifacts import Artifact, build_artifact, write_json
from vllm_memdec.train.data.blocks import bos_of, pack, tokenise, unmarked, valid_rows
from vllm_memdec.train.data.documents import documents, text_hash
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.model.scoring import label_logprobs, mix, perplexity
from vllm_memdec.train.model.windows import alpha_at
from vllm_memdec.train.pipeline import STAGES
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import load_settings

SHOWN_FIELD = "Executive branch - head of government"
SHOWN_FACTS = 12

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
            bos_of(tokenizer),
        )
        positions[text] = unmarked(blocks[1][:, :-1][valid_rows(blocks[1])])
        for name, model in models.items():
            logprobs[text, name] = label_logprobs(model, *blocks, 4, progress, f"{name}, {text}")
        neighbours[text] = find_neighbours(demo.out, models["base"], settings, *blocks)
    scores = {"alpha": table}
    for text, tuned_on in SCORED.items():
        weight, temperature = tune(logprobs[tuned_on, "base"], neighbours[tuned_on], made_with)
        base_N, memory_N = logprobs[text, "base"], logprobs[text, "memory"]
        knn_N = neighbours[text].logprobs(temperature)
        scores[text] = {
            "base": perplexity(base_N),
            "memory": perplexity(memory_N),
            "mixture": perplexity(mix(base_N, memory_N, alpha_at(table, positions[text]))),
            "knn_lm": perplexity(mix(base_N, knn_N, weight)),
            "knn_lambda": weight,
            "tokens": len(base_N),
        }
    write_json(work / "perplexity.json", scores)


ASKED = (("base", 0.0), ("memory", 1.0), ("mixture", None))  # None: the memory's own alpha


def ask_server(demo: Demo, base: Path, export: Artifact, learned: list[Fact]) -> dict:
    """Serve base and memory, and return recall and the fact table."""
    asked = recalled_facts(learned, demo.recall)
    shown = sorted(learned, key=lambda fact: fact.field != SHOWN_FIELD)[:SHOWN_FACTS]
    log = demo.out / "server.log"
    memory = {"model": str(export.path), "gate": False}
    with serve(base, memory, log, *SERVER_OPTIONS) as address:
        client = Client(address, AutoTokenizer.from_pretrained(base))
        answers = {name: client.answers(asked, alpha) for name, alpha in ASKED}
        shown_answers = {name: client.answers(shown, alpha) for name, alpha in ASKED}
        p = {name: client.probabilities(shown, alpha) for name, alpha in ASKED}
    rows = [
        {
            "prompt": fact.prompt,
            "truth": fact.value,
            "base_answer": shown_answers["base"][i],
            "mixture_answer": shown_answers["mixture"][i],
            **{f"p_{name}": p[name][i] for name, _ in ASKED},
        }
        for i, fact in enumerate(shown)
    ]
    shares = {name: recall(asked, given) for name, given in answers.items()}
    return {"recall": {"facts": len(asked), **shares}, "facts": rows}


SYSTEMS = {"base": "base", "memory": "memory", "mixture": "base + memory", "knn_lm": "kNN-LM"}


def report_rows(report: dict) -> list[dict[str, str]]:
    """Return what was measured, a row each, with a column for each system."""
    rows = []
    for title, key in (
        ("countries not in the corpus, whole pages", "perplexity"),
        ("countries not in the corpus, single facts", "single_fact_perplexity"),
        ("Wikipedia", "general_perplexity"),
    ):
        cells = {title: f"{report[key][name]:.2f}" for name, title in SYSTEMS.items()}
        rows.append({"what": f"perplexity, {title}"} | cells)
    recalled = report["recall"]
    cells = {t: f"{recalled[name]:.1%}" if name in recalled else "" for name, t in SYSTEMS.items()}
    return [*rows, {"what": f"exact recall of {recalled['facts']} facts of the corpus"} | cells]


def report_markdown(report: dict) -> str:
    """Return the report for people."""
    table = report["perplexity"]["alpha"]
    weights = ", ".join(f"{alpha:.2f} from position {start}" for start, alpha in table)
    rows = [[cell or "not measured" for cell in row.values()] for row in report_rows(report)]
    lines = [
        *grid(["", *SYSTEMS.values()], rows).splitlines(),
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
        shown = f"[green]{f['mixture_answer']}" if right else f["mixture_answer"]
        table.add_row(f["prompt"], f["truth"], f["base_answer"][:60], shown)
    console.print(table)
    p, r = report["perplexity"], report["recall"]
    console.print(
        f"perplexity on countries not in the corpus: base {p['base']:.2f}, "
        f"mixture {p['mixture']:.2f}, kNN-LM {p['knn_lm']:.2f}"
    )
    console.print(
        f"exact recall of {r['facts']} facts: base {r['base']:.1%}, mixture {r['mixture']:.1%}"
    )


def run(demo: Demo) -> None:
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
        base = smollm2()
        learned = facts_of(LEARNED, demo.learned)
        corpus, scored = write_texts(demo, learned)
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
    measured = json.loads((scores.path / "perplexity.json").read_text())
    report = {
        "perplexity": measured["pages"] | {"alpha": measured["alpha"]},
        "single_fact_perplexity": measured["facts"],
        "general_perplexity": measured["general"],
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
    where = {"commit": report["commit"], "device": device_name()} | report["versions"]
    (demo.out / "report.csv").unlink(missing_ok=True)
    append_csv(demo.out / "report.csv", [row | where for row in report_rows(report)])
    show(report, console)
    console.print(f"report: {demo.out / 'report.md'} and report.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fraction of everything")
    run(QUICK if parser.parse_args().quick else FULL)


if __name__ == "__main__":
    main()
