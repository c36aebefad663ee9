"""Run the stages in order: corpus -> datastore -> index -> targets -> memory -> export.

Every stage is a function of its settings and of finished artifacts; what is up to date is skipped.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.artifacts import Artifact, build_artifact, folder_sha256, locked
from vllm_memdec.train.cluster import Cluster, Here
from vllm_memdec.train.config import Settings
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.text import corpus_files, text_hash

MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")
MEMORY_BUDGET = 4 * 2**30
STAGES = ("corpus", "datastore", "index", "targets", "memory", "export")


def model_hash(folder: str, option: str) -> str:
    """Return a hash over a model folder's weights, configs and tokenizer; MemdecError if none."""
    if not (Path(folder) / "config.json").is_file():
        raise MemdecError(f"{folder} is not a model folder, it has no config.json: check {option}.")
    return folder_sha256(Path(folder), MODEL_FILES)


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
    check_places(corpus, validation, output)
    with locked(output):
        return _build(
            base, corpus, output, settings, validation, progress, cluster or Here(), budget, until
        )


def check_places(corpus: Path, validation: Path | None, output: Path) -> None:
    """Refuse an output that would become corpus, and validation text that would be trained on."""
    files = corpus_files(corpus)[0]
    for option, path in (("--corpus", corpus), ("--validation", validation)):
        if path and path.is_dir() and output.resolve().is_relative_to(path.resolve()):
            raise MemdecError(
                f"--output {output} lies inside {option} {path}: choose a folder outside."
            )
    if validation is not None and validation.resolve() != corpus.resolve():
        held_out = {path.resolve() for path in corpus_files(validation)[0]}
        if shared := sorted(held_out & {path.resolve() for path in files}):
            raise MemdecError(
                f"{shared[0]} is in both --corpus and --validation: move it out of one."
            )


def _build(
    base: str,
    corpus: Path,
    output: Path,
    settings: Settings,
    validation: Path | None,
    progress: Progress,
    cluster: Cluster,
    budget: int,
    until: str,
) -> Artifact:
    base_hash = model_hash(base, "--base")
    memory_inputs = {"base": base_hash}
    if settings.memory.init != "base":
        init = Path(settings.memory.init)
        if init.resolve().is_relative_to(output.resolve()):
            raise MemdecError(
                f"--init {init} lies inside --output {output}, which is written anew: "
                "choose another output."
            )
        memory_inputs["init"] = model_hash(str(init), "memory.init or --init")
    if settings.memory.tokenizer is not None:
        progress.say(
            "--tokenizer FOLDER (memory.tokenizer) is now --adapt-tokenizer "
            "(memory.adapt_tokenizer): a memory is always adapted to its base's."
        )
    if settings.memory.adapts:
        from vllm_memdec.checkpoint import tokenizer_fingerprint
        from vllm_memdec.train.corpus import load_tokenizer

        memory_inputs["tokenizer"] = tokenizer_fingerprint(
            load_tokenizer(settings.memory.tokenizer or base)
        )
    if settings.memory.init != "base":
        from vllm_memdec.train.decoder import with_defaults

        memory_defaults = with_defaults(settings.memory, base, progress.say)
        settings = settings.model_copy(update={"memory": memory_defaults})
    inputs = {"base": base_hash}
    for name, path in (("corpus", corpus), ("validation", validation)):
        if path is not None:
            inputs[name] = text_hash(path)
            if others := corpus_files(path)[1]:
                progress.say(f"{name}: files in {path} that are no text and left out: {others}")
    if inputs.get("validation") == inputs["corpus"]:
        raise MemdecError(
            "--validation is the text of --corpus, which the memory learns by heart: give text "
            "that it does not see, or leave --validation out."
        )

    @functools.cache
    def check_memory() -> None:
        """Refuse what only the fifth stage would stumble on."""
        from vllm_memdec.train.decoder import memory_config

        memory_config(settings.memory, base, settings.corpus.block_tokens)

    def stage(
        name: str, stage_settings: dict, stage_inputs: dict, make: Callable[[Path], None]
    ) -> Artifact:
        def checked(work: Path) -> None:
            check_memory()
            make(work)

        return build_artifact(
            output / name, name, stage_settings, stage_inputs, checked, progress.say
        )

    def make_corpus(work: Path) -> None:
        from vllm_memdec.train.corpus import build_corpus

        build_corpus(settings.corpus, base, corpus, validation, work, progress, cluster)

    blocks = stage("corpus", settings.corpus.model_dump(), inputs, make_corpus)
    if until == "corpus":
        return blocks

    def keys(folder: Path) -> Any:
        from vllm_memdec.train.datastore import Keys

        return Keys(settings.datastore, base, blocks.path, folder)

    def make_datastore(work: Path) -> None:
        from vllm_memdec.train.datastore import build_datastore

        build_datastore(keys(work), work, progress, cluster)

    datastore = stage(
        "datastore",
        settings.datastore.model_dump(),
        {"corpus": blocks.hash, "base": base_hash},
        make_datastore,
    )

    if until == "datastore":
        return datastore

    def make_index(work: Path) -> None:
        from vllm_memdec.train.index import build_index

        build_index(settings.index, keys(datastore.path), budget, work, progress, cluster)

    index_settings = settings.index.model_dump()
    probes = index_settings.pop("probes")  # of the search: another value needs no other index
    index = stage("index", index_settings, {"datastore": datastore.hash}, make_index)

    if until == "index":
        return index

    def make_targets(work: Path) -> None:
        from vllm_memdec.train.index import Index
        from vllm_memdec.train.targets import build_targets

        searched = Index(index.path, probes, budget)
        build_targets(settings.targets, keys(datastore.path), searched, work, progress, cluster)

    targets = stage(
        "targets",
        settings.targets.model_dump() | {"probes": probes},
        {"datastore": datastore.hash, "index": index.hash},
        make_targets,
    )

    if until == "targets":
        return targets

    def make_memory(work: Path) -> None:
        from vllm_memdec.train.decoder import training_budget
        from vllm_memdec.train.trainer import train_memory

        trained = training_budget(settings.memory, base, progress.say)
        if trained.init != "base":
            trained = trained.changed(init=os.path.abspath(trained.init))
        if trained.tokenizer is not None:
            trained = trained.changed(tokenizer=os.path.abspath(trained.tokenizer))
        train_memory(trained, base, blocks.path, targets.path, work, progress, cluster)

    from vllm_memdec.train.corpus import load_rows

    memory_settings = settings.memory.model_dump()
    for name in ("checkpoint_seconds", "gradient_checkpointing", "parallel"):
        memory_settings.pop(name)  # changes nothing in the result
    memory_settings["batch_blocks"] = settings.memory.batch(len(load_rows(blocks.path, "train")))
    memory_settings.pop("adapt_tokenizer"), memory_settings.pop("tokenizer")
    if not settings.memory.adapts:  # else the tokenizer's hash is an input
        memory_settings.pop("transfer_fraction")
    memory_inputs |= {"corpus": blocks.hash, "targets": targets.hash}
    memory = stage("memory", memory_settings, memory_inputs, make_memory)

    if until == "memory":
        return memory

    def make_export(work: Path) -> None:
        from vllm_memdec.train.export import export_memory

        artifacts = {"corpus": blocks, "targets": targets, "memory": memory}
        provenance = {
            "artifacts": {name: artifact.hash for name, artifact in artifacts.items()},
            "settings": settings.model_dump() | {"memory": memory_settings},
        }
        export_memory(
            settings.export,
            base,
            blocks.path,
            targets.path,
            memory.path,
            provenance,
            work,
            progress,
            cluster,
        )

    return stage(
        "export",
        settings.export.model_dump(),
        {"memory": memory.hash, "corpus": blocks.hash, "targets": targets.hash, "base": base_hash},
        make_export,
    )
