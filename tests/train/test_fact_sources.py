"""benchmarks/quality/sources.py on a tiny build whose corpus is of facts."""

import random

import numpy as np
import pytest

from benchmarks.corpora.factbook import Fact
from benchmarks.quality import sources as benchmark
from benchmarks.quality.sources import found, measure
from vllm_memdec.train.data.places import Places
from vllm_memdec.train.evaluation.explain import Source
from vllm_memdec.train.evaluation.sources import Sources

CHANGES = {"corpus": {"block_tokens": 128}, "memory": {"epochs": 0.1}}


def facts(count):
    """Return facts of some countries whose values tell them apart."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "ru", "te") for b in ("na", "so", "vi", "ga")]
    return [
        Fact(f"Land {n % 7}", f"Field {n // 7}", " ".join(rng.choices(words, k=4)))
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def built(tiny_model, jsonl, build, tmp_path_factory):
    """Return a base and its build of 60 facts, the memory of which has hardly been trained."""
    folder = tmp_path_factory.mktemp("facts")
    base, texts = tiny_model("llama"), [fact.line for fact in facts(60)]
    corpus, validation = (
        jsonl(folder / "corpus.jsonl", texts),
        jsonl(folder / "v.jsonl", texts[:0:-9]),
    )
    validation.write_text(validation.read_text().replace("Land", "Country"))
    build(base, corpus, folder / "out", CHANGES, validation)
    return base, folder / "out"


def test_facts_of_the_corpus_are_found(built):
    base, build = built
    places = Places(build / "corpus")
    rows = np.arange(places.first_rows[-1])
    block_N, document_N = places.labels(rows)[0], places.documents(rows)
    blocks = [len(set(block_N[document_N == n])) for n in range(60)]
    asked = [fact for fact, n in zip(facts(60), blocks, strict=True) if n == 1][::5]
    assert len(asked) > 5
    every, decided = measure(build, base, asked)
    assert every["facts asked"] == every["facts"] == len(asked)
    tokenizer = Sources(build, base).tokenizer
    assert every["tokens"] == sum(
        len(tokenizer(f.line)["input_ids"]) - len(tokenizer(f.prompt)["input_ids"]) for f in asked
    )
    assert every["first_tokens"] == len(asked)
    # The nearest to a document read again are its own keys, unless a block cut it.
    assert every["facts_found"] == len(asked)
    assert every["tokens_found"] > 0.9 * every["tokens"]
    assert decided["tokens"] <= every["tokens"] and decided["facts"] <= every["facts"]


def test_other_documents_are_not_taken_for_the_right_one(built, monkeypatch):
    """A map that is off by one finds next to nothing."""
    base, build = built
    documents = benchmark.Sources.of

    def off(self, ids, tokens):
        shifted = lambda s: Source(s.document % 60 + 1, *list(vars(s).values())[1:])  # noqa: E731
        return [[shifted(s) for s in each] for each in documents(self, ids, tokens)]

    monkeypatch.setattr(benchmark.Sources, "of", off)
    every, _ = measure(build, base, facts(60)[::5])
    assert every["facts_found"] < 0.5 * every["facts"]


def test_what_is_counted_of_a_fact():
    def source(document, weight):
        return Source(document, None, weight, True, [], True, True)

    named = {
        4: [source(1, 0.5), source(2, 0.3), source(3, 0.1)],
        5: [source(7, 0.9), source(1, 0.1)],
        6: [source(8, 0.8), source(2, 0.2)],
    }
    names = ("facts_found", "facts_found_first", "tokens", "tokens_found", "first_tokens_found")
    for right, counted in (
        ({7}, (1, 1, 3, 1, 0)),  # 0.9 of 7, 0.8 of 8, 0.6 of 1
        ({1}, (1, 0, 3, 2, 1)),
        ({2}, (0, 0, 3, 2, 1)),
        ({9}, (0, 0, 3, 0, 0)),
    ):
        assert tuple(found(right, named, 4)[name] for name in names) == counted
    without_first = found({1}, {5: named[5]}, 4)
    assert (without_first["first_tokens"], without_first["first_tokens_found"]) == (0, 0)
