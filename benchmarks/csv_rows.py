"""Rows of the committed CSV files, and tables in Markdown."""

import csv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
USUAL = ("smollm2", "today")
RESULTS = ROOT / "benchmarks/results"


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, none if it is not there."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def usual(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows of quality.csv of the pair and budget that the first table shows."""
    return [row for row in rows if (row["pair"], row["budget"]) == USUAL]


def grid(titles: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
