"""What a gate gives on text that it was not trained on: a report, tables and a chart."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_memdec.train.model.scoring import ALPHAS, best_alpha, mix, perplexity
from vllm_memdec.train.model.windows import by_context

CLASSES = ("word", "inside a word", "number", "punctuation", "line break")


def token_class(text: str) -> int:
    """Return the place in CLASSES of a token's text."""
    if "\n" in text:
        return 4
    if any(c.isdigit() for c in text):
        return 2
    if not any(c.isalpha() for c in text):
        return 3
    return 0 if text[0].isspace() else 1


def report(weighed: dict[str, tuple[Any, np.ndarray]]) -> dict[str, Any]:
    """Return perplexities of base, fixed weights and gate, and the gate's mean weights.

    weighed: by kind of text what was scored (gate.Scored) and the gate's weights [N].
    """
    domain = weighed["domain"][0]
    fixed = best_alpha(domain.base_N, domain.memory_N)
    figures: dict[str, Any] = {"fixed_alpha": fixed, "texts": {}}
    for kind, (part, alpha_N) in weighed.items():
        mixed = {
            "fixed": mix(part.base_N, part.memory_N, fixed),
            "gate": mix(part.base_N, part.memory_N, alpha_N),
        }
        curve = [perplexity(mix(part.base_N, part.memory_N, a)) for a in ALPHAS]
        by_class = {
            name: float(alpha_N[part.classes_N == n].mean())
            for n, name in enumerate(CLASSES)
            if (part.classes_N == n).any()
        }
        figures["texts"][kind] = {
            "tokens": len(alpha_N),
            "base": curve[0],
            **{name: perplexity(logp_N) for name, logp_N in mixed.items()},
            "mean_alpha": float(alpha_N.mean()),
            "alpha_by_class": by_class,
            "curve": curve,
            "by_context": by_context(part.position_N, part.base_N, part.memory_N, mixed),
        }
    return figures


def show(figures: dict[str, Any], console: Console) -> None:
    """Print the report."""
    fixed = figures["fixed_alpha"]
    table = Table("text", "tokens", "base", f"alpha {fixed:g}", "gate", "mean alpha")
    for kind, row in figures["texts"].items():
        cells = [f"{row['tokens']:,}", f"{row['base']:.2f}"]
        cells += [f"{row[n]:.2f} ({row[n] / row['base'] - 1:+.1%})" for n in ("fixed", "gate")]
        table.add_row(kind, *cells, f"{row['mean_alpha']:.2f}")
    console.print(table)
    console.print("Perplexity on documents of which the gate has seen nothing in training.")
    table = Table("text", "context", "tokens", "base", f"alpha {fixed:g}", "gate")
    for kind, row in figures["texts"].items():
        for part in row["by_context"]:
            cells = [f"{part['from']}-{part['to']}", f"{part['tokens']:,}", f"{part['base']:.2f}"]
            cells += [
                f"{part[n]:.2f} ({part[n] / part['base'] - 1:+.1%})" for n in ("fixed", "gate")
            ]
            table.add_row(kind, *cells)
    console.print(table)


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draw perplexity over fixed weights beside the gate's, and the gate's weights by class."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    kinds = len(figures["texts"])
    width = 0.8 / kinds
    for n, (kind, row) in enumerate(figures["texts"].items()):
        colour = f"C{n}"
        left.plot(
            ALPHAS[:-1],
            [value / row["base"] for value in row["curve"][:-1]],
            color=colour,
            label=f"{kind}, fixed alpha",
        )
        left.axhline(row["gate"] / row["base"], color=colour, ls="--", label=f"{kind}, gate")
        names = list(row["alpha_by_class"])
        places = [CLASSES.index(name) + (n - (kinds - 1) / 2) * width for name in names]
        right.bar(places, row["alpha_by_class"].values(), width, color=colour, label=kind)
    left.set(xlabel="alpha", ylabel="perplexity / base's", ylim=(0, 2))
    right.set(ylabel="mean alpha of the gate", ylim=(0, 1))
    right.set_xticks(range(len(CLASSES)), CLASSES)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
