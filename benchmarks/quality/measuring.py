"""What the commands that measure domains of a pair share: their options, and where rows go."""

import argparse
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import provenance, replace_rows, rounded
from benchmarks.corpora import domains
from benchmarks.quality.domain import QUICK, SETTINGS, WORK, Domain, sizes_of
from benchmarks.quality.pair import add_options, chosen
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import load_settings

KEYS = ("domain", "pair", "budget")  # of a row: another of the same takes its place


def new_parser(description: str | None, default: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser with the options of all; default: the domains that are measured."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domains", nargs="+", default=list(default), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a fraction, to see that it works")
    parser.add_argument("--train-tokens", type=int, help="of each corpus; the rest in proportion")
    add_options(parser)
    return parser


def parsed(
    parser: argparse.ArgumentParser, known: Collection[str] = domains.DOMAINS
) -> argparse.Namespace:
    """Return the options that were given, the domains checked."""
    options = parser.parse_args()
    if wrong := [name for name in options.domains if name not in known]:
        parser.error(f"no such domain: {', '.join(wrong)}; known: {', '.join(known)}.")
    return options


def domains_of(options: argparse.Namespace) -> list[Domain]:
    """Return the domains of the options, in their sizes, beside the pair of the options."""
    try:
        pair = chosen(options)
    except ValueError as error:  # options that do not go together
        raise SystemExit(str(error)) from None
    settings, progress = load_settings(SETTINGS), Progress()
    return [
        Domain(
            name,
            pair,
            QUICK if options.quick else sizes_of(name, options.train_tokens),
            settings,
            progress,
        )
        for name in options.domains
    ]


def write(options: argparse.Namespace, table: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows to a table in place of their like; those of a quick run lie in build/."""
    path = WORK / f"quick-{table.name}" if options.quick else table
    replace_rows(path, rows, list(domains.DOMAINS), KEYS)


def measure(
    options: argparse.Namespace,
    table: Path,
    rows_of: Callable[[Domain], list[dict[str, Any]]],
    *packages: str,
) -> None:
    """Measure one domain after the other, and write and print its rows; the last line is JSON."""
    origin, rows = provenance("torch", "transformers", *packages), []
    for domain in domains_of(options):
        of_domain = [rounded(row) for row in rows_of(domain)]
        rows += of_domain
        for row in of_domain:
            print("  ".join(str(value) for value in row.values()), flush=True)
        write(options, table, [row | origin for row in rows])
    print(json.dumps({"benchmark": table.stem, "results": rows}))
