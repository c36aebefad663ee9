"""Fact recall: the share of a corpus's facts whose every token a system finds the likeliest.

A fact is asked for as the corpus says it, or by a question in other words (corpora/questions.py).
"""

import json
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.corpora import domains, questions
from benchmarks.corpora.factbook import Fact
from benchmarks.quality.domain import Domain, made_in
from benchmarks.systems.system import System
from vllm_memdec.train.data.artifacts import write_json

MAX_VALUE = 60  # characters of a fact that is asked for
PHRASINGS = ("original", "question")


def facts_of(domain: Domain, phrasing: str = "original") -> list[Fact]:
    """Return facts that the domain's corpus has, drawn at random."""
    if domain.name not in domains.FACTS:
        return []
    known = {line for text in domain.documents("train") for line in text.splitlines()}
    facts = [
        fact
        for fact in domains.facts(domains.FACTS[domain.name])
        if len(fact.value) <= MAX_VALUE and fact.line in known
    ]
    if phrasing == "question":
        facts = [fact for fact in facts if questions.question(fact)]
    return random.Random(0).sample(facts, min(domain.sizes.facts, len(facts)))


def recall(
    domain: Domain,
    systems: Sequence[System],
    tuned: dict[str, dict[str, float]],
    phrasing: str = "original",
    name: str = "recall",
) -> dict[str, float]:
    """Return the share of facts that each system recalls, and how many facts were asked for.

    tuned: what each system's fit() chose, by its name. Without facts: nothing.
    """
    facts = facts_of(domain, phrasing)
    if not facts:
        return {}

    def make(work: Path) -> None:
        shares: dict[str, float] = {}
        for group in groups(systems):
            recalled = list(ask(domain, group, facts, phrasing))
            shares |= {name: statistics.mean(row[name] for row in recalled) for name in recalled[0]}
            if not group[0].beside_base:
                group[0].release()
        write_json(work / "recall.json", shares | {"facts": len(facts)})

    settings: dict[str, Any] = {"facts": len(facts)} | made_in()
    settings["tuned"] = {name: chosen for name, chosen in tuned.items() if chosen}
    inputs, unnamed = {"text": domain.text.hash}, []
    for system in systems:
        of_system = system.inputs()
        inputs |= of_system
        if not tuned[system.name] and not of_system:
            unnamed.append(system.name)  # else what was measured without it would count as whole
    if unnamed:
        settings["systems"] = unnamed
    name = domain.pair.budgeted(name)
    if phrasing != "original":
        name, settings["phrasing"] = f"{name}-{phrasing}", [questions.asked(f)[0] for f in facts]
    artifact = domain.artifact(name, settings, inputs, make)
    return json.loads((artifact.path / "recall.json").read_text())


def groups(systems: Sequence[System]) -> list[list[System]]:
    """Return the systems that share the base's reading of a line, then each of the others alone.

    So RAM holds one fine-tuned base at a time.
    """
    sharing = [system for system in systems if system.beside_base]
    alone = [[system] for system in systems if not system.beside_base]
    return [sharing, *alone] if sharing else alone


@torch.inference_mode()
def ask(
    domain: Domain, systems: Sequence[System], facts: Sequence[Fact], phrasing: str = "original"
) -> Iterator[dict[str, bool]]:
    """Yield for each fact which systems recall it: every token of its value and of the line end."""
    with domain.progress.task("asking for facts", len(facts), "facts") as advance:
        for fact in facts:
            texts = (fact.prompt, fact.line) if phrasing == "original" else questions.asked(fact)
            prompt, line = (
                domain.tokenizer(text)["input_ids"] for text in (texts[0], f"{texts[1]}\n")
            )
            wanted = torch.tensor(line[len(prompt) :])
            yield {
                system.name: bool((system.next_token(prompt, line).argmax(-1) == wanted).all())
                for system in systems
            }
            advance(1)
