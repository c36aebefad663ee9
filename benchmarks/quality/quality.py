"""What a domain's text teaches memory, kNN-LM, RAG, DAPT and LoRA, and what they forget for it.

    python -m benchmarks.quality.quality   # two CPU cores: about seven hours; what is there is kept
    python -m benchmarks.quality.quality --pair qwen2.5-coder --budget paper --train-tokens 15000
    python -m benchmarks.quality.quality --pair qwen2.5-coder --estimate   # only says how long

For each domain (see domains.py) every system gets the same text. What is trained gets the same
training FLOPs: the memory's, its pass of the base over the corpus included, or, with --budget
paper, those of one epoch of the base over the corpus. Learning rates, alpha,
lambda, the retriever's k and kNN-LM's temperature are tuned on validation text. Then, on text that
none has seen and that is no near-duplicate of what they have: perplexity on the domain, and on
general text (what was forgotten); and fact recall, the share of the corpus's facts each completes.

The pairs of base and memory are in pair.py. A base whose AdamW does not fit is trained with
Adafactor (systems/slim.py), and rows say so. How long it takes is printed first, estimate.py.

Rows go to results/quality.csv, the curves over alpha to build/quality/alpha.png, and
`python -m benchmarks.tables --readme` puts the table into the README.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, provenance
from benchmarks.corpora import domains
from benchmarks.quality.domain import TEXTS, WORK, Domain
from benchmarks.quality.estimate import show
from benchmarks.quality.measuring import domains_of, new_parser, parsed, write
from benchmarks.quality.pair import columns
from benchmarks.quality.recall import recall
from benchmarks.systems.base import Base
from benchmarks.systems.finetune import Dapt
from benchmarks.systems.memory import Memory, TokenMemory
from benchmarks.systems.registry import SYSTEMS
from benchmarks.systems.system import System
from benchmarks.systems.trained import budget
from vllm_memdec.train.model.devices import products
from vllm_memdec.train.model.scoring import ALPHAS, perplexity

TABLE = RESULTS / "quality.csv"
TUNED = ("alpha", "lambda", "temperature", "passages", "learning_rate")  # columns of the table


def rows_of(domain: Domain, left_out: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return a row for each system, but for those that are left out by name."""
    systems = [domain.system(kind) for kind in SYSTEMS if kind.name not in left_out]
    tuned: dict[str, dict[str, float]] = {}
    measured: dict[str, dict[str, float]] = {}
    for system in systems:
        tuned[system.name] = system.fit()
        scored = {text: system.logprobs(text) for text in TEXTS[1:]}
        rows = {text: systems[0].logprobs(text).shape for text in scored}
        assert {t: s.shape for t, s in scored.items()} == rows, f"{system.name} left rows out"
        measured[system.name] = {text: perplexity(scored[text]) for text in scored}
        domain.progress.say(f"{domain.name}, {system.name}: {measured[system.name]['test']:.2f}")
    recalled = recall(domain, systems, tuned)
    asked = recall(domain, systems, tuned, "question")
    counts = json.loads((domain.text.path / "counts.json").read_text())
    base, base_N = measured[systems[0].name]["test"], systems[0].logprobs("test")
    return [
        {
            "domain": domain.name,
            "system": system.title,
            "perplexity": round(measured[system.name]["test"], 3),
            "change": round(measured[system.name]["test"] / base - 1, 4),
            **{text: round(measured[system.name][text], 3) for text in domains.GENERAL},
            "recall": round(recalled[system.name], 4) if recalled else "",
            "facts": recalled.get("facts", ""),
            "recall_question": round(asked[system.name], 4) if asked else "",
            "questions": asked.get("facts", ""),
            **{name: tuned[system.name].get(name, "") for name in TUNED},
            "train_tokens": domain.corpus_tokens,
            "test_tokens": len(base_N),
            "duplicates": counts["duplicates"],
            "tflop": round(budget(domain) / 1e12, 1) if system.trained else "",
            **columns(domain.pair),
            "optimizer": optimizer(system),
            "dtype": products("bfloat16"),
        }
        for system in systems
    ]


def optimizer(system: System) -> str:
    """Return what trained a system, where it was trained."""
    if not system.trained:
        return ""
    slim = isinstance(system, Dapt) and system.tight
    return "Adafactor" if slim else "AdamW"


def curves_of(domain: Domain, left_out: Collection[str] = ()) -> dict[tuple[str, str], list[float]]:
    """Return perplexity over alpha, relative to the base's, by memory and text."""
    base = domain.system(Base)
    return {
        (kind.name, text): [
            value / perplexity(base.logprobs(text)) for value in domain.system(kind).curve(text)
        ]
        for kind in (Memory, TokenMemory)
        if kind.name not in left_out
        for text in TEXTS[1:]
    }


def draw(curves: dict[str, dict[tuple[str, str], list[float]]], path: Path) -> None:
    """Draw the curves of each domain: domain and general text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(curves), figsize=(3.6 * len(curves), 3.6), layout="constrained", squeeze=False
    )
    for axis, (name, of_domain) in zip(axes[0], curves.items(), strict=True):
        for kind, style in ((Memory, "-"), (TokenMemory, ":")):
            for text, colour in (("test", "C0"), ("wiki", "C1"), ("brown", "C2")):
                if (kind.name, text) not in of_domain:
                    continue
                label = f"{'domain' if text == 'test' else text}{', CE only' * (style == ':')}"
                values = of_domain[kind.name, text][:96]
                axis.plot(ALPHAS[:96], values, style, color=colour, label=label)
        axis.axhline(1, color="grey", lw=0.8)
        axis.set(title=name, xlabel="alpha", ylim=(0.2, 2.5))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("perplexity / base's")
    axes[0, -1].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = new_parser(__doc__, list(domains.DOMAINS))
    parser.add_argument("--estimate", action="store_true", help="only say how long it will take")
    parser.add_argument(
        "--leave-out", nargs="+", default=[], metavar="SYSTEM",
        choices=[kind.name for kind in SYSTEMS[1:]],
        help="systems that have no row, nor keep an older one: %(choices)s",
    )  # fmt: skip
    options = parsed(parser)
    made, left_out = domains_of(options), options.leave_out
    hours = sum(show(d, [k for k in SYSTEMS if k.name not in left_out]) for d in made)
    print(f"in all about {hours:.1f} hours, less what is there already", flush=True)
    if options.estimate:
        return
    curves, rows = {}, []
    origin = provenance("torch", "transformers")
    for domain in made:
        measured = [row | origin for row in rows_of(domain, left_out)]
        curves[domain.name] = curves_of(domain, left_out)
        rows += measured
        for row in measured:
            print(
                f"{row['domain']:<12} {row['system']:<24} {row['perplexity']:>8.2f} "
                f"{row['change']:>+7.1%}  wiki {row['wiki']:>6.2f}  brown {row['brown']:>6.2f}  "
                f"recall {row['recall']}"
            )
        write(options, TABLE, rows)
    draw(curves, made[0].pair.place(WORK) / "alpha.png")
    print(json.dumps({"rows": len(rows), "csv": str(TABLE)}))


if __name__ == "__main__":
    main()
