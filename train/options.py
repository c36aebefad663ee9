"""Options that several commands of `memdec` have."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.hub import model_folder, text_path
from vllm_memdec.train.data.readers import TEXT, Fields
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.trust import allow_code

Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that a model's folder brings with it.",
        callback=allow_code,  # holds for all that the command loads
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="STAGE.NAME=VALUE",
        help="A setting, such as memory.epochs=3; wins over --config. May be given several times.",
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write a report there.")]
Memory = Annotated[Path, typer.Argument(help="Folder of the memory: a build's export/.")]
Memories = Annotated[
    list[Path],
    typer.Argument(
        metavar="MEMORY...",
        help="Folder of the memory: a build's export/. Of several the gates are trained together.",
    ),
]
Served = Annotated[Path, typer.Option(help="Folder of a base that it serves.")]
Alpha = Annotated[float | None, typer.Option(help="Weight of the memory; default: its own.")]
Texts = Annotated[list[Path], typer.Option(help="Text to read. May be given several times.")]
DomainTexts = Annotated[
    list[Path],
    typer.Option(
        help="Text of its domain that it has not learnt. May be given several times; for several "
        "memories one for each, in their order."
    ),
]
GeneralTexts = Annotated[
    list[Path],
    typer.Option(
        help="Text of all other kinds, some ten thousand tokens. May be given several times."
    ),
]
LearntTexts = Annotated[
    list[Path] | None,
    typer.Option(
        help="Text that it has learnt: without it, memorised facts would be doubted. As --domain."
    ),
]
ContextTokens = Annotated[
    int | None,
    typer.Option(
        min=32,
        help="Tokens of the longest contexts; default: as many as the text fills, up to 4096.",
    ),
]
Sources = Annotated[
    Path | None,
    typer.Option(metavar="BUILD", help="The memory's build: show where its tokens come from."),
]
Update = Annotated[
    Path | None,
    typer.Option(help="Folder of a build whose corpus became this one: what stays is kept."),
]
Work = Annotated[
    Path | None,
    typer.Option(help="Folder for a sample, removed after: on a cluster, one that nodes share."),
]
KeysBase = Annotated[str | None, typer.Option(help="The base of that build, if --base is another.")]
TextField = Annotated[
    str | None,
    typer.Option(
        "--text-field",
        metavar="NAME",
        help="Field of the rows that holds the text, a.b within a; default: text.",
    ),
]


UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
MIN_BUDGET = 64 * 2**20


def parse_bytes(text: str, option: str) -> int:
    """Return the number of bytes that a text such as 4GiB, 500MB or 1000000 stands for."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmg]?i?)b?", text.strip().lower())
    if not match or match[2] not in UNITS:
        raise MemdecError(f"{option} must be a size such as 4GiB or 500MB, got {text!r}.")
    size = int(float(match[1]) * UNITS[match[2]])
    if size < MIN_BUDGET:
        raise MemdecError(f"{option} must be at least 64MiB, got {text!r}.")
    return size


def base_folder(base: Path, progress: Progress) -> Path:
    """Return the folder of --base, which may name a repository of the hub."""
    return Path(model_folder(str(base), "--base", progress.say))


def served_folders(memory: Path, base: Path, progress: Progress) -> tuple[str, str]:
    """Return the folders of a memory and its base, which may name repositories of the hub."""
    return (
        model_folder(str(memory), "MEMORY", progress.say),
        str(base_folder(base, progress)),
    )


def text_paths(paths: Sequence[Path], option: str, progress: Progress) -> list[Path]:
    """Return the places of texts, which may name datasets of the hub."""
    return [text_path(path, option, progress.say) for path in paths]


def fields(text_field: str | None) -> Fields:
    """Return the fields that are read where no settings are."""
    return TEXT if text_field is None else Fields(text_field)


def with_text_field(assignments: Sequence[str] | None, name: str | None) -> list[str]:
    """Return the values of --set, and what --text-field sets."""
    given = [] if name is None else [f"corpus.text_field={json.dumps(name)}"]
    return [*(assignments or ()), *given]
