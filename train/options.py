"""Options that several commands of `memdec` have."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vllm_memdec.train.data.readers import TEXT, Fields
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
Served = Annotated[Path, typer.Option(help="Folder of a base that it serves.")]
Alpha = Annotated[float | None, typer.Option(help="Weight of the memory; default: its own.")]
Texts = Annotated[list[Path], typer.Option(help="Text to read. May be given several times.")]
ContextTokens = Annotated[
    int | None,
    typer.Option(
        min=32,
        help="Tokens of the longest contexts; default: as many as the text fills, up to 4096.",
    ),
]
TextField = Annotated[
    str | None,
    typer.Option(
        "--text-field",
        metavar="NAME",
        help="Field of the rows that holds the text, a.b within a; default: text.",
    ),
]


def fields(text_field: str | None) -> Fields:
    """Return the fields that are read where no settings are."""
    return TEXT if text_field is None else Fields(text_field)


def with_text_field(assignments: Sequence[str] | None, name: str | None) -> list[str]:
    """Return the values of --set, and what --text-field sets."""
    given = [] if name is None else [f"corpus.text_field={json.dumps(name)}"]
    return [*(assignments or ()), *given]
