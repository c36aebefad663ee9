"""The Dockerfile of the server, read: it is built where images can be had, which is not here."""

import ast
import json
import re
from pathlib import Path

from test_packaging import SOURCES

from vllm_memdec.plugin import BELOW, OLDEST

ROOT = Path(__file__).parent.parent
PATH = ROOT / ".github/Dockerfile"
KNOWN = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT"}


def read(text: str) -> list[tuple[str, str]]:
    """Return (instruction, arguments) of a Dockerfile, lines that go on joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


INSTRUCTIONS = read(PATH.read_text())


def of(name: str) -> list[str]:
    """Return the arguments of all instructions of a name, in order."""
    return [given for each, given in INSTRUCTIONS if each == name]


def test_it_is_made_of_known_instructions():
    assert INSTRUCTIONS[0][0] == "FROM" and {name for name, _ in INSTRUCTIONS} <= KNOWN


def test_its_images_have_fixed_tags_and_a_vllm_that_is_served():
    images = [given.split()[0] for given in of("FROM")]
    assert all(re.fullmatch(r"[\w/-]+:v?\d[\w.-]*", image) for image in images)
    major, minor = re.fullmatch(r"vllm/vllm-openai:v(\d+)\.(\d+)\.\d+", images[-1]).groups()
    assert OLDEST <= (int(major), int(minor)) < BELOW


def test_the_wheel_has_all_its_sources():
    copied = [path for given in of("COPY") for path in given.split()[:-1]]
    assert sorted(copied) == sorted(SOURCES)
    assert all((ROOT / path).exists() for path in copied)
    for given in of("COPY"):  # a folder's content goes where the folder is named
        *sources, target = given.split()
        assert target == "./" or [target] == sources


def test_the_install_changes_nothing_else_and_finds_the_plugin():
    [install] = [given for given in of("RUN") if "pip install" in given]
    assert "--no-deps /wheels/*.whl" in install and "from=wheel" in install
    code = re.search(r'python3 -c "(.*)"', install)[1]
    ast.parse(code)
    exec(code)  # here the plugin is installed as well


def test_it_serves_as_vllm_does_and_not_as_root():
    assert json.loads(of("ENTRYPOINT")[-1]) == ["vllm", "serve"]
    assert of("USER") == ["2000:0"] and "--owner 2000" in of("RUN")[-1]
    [home] = of("ENV")
    assert home == "HF_HOME=/cache HOME=/cache" and of("RUN")[-1].endswith("/cache")
