"""Questions of several choices: the word that ends a passage, and the value of a fact."""

import random
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.corpora.factbook import Fact
from benchmarks.corpora.questions import question

CHOICES, BEFORE = 4, 40  # answers to each question, words before a cloze's


def cloze(texts: list[str], count: int) -> list[tuple[str, list[str]]]:
    """Return passages that lack their last word, and words that might end them, the right first."""
    rng = random.Random(0)
    cut = []
    for text in texts:
        words = text.split()
        for start in range(0, len(words), 2 * BEFORE):
            last = range(start + BEFORE, min(start + 2 * BEFORE, len(words)))
            ends = [n for n in last if words[n].isalpha() and len(words[n]) > 4]
            if ends:
                end = rng.choice(ends)
                cut.append((" ".join(words[end - BEFORE : end]), words[end]))
    cut = rng.sample(cut, min(count, len(cut)))
    others = sorted({word for _, word in cut})
    return [
        (passage, [right, *rng.sample([w for w in others if w != right], CHOICES - 1)])
        for passage, right in cut
    ]


def of_facts(facts: Sequence[Fact], known: Sequence[Fact]) -> list[tuple[str, list[str]]]:
    """Return questions for facts, and values that might answer them, the right first.

    The wrong ones are the same field's of other countries in `known`; a fact with too few of them
    is not asked.
    """
    rng = random.Random(0)
    values: dict[str, set[str]] = defaultdict(set)
    for fact in known:
        values[fact.field].add(fact.value)
    asked = []
    for fact in facts:
        others = sorted(values[fact.field] - {fact.value})
        if len(others) >= CHOICES - 1:
            answers = [fact.value, *rng.sample(others, CHOICES - 1)]
            asked.append((f"Question: {question(fact)}\nAnswer:", answers))
    return asked
