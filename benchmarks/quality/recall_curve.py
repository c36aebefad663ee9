"""How often a memory must read facts until it recalls them, and where it passes RAG.

    python -m benchmarks.quality.recall_curve --pair qwen2.5-coder --train-tokens 15000

One memory for each share of a training, each trained from its start with a schedule of its own,
mixed with the weight that is best on validation text; beside it what needs no training, the base
and RAG. Facts are asked for as the corpus says them and in other words. What is done is kept.
Writes results/recall.csv; the last line is JSON.
"""

from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.common import RESULTS
from benchmarks.corpora import domains
from benchmarks.quality.domain import Domain
from benchmarks.quality.estimate import show
from benchmarks.quality.measuring import measure, new_parser, parsed
from benchmarks.quality.pair import columns
from benchmarks.quality.recall import PHRASINGS, recall
from benchmarks.systems.base import Base
from benchmarks.systems.memory import Memory
from benchmarks.systems.rag import Bm25Rag, Bm25Rag16, MiniLmRag
from benchmarks.systems.system import System

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
    return rows


def main() -> None:
    parser = new_parser(__doc__, ("finance", "factbook"))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    options = parsed(parser, domains.FACTS)

    def of_domain(domain: Domain) -> list[dict[str, Any]]:
        show(domain, (*UNTRAINED, Memory), options.shares)
        return rows_of(domain, tuple(options.shares))

    measure(options, TABLE, of_domain)


if __name__ == "__main__":
    main()
