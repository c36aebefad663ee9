"""What memdec wrote itself: nothing else is ever deleted, replaced or written over."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from vllm_memdec.errors import MemdecError

MANIFEST = "manifest.json"
PLAN = "plan.json"  # in a working folder: stage, settings and inputs of what it is to become
LOGS = "logs"
DIGESTS = "digests"  # in a working folder: hashes of its files, left by their writers
PLANNED = ("schema", "stage", "settings", "inputs")
PARTIAL, KEPT = ".partial", ".kept"
WRITTEN_BY = "written_by"  # the entry by which a JSON report is known as memdec's
PAGE = b'<meta name="generator" content="memdec">'  # the same in the head of an HTML page
CARD = "README.md"  # the model card that `memdec push` puts beside an export
# The line by which it is known as memdec's: who deletes it keeps a card of their own.
CARD_MARK = "<!-- memdec push writes this card anew: delete this line to keep what you change -->"
FILES, PLACES = "files.json", "places.npy"  # where a corpus's documents stood, see places.py
# All that memdec writes in logs/.
OF_LOGS = ("metrics.jsonl", "loss.png", "tensorboard", FILES, PLACES)


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if the file is absent or holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def is_ours(folder: Path, stage: str) -> bool:
    """Tell whether a stage wrote this folder: its manifest or plan parses and names the stage."""
    for name in (MANIFEST, PLAN):
        record = read_object(folder / name)
        if record and record.get("stage") == stage and all(key in record for key in PLANNED):
            return True
    # A kill before the plan was written leaves nothing else.
    return folder.is_dir() and all(p.match(f"{PLAN}.*.tmp") for p in folder.iterdir())


def check_ours(path: Path, stage: str) -> None:
    """Raise MemdecError if something lies where an artifact is to be, and no stage wrote it."""
    for place in (path, path.with_name(path.name + PARTIAL)):
        if (place.exists() or place.is_symlink()) and not is_ours(place, stage):
            raise MemdecError(
                f"{place} is in the way and holds no manifest or plan of memdec's {stage}, so it "
                "is left alone: move it elsewhere, or give another --output."
            )


def check_places(inputs: Iterable[tuple[str, str | Path | None]], output: Path) -> None:
    """Raise MemdecError if an input, given as (option, path), lies inside the output or around it.

    Links are followed: what counts is where the files are.
    """
    out = output.resolve()
    for option, given in inputs:
        if given is None:
            continue
        path = Path(given).resolve()
        if out == path:
            raise MemdecError(f"--output {output} is {option} itself: choose another folder.")
        if path.is_dir() and out.is_relative_to(path):
            raise MemdecError(
                f"--output {output} lies inside {option} {given}: choose a folder outside."
            )
        if path.is_relative_to(out):
            raise MemdecError(
                f"{option} {given} lies inside --output {output}, where memdec writes and "
                "deletes: choose another output."
            )


def strangers(folder: Path, files: Iterable[str]) -> Iterator[Path]:
    """Yield the files of an artifact's folder that memdec did not write; files: what it wrote."""
    known = set(files)
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        first, *rest = relative.parts
        ours = first in (DIGESTS, MANIFEST, PLAN) or path.match("*.????????.tmp")
        ours |= first == LOGS and rest[:1] != [] and rest[0] in OF_LOGS
        ours |= str(relative) == CARD and is_own_card(path)
        if (path.is_symlink() or not path.is_dir()) and not ours and str(relative) not in known:
            yield path


def same_content(one: Path, other: Path) -> bool:
    """Tell whether two files are there and hold the same bytes."""
    if not (one.is_file() and other.is_file() and one.stat().st_size == other.stat().st_size):
        return False
    return one.read_bytes() == other.read_bytes()


def retire(folder: Path, successor: Path, say: Callable[[str], None]) -> None:
    """Delete an artifact that its successor replaces; files of others are moved to NAME.kept.

    The manifest goes last: until then the folder can be known as ours, whenever this is killed.
    """
    files = (read_object(folder / MANIFEST) or {}).get("files", ())
    kept = [
        path
        for path in ([] if folder.is_symlink() else strangers(folder, files))
        if not same_content(path, successor / path.relative_to(folder))
    ]
    if kept:
        aside = unused(folder.with_name(folder.name + KEPT))
        for path in kept:
            place = aside / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
        names = ", ".join(sorted(str(p.relative_to(folder)) for p in kept)[:3])
        more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        say(f"{folder.name}: moved to {aside}, since it is no part of a build: {names}{more}")
    remove(folder, MANIFEST)


def remove(folder: Path, last: str) -> None:
    """Delete a folder of ours; the file by which it can be known goes last.

    Of a link to a folder only the link goes: somebody chose the place that it leads to.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    for path in folder.iterdir():
        if path.name == last:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.rmtree(folder)


def unused(path: Path) -> Path:
    """Return the path, or the first of path-2, path-3, ... at which nothing lies."""
    number, free = 1, path
    while free.exists() or free.is_symlink():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def is_own_card(path: Path) -> bool:
    """Tell whether memdec wrote a model card, and nobody has taken it over since."""
    return path.is_file() and CARD_MARK in path.read_text(encoding="utf-8", errors="replace")


def is_report(path: Path) -> bool:
    """Tell whether memdec wrote a report: its top level says so, or the head of the page."""
    if (read_object(path) or {}).get(WRITTEN_BY) == "memdec":
        return True
    with open(path, "rb") as file:
        return PAGE in file.read(300)


def check_report(path: Path | None, option: str = "--json") -> None:
    """Raise MemdecError if a report could not be written there, before minutes are spent on it.

    What lies there already is written over only if it is a report of memdec, too.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise MemdecError(f"{path.parent} is no folder: create it, or check {option}.")
    if path.is_dir():
        raise MemdecError(f"{path} is a folder: give {option} a file.")
    if {"stage", "files"} <= (read_object(path.parent / MANIFEST) or {}).keys():
        raise MemdecError(
            f"{path} would lie among the files of a build's stage: give {option} another place."
        )
    if path.exists() and not path.is_file():
        raise MemdecError(f"{path} is no regular file: give {option} another one.")
    if path.exists() and not is_report(path):
        raise MemdecError(
            f"{path} exists and is no report of memdec, so it is left alone: give {option} "
            "another file."
        )
