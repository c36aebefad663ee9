"""An artifact: a folder that one stage wrote whole, with a manifest of how it came to be.

A stage works in `NAME.partial/` and the folder gets its name `NAME/` only when everything in it
is on disk, so a folder without `.partial` is complete by construction. The manifest's hash covers
stage, settings, inputs and every file's content: equal hashes mean equal results. Files under
`logs/` (curves, timings) are for people and stay out of the hash.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
MANIFEST = "manifest.json"
LOGS = "logs"
PACKAGES = ("vllm-memdec", "torch", "transformers", "faiss-cpu", "faiss-gpu-cu12", "numpy")


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


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Call write(temporary path), then give the file its name: it is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, readable by people."""
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n"))


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that shape an artifact."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def open_artifact(path: Path) -> Artifact | None:
    """Return the artifact in a folder, or None if there is none or a file of it is damaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        sizes_agree = all(
            (path / name).stat().st_size == entry["bytes"]
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Artifact(path, manifest) if sizes_agree and manifest.get("schema") == SCHEMA else None


def build_artifact(
    path: Path,
    stage: str,
    settings: dict[str, Any],
    inputs: dict[str, str],
    make: Callable[[Path], None],
    say: Callable[[str], None] = print,
) -> Artifact:
    """Return the artifact at path, calling make(working folder) unless it is up to date.

    settings and inputs (name -> hash) decide what "up to date" means. A working folder left by a
    killed run of the same plan is handed to make() again, which keeps the files already whole.
    """
    plan = {"schema": SCHEMA, "stage": stage, "settings": settings, "inputs": inputs}
    found = open_artifact(path)
    if found is not None and all(found.manifest.get(key) == plan[key] for key in plan):
        say(f"{stage}: up to date")
        return found
    if path.exists():
        why = "its settings or inputs changed" if found is not None else "it is damaged"
        say(f"{stage}: building again, {why}")
    work = path.with_name(path.name + ".partial")
    plan_file = work / "plan.json"
    if work.exists():
        try:
            resumable = json.loads(plan_file.read_text()) == plan
        except (OSError, ValueError):
            resumable = False
        if resumable:
            say(f"{stage}: resuming")
        else:
            shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(plan_file, plan)
    make(work)
    files = {
        str(p.relative_to(work)): {"bytes": p.stat().st_size, "sha256": file_sha256(p)}
        for p in _data_files(work)
    }
    content = plan | {"files": files}
    manifest = content | {"hash": json_sha256(content), "versions": versions()}
    write_json(work / MANIFEST, manifest)
    plan_file.unlink()
    if path.exists():
        shutil.rmtree(path)
    os.replace(work, path)
    return Artifact(path, manifest)


def _data_files(folder: Path) -> Iterator[Path]:
    for p in sorted(folder.rglob("*")):
        relative = p.relative_to(folder)
        if p.is_file() and relative.parts[0] != LOGS and p.name not in (MANIFEST, "plan.json"):
            yield p
