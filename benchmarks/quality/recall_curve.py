"""How often a memory must read facts until it recalls them, and where it passes RAG.

    python -m benchmarks.quality.recall_curve --pair qwen2.5-coder --train-tokens 15000

One memory for each share of a training, each trained from its start with a schedule of its own,
mixed with the weight that is best on validation text; beside it what needs no training, the base
and RAG. Facts are asked for as the corpus says them and in other words. What is done is kept.
Writes results/recall.csv; the last line is JSON.
"""

import argparse
import json
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, provenance, replace_rows, rounded
from benchmarks.corpora import domains
from benchmarks.quality.domain import QUICK, SETTINGS, WORK, Domain, sizes_of
from benchmarks.quality.estimate import show
from benchmarks.quality.pair import add_options, chosen, columns
from benchmarks.quality.recall import PHRASINGS, recall
from benchmarks.systems.base import Base
from benchmarks.systems.memory import Memory
from benchmarks.systems.rag import Bm25Rag, Bm25Rag16, MiniLmRag
from benchmarks.systems.system import System
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import load_settings

TABLE = RESULTS / "recall.csv"
SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of a training, see Trained.epochs()
UNTRAINED = (Base, Bm25Rag, MiniLmRag, Bm25Rag16)


class Shared(Memory):
    """Base + a memory that was trained for a share of a training."""

    def __init__(self, domain: Domain, share: float) -> None:
        super().__init__(domain)
        self.share = share
        self.name = f"memory-{share:g}"  # of its artifacts

    @cached_property
    def artifact(self) -> Any:
        full = self.domain.system(Memory)
        return full.train(full.rate, self.share)

    @cached_property
    def folder(self) -> str:
        return str(self.artifact.path)

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        name = self.domain.pair.budgeted(f"{self.name}-recall")
        return self.domain.scores(name, self.folder, ("validation",))

    def fit(self) -> dict[str, float]:
        return {"alpha": self.alpha}


def rows_of(domain: Domain, shares: tuple[float, ...] = SHARES) -> list[dict[str, Any]]:
    """Return a row for each system, and for each memory."""
    memories = [Shared(domain, share) for share in shares]
    systems: list[System] = [*(domain.system(kind) for kind in UNTRAINED), *memories]
    tuned = {system.name: system.fit() for system in systems}
    found = {
        phrasing: recall(domain, systems, tuned, phrasing, "recall-curve") for phrasing in PHRASINGS
    }
    rows = []
    for system in systems:
        trained = isinstance(system, Shared)
        epochs = system.artifact.manifest["settings"]["epochs"] if trained else 0.0
        rows.append(
            {
                "domain": domain.name,
                **columns(domain.pair),
                "system": system.title,
                "epochs": epochs,
                "tflop": system.flops(epochs) / 1e12 if trained else 0.0,
                "alpha": tuned[system.name].get("alpha", ""),
                **{phrasing: found[phrasing].get(system.name, "") for phrasing in PHRASINGS},
                **{f"{phrasing}_facts": found[phrasing].get("facts", "") for phrasing in PHRASINGS},
                "train_tokens": domain.corpus_tokens,
            }
        )
    return [rounded(row) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domains", nargs="+", default=["finance", "factbook"], metavar="NAME")
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--train-tokens", type=int, help="of each corpus; the rest in proportion")
    parser.add_argument("--quick", action="store_true", help="a fraction, to see that it works")
    add_options(parser)
    options = parser.parse_args()
    if wrong := set(options.domains) - set(domains.FACTS):
        parser.error(f"no domain of facts: {', '.join(wrong)}; known: {', '.join(domains.FACTS)}.")
    pair, settings, progress = chosen(options), load_settings(SETTINGS), Progress()
    origin, rows = provenance("torch", "transformers"), []
    for name in options.domains:
        sizes = QUICK if options.quick else sizes_of(name, options.train_tokens)
        domain = Domain(name, pair, sizes, settings, progress)
        show(domain, (*UNTRAINED, Memory), options.shares)
        of_domain = rows_of(domain, tuple(options.shares))
        rows += of_domain
        for row in of_domain:
            print("  ".join(str(value) for value in row.values()), flush=True)
        table = WORK / "quick-recall.csv" if options.quick else TABLE
        keys = ("domain", "pair", "budget")
        replace_rows(table, [row | origin for row in rows], list(domains.DOMAINS), keys)
    print(json.dumps({"benchmark": "recall_curve", "results": rows}))


if __name__ == "__main__":
    main()
