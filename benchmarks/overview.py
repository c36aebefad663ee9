"""Each system once: what it learns, forgets, recalls and costs, as a table and as a picture."""

import json
import statistics
from pathlib import Path

from benchmarks.csv_rows import RESULTS, grid, read, usual

DOMAINS = ("biomedicine", "law", "finance", "factbook")  # each domain once
GENERAL = ("wiki", "brown")
REGIMES = ("decode, batch 1", "decode, batch 8")
SAME_SHAPE = ("DAPT", "LoRA")  # as the base, once an adapter is merged
DRAFTING = "base + memory, 3 drafts"
PICTURE = RESULTS / "systems.svg"


def overview() -> str:
    """Return the table of all systems, each as its means over DOMAINS."""
    changes, times = means(), token_times()
    if not changes:
        return "not measured\n"

    def time(system: str, regime: str) -> str:
        if system in SAME_SHAPE:
            return "as the base"
        ratio = times.get((regime, system))
        return "not measured" if ratio is None else f"{ratio:.2f}x"

    rows = []
    for system, change in changes.items():
        learned = [f"{change['domain']:+.0%}", f"{change['general']:+.0%}"]
        rows.append([system, *learned, f"{change['recall']:.0%}"])
    ours = next(row for row in rows if row[0] == "base + memory")
    rows.insert(rows.index(ours) + 1, [DRAFTING, *["as above"] * 3])
    titles = ["", "perplexity, domain", "perplexity, general text", "fact recall"]
    return grid(
        [*titles, *(f"time per token, {regime}" for regime in REGIMES)],
        [[*row, *(time(row[0], regime) for regime in REGIMES)] for row in rows],
    )


def means() -> dict[str, dict[str, float]]:
    """Return each system's mean change of perplexity over DOMAINS, and its mean fact recall.

    The change is the geometric mean of the ratios to the base, less 1.
    """
    rows = [row for row in usual(read(RESULTS / "quality.csv")) if row["domain"] in DOMAINS]
    base = {row["domain"]: row for row in rows if row["system"] == "base"}

    def change(chosen: list[dict[str, str]], *texts: str) -> float:
        ratios = [float(r[text]) / float(base[r["domain"]][text]) for r in chosen for text in texts]
        return statistics.geometric_mean(ratios) - 1

    by_system = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        chosen = [row for row in rows if row["system"] == system]
        assert len(chosen) == len(DOMAINS), f"{system} was not measured in every domain"
        by_system[system] = {
            "domain": change(chosen, "perplexity"),
            "general": change(chosen, *GENERAL),
            "recall": statistics.mean(float(row["recall"]) for row in chosen if row["recall"]),
        }
    return by_system


def token_times() -> dict[tuple[str, str], float]:
    """Return (regime, system) -> time per token in the base's, of latency.py's last run."""
    rows = read(RESULTS / "latency.csv")
    return {
        (row["regime"], row["system"]): float(row["ratio"])
        for row in rows
        if row["timestamp"] == rows[-1]["timestamp"]
    }


def shown() -> str:
    """Return what the picture shows, as it is written into its description."""
    rounded = {
        system: {name: round(value, 4) for name, value in change.items()}
        for system, change in means().items()
    }
    times = {f"{regime}: {system}": ratio for (regime, system), ratio in token_times().items()}
    return json.dumps({"change": rounded, "time": times}, sort_keys=True)


def draw(path: Path) -> None:
    """Draw what systems learn and forget, and beside it what a token costs."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.hashsalt": "memdec", "font.size": 9, "svg.fonttype": "none"}
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 4), width_ratios=(3, 2), layout="constrained"
    )
    for system, change in means().items():
        x, y = 100 * change["domain"], 100 * change["general"]
        ours = "memory" in system
        left.plot(x, y, "o", color="C3" if ours else "C0", markersize=8 if ours else 6)
        below = y < 0 or system == "base + memory, CE only"  # where another label is above
        left.annotate(
            system, (x, y), xytext=(6, -12 if below else 5), textcoords="offset points",
            weight="bold" if ours else "normal",
        )  # fmt: skip
    left.axhline(0, color="grey", linewidth=0.8)
    left.set_xlim(-72, 14)
    left.set_ylim(bottom=-7)
    left.set_xlabel("perplexity on unseen text of the domain, change in %  (left: learned more)")
    left.set_ylabel("on general text, change in %  (up: forgot more)")
    times = {
        system: ratio for (regime, system), ratio in token_times().items() if regime == REGIMES[0]
    }
    names = [*times][::-1]
    colors = ["C3" if "memory" in name else "C0" for name in names]
    bars = right.barh(names, [times[name] for name in names], color=colors)
    right.bar_label(bars, fmt="%.2f", padding=3)
    right.margins(x=0.15)
    right.set_xlabel("time per token, batch 1, in the base's")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None, "Description": shown()})
    pyplot.close(figure)
