"""The command `memdec push`: its options, and what they mean for push.py."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_memdec.train.explained import explained
from vllm_memdec.train.progress import Progress


def push(
    export: Annotated[Path, typer.Argument(help="Folder of the memory: a build's export/.")],
    repo: Annotated[str, typer.Argument(help="Repository of the Hugging Face hub: ORG/NAME.")],
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME", help="The base's id on the hub; default: where the build had it."
        ),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="The memory's licence, as the hub spells it: apache-2.0.")
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(help="Language of the corpus: en. May be given several times."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, if it is new.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to, made if need be; default: main.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the card, list the files, upload nothing.")
    ] = False,
) -> None:
    """Upload a memory to the Hugging Face hub, with a model card: README.md in its folder."""
    progress = Progress()
    with explained(progress):
        from vllm_memdec.train.sharing import push as pushing
        from vllm_memdec.train.sharing.card import Naming

        languages = tuple(language or ())
        naming = Naming(repo, revision, base_model, license, languages)
        pushing.push(export.expanduser(), naming, private, dry_run, progress)
