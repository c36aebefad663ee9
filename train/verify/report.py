"""`memdec verify`: is a build whole, do its stages belong together, is it what it should be?

First what manifests can tell, every file against its hash; then the content, see checks.py. A
check that cannot run says why, and is no failure.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_memdec.checkpoint import read_block
from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.artifacts import (
    HASHED,
    SCHEMA,
    data_files,
    file_sha256,
    json_sha256,
    versions,
)
from vllm_memdec.train.data.inputs import same_base
from vllm_memdec.train.data.ownership import MANIFEST, read_object
from vllm_memdec.train.faults import fault, sentence_of
from vllm_memdec.train.pipeline import STAGES
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.verify import checks
from vllm_memdec.train.verify.build import Build, NotChecked
from vllm_memdec.train.verify.checks import Result

OK, FAILED, MEASURED, NOT_CHECKED = "ok", "FAILED", "measured", "not checked"
STRAY = "is no part of the build"
COLOURS = {OK: "green", FAILED: "red", MEASURED: "cyan", NOT_CHECKED: "yellow"}


@dataclass(frozen=True)
class Check:
    """The result of one check, and what to do about it if it failed."""

    name: str
    status: str
    detail: str
    fix: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def delete(*stages: str) -> str:
    """Return the sentence that mends some stages."""
    folders = f"the {' and '.join(stages)} folder{'s' * (len(stages) > 1)}"
    return f"delete {folders} and run the same memdec build again: it makes anew what is gone."


# Of the checks of a build's content: the function, the stages it is about, the fix if it fails.
CONTENT: dict[str, tuple[Callable[[Build], Result], tuple[str, ...], str]] = {
    "tokenizer": (checks.check_tokenizer, ("corpus", "export"), delete("corpus", "export")),
    "held-out text": (checks.check_held_out, ("corpus",), delete("corpus")),
    "alignment": (
        checks.check_alignment,
        ("corpus", "datastore", "targets"),
        delete("datastore", "targets"),
    ),
    "probabilities": (checks.check_probabilities, ("targets",), delete("targets")),
    "recall": (checks.check_recall, ("index",), f"raise index.probes, or {delete('index')}"),
    "label leak": (checks.check_leak, ("targets",), delete("targets")),
    "fidelity": (
        checks.check_fidelity,
        ("memory",),
        "raise memory.epochs or give more text, and run memdec build again.",
    ),
    "memorisation": (checks.check_memorisation, ("memory",), ""),
}


def verify(
    artifact: Path, sample: int = 1024, base: Path | None = None, progress: Progress | None = None
) -> list[Check]:
    """Check a build's output folder, or one stage's folder in it; MemdecError if it is neither."""
    progress = progress or Progress()
    artifact = artifact.absolute()  # "." has no name
    root, stages = locate(artifact)
    manifests = {stage: read_manifest(root / stage) for stage in STAGES if (root / stage).is_dir()}
    if base is not None:
        check_base(base, manifests)
    damage = {
        stage: list(find_damage(root / stage, manifests[stage], progress)) for stage in stages
    }
    whole = {stage: manifest for stage, manifest in manifests.items() if manifest}
    results = [check_files(stages, damage)]
    results += [check_manifests(stages, whole), check_schema(stages, whole)]
    results.append(check_chain(root, stages, whole))
    broken = {s for s in manifests if s not in whole} | {s for s in stages if damage[s]}
    build = Build(root, frozenset(broken), sample, base, progress)
    return results + [
        run(name, function, build, fix)
        for name, (function, parts, fix) in CONTENT.items()
        if root == artifact or set(parts) & set(stages)  # a whole build is told what it lacks
    ]


def locate(artifact: Path) -> tuple[Path, list[str]]:
    """Return (output folder, stages to check) of a path a user gave."""
    if artifact.name in STAGES and (artifact / MANIFEST).exists():
        return artifact.parent, [artifact.name]
    stages = [stage for stage in STAGES if (artifact / stage).is_dir()]
    if not stages:
        raise MemdecError(
            f"{artifact} is no build: give the --output folder of a memdec build, "
            "or a finished stage's folder in it."
        )
    return artifact, stages


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a stage's manifest, or None if it is no manifest."""
    manifest = read_object(folder / MANIFEST)
    if manifest is None:
        return None
    try:
        sizes = {str(name): (e["bytes"], e["sha256"]) for name, e in manifest["files"].items()}
        inputs = {str(name): str(digest) for name, digest in manifest["inputs"].items()}
        read = manifest["hash"], manifest["schema"], manifest["stage"], sizes, inputs
    except (KeyError, TypeError, AttributeError):
        return None
    return manifest if all(part is not None for part in read) else None


def check_base(base: Path, manifests: dict[str, Any]) -> None:
    """Refuse another base than the build's."""
    if not same_base(base, [manifest for manifest in manifests.values() if manifest]):
        raise MemdecError(f"{base} is not the base of this build: give the one it was made with.")


def find_damage(folder: Path, manifest: dict[str, Any] | None, progress: Progress) -> Iterator[str]:
    """Yield what is wrong with a stage's files."""
    if manifest is None:
        yield f"{folder.name}/{MANIFEST} is missing or unreadable"
        return
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    with progress.task(f"hashing {folder.name}", total, "bytes") as advance:
        for name, entry in manifest["files"].items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                yield f"{folder.name}/{name} is missing"
            elif size != entry["bytes"]:
                yield f"{folder.name}/{name} has {size:,} of {entry['bytes']:,} bytes"
            elif file_sha256(path) != entry["sha256"]:
                yield f"{folder.name}/{name} is not what was written: its SHA-256 differs"
            advance(entry["bytes"])
    for path in sorted(data_files(folder)):
        if str(path.relative_to(folder)) not in manifest["files"]:
            yield f"{folder.name}/{path.relative_to(folder)} {STRAY}"


def check_files(stages: list[str], damage: dict[str, list[str]]) -> Check:
    """Is every file there, of its size and of its content?"""
    broken = [stage for stage in stages if damage[stage]]
    if broken:
        all_of_it = [what for stage in broken for what in damage[stage]]
        more = f" and {len(all_of_it) - 3} more" if len(all_of_it) > 3 else ""
        said = "; ".join(all_of_it[:3]) + more
        # A file that is one too many may be the user's own: it is not for memdec to delete.
        strays = [what.removesuffix(f" {STRAY}") for what in all_of_it if what.endswith(STRAY)]
        fix = f"move {', '.join(strays[:3])} out of the build's folders" if strays else ""
        damaged = [s for s in broken if not all(w.endswith(STRAY) for w in damage[s])]
        if damaged:
            fix += f"{'; then ' if fix else ''}{delete(*damaged)}"
        else:
            fix += " and verify again."
        return Check("files", FAILED, said, fix, {"damage": all_of_it})
    return Check("files", OK, f"whole: {', '.join(stages)}")


def check_manifests(stages: list[str], manifests: dict[str, Any]) -> Check:
    """Does each manifest's hash cover what it says, and is it that of its folder?"""
    wrong = [
        stage
        for stage in stages
        if (m := manifests.get(stage)) is None
        or m["stage"] != stage
        or m["hash"] != json_sha256({key: m.get(key) for key in HASHED})
    ]
    if wrong:
        return Check("manifests", FAILED, f"changed since: {', '.join(wrong)}", delete(*wrong))
    return Check("manifests", OK, "their hashes are their content's")


def check_schema(stages: list[str], manifests: dict[str, Any]) -> Check:
    """Was everything written by a release whose files this one reads?"""
    other = {s: manifests[s]["schema"] for s in stages if s in manifests}
    other = {stage: schema for stage, schema in other.items() if schema != SCHEMA}
    if other:
        said = ", ".join(f"{stage} has {schema!r}" for stage, schema in other.items())
        fix = f"run memdec build again with this release, which writes version {SCHEMA}."
        return Check("schema", FAILED, f"version {SCHEMA} is read here: {said}", fix)
    return Check("schema", OK, f"version {SCHEMA}")


def check_chain(root: Path, stages: list[str], manifests: dict[str, Any]) -> Check:
    """Was each stage made from those that lie beside it, and all from one base?"""
    wrong, compared, absent = [], 0, set()
    for stage in stages:
        inputs = dict(manifests[stage]["inputs"]) if stage in manifests else {}
        if stage == "export" and stage in manifests:
            section = read_block(root / stage)
            inputs |= section.provenance.get("artifacts", {}) if section else {}
        earlier = STAGES[: STAGES.index(stage)]  # `corpus` among the corpus's inputs is text
        for name, digest in inputs.items():
            if name in earlier and name not in manifests:
                absent.add(name)
            elif name in earlier:
                compared += 1
                if manifests[name]["hash"] != digest:
                    wrong.append(f"{stage} was made from another {name}")
    if len({m["inputs"]["base"] for m in manifests.values() if "base" in m["inputs"]}) > 1:
        wrong.append("the stages were made with different bases")
    if wrong:
        fix = "run the same memdec build again: it makes anew what does not belong together."
        return Check("chain", FAILED, "; ".join(wrong), fix)
    if not compared:
        return Check("chain", NOT_CHECKED, f"{', '.join(stages)} has no input here to compare with")
    left_out = f"; not there: {', '.join(sorted(absent))}" if absent else ""
    return Check("chain", OK, f"{compared} hashes of inputs agree{left_out}")


def run(name: str, function: Callable[[Build], Result], build: Build, fix: str) -> Check:
    """Run a check of content; what it cannot read has failed, too."""
    build.progress.say(f"{name} ...")
    try:
        passed, detail, figures = function(build)
    except NotChecked as why:
        return Check(name, NOT_CHECKED, str(why))
    except (ValueError, OSError, RuntimeError, LookupError) as error:
        if fault(error) is not None:  # says nothing of the build
            refused = str(sentence_of(error))
            return Check(
                name, FAILED, f"could not be run: {refused}", f"no file is known damaged: {refused}"
            )
        what = (str(error).splitlines() or [type(error).__name__])[0]
        return Check(name, FAILED, f"cannot be read: {what}", fix)
    if passed is None:
        return Check(name, MEASURED, detail, figures=figures)
    return Check(name, OK if passed else FAILED, detail, "" if passed else fix, figures)


def show(results: list[Check], console: Console) -> None:
    """Print a line for each check."""
    table = Table("check", "result", "what was found")
    for check in results:
        table.add_row(check.name, f"[{COLOURS[check.status]}]{check.status}", escape(check.detail))
    console.print(table)


def report(artifact: Path, results: list[Check]) -> dict[str, Any]:
    """Return the results as JSON."""
    passed = all(check.status != FAILED for check in results)
    return {"artifact": str(artifact), "passed": passed, "versions": versions()} | {
        "checks": [asdict(check) for check in results]
    }
