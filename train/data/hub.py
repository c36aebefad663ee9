"""Models and corpora of the Hugging Face hub: an id in place of a path is a snapshot's folder.

ORG/NAME, ORG/NAME@REVISION, or hf://datasets/ORG/NAME@REVISION/FOLDER. A path that is there wins.
A repository is downloaded, into the hub's own cache, before anything else is done, and from then on
it is a folder like any other; its place in the cache tells the repository and the commit.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_memdec.errors import MemdecError
from vllm_memdec.gate import FILE as GATE
from vllm_memdec.train.data.files import (
    CARDS,
    COMPRESSIONS,
    FORMATS,
    HIDDEN,
    TABLE,
    CorpusFiles,
    format_of,
    sorted_out,
)
from vllm_memdec.train.faults import FULL, HANDLES, NOT_ALLOWED, fault, reraise
from vllm_memdec.train.settings import Settings


def forbidden() -> bool:
    """Return whether the user's environment forbids to ask the hub."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


OFFLINE = forbidden()  # at the start: the command forbids it to all but this module
NAME = r"[A-Za-z0-9][\w.-]*"
ID = re.compile(
    rf"(?P<uri>hf:/+(?P<kind>models/|datasets/)?)?(?P<id>{NAME}(?:/{NAME})?)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[\w.+-]+))?(?:/(?P<path>.+))?"
)
SNAPSHOT = re.compile(r"(?:models|datasets)--(.+)/snapshots/([0-9a-f]{40})(?:/|$)")
CODES = ("*.model", "*.model.*", "*.tiktoken", "merges.txt", "*vocab*.txt")
# No licence, nor requirements of a repository.
MODEL = ("*.json", "*.jinja", "*.py", GATE, *CODES)
SAFE, PICKLED = "*.safetensors", "pytorch_model*.bin"
NOT_MODEL = ("*/*", "consolidated*")  # copies in other formats
WITH_TEXT = tuple(f"*{kind}{packed}" for kind in FORMATS for packed in ("", *COMPRESSIONS))
NOT_TEXT = (*CARDS, ".*", "*/.*")


def model_folder(given: str, option: str, say: Callable[[str], None], weights: bool = True) -> str:
    """Return the folder of a model: the path itself, or a hub repository's, downloaded if need be.

    weights: whether they are needed, too. Raises MemdecError, in one sentence, for a repository
    that cannot be had.
    """
    place = os.path.expanduser(given)
    match = None if os.path.lexists(place) else ID.fullmatch(given)
    if match is None or match["path"] or match["kind"] == "datasets/":
        return place
    if not match["uri"] and "/" not in match["id"]:
        return place  # a folder that is missed
    announce(option, given, say)
    folder = fetch(match, "model", option, [*MODEL, SAFE] if weights else [*MODEL], NOT_MODEL)
    if weights and not any(folder.glob(SAFE)):
        folder = fetch(match, "model", option, [*MODEL, PICKLED], NOT_MODEL)
    say(f"{option}: {origin(folder)}")
    return str(folder)


def text_path(given: Path, option: str, say: Callable[[str], None]) -> Path:
    """Return the path of text: itself, or a hub dataset's folder, downloaded if need be.

    Raises MemdecError, in one sentence, for a dataset that cannot be had.
    """
    place = given.expanduser()
    match = None if os.path.lexists(place) else ID.fullmatch(str(given))
    if match is None or match["kind"] == "models/":
        return place
    if not match["uri"] and (
        "/" not in match["id"] or match["path"] or format_of(place) in FORMATS
    ):
        return place  # a file or folder that is missed
    within = (match["path"] or "").strip("/")
    patterns = [f"{within}/{each}" for each in WITH_TEXT] + [within] if within else [*WITH_TEXT]
    announce(option, given, say)
    asked = check_listing(match, given, within, say)
    folder = fetch(match, "dataset", option, patterns, NOT_TEXT)
    say(f"{option}: {origin(folder)}" + (f", {within}" if within else ""))
    if not (folder / within).exists():
        raise MemdecError(f"{given} of the hub holds no text that is read: check {option}.")
    if not asked:
        there = sum(format_of(path) in FORMATS for path in (folder / within).rglob("*"))
        say(f"{option}: the hub was not asked if these {there} files of its cache are all")
    return folder / within


def announce(option: str, given: str | Path, say: Callable[[str], None]) -> None:
    """Say, before it takes its time, that something is asked of the hub."""
    if not OFFLINE:
        say(f"{option}: {given} of the Hugging Face hub; what its cache lacks is downloaded")


def check_listing(
    match: re.Match[str], given: Path, within: str, say: Callable[[str], None]
) -> bool:
    """Say what is left out of a dataset; MemdecError if that is most of it, before a download.

    Returns whether the hub could be asked.
    """
    from huggingface_hub import HfApi

    try:
        with asking():
            entries = HfApi().list_repo_tree(
                match["id"], recursive=True, revision=match["revision"], repo_type="dataset"
            )
            listed = [(Path(e.path), e.size) for e in entries if hasattr(e, "size")]
    except Exception:  # whatever it is, fetch() has a sentence for it
        return False
    files = [
        (path, size)
        for path, size in listed
        if (not within or path.is_relative_to(within)) and str(path) not in CARDS
        if not any(part.startswith(HIDDEN) for part in path.parts)
    ]
    if left_out := sorted_out(CorpusFiles(given), files).left_out():
        say(f"left out of {given}: {left_out} ({TABLE})")
    return True


def with_folders(settings: Settings, say: Callable[[str], None]) -> Settings:
    """Return the settings with the folders of the models that memory.init and so on name."""
    given = {"init": settings.memory.init, "tokenizer": settings.memory.tokenizer}
    folders = {
        name: model_folder(value, f"memory.{name}", say)
        for name, value in given.items()
        if value not in (None, "base")
    }
    return settings.changed({"memory": folders}) if folders else settings


def served(base: str) -> list[str]:
    """Return the words by which vLLM is given a base: its folder, or its id and revision."""
    known = origin(base)
    match = ID.fullmatch(known or base) if known or not os.path.lexists(base) else None
    if match is None:
        return [base]
    return [match["id"], *(["--revision", match["revision"]] if match["revision"] else [])]


def origin(path: str | Path) -> str | None:
    """Return ORG/NAME@COMMIT of a path in the hub's cache; None for any other."""
    match = SNAPSHOT.search(str(path))
    return f"{match[1].replace('--', '/')}@{match[2]}" if match else None


def fetch(
    match: re.Match[str], kind: str, option: str, patterns: list[str], left_out: tuple[str, ...]
) -> Path:
    """Return the snapshot's folder of a repository, with the files of some patterns in it."""
    from huggingface_hub import errors, snapshot_download

    name, revision = match["id"], match["revision"]
    wanted = f"{name}@{revision}" if revision else name
    missing = f"{option}: {wanted} is not there as a path"
    command = f"hf download {'--repo-type dataset ' if kind == 'dataset' else ''}{name}"
    command += f" --revision {revision}" if revision else ""
    try:
        with asking():
            folder = snapshot_download(
                name,
                repo_type=kind,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=[*left_out],
            )
        return Path(folder)
    except errors.GatedRepoError:
        what = f"its {kind} {name} is gated: accept its terms on its page, then `hf auth login`"
    except errors.RepositoryNotFoundError:
        what = f"it has no {kind} {name} that you may read: check {option}, or `hf auth login`"
    except errors.RevisionNotFoundError:
        what = f"its {kind} {name} has no revision {revision}: check {option}"
    except errors.HFValidationError:
        raise MemdecError(f"{missing}, nor can it be an id of the hub: check {option}.") from None
    except Exception as error:  # of the hub's library, of its HTTP library, or of the storage
        refused = fault(error)
        if refused is not None and refused.errno in (*FULL, *HANDLES, *NOT_ALLOWED):
            reraise(error)
        if OFFLINE:
            raise MemdecError(
                f"{missing}, and with HF_HUB_OFFLINE set the Hugging Face hub was not asked for "
                f"it: give a path, unset HF_HUB_OFFLINE, or run `{command}` first."
            ) from error
        raise MemdecError(
            f"{missing}, and the Hugging Face hub cannot be reached for it ({reason(error)}): give "
            f"a path, run `{command}` where there is a network, or set HF_ENDPOINT to a mirror."
        ) from error
    raise MemdecError(f"{missing}, and the Hugging Face hub was asked: {what}.")


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Let the hub's library use the network, unless the user's environment forbids it."""
    from huggingface_hub import constants

    before: Any = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = OFFLINE
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def reason(error: BaseException) -> str:
    """Return the kind of the first error of a chain: a text of it may name tokens and hosts."""
    while error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__
