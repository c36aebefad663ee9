"""Show the tables of the READMEs, made from committed CSV files; --readme puts them into the pages.

    python -m benchmarks.tables [--readme]

A table goes wherever a page has its marks: <!-- NAME --> and <!-- /NAME -->.
"""

import argparse
import ast
import functools
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import csv_rows, memory_tables, overview, pair_tables
from benchmarks.csv_rows import RESULTS, ROOT, grid, read
from benchmarks.speed import paper

PAGES = ("README.md", "benchmarks/README.md", "vllm_memdec/README.md", "train/README.md")
FEATURES = ROOT / "tests/serving/features.csv"
BASES = ROOT / "vllm_memdec/bases.csv"


def features() -> str:
    """Return what `make features` found, what works first."""
    rows = sorted(read(FEATURES), key=lambda row: row["status"] != "works")
    columns = {"feature": "feature", "status": "status", "with drafts": "drafts", "note": "note"}
    return grid([*columns], [[row[name] for name in columns.values()] for row in rows])


def bases() -> str:
    """Return what `make bases` found of each base."""
    return grid(
        ["base", "architecture", "kind", "error", "drafts", "note", "on a CPU"],
        [
            [
                row["name"],
                row["architecture"],
                row["kind"],
                f"{float(row['error']):.0e} in {row['dtype']}",
                row["drafts"],
                row["note"],
                row["on_cpu"],
            ]
            for row in read(BASES)
        ],
    )


def quality() -> str:
    """Return what the usual pair gives: perplexity by domain, general text, and fact recall."""
    return of_pair(csv_rows.usual(read(RESULTS / "quality.csv")))


def pairs() -> str:
    """Return the same of each other pair and budget."""
    rows = read(RESULTS / "quality.csv")
    kinds = dict.fromkeys((r["pair"], r["budget"]) for r in rows if r not in csv_rows.usual(rows))
    return (
        "\n".join(
            of_pair([row for row in rows if (row["pair"], row["budget"]) == kind], f"{kind[0]}: ")
            for kind in kinds
        )
        or "not measured\n"
    )


def of_pair(rows: list[dict[str, str]], title: str = "") -> str:
    """Return the tables of the rows of one pair."""
    if not rows:
        return "not measured\n"
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    fullest = max(domains, key=lambda domain: sum(row["domain"] == domain for row in rows))
    systems = [row["system"] for row in rows if row["domain"] == fullest]
    by_system = {(row["domain"], row["system"]): row for row in rows}
    base = {domain: by_system[domain, systems[0]] for domain in domains}

    def shown(cell: Callable[[dict[str, str]], str], domain: str, system: str) -> str:
        row = by_system.get((domain, system))
        return "not measured" if row is None else cell(row)

    def own(row: dict[str, str]) -> str:
        change = f" ({float(row['change']):+.0%})" if float(row["change"]) else ""
        return f"{float(row['perplexity']):.2f}{change}"

    def general(row: dict[str, str]) -> str:
        changes = [
            float(row[text]) / float(base[row["domain"]][text]) - 1 for text in ("wiki", "brown")
        ]
        return " / ".join(f"{change:+.0%}" for change in changes)

    def recall(row: dict[str, str]) -> str:
        return f"{float(row['recall']):.0%}" if row["recall"] else "-"

    def in_other_words(row: dict[str, str]) -> str:
        cell = row["recall_question"]
        return f"{float(cell):.0%}" if cell else "not measured"

    asked = [domain for domain in domains if base[domain]["facts"]]
    parts = [
        (f"{title}perplexity on unseen text of the domain", domains, own),
        (f"{title}change on general text, Wikipedia / Brown", domains, general),
    ]
    if asked:
        parts.append((f"{title}fact recall, facts of the corpus", asked, recall))
    if any(row["recall_question"] for row in rows):
        parts.append((f"{title}the same facts, asked in other words", asked, in_other_words))
    return "\n".join(
        grid(
            [title, *chosen],
            [[system, *(shown(cell, domain, system) for domain in chosen)] for system in systems],
        )
        for title, chosen, cell in parts
    )


def latency() -> str:
    """Return what a token costs, relative to the base, by the last run on each device."""
    rows = read(RESULTS / "latency.csv")
    last = {(row["device"], row["models"]): row["timestamp"] for row in rows}
    lines = [] if rows else ["not measured\n"]
    for (device, models), timestamp in last.items():
        run = (device, models, timestamp)
        chosen = [r for r in rows if (r["device"], r["models"], r["timestamp"]) == run]
        regimes = list(dict.fromkeys(row["regime"] for row in chosen))
        by_system = {(row["regime"], row["system"]): row for row in chosen}
        systems = list(dict.fromkeys(row["system"] for row in chosen))

        def cell(row: dict[str, str] | None) -> str:
            if row is None:
                return ""
            between = f"{float(row['ratio_min']):.2f}-{float(row['ratio_max']):.2f}"
            return f"{float(row['ratio']):.2f}x ({between}), {float(row['token_ms']):.1f} ms"

        lines.append(
            grid(
                [f"time per token: {models}, {device}", *regimes, "the paper's"],
                [
                    [system, *(cell(by_system.get((regime, system))) for regime in regimes)]
                    + [f"{paper.RATIOS[system]:.2f}x" if system in paper.RATIOS else ""]
                    for system in systems
                ],
            )
        )
    return "\n".join(lines)


def speculation() -> str:
    """Return what drafting with the memory brings: greedy times, and what formulas say at T = 1."""
    rows = read(RESULTS / "speculation.csv")
    last = {(row["device"], row["temperature"]): row["timestamp"] for row in rows}
    lines = [] if rows else ["not measured\n"]
    for device in dict.fromkeys(device for device, _ in last):
        mine = (row for row in rows if row["device"] == device)
        chosen = [r for r in mine if last[device, r["temperature"]] == r["timestamp"]]
        greedy = [r for r in chosen if not float(r["temperature"])]
        by_system = {(f"{r['text']}, batch {r['batch']}", r["system"]): r for r in greedy}
        columns = list(dict.fromkeys(column for column, _ in by_system))

        def cell(row: dict[str, str]) -> str:
            between = f"{float(row['ratio_min']):.2f}-{float(row['ratio_max']):.2f}"
            return f"{float(row['ratio']):.2f}x ({between})"

        lines.append(
            grid(
                [f"greedy, {device}", *columns],
                [
                    [system, *(cell(by_system[column, system]) for column in columns)]
                    for system in dict.fromkeys(system for _, system in by_system)
                ],
            )
        )
        titles = ("alpha", "drafts", "acceptance", "alpha + (1 - alpha) o",
                  "acceptance by position", "tokens per step", "draft cost", "verify cost",
                  "predicted", "measured", "error")  # fmt: skip
        predicted = [row for row in chosen if row["predicted"]]
        lines.append(
            grid(
                list(titles),
                [
                    [
                        row["alpha"],
                        row["system"].removesuffix(" drafts"),
                        *(f"{float(row[name]):.2f}" for name in ("acceptance", "bound")),
                        row["accepted_by_position"],
                        *(f"{float(row[name]):.2f}" for name in ("tokens_a_step", "c", "v")),
                        f"{float(row['predicted']):.2f}x",
                        f"{float(row['ratio']):.2f}x",
                        f"{float(row['ratio']) / float(row['predicted']) - 1:+.0%}",
                    ]
                    for row in predicted
                ],
            )
        )
    return "\n".join(lines)


def demo() -> str:
    """Return what the demo measured."""
    systems = ("base", "memory", "base + memory", "kNN-LM")
    rows = read(RESULTS / "demo.csv")
    return grid(
        ["", *systems],
        [[row["what"], *(row[system] or "not measured" for system in systems)] for row in rows],
    )


def scale() -> str:
    """Return what index, search and targets cost, by number of keys and kind of index."""
    rows = read(RESULTS / "scale.csv")
    rows.sort(key=lambda row: ("PQ" not in row["kind"], int(row["keys"])))
    titles = ("keys", "index", "parts", "index, s/M keys", "search, s/M queries",
              "targets, s/M rows", "search, ns/key visited", "peak ram, GB", "files open",
              "recall@64", "commit")  # fmt: skip

    def largest(row: dict[str, str], of: str) -> float:
        return max(float(row[f"{part}_{of}"] or 0) for part in ("index", "search", "targets"))

    return grid(
        list(titles),
        [
            [
                f"{int(row['keys']) / 1e6:g} M",
                row["kind"],
                row["parts"],
                *(
                    f"{float(row[f'{part}_s_per_million']):.0f}"
                    for part in ("index", "search", "targets")
                ),
                f"{float(row['search_ns_a_key']):.0f}",
                f"{largest(row, 'ram_mb') / 1000:.2f}",
                f"{largest(row, 'files'):.0f}",
                f"{float(row['recall_at_64']):.2f}" if row["recall_at_64"] else "not measured",
                row["commit"],
            ]
            for row in rows
        ],
    )


def modules(folder: str, place: str = "") -> str:
    """Return the modules of a folder, and what each is for: the first sentence of its docstring.

    place: of the folder, seen from the page.
    """
    root = ROOT / folder
    rows = []
    for path in sorted(root.rglob("*.py"), key=lambda p: (p.parent != root, p.parts)):
        inside = path.relative_to(root)
        if path.name == "__init__.py" or (folder == "vllm_memdec" and inside.parts[0] in LINKED):
            continue
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text, f"{path} has no docstring"
        rows.append([f"[{inside}]({place}{inside})", text.split("\n\n")[0].replace("\n", " ")])
    return grid(["module", "what it is for"], rows)


LINKED = ("kernels", "train")  # folders of the repository, installed inside vllm_memdec
TABLES: dict[str, Callable[[], str]] = {
    "overview": overview.overview,
    "demo": demo,
    "scale": scale,
    "serving modules": functools.partial(modules, "vllm_memdec"),
    "kernel modules": functools.partial(modules, "kernels", "../kernels/"),
    "compiling modules": functools.partial(modules, "train"),
    "benchmark modules": functools.partial(modules, "benchmarks"),
    "features": features,
    "bases": bases,
    "quality": quality,
    "pairs": pairs,
    "recall": pair_tables.recall,
    "plug and play": pair_tables.plug_and_play,
    "tasks": pair_tables.tasks,
    "ablation": memory_tables.ablation,
    "gating": memory_tables.gating,
    "together": memory_tables.together,
    "context": memory_tables.context,
    "update": memory_tables.update,
    "sources": memory_tables.sources,
    "latency": latency,
    "speculation": speculation,
}


def block(name: str) -> re.Pattern:
    """Return what matches a table between its marks in a page."""
    return re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)


def pages() -> list[Path]:
    """Return the pages that are there."""
    return [ROOT / page for page in PAGES if (ROOT / page).exists()]


def filled(text: str, tables: dict[str, str]) -> str:
    """Return a page with these tables between their marks; those it has no marks for stay out."""
    for name, table in tables.items():
        text = block(name).sub(lambda _, table=table: table, text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--readme", action="store_true", help="write the tables into the pages, and draw"
    )
    options = parser.parse_args()
    tables = {name: make() for name, make in TABLES.items()}
    print("\n".join(tables.values()))
    if options.readme:
        for page in pages():
            page.write_text(filled(page.read_text(), tables))
        overview.draw(overview.PICTURE)


if __name__ == "__main__":
    main()
