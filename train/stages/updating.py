"""`memdec build --update OLD`: what each stage takes from an old build instead of making it.

    corpus     the blocks of documents that stay (changes.py)
    datastore  their keys; only new blocks are embedded
    index      its trained quantiser, which is filled again: filling is cheap beside embedding
    targets    its temperature. All rows are searched: with k neighbours and a share s of the rows
               changed a row has (1 - s)^k to keep its own, which for 256 and 1 % is 8 in 100
    memory     its weights, trained on what is new and what is gone, with replay (replay.py)

The old build is only read.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vllm_memdec.errors import MemdecError
from vllm_memdec.gate import FILE
from vllm_memdec.train.data.artifacts import (
    LOGS,
    MANIFEST,
    SCHEMA,
    Artifact,
    open_artifact,
    write_atomic,
    write_json,
)
from vllm_memdec.train.data.blocks import (
    bos_of,
    load_blocks,
    load_rows,
    packed,
    shard_rows,
    valid_rows,
)
from vllm_memdec.train.data.changes import (
    BLOCKS_KEPT,
    KeptRows,
    gone_fragments,
    known_texts,
)
from vllm_memdec.train.data.shards import load_array, save_array, shard_path, unfinished
from vllm_memdec.train.model.hidden_states import Keys
from vllm_memdec.train.model.huggingface import load_tokenizer
from vllm_memdec.train.progress import human_seconds
from vllm_memdec.train.settings import MemorySettings, UpdateSettings
from vllm_memdec.train.stages.datastore import keys_of
from vllm_memdec.train.stages.index import TRAINED, read_facts, shaping
from vllm_memdec.train.stages.search import Index
from vllm_memdec.train.stages.stage import Build, Stage
from vllm_memdec.train.stages.targets import Searcher, build_targets
from vllm_memdec.train.stages.training import train_memory
from vllm_memdec.train.training.batches import Batches
from vllm_memdec.train.training.metrics import METRICS, read_metrics
from vllm_memdec.train.training.replay import Replay

AFRESH = "or build afresh, without --update."
GONE = "gone"  # the folder in the memory's working folder of what is to be forgotten
REPACKED = 2.0  # times the rows it was trained on, either way, up to which a quantiser is kept
SPELLING = {
    "probes": "index.probes",
    "validation_fraction": "corpus.validation_fraction (or --validation)",
}
# Settings of a base's memory that mean nothing to one that goes on from its own weights.
STARTS = ("layers", "adapt_tokenizer", "tokenizer", "transfer_fraction")


def open_old(folder: Path, stages: tuple[str, ...]) -> dict[str, Artifact]:
    """Return the artifacts of a build that is to be updated; MemdecError if it cannot be."""
    found = {stage: open_artifact(folder / stage) for stage in stages}
    for stage, artifact in found.items():
        if artifact is None:
            raise MemdecError(
                f"--update: {folder} has no finished {stage}: run its memdec build to the end "
                f"first, {AFRESH}"
            )
        if artifact.manifest["schema"] != SCHEMA:
            raise MemdecError(
                f"--update: {folder / stage} has version {artifact.manifest['schema']} of the "
                f"files, {SCHEMA} is read here: build afresh, without --update."
            )
    if not known_texts(folder / "corpus"):
        raise MemdecError(
            f"--update: {folder} was built by a release that did not note which document a token "
            "is of: build afresh, without --update."
        )
    return {stage: artifact for stage, artifact in found.items() if artifact is not None}


def check_old(
    build: Build, inputs: dict[str, dict[str, str]], describe: dict[str, Callable[[Build], Stage]]
) -> None:
    """Raise MemdecError unless an old build has our base and settings, and another text."""
    assert build.old is not None
    folder = build.old["corpus"].path.parent
    made = {stage: artifact.manifest for stage, artifact in build.old.items()}
    for stage, name, what in (
        ("corpus", "tokenizer", "tokenizer"),
        ("datastore", "base", "base"),
        ("corpus", "chat_template", "chat template"),
    ):
        ours, theirs = (of.get(name) for of in (inputs[stage], made[stage]["inputs"]))
        if ours != theirs and (name != "chat_template" or ours and theirs):
            raise MemdecError(
                f"--update: {folder} was built with another {what}: give the one it was built "
                f"with, {AFRESH}"
            )
    given = build.settings
    for what, ours, theirs in (
        ("corpus.group", given.corpus.group, made["corpus"]["settings"].get("group")),
        (
            "datastore.keep_keys false",
            not given.datastore.keep_keys,
            made["datastore"]["settings"].get("keep_keys") is False,
        ),
        (
            "memory.objective mixture",
            given.memory.objective == "mixture",
            made["memory"]["settings"].get("objective") == "mixture",
        ),
    ):
        if ours or theirs:
            raise MemdecError(
                f"--update cannot be used with {what}: build afresh, without --update."
            )
    texts = [{n: of.get(n) for n in ("corpus", "validation")} for of in
             (inputs["corpus"], made["corpus"]["inputs"])]  # fmt: skip
    if texts[0] == texts[1]:
        raise MemdecError(
            f"--corpus holds what {folder} was built from: there is nothing to update."
        )
    # What the old build would have been with our settings.
    before = replace(build, done=dict(build.old), old=None)
    for stage in ("corpus", "datastore", "index", "targets", "memory"):
        ours = json.loads(json.dumps(describe[stage](before).settings))
        theirs = made[stage]["settings"]
        if stage == "index":  # of an update it may be its ancestor's
            facts = read_facts(build.old[stage].path / "index.json")
            ours = shaping(build.settings.index, trained_keys(facts), facts["width"])
        for name in sorted(ours.keys() | theirs.keys() - {"update"}):
            if ours.get(name) != theirs.get(name):
                said = SPELLING.get(name, f"{stage}.{name}")
                raise MemdecError(
                    f"--update: {said} is {ours.get(name)} here and was {theirs.get(name)} in "
                    f"{folder}: give the settings it was built with, {AFRESH}"
                )


@dataclass
class Copier:
    """Writes keys and labels of one shard: old rows are copied, those of new blocks are made."""

    gpu: ClassVar[bool] = True
    keys: Keys
    old: Path
    work: Path

    @functools.cached_property
    def rows(self) -> KeptRows:
        return KeptRows(self.old, self.keys.corpus)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        return shard_rows(self.keys.corpus)

    def __call__(self, shard: int) -> int:
        first, stop = self.starts[shard : shard + 2].tolist()
        parts = {name: [self.rows.read(name, first, stop)] for name in ("keys", "labels")}
        tokens, _ = load_blocks(self.keys.corpus, "train")
        # The shard's first block that is new.
        new = max(0, len(load_array(self.keys.corpus / BLOCKS_KEPT)) - shard * tokens.per_shard)
        if new < len(tokens.shard(shard)):
            for name, made in zip(
                ("keys", "labels"), self.keys.compute(shard, first=new), strict=True
            ):
                parts[name].append(made)
        for name, arrays in parts.items():
            array = np.concatenate(arrays)
            assert len(array) == stop - first, "rows that stay and new ones are all of a shard"
            save_array(shard_path(self.work, name, shard), array)
        return stop - first


def datastore(build: Build, stage: Stage, old: Path) -> Stage:
    """Return how the keys of what stays are copied."""

    def make(work: Path) -> None:
        keys, progress = keys_of(build, work), build.context.progress
        starts = shard_rows(keys.corpus)
        todo = unfinished(work, ("keys", "labels"), len(starts) - 1)
        done = sorted(set(range(len(starts) - 1)) - set(todo))
        with progress.task(
            "datastore: copying, embedding what is new", int(starts[-1]), "rows"
        ) as advance:
            advance(int(np.diff(starts)[done].sum()), done_before=True)
            for rows in build.context.executor.map(Copier(keys, old, work), todo):
                advance(rows)

    return replace(stage, make=make)


def trained_keys(facts: dict[str, Any]) -> int:
    """Return how many keys there were when an index's quantiser was trained."""
    return facts.get("trained_keys", facts["keys"])


def index(build: Build, stage: Stage, old: Path) -> Stage:
    """Return how an index is filled whose quantiser is there, unless its corpus has grown apart."""
    facts = read_facts(old / "index.json")
    rows = int(shard_rows(build.path("corpus"))[-1])
    trained, before = (old / TRAINED).exists(), trained_keys(facts)
    if max(rows, before) > REPACKED * min(rows, before) or ("IVF" in facts["kind"] and not trained):
        return stage

    def make(work: Path) -> None:
        if not (work / "index.json").exists() and not (work / "training.json").exists():
            if trained:
                write_atomic(work / TRAINED, lambda p: shutil.copyfile(old / TRAINED, p))
            kept = {name: facts[name] for name in ("kind", "width")}
            write_json(work / "training.json", kept | {"keys": rows, "trained_keys": before})
        stage.make(work)

    settings = read_facts(old / MANIFEST)["settings"]
    return replace(stage, settings=settings, make=make)


def targets(build: Build, stage: Stage, old: Path) -> Stage:
    """Return how all rows are searched, under the old temperature."""

    def make(work: Path) -> None:
        if not (work / "targets.json").exists():
            facts = json.loads((old / "targets.json").read_text())
            rows = int(shard_rows(build.path("corpus"))[-1])
            facts["neighbours"] = min(build.settings.targets.neighbours, rows - 1)
            write_json(work / "targets.json", facts)
        stage.make(work)

    return replace(stage, make=make)


@dataclass
class Outsiders(Searcher):
    """Writes the targets of rows that the index does not hold."""

    @property
    def neighbours(self) -> int:
        return min(self.settings.neighbours, self.index.facts["keys"])

    def own(self, rows: range) -> np.ndarray:
        return np.full(len(rows), -2)


def write_gone(build: Build, folder: Path) -> Path | None:
    """Write corpus, datastore and targets of the rows that are gone; None where there are none."""
    assert build.old is not None
    old, corpus = build.old["corpus"].path, build.path("corpus")
    rows = KeptRows(build.old["datastore"].path, corpus, kept=False)
    if not len(rows):
        return None
    places = [folder / name for name in ("corpus", "datastore", "targets")]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(build.base)
    settings, counts = build.settings.corpus, [np.zeros(0, np.int32)]
    shape = settings.block_tokens, tokenizer.eos_token_id, settings.shard_blocks, bos_of(tokenizer)
    done = 0
    for shard, (tokens, positions) in enumerate(packed(gone_fragments(old, corpus), *shape)):
        save_array(shard_path(places[0], "tokens-train", shard), tokens)
        save_array(shard_path(places[0], "positions-train", shard), positions)
        valid = valid_rows(positions)
        counts.append(valid.sum(axis=1, dtype=np.int32))
        labels = tokens[:, 1:][valid]
        for name in ("keys", "labels"):
            array = rows.read(name, done, done + len(labels))
            assert name == "keys" or np.array_equal(array, labels), "those that are gone, in order"
            save_array(shard_path(places[1], name, shard), array)
        done += len(labels)
    assert done == len(rows), "all of the rows that are gone"
    save_array(places[0] / "rows-train.npy", np.concatenate(counts))
    shutil.copyfile(corpus / "used-train.npy", places[0] / "used-train.npy")  # of the neighbours
    facts = {"train": {"blocks": sum(map(len, counts))}, "shard_blocks": settings.shard_blocks}
    write_json(places[0] / "corpus.json", facts)
    shutil.copyfile(build.path("targets") / "targets.json", places[2] / "targets.json")
    keys = Keys(build.settings.datastore, build.base, places[0], places[1])
    searched = Index(build.path("index"), build.settings.index.probes, build.context.ram_budget)
    build_targets(build.settings.targets, keys, searched, places[2], build.context, Outsiders)
    return folder


def share_of_epochs(memory: MemorySettings) -> float:
    """Return how much of its epochs a fresh build trains."""
    return memory.transfer_fraction if memory.adapts else 1.0


def trained(memory: MemorySettings, update: UpdateSettings, old: Path) -> MemorySettings:
    """Return the settings of the training that goes on from an old memory."""
    names = memory.model_fields_set - {*STARTS}
    rates = ["learning_rate"] + ["muon_learning_rate"] * (memory.optimizer == "muon")
    return MemorySettings(
        **{name: getattr(memory, name) for name in names}
        | {"init": str(old), "epochs": update.epochs or share_of_epochs(memory) * memory.epochs}
        | {name: min(1.0, update.learning_rate * getattr(memory, name)) for name in rates}
    )


def memory(build: Build, stage: Stage, old: Path) -> Stage:
    """Return how the old memory is trained on."""
    update = build.settings.update

    def make(work: Path) -> None:
        gone = write_gone(build, work / GONE)
        paths = build.path("corpus"), build.path("targets"), work
        settings = trained(build.settings.memory, update, old)
        batches = Replay(first_new(build), update.replay, gone)
        train_memory(settings, build.base, *paths, build.context, batches)
        if gone is not None:
            shutil.rmtree(gone)

    settings = stage.settings | {"update": update.model_dump()}
    return replace(stage, settings=settings, make=make)


def first_new(build: Build) -> int:
    """Return the number of the first block that the old corpus has not."""
    return len(load_array(build.path("corpus") / BLOCKS_KEPT))


def export(build: Build, stage: Stage, old: Path) -> Stage:
    """Return how the memory's folder is made; a gate of the old one is no gate of it."""

    def make(work: Path) -> None:
        stage.make(work)
        if (old / FILE).exists():
            build.context.progress.say(
                f"export: the gate of {old} is not taken over, it was trained for other weights: "
                "run memdec calibrate again"
            )

    return replace(stage, make=make)


def cost(build: Build) -> Iterator[str]:
    """Yield what an update cost beside a fresh build of its corpus, in work and in seconds."""
    assert build.old is not None
    rows = load_rows(build.path("corpus"), "train")
    said = f"update: embedded {len(rows) - first_new(build):,} of {len(rows):,} token blocks"
    if "targets" in build.done:
        said += f", searched all of {rows.sum():,} rows"
    if "memory" in build.done:
        metrics = read_metrics(build.path("memory") / LOGS / METRICS)
        ours = round(metrics[-1]["epoch"] * len(rows))
        fresh = Batches(build.settings.memory, build.path("corpus"), build.path("targets"))
        theirs = round(fresh.steps * fresh.size * share_of_epochs(build.settings.memory))
        said += f", trained on {ours:,} blocks for {theirs:,} ({ours / theirs:.0%})"
    yield said
    if "old" in build.old["corpus"].manifest["inputs"]:
        yield "update: what a fresh build takes is not known, as the old one was an update itself"
        return
    seconds = sum(artifact.manifest["seconds"] for artifact in build.done.values())
    whole = sum(build.old[stage].manifest["seconds"] for stage in build.done)
    before = load_rows(build.old["corpus"].path, "train").sum()
    whole = max(whole * float(rows.sum() / before), 0.1)  # of what takes no time
    yield (
        f"update: {human_seconds(seconds)} for the {human_seconds(whole)} of a fresh build, by the "
        f"old one's time a row ({seconds / whole:.0%})"
    )


def updated(build: Build, name: str, stage: Stage) -> Stage:
    """Return how a stage is made from what an old build has; without one, as it is."""
    makers = {
        "datastore": datastore,
        "index": index,
        "targets": targets,
        "memory": memory,
        "export": export,
    }
    if build.old is None or name not in makers:
        return stage
    return makers[name](build, stage, build.old[name].path)
