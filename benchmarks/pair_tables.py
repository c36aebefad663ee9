"""Tables of the pairs of base and memory: recall over budgets, one memory for two bases, tasks."""

import itertools
import statistics

from benchmarks.csv_rows import RESULTS, grid, read

PHRASINGS = ("original", "question")
MEMORY = "base + memory"


def share(cell: str) -> str:
    """Return a share in percent, a dash where nothing was asked."""
    return f"{float(cell):.0%}" if cell else "-"


def curve(rows: list[dict[str, str]]) -> tuple[list[tuple[float, float]], float]:
    """Return the memory's recall by epochs, the mean over domains of one pair, and RAG's best.

    The last pair that was measured counts. Epochs differ a little by domain: their mean counts.
    """
    if not rows:
        return [], 0.0
    last = max(rows, key=lambda row: row["timestamp"])
    mine = [r for r in rows if (r["pair"], r["budget"]) == (last["pair"], last["budget"])]
    by_domain = {
        name: [(float(r["epochs"]), float(r["original"])) for r in of if r["system"] == MEMORY]
        for name, of in grouped(mine)
    }
    points = [
        tuple(round(statistics.mean(values), 4) for values in zip(*of, strict=True))
        for of in zip(*by_domain.values(), strict=True)
    ]
    best = [
        max(float(r["original"]) for r in of if r["system"].startswith("RAG"))
        for _, of in grouped(mine)
    ]
    return points, round(statistics.mean(best), 4)


def grouped(rows: list[dict[str, str]]) -> list[tuple[str, list[dict[str, str]]]]:
    """Return the rows of each domain."""
    names = dict.fromkeys(row["domain"] for row in rows)
    return [(name, [row for row in rows if row["domain"] == name]) for name in names]


def passes(rows: list[dict[str, str]], phrasing: str) -> str:
    """Return after how many epochs the memory recalls as much as RAG's best row, in words."""
    memory = sorted((float(r["epochs"]), float(r[phrasing])) for r in rows if r["system"] == MEMORY)
    rag = max(float(r[phrasing]) for r in rows if r["system"].startswith("RAG"))
    for (before, low), (after, high) in itertools.pairwise([(0.0, 0.0), *memory]):
        if high >= rag:
            epochs = before + (after - before) * max(0.0, rag - low) / max(high - low, 1e-9)
            return f"{epochs:.3g} epochs"
    return f"not within {memory[-1][0]:.3g} epochs"


def recall() -> str:
    """Return fact recall by system and budget, in both phrasings."""
    rows = read(RESULTS / "recall.csv")
    if not rows:
        return "not measured\n"
    lines = [
        [
            f"{row['domain']}, {row['pair']}",
            row["system"],
            *((f"{float(row['epochs']):.3g}", row["tflop"]) if float(row["epochs"]) else ("", "")),
            *(share(row[phrasing]) for phrasing in PHRASINGS),
        ]
        for row in rows
    ]
    for pair, budget in dict.fromkeys((row["pair"], row["budget"]) for row in rows):
        of_pair = [row for row in rows if (row["pair"], row["budget"]) == (pair, budget)]
        for name, of_domain in grouped(of_pair):
            where = [passes(of_domain, phrasing) for phrasing in PHRASINGS]
            lines.append([f"{name}, {pair}", "the memory passes RAG at", "", "", *where])
    titles = ["", "", "epochs", "TFLOP", "facts recalled", "asked in other words"]
    return grid(titles, lines)


def plug_and_play() -> str:
    """Return what one memory gives beside two bases."""
    rows = read(RESULTS / "plug_and_play.csv")
    if not rows:
        return "not measured\n"
    titles = ["", "base", "", "M weights", "perplexity", "Wikipedia", "Brown", "facts"]
    return grid(
        [*titles, "in other words", "vLLM off by"],
        [
            [
                row["domain"],
                row["base"],
                row["system"],
                f"{int(row['weights']) / 1e6:,.0f}",
                *(f"{float(row[text]):.2f}" for text in ("perplexity", "wiki", "brown")),
                *(share(row[phrasing]) for phrasing in PHRASINGS),
                f"{float(row['gap']):.3f}" if row["gap"] else "",
            ]
            for row in rows
        ],
    )


def tasks() -> str:
    """Return the shares of right answers to questions of several choices."""
    rows = read(RESULTS / "tasks.csv")
    if not rows:
        return "not measured\n"
    kinds = list(dict.fromkeys((row["domain"], row["pair"], row["task"]) for row in rows))
    found = {(row["domain"], row["pair"], row["task"], row["system"]): row for row in rows}
    systems = dict.fromkeys(row["system"] for row in rows)
    return grid(
        ["", *(f"{task}, {domain} ({pair})" for domain, pair, task in kinds)],
        [
            [system, *(share(found[*kind, system]["accuracy"]) for kind in kinds)]
            for system in systems
        ],
    )
