"""The texts of the demo: what its memory learns, is tuned on, and is scored on."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.corpora.domains import wikipedia
from benchmarks.corpora.download import BUILD
from benchmarks.corpora.factbook import LEFT_OUT, Fact, factbook, pages
from benchmarks.corpora.jsonl import write_jsonl

HERE = Path(__file__).resolve().parent

SECTION, MAX_VALUE = "Government", 100  # section of the facts; characters of a value at most
LEARNED = ("south-america", "central-asia")  # regions of the corpus
VALIDATION = ("south-asia",)  # regions on which alpha, lambda and temperature are tuned
HELD_OUT = (
    "central-america-n-caribbean",
)  # countries that are scored once and used for nothing else
GENERAL_CHARACTERS = 800  # characters of each Wikipedia article
MAX_RECALLED = 60  # characters of a value that is asked for: longer values are lists


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
        return texts_of(self.out)


FULL = Demo(BUILD / "demo", HERE / "demo.yaml")
QUICK = Demo(BUILD / "demo-quick", HERE / "demo-quick.yaml", 80, 16, 16, 2, 8, "none")


def texts_of(build: Path) -> Path:
    """Return the folder of the texts that a demo's build was made of."""
    return build.with_name(f"{build.name}-text")


def facts_of(regions: Iterable[str], count: int | None) -> list[Fact]:
    """Return the facts of some regions, or a random draw of them, in the book's order."""
    facts = [
        fact
        for region in regions
        for fact in factbook(region, SECTION, MAX_VALUE)
        if not fact.field.startswith(LEFT_OUT)
    ]
    if count is None:
        return facts
    return [facts[i] for i in sorted(random.Random(0).sample(range(len(facts)), count))]


def recalled_facts(learned: list[Fact], count: int) -> list[Fact]:
    """Return a random draw of the facts whose recall is measured."""
    short = [fact for fact in learned if len(fact.value) <= MAX_RECALLED]
    return random.Random(0).sample(short, min(count, len(short)))


def write_texts(demo: Demo, learned: list[Fact]) -> tuple[Path, dict[str, Path]]:
    """Write the corpus of learned facts and the texts to tune on and to score; return the files."""
    corpus = write_jsonl(demo.texts / "corpus.jsonl", (fact.line for fact in learned))
    validation = facts_of(VALIDATION, demo.validation)
    held_out = facts_of(HELD_OUT, demo.held_out)
    contents = {
        "validation_facts": [fact.line for fact in validation],
        "validation_pages": pages(validation),
        "facts": [fact.line for fact in held_out],
        "pages": pages(held_out),
        "general": wikipedia(GENERAL_CHARACTERS)[: demo.articles],
    }
    return corpus, {
        name: write_jsonl(demo.texts / f"{name}.jsonl", texts) for name, texts in contents.items()
    }
