"""Tables of what memories and their gates are worth: gates, context, updates, objectives."""

from benchmarks.csv_rows import RESULTS, grid, read

GENERAL = ("wiki", "brown")  # texts of no domain in together.csv
WHO = ("base", "memory", "mixture")  # of whom update.csv has the recall
# Names of rows in gating.csv, and the field's words for them.
SHOWN = {
    "perplexity, both in turn": "perplexity, mixed stream",
    "facts said by heart": "fact recall",
}


def gating() -> str:
    """Return what gates give beside fixed weights, by what was measured."""
    rows = read(RESULTS / "gating.csv")
    if not rows:
        return "not measured\n"

    def cell(row: dict[str, str], system: str) -> str:
        if not row[system]:
            return ""
        value, base = float(row[system]), float(row["base"] or 0)
        if not row["what"].startswith("perplexity"):
            return f"{value:.1%}"
        return f"{value:.2f}" + (f" ({value / base - 1:+.1%})" if system != "base" else "")

    return grid(
        ["", "", "of", "base", "fixed alpha", "gate", "gate trained with that base"],
        [
            [
                row["domain"],
                SHOWN.get(row["what"], row["what"]),
                row["count"],
                cell(row, "base"),
                f"{cell(row, 'fixed')} at {float(row['alpha']):.2f}" if row["alpha"] else "",
                cell(row, "gate"),
                cell(row, "own_gate"),
            ]
            for row in rows
        ],
    )


def together() -> str:
    """Return what gates of several memories give that decide together, beside an oracle."""
    rows = read(RESULTS / "together.csv")
    if not rows:
        return "not measured\n"

    def cell(row: dict[str, str], system: str) -> str:
        value, oracle = float(row[system]), float(row["oracle"])
        return f"{value:.2f} ({value / oracle - 1:+.1%})"

    titles = ["", "tokens", "base", "oracle", "gates as they are", "with offsets"]
    return grid(
        [*titles, "trained together", "own gate alone, after"],
        [
            [
                row["text"],
                row["tokens"],
                f"{float(row['base']):.2f}",
                f"{float(row['oracle']):.2f}",
                *(cell(row, system) for system in ("as_they_are", "offsets", "together")),
                "" if row["text"] in GENERAL else cell(row, "alone"),
            ]
            for row in rows
        ],
    )


def context() -> str:
    """Return what base, mixture and gate give by the length of the context."""
    rows = read(RESULTS / "context.csv")
    if not rows:
        return "not measured\n"

    def cell(row: dict[str, str], system: str) -> str:
        value, base = float(row[system]), float(row["base"])
        return f"{value:.2f}" + (f" ({value / base - 1:+.1%})" if system != "base" else "")

    titles = ["", "context", "tokens", "base", "one alpha", "alpha by context", "gate"]
    return grid(
        [*titles, "best alpha"],
        [
            [
                f"{row['domain']}, {row['text']}",
                f"{row['from']}-{row['to']}",
                row["tokens"],
                *(cell(row, system) for system in ("base", "fixed", "mixture", "gate")),
                f"{float(row['best_alpha']):.2f}",
            ]
            for row in rows
        ],
    )


def update() -> str:
    """Return what an update costs and is worth beside a build of the same documents."""
    rows = read(RESULTS / "update.csv")
    if not rows:
        return "not measured\n"
    # An update, and a build from scratch of the same documents.
    afresh = {row["documents"]: row for row in reversed(rows) if row["build"].startswith("built")}

    def share(row: dict[str, str], name: str, spelled: str) -> str:
        value, other = float(row[name]), float(afresh[row["documents"]][name])
        return f"{value:{spelled}}" + (f" ({value / other:.0%})" if other != value else "")

    def recall(row: dict[str, str], kind: str) -> str:
        return " / ".join(f"{float(row[f'{kind}_{who}']):.0%}" for who in WHO)

    own, others = rows[0]["tenth_facts"], rows[0]["rest_facts"]
    return grid(
        [
            "",
            "blocks embedded",
            "blocks trained on",
            "TFLOP",
            "seconds",
            "perplexity of the mixture",
            f"{own} facts of the tenth: {', '.join(WHO)}",
            f"{others} other facts",
        ],
        [
            [
                row["build"],
                share(row, "embedded", ".0f"),
                share(row, "trained", ".0f"),
                share(row, "tflop", ".1f"),
                share(row, "seconds", ".0f"),
                share(row, "perplexity", ".2f"),
                recall(row, "tenth"),
                recall(row, "rest"),
            ]
            for row in rows
        ],
    )


def ablation() -> str:
    """Return what each arm gave at the same training FLOPs, and at half of them."""
    rows = read(RESULTS / "ablation.csv")
    if not rows:
        return "not measured\n"
    titles = ["domain, tokens", "arm", "dtype", "training TFLOP", "epochs", "memory alone"]
    return grid(
        [*titles, "base + memory (alpha)", "hard tokens", "healed once, TFLOP", "wall"],
        [
            [
                f"{row['domain']}, {int(row['train_tokens']):,} (base {float(row['base']):.1f})",
                row["title"],
                row["dtype"],
                f"{float(row['tflop']):.1f}",
                f"{float(row['epochs']):.1f}",
                f"{float(row['memory']):.1f}",
                f"{float(row['mixture']):.2f} ({float(row['alpha']):.2f})",
                f"{float(row['hard']):.3f}",
                f"{float(row['seed_tflop']):.0f}" if row["seed_tflop"] else "",
                f"{float(row['seconds']):.0f} s",
            ]
            for row in rows
        ],
    )


def sources() -> str:
    """Return how often the document that states a fact is among its sources, by run."""

    def share(row: dict[str, str], part: str, whole: str) -> str:
        return f"{int(row[part]) / int(row[whole]):.0%} of {row[whole]}" if int(row[whole]) else "-"

    titles = ["tokens of the value", "facts", "the first source", "single tokens", "first tokens"]
    return grid(
        [*titles, "the memory's epochs", "keys by", "commit"],
        [
            [
                row["tokens of the value"],
                share(row, "facts_found", "facts"),
                share(row, "facts_found_first", "facts"),
                share(row, "tokens_found", "tokens"),
                share(row, "first_tokens_found", "first_tokens"),
                f"{float(row['memory epochs']):g}",
                row["datastore dtype"],
                row["commit"],
            ]
            for row in read(RESULTS / "sources.csv")
        ],
    )
