"""Where facts come from: does `memdec explain --sources` name the document that states a fact?

    python -m benchmarks.quality.sources            # 50 facts of the demo, on build/demo
    python -m benchmarks.quality.sources --build build/demo-quick --facts 8 --no-csv

The demo's corpus has a fact in each document. Facts are drawn at random, and each is read as a
text; the tokens of its value are asked for their sources, at most three documents each. The right
document is the one whose text is the fact. Counted are all tokens of the values, as if the memory
had decided each (`--alpha 1`), and those that it did decide at its own weight. A fact is found if
the right document is among the three with most weight over these tokens. Beside that: single
tokens, and the first token of each value, before which nothing of it can be read. Appends to
results/sources.csv; the last line is JSON. Accepted if 80 % of the facts are found both by all
tokens and by those decided, a fact without one of them not counted; else the exit code is 1.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, append_csv, provenance
from benchmarks.corpora.download import BUILD, smollm2
from benchmarks.corpora.factbook import Fact
from benchmarks.demo.texts import LEARNED, facts_of, recalled_facts, texts_of
from vllm_memdec.train.data.duplicates import stored_documents
from vllm_memdec.train.evaluation.explain import Explainer, Source
from vllm_memdec.train.evaluation.sources import SHOWN, Sources

COUNTED = (
    "facts", "facts_found", "facts_found_first", "tokens", "tokens_found", "first_tokens",
    "first_tokens_found",
)  # fmt: skip
ENOUGH = 0.8  # share of the facts whose document must be found
STAGE_SETTINGS = {"datastore": ("dtype",), "targets": ("neighbours",), "memory": ("epochs",)}


def measure(build: Path, base: str, facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """Return how often the document that states a fact is named: by all tokens, by those decided.

    Those of the value are meant, and decided by the memory at its own weight.
    """
    sources, explain = Sources(build, base), Explainer(base, str(build / "export"))
    tokenizer = sources.tokenizer
    texts = [
        tokenizer.decode(document, skip_special_tokens=True)
        for document in stored_documents(build / "corpus", "train")
    ]
    counts = {tokens: Counter[str]() for tokens in ("all", "decided")}
    for fact in facts:
        explanation = explain(fact.line, write=0)
        start = len(tokenizer(fact.prompt)["input_ids"])  # where the value begins
        value = list(range(start, len(explanation.ids)))
        right = {n for n, text in enumerate(texts, 1) if text == fact.line}
        assert right, f"no document is {fact.line!r}"
        named = dict(zip(value, sources.of(explanation.ids, value), strict=True))
        decided = [at for at in value if explanation.tokens[at - 1].decided == "memory"]
        for tokens, chosen in (("all", value), ("decided", decided)):
            if chosen:
                counts[tokens].update(found(right, {at: named[at] for at in chosen}, start))
    return [
        {"tokens of the value": tokens, "facts asked": len(facts), **dict.fromkeys(COUNTED, 0)}
        | counted
        for tokens, counted in counts.items()
    ]


def found(right: set[int], named: dict[int, list[Source]], start: int) -> dict[str, int]:
    """Return what is counted of one fact: its tokens' sources, by their places in the text."""
    weights: dict[int, float] = {}
    for source in (source for sources in named.values() for source in sources):
        weights[source.document] = weights.get(source.document, 0) + source.weight
    ranked = sorted(weights, key=weights.__getitem__, reverse=True)[:SHOWN]
    by_token = {at: any(s.document in right for s in sources) for at, sources in named.items()}
    counted = (
        True,
        bool(right & set(ranked)),
        ranked[0] in right,
        len(named),
        sum(by_token.values()),
        start in named,
        by_token.get(start, False),
    )
    return dict(zip(COUNTED, map(int, counted), strict=True))


def made_with(build: Path) -> dict[str, Any]:
    """Return the settings of a build that matter here."""
    manifests = {
        stage: json.loads((build / stage / "manifest.json").read_text())["settings"]
        for stage in STAGE_SETTINGS
    }
    return {
        f"{stage} {name}": manifests[stage][name]
        for stage, names in STAGE_SETTINGS.items()
        for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=BUILD / "demo", help="a demo's output")
    parser.add_argument("--facts", type=int, default=50, help="how many are drawn")
    parser.add_argument("--no-csv", action="store_true", help="append nothing to the results")
    options = parser.parse_args()
    origin = provenance("torch", "transformers")
    text = texts_of(options.build) / "corpus.jsonl"
    known = {json.loads(line)["text"] for line in text.read_text().splitlines()}
    learned = [fact for fact in facts_of(LEARNED, None) if fact.line in known]
    facts = recalled_facts(learned, options.facts)
    rows = [made_with(options.build) | row for row in measure(options.build, str(smollm2()), facts)]
    accepted = all(row["facts_found"] >= ENOUGH * row["facts"] > 0 for row in rows)
    for row in rows:
        print(" ".join(f"{name}: {value}" for name, value in row.items()))
    if not options.no_csv:
        append_csv(RESULTS / "sources.csv", [origin | row for row in rows])
    print(json.dumps({"benchmark": "sources", **origin, "results": rows, "accepted": accepted}))
    sys.exit(0 if accepted else 1)


if __name__ == "__main__":
    main()
