"""An artifact: a folder that one stage wrote whole, with a manifest of how it came to be.

A stage works in `NAME.partial/` and the folder gets its name `NAME/` only when everything in it
is on disk, so a folder without `.partial` is complete by construction. The manifest's hash covers
stage, settings, inputs and every file's content: equal hashes mean equal results. Files under
`logs/` (curves, timings) are for people and stay out of the hash.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vllm_memdec.checkpoint import json_text
from vllm_memdec.errors import MemdecError
from vllm_memdec.gate import FILE as GATE
from vllm_memdec.train.data.completeness import check_there
from vllm_memdec.train.data.ownership import (
    CARD,
    DIGESTS,
    LOGS,
    MANIFEST,
    PARTIAL,
    PLAN,
    WRITTEN_BY,
    check_ours,
    read_object,
    remove,
    retire,
)
from vllm_memdec.train.heap import trim_heap

SCHEMA = 1
NOT_KEPT = (".pt",)  # checkpoints: gone before a stage is sealed
HASHED = ("schema", "stage", "settings", "inputs", "files")  # a manifest's entries in its hash
# How storage without locks refuses one.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP)
PACKAGES = ("vllm-memdec", "torch", "transformers", "faiss-cpu", "faiss-gpu", "numpy")


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its folder and its parsed manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def hash(self) -> str:
        return self.manifest["hash"]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def folder_sha256(folder: Path, patterns: tuple[str, ...]) -> str:
    """Return one hash over names and contents of the files in a folder that match the patterns."""
    files = sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()})
    return json_sha256([[p.name, file_sha256(p)] for p in files])


class Hashing:
    """A file that is written to, and the SHA-256 of all that was."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)


def write_hashed(path: Path, write: Callable[[Hashing], Any]) -> None:
    """Call write(open file), then give the file its name: it is whole or absent."""

    def write_file(temporary: Path) -> str:
        with open(temporary, "wb") as file:
            hashing = Hashing(file)
            write(hashing)
        return hashing.sha256.hexdigest()

    _write_whole(path, write_file)


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Call write(temporary path), then give the file its name: it is whole or absent.

    For libraries that write to a path: what they wrote is read back once for its hash, by the
    process that has it in cache.
    """

    def write_file(temporary: Path) -> str | None:
        write(temporary)
        kept = is_working_folder(path.parent) and path.suffix not in NOT_KEPT
        return file_sha256(temporary) if kept else None

    _write_whole(path, write_file)


def _write_whole(path: Path, write: Callable[[Path], str | None]) -> None:
    """Call write(temporary path), which returns the file's hash; give the file its name."""
    # A name of its own: a lost worker that still lives may be writing the same file.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        digest = write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if digest and is_working_folder(path.parent):
            _leave_digest(path, temporary.stat().st_size, digest)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    os.replace(temporary, path)


def is_working_folder(folder: Path) -> bool:
    """Tell whether a stage is at work in a folder: its files will be sealed."""
    return (folder / PLAN).exists()


def _leave_digest(path: Path, size: int, digest: str) -> None:
    """Note a file's size and hash where the sealing finds them, each process in a file of its own.

    Before the file gets its name: a file that two have written differently has two hashes here.
    """
    folder = path.parent / DIGESTS
    folder.mkdir(exist_ok=True)
    with open(folder / f"{_writer(os.getpid())}.jsonl", "a") as file:
        file.write(json.dumps([path.name, size, digest]) + "\n")


@functools.cache
def _writer(process: int) -> str:
    return f"{process}-{uuid.uuid4().hex[:8]}"


def _read_digests(work: Path) -> dict[str, set[tuple[int, str]]]:
    """Return what writers left in a working folder: name -> sizes and hashes, one if all agree."""
    digests: dict[str, set[tuple[int, str]]] = {}
    for path in (work / DIGESTS).glob("*.jsonl"):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line that a kill cut off
                name, size, digest = json.loads(line)
                digests.setdefault(name, set()).add((size, digest))
    return digests


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, readable by people."""
    write_atomic(path, lambda p: p.write_text(json_text(value)))


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report where one was asked for, marked so that a later one may replace it."""
    if path is not None:
        write_json(path, {WRITTEN_BY: "memdec"} | report)


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that shape an artifact."""
    installed = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def open_artifact(path: Path) -> Artifact | None:
    """Return the artifact in a folder, or None if there is none or a file of it is damaged.

    Whatever else keeps it from being read is raised as the OSError that it is.
    """
    manifest = read_object(path / MANIFEST)
    if manifest is None:
        return None
    try:
        whole = manifest["hash"] == json_sha256({key: manifest[key] for key in HASHED}) and all(
            (path / name).stat().st_size == entry["bytes"]
            for name, entry in manifest["files"].items()
        )
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, AttributeError):
        return None
    return Artifact(path, manifest) if whole else None


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Create a folder and hold it for this process; MemdecError if another one has it.

    Some storage has no locks (Lustre, EFS, NFS as it may be mounted): it goes on, with a line.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise MemdecError(f"{folder} is a file, not a folder: give another --output.") from None
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it on any exit
        except BlockingIOError:
            raise MemdecError(
                f"another memdec build is writing to {folder}: wait for it, or give another folder."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            say(
                f"The storage of {folder} has no locks ({error.strerror}): see to it that no other "
                "memdec build writes there."
            )
        yield


def build_artifact(
    path: Path,
    stage: str,
    settings: dict[str, Any],
    inputs: dict[str, str],
    make: Callable[[Path], None],
    say: Callable[[str], None] = print,
    files: Callable[[Path], Iterable[str]] = lambda work: (),
    sources: dict[str, str] | None = None,
) -> Artifact:
    """Return the artifact at path, calling make(working folder) unless it is up to date.

    files(working folder) names those that make() must have left there: MemdecError without them.
    sources: of inputs that came from the hub, ORG/NAME@COMMIT, for the manifest to record.

    settings and inputs (name -> hash) decide what "up to date" means. A working folder left by a
    killed run of the same plan is handed to make() again, which keeps the files already whole.
    """
    plan = {"schema": SCHEMA, "stage": stage, "settings": settings, "inputs": inputs}
    plan = json.loads(json.dumps(plan))  # a manifest has lists for tuples
    check_ours(path, stage)
    artifact = open_artifact(path)
    if artifact is not None and all(artifact.manifest[key] == plan[key] for key in plan):
        say(f"{stage}: up to date")
        return artifact
    if path.exists():
        say(f"{stage}: building again, {_why_again(artifact, plan)}")
    work = path.with_name(path.name + PARTIAL)
    if read_object(work / PLAN) == plan:
        say(f"{stage}: resuming")
        _sweep(work)
    else:
        if work.exists():
            say(f"{stage}: starting over, the unfinished work was for other settings or inputs")
            # First: no run may take up what is half removed.
            write_json(work / PLAN, plan | {"settings": None, "inputs": None})
            remove(work, PLAN)
        work.mkdir(parents=True)
        write_json(work / PLAN, plan)
    if open_artifact(work) is None:  # else it was killed just before it got its name
        started = time.monotonic()
        make(work)
        trim_heap()
        _sweep(work)
        names = sorted(str(p.relative_to(work)) for p in data_files(work))
        check_there(work, files(work), names)
        left = _read_digests(work)
        sealed = {name: _seal(work / name, left.get(name, set())) for name in names}
        content = plan | {"files": sealed}
        # Of the run that finished it; where and when it was made is no part of what it is.
        seconds = round(time.monotonic() - started, 1)
        manifest = content | {
            "hash": json_sha256(content),
            "versions": versions(),
            "seconds": seconds,
        }
        if sources:
            manifest["sources"] = sources
        write_json(work / MANIFEST, manifest)
    shutil.rmtree(work / DIGESTS, ignore_errors=True)
    if path.exists():
        retire(path, work, say)
    os.replace(work, path)
    (path / PLAN).unlink()
    return Artifact(path, json.loads((path / MANIFEST).read_text()))


def _why_again(artifact: Artifact | None, plan: dict[str, Any]) -> str:
    """Return why an artifact that is there is made again."""
    if artifact is None:
        return "it is damaged"
    made = artifact.manifest
    same_release = made["schema"] == plan["schema"]
    same_release &= made["settings"].keys() == plan["settings"].keys()
    if plan["stage"] == "corpus" and "base" in made["inputs"]:  # early releases hashed all of it
        same_release = False
    return "its settings or inputs changed" if same_release else "another release made it"


def _sweep(work: Path) -> None:
    """Remove the half-written files of processes that were killed, or lost on the way."""
    for leftover in work.rglob("*.tmp"):
        leftover.unlink(missing_ok=True)


def _seal(path: Path, left: set[tuple[int, str]]) -> dict[str, Any]:
    """Return a file's manifest entry, of what its writer left or, without that, by reading it."""
    size = path.stat().st_size
    if len(left) == 1:
        written, digest = next(iter(left))
        if size != written:
            raise MemdecError(
                f"{path} has {size:,} of the {written:,} bytes that were written: delete {path} "
                "and run again, finished parts are kept."
            )
        return {"bytes": size, "sha256": digest}
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": size, "sha256": digest}


def data_files(folder: Path) -> Iterator[Path]:
    """Yield the files of an artifact, or of its working folder, that its manifest lists.

    A gate, which `memdec calibrate` puts beside a memory, is none of them, nor is a model card.
    """
    for p in folder.rglob("*"):
        relative = p.relative_to(folder)
        other = p.name in (MANIFEST, PLAN) or p.stem == Path(GATE).stem or str(relative) == CARD
        if p.is_file() and relative.parts[0] not in (LOGS, DIGESTS) and not other:
            yield p
