"""Run the stages in order: corpus -> datastore -> index -> targets -> memory -> export.

Every stage is a function of its settings and of finished artifacts; what is up to date is skipped.
Its settings and inputs are all that changes its result, and nothing else: batch sizes that only
bound memory, paths, and files beside a base that no stage reads are in no manifest.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data import completeness as complete
from vllm_memdec.train.data.artifacts import Artifact, build_artifact, json_sha256, locked
from vllm_memdec.train.data.documents import corpus_files
from vllm_memdec.train.data.inputs import Hashes, model_hash, tokenizer_hash, weights_hash
from vllm_memdec.train.data.ownership import check_ours, check_places
from vllm_memdec.train.executor.executor import Cluster, Here
from vllm_memdec.train.faults import AGAIN, out_of_memory
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import MemorySettings, Settings

__all__ = ["MEMORY_BUDGET", "STAGES", "build", "model_hash"]

MEMORY_BUDGET = 4 * 2**30
STAGES = ("corpus", "datastore", "index", "targets", "memory", "export")
# Settings of a memory that change nothing in it, or whose meaning is among its inputs.
NO_MATTER = ("adapt_tokenizer", "checkpoint_seconds", "compile", "gradient_checkpointing",
             "micro_batch_blocks", "parallel", "tokenizer")  # fmt: skip
OTHERS = "close other programs or take a larger machine"  # if memory runs out


def build(
    base: str,
    corpus: Path,
    output: Path,
    settings: Settings,
    validation: Path | None = None,
    progress: Progress | None = None,
    cluster: Cluster | None = None,
    budget: int = MEMORY_BUDGET,
    until: str = "export",
) -> Artifact:
    """Compile a corpus into a memory under output/; return the last stage's artifact.

    cluster: where the work runs, by default in this process; budget: bytes a process may take for
    what grows with the corpus; until: the last stage to make, one of STAGES.
    Raises MemdecError, in one sentence, for input or settings that cannot work.

    >>> from pathlib import Path
    >>> from vllm_memdec.train.config import parse_settings
    >>> from vllm_memdec.train.pipeline import build
    >>> settings = parse_settings({"corpus": {"block_tokens": 128}, "memory": {"epochs": 1}})
    >>> export = build("models/base", Path("corpus.jsonl"), Path("build/memory"), settings)
    >>> export.path.name, export.manifest["stage"], len(export.hash)
    ('export', 'export', 64)
    """
    if until not in STAGES:
        raise MemdecError(f"--until must be one of {', '.join(STAGES)}, got {until!r}.")
    progress = progress or Progress()
    # Workers have another working directory.
    base, corpus, output = os.path.abspath(base), corpus.absolute(), output.absolute()
    validation = validation and validation.absolute()
    check_inputs(base, corpus, validation, output, settings.memory)
    with locked(output):
        hashes = Hashes(output)
        try:
            inputs = find_inputs(base, corpus, validation, settings, hashes, progress)
        finally:
            hashes.save()
        if settings.memory.init != "base":
            from vllm_memdec.train.model.decoder import with_defaults

            memory = with_defaults(settings.memory, base, progress.say)
            settings = settings.model_copy(update={"memory": memory})
        cluster = cluster or Here()
        return Compilation(
            base, corpus, output, settings, validation, progress, cluster, budget, inputs, {}
        ).run(until)


def check_inputs(
    base: str, corpus: Path, validation: Path | None, output: Path, settings: MemorySettings
) -> None:
    """Refuse an output that the build could harm something in, before anything is touched.

    And validation text that would be trained on.
    """
    files = corpus_files(corpus)[0]
    inputs = [("--corpus", corpus), ("--validation", validation), ("--base", base)]
    inputs.append(("--init", None if settings.init == "base" else settings.init))
    inputs.append(("--tokenizer", settings.tokenizer))
    check_places(inputs, output)
    for stage in STAGES:
        check_ours(output / stage, stage)
    if validation is not None and validation.resolve() != corpus.resolve():
        held_out = {path.resolve() for path in corpus_files(validation)[0]}
        if shared := sorted(held_out & {path.resolve() for path in files}):
            raise MemdecError(
                f"{shared[0]} is in both --corpus and --validation: move it out of one."
            )


def find_inputs(
    base: str,
    corpus: Path,
    validation: Path | None,
    all_settings: Settings,
    hashes: Hashes,
    progress: Progress,
) -> dict[str, dict[str, str]]:
    """Return, of the stages that read files of the user's, a hash of each: stage -> name -> hash.

    Of a base a stage's hash covers only what the stage reads.
    """
    settings = all_settings.memory
    group = all_settings.corpus.group if validation is None else None  # else nothing is held out
    tokenizer = tokenizer_hash(base, "--base", hashes)
    weights = weights_hash(base, "--base", hashes)
    of_memory = {"base": weights}
    if settings.init != "base":
        option = "memory.init or --init"
        parts = [find(settings.init, option, hashes) for find in (weights_hash, tokenizer_hash)]
        of_memory = {"base tokenizer": tokenizer, "init": json_sha256(parts)}
    if settings.tokenizer is not None:
        progress.say(
            "--tokenizer FOLDER (memory.tokenizer) is now --adapt-tokenizer "
            "(memory.adapt_tokenizer): a memory is always adapted to its base's."
        )
    if settings.adapts:
        from vllm_memdec.checkpoint import tokenizer_fingerprint
        from vllm_memdec.train.model.huggingface import load_tokenizer

        of_memory["tokenizer"] = tokenizer_fingerprint(load_tokenizer(settings.tokenizer or base))
    text = {}
    for name, path in (("corpus", corpus), ("validation", validation)):
        if path is not None:
            text[name] = hashes.text(path, group)
            if others := corpus_files(path)[1]:
                progress.say(f"{name}: files in {path} that are no text and left out: {others}")
    if text.get("validation") == text["corpus"]:
        raise MemdecError(
            "--validation is the text of --corpus, which the memory learns by heart: give text "
            "that it does not see, or leave --validation out."
        )
    return {
        "corpus": {"tokenizer": tokenizer} | text,
        "datastore": {"base": weights},
        "memory": of_memory,
        "export": {"base": weights},
    }


@dataclass(frozen=True)
class Stage:
    """How one artifact is made, and all that decides what is in it."""

    settings: dict[str, Any]
    reads: tuple[str, ...]  # the stages before it whose artifacts it reads
    make: Callable[[Path], None]
    files: Callable[[Path], Iterable[str]]  # names of those that make() must leave in its folder
    remedy: str  # what to do if memory runs out: it must keep the work that is done


@dataclass(frozen=True)
class Compilation:
    """The stages of one build; `done` holds the artifacts of those before the one that runs."""

    base: str
    corpus: Path
    output: Path
    settings: Settings
    validation: Path | None
    progress: Progress
    cluster: Cluster
    budget: int
    inputs: dict[str, dict[str, str]]
    done: dict[str, Artifact]

    def run(self, until: str) -> Artifact:
        """Make or find every stage up to one; return that one's artifact."""
        for name in STAGES[: STAGES.index(until) + 1]:
            stage: Stage = getattr(self, f"{name}_stage")()
            try:
                self.done[name] = self.build_stage(name, stage)
            except Exception as error:
                if out_of_memory(error):
                    raise MemdecError(
                        f"out of memory in the {name} stage: {stage.remedy} {AGAIN}"
                    ) from error
                raise
        return self.done[until]

    def build_stage(self, name: str, stage: Stage) -> Artifact:
        """Make or find one stage's artifact."""

        def make(work: Path) -> None:
            self.check_memory()
            stage.make(work)

        earlier = {each: self.done[each].hash for each in stage.reads}
        inputs = self.inputs.get(name, {}) | earlier
        path = self.output / name
        say = self.progress.say
        return build_artifact(path, name, stage.settings, inputs, make, say, stage.files)

    def check_memory(self) -> None:
        """Refuse what only the fifth stage would stumble on."""
        from vllm_memdec.train.model.decoder import memory_config
        from vllm_memdec.train.stages.faiss_gpu import check_width

        settings = self.settings
        memory_config(settings.memory, self.base, settings.corpus.block_tokens)
        check_width(settings.targets.neighbours, settings.index.probes, self.cluster)

    def path(self, stage: str) -> Path:
        """Return the folder of a finished stage."""
        return self.done[stage].path

    def keys(self, datastore: Path) -> Any:
        """Return the keys of the corpus's rows, of which a datastore may hold some."""
        from vllm_memdec.train.model.hidden_states import Keys

        return Keys(self.settings.datastore, self.base, self.path("corpus"), datastore)

    def corpus_stage(self) -> Stage:
        settings = self.settings.corpus.model_dump()
        if self.validation is not None:
            settings["validation_fraction"] = settings["group"] = None  # nothing is held out

        def make(work: Path) -> None:
            from vllm_memdec.train.stages.corpus import build_corpus

            text = self.corpus, self.validation
            build_corpus(self.settings.corpus, self.base, *text, work, self.progress, self.cluster)

        remedy = f"{OTHERS}, or give --ray-address none, which takes one worker,"
        return Stage(settings, (), make, complete.corpus_files, remedy)

    def datastore_stage(self) -> Stage:
        settings = self.settings.datastore.model_dump()
        batch = settings.pop("batch_blocks")  # bounds memory
        if self.settings.datastore.key != "layer":
            settings["layer_fraction"] = None

        def make(work: Path) -> None:
            from vllm_memdec.train.stages.datastore import build_datastore

            build_datastore(self.keys(work), work, self.progress, self.cluster)

        def files(work: Path) -> Iterable[str]:
            names = ("keys", "labels") if settings["keep_keys"] else ("labels",)
            return complete.numbered(names, complete.n_shards(self.path("corpus")))

        remedy = lowered("datastore.batch_blocks", batch)
        return Stage(settings, ("corpus",), make, files, remedy)

    def index_stage(self) -> Stage:
        from vllm_memdec.train.stages.index import build_index, index_files, shaping

        rows = json.loads((self.path("corpus") / "corpus.json").read_text())["train"]["rows"]
        keys = self.keys(self.path("datastore"))
        settings = shaping(self.settings.index, rows, keys.width)

        def make(work: Path) -> None:
            build_index(self.settings.index, keys, self.budget, work, self.progress, self.cluster)

        return Stage(settings, ("datastore",), make, index_files, self.less_budget())

    def less_budget(self) -> str:
        """Return what to do if an index takes too much memory, or keys that are computed again."""
        kept = self.settings.datastore.keep_keys
        return "lower --memory-budget" + ("" if kept else " or datastore.batch_blocks")

    def targets_stage(self) -> Stage:
        # Another number of probes needs no other index, but finds other neighbours.
        settings = self.settings.targets.model_dump() | {"probes": self.settings.index.probes}

        def make(work: Path) -> None:
            from vllm_memdec.train.stages.search import Index
            from vllm_memdec.train.stages.targets import build_targets

            searched = Index(self.path("index"), self.settings.index.probes, self.budget)
            keys = self.keys(self.path("datastore"))
            build_targets(self.settings.targets, keys, searched, work, self.progress, self.cluster)

        def files(work: Path) -> Iterable[str]:
            from vllm_memdec.train.stages.targets import ARRAYS

            count = complete.n_shards(self.path("corpus"))
            return ["targets.json", *complete.numbered(ARRAYS, count)]

        return Stage(settings, ("datastore", "index"), make, files, self.less_budget())

    def memory_stage(self) -> Stage:
        def make(work: Path) -> None:
            from vllm_memdec.train.model.decoder import training_budget
            from vllm_memdec.train.stages.training import train_memory

            trained = training_budget(self.settings.memory, self.base, self.progress.say)
            if trained.init != "base":
                trained = trained.changed(init=os.path.abspath(trained.init))
            if trained.tokenizer is not None:
                trained = trained.changed(tokenizer=os.path.abspath(trained.tokenizer))
            read = self.path("corpus"), self.path("targets")
            train_memory(trained, self.base, *read, work, self.progress, self.cluster)

        micro = self.settings.memory.micro_batch_blocks
        remedy = lowered("memory.micro_batch_blocks", micro)
        if micro == 1 and not self.settings.memory.gradient_checkpointing:
            remedy = "set memory.gradient_checkpointing to true"
        settings = self.memory_settings()
        return Stage(settings, ("corpus", "targets"), make, complete.model_files, remedy)

    def memory_settings(self) -> dict[str, Any]:
        """Return what decides what is trained; what is read from folders is among the inputs."""
        from vllm_memdec.train.data.blocks import load_rows

        settings = self.settings.memory.model_dump()
        for name in NO_MATTER:
            settings.pop(name)
        rows = load_rows(self.path("corpus"), "train")
        settings["batch_blocks"] = self.settings.memory.batch(len(rows))
        if settings["init"] != "base":
            settings["init"] = "folder"
        if settings["early_stop"] is None:
            settings["evaluate_steps"] = None  # only looked at
        if not self.settings.memory.adapts:  # else the tokenizer's hash is an input
            settings.pop("transfer_fraction")
        return settings

    def export_stage(self) -> Stage:
        settings = self.settings.export.model_dump()
        read = ("corpus", "targets", "memory")

        def make(work: Path) -> None:
            from vllm_memdec.train.stages.export import export_memory

            made = {name: self.done[name].manifest["settings"] for name in self.done}
            provenance = {
                "artifacts": {name: self.done[name].hash for name in read},
                "settings": made | {"export": settings},
            }
            paths = [self.path(name) for name in read]
            runs = self.progress, self.cluster
            export_memory(self.settings.export, self.base, *paths, provenance, work, *runs)

        return Stage(settings, read, make, complete.model_files, OTHERS)


def lowered(setting: str, value: int | None) -> str:
    """Return the advice to lower a number of blocks, or another one where it cannot be lower."""
    if value is None:
        return f"set {setting} to 2 (unset, it goes by the device)"
    return f"lower {setting} (it is {value})" if value > 1 else OTHERS
