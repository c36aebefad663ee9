"""Tasks beside perplexity: questions of several choices, by lm-evaluation-harness.

    pip install -e .[tasks]
    python -m benchmarks.quality.tasks --pair qwen2.5-coder --train-tokens 15000

facts: of the corpus, asked in other words, with the values of the same field of three other
countries; general: which of four words ends a passage of general text. Each system of quality.py
answers in this process, as one model of the harness, by the likelihood of each answer. Writes
results/tasks.csv; the last line is JSON.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS
from benchmarks.corpora import domains
from benchmarks.corpora.choices import CHOICES, cloze, of_facts
from benchmarks.quality.domain import Domain, general_texts
from benchmarks.quality.measuring import measure, new_parser, parsed
from benchmarks.quality.pair import columns
from benchmarks.quality.recall import facts_of, groups
from benchmarks.systems.base import Base
from benchmarks.systems.finetune import Dapt, Lora
from benchmarks.systems.gated import Gated
from benchmarks.systems.memory import Memory
from benchmarks.systems.rag import Bm25Rag, MiniLmRag
from benchmarks.systems.system import System
from vllm_memdec.train.data.artifacts import json_sha256, write_json

TABLE = RESULTS / "tasks.csv"
SYSTEMS: tuple[type[System], ...] = (Base, Memory, Gated, Bm25Rag, MiniLmRag, Dapt, Lora)


def questions_of(domain: Domain) -> dict[str, list[dict[str, Any]]]:
    """Return the documents of each task: a question, its choices, and the number of the right one.

    The right one's place goes round, for equal likelihoods go to the first.
    """
    facts = facts_of(domain, "question")
    known = domains.facts(domains.FACTS[domain.name]) if facts else []
    texts = sum(general_texts(domain.tokenizer, domain.sizes, "asked"), [])
    asked = {"facts": of_facts(facts, known), "general": cloze(texts, domain.sizes.facts)}
    return {
        task: [
            {"text": text, "choices": answers[-n % CHOICES :] + answers[: -n % CHOICES],
             "answer": n % CHOICES}
            for n, (text, answers) in enumerate(pairs)
        ]
        for task, pairs in asked.items()
        if pairs
    }  # fmt: skip


class Answers:
    """The likelihoods that systems give to answers; those beside the base share its reading."""

    def __init__(self, domain: Domain, systems: Sequence[System]) -> None:
        self.domain, self.groups = domain, groups(systems)
        self.known: dict[tuple[str, str], dict[str, tuple[float, bool]]] = defaultdict(dict)

    @torch.inference_mode()
    def ask(self, system: System, context: str, answer: str) -> tuple[float, bool]:
        """Return log p of an answer after a context, and whether it is greedy."""
        found = self.known[context, answer]
        if system.name not in found:
            tokenizer = self.domain.tokenizer
            prompt, line = (tokenizer(text)["input_ids"] for text in (context, context + answer))
            wanted_n = torch.tensor(line[len(prompt) :])
            for each in next(group for group in self.groups if system in group):
                p_nV = each.next_token(prompt, line)
                logp = float(p_nV.gather(1, wanted_n[:, None]).log().sum())
                found[each.name] = logp, bool((p_nV.argmax(-1) == wanted_n).all())
        return found[system.name]


def accuracies(
    answers: Answers, system: System, questions: dict[str, list[dict[str, Any]]]
) -> dict[str, float]:
    """Return a system's share of right answers in each task, as the harness finds it."""
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM

    class Model(LM):
        """A system as a model of the harness."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return [answers.ask(system, *request.args) for request in requests]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError("no task here asks for it")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError("no task here asks for it")

    tasks = [
        {
            "task": task,
            "custom_dataset": lambda documents=documents, **_: {
                "test": datasets.Dataset.from_list(documents)
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}],
        }
        for task, documents in questions.items()
    ]
    found = simple_evaluate(model=Model(), tasks=tasks, bootstrap_iters=0, log_samples=False)
    return {task: found["results"][task]["acc,none"] for task in questions}


def rows_of(domain: Domain, kinds: Sequence[type[System]] = SYSTEMS) -> list[dict[str, Any]]:
    """Return a row for each task and system."""
    systems = [domain.system(kind) for kind in kinds]
    tuned = {system.name: system.fit() for system in systems}
    questions = questions_of(domain)

    def make(work: Path) -> None:
        answers = Answers(domain, systems)
        found = {}
        for system in systems:
            found[system.name] = accuracies(answers, system, questions)
            if not system.beside_base:
                system.release()
        write_json(work / "tasks.json", found)

    settings = {"tuned": tuned, "questions": json_sha256(questions)}
    inputs = {name: h for system in systems for name, h in system.inputs().items()}
    name = domain.pair.budgeted("tasks")
    made = domain.artifact(name, settings, inputs | {"text": domain.text.hash}, make)
    found = json.loads((made.path / "tasks.json").read_text())
    return [
        {
            "domain": domain.name,
            **columns(domain.pair),
            "task": task,
            "system": system.title,
            "accuracy": found[system.name][task],
            "questions": len(documents),
            "train_tokens": domain.corpus_tokens,
        }
        for task, documents in questions.items()
        for system in systems
    ]


def main() -> None:
    parser = new_parser(__doc__, ("finance", "factbook"))
    options = parsed(parser)
    if find_spec("lm_eval") is None:
        parser.error("lm-evaluation-harness is not installed: run `pip install -e .[tasks]`.")
    measure(options, TABLE, rows_of, "lm-eval")


if __name__ == "__main__":
    main()
