"""Show what `make features` found, as a Markdown table; --readme puts it into README.md.

python benchmarks/features.py [--readme]
"""

import argparse
import csv
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests/serving/features.csv"
README = ROOT / "README.md"
BLOCK = re.compile(r"(?<=<!-- features -->\n).*?(?=<!-- /features -->)", re.DOTALL)


def read() -> list[dict[str, str]]:
    """Return the rows of the CSV; keys feature, status, note."""
    with open(TABLE, newline="") as file:
        return list(csv.DictReader(file))


def markdown(rows: list[dict[str, str]]) -> str:
    """Return the table, what works first."""
    lines = ["| feature | status | note |", "|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["status"] != "works"):
        lines.append(f"| {row['feature']} | {row['status']} | {row['note']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="replace the table in README.md")
    table = markdown(read())
    if parser.parse_args().readme:
        README.write_text(BLOCK.sub(lambda _: table, README.read_text()))
    print(table, end="")


if __name__ == "__main__":
    main()
