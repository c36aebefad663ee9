"""Run the stages in order: corpus -> datastore -> index -> targets -> memory -> export.

Every stage is a function of its settings and of finished artifacts; what is up to date is skipped.
Its settings and inputs are all that changes its result, and nothing else: batch sizes that only
bound memory, paths, and files beside a base that no stage reads are in no manifest.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.artifacts import Artifact, build_artifact, json_sha256, locked
from vllm_memdec.train.data.documents import fields_of
from vllm_memdec.train.data.files import TABLE, corpus_files
from vllm_memdec.train.data.hub import model_folder, origin, text_path, with_folders
from vllm_memdec.train.data.inputs import (
    Hashes,
    check_model,
    check_weights,
    tokenizer_hash,
    weights_hash,
)
from vllm_memdec.train.data.ownership import check_ours, check_places
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.faults import AGAIN, out_of_memory
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import MemorySettings, Settings
from vllm_memdec.train.stages.stage import Build, Stage

STAGES = ("corpus", "datastore", "index", "targets", "memory", "export")


def build(
    base: str,
    corpus: Path,
    output: Path,
    settings: Settings,
    validation: Path | None = None,
    context: Context | None = None,
    until: str = "export",
    update: Path | None = None,
) -> Artifact:
    """Compile a corpus into a memory under output/; return the last stage's artifact.

    context: where the work runs, by default in this process, how progress is shown, and how much
    ram a process may take; until: the last stage to make, one of STAGES; update: the folder of a
    build whose corpus has become this one, from which all that stays is taken.
    Raises MemdecError, in one sentence, for input or settings that cannot work.

    >>> from pathlib import Path
    >>> from vllm_memdec.train.pipeline import build
    >>> from vllm_memdec.train.settings import parse_settings
    >>> settings = parse_settings({"corpus": {"block_tokens": 128}, "memory": {"epochs": 1}})
    >>> export = build("models/base", Path("corpus.jsonl"), Path("build/memory"), settings)
    >>> export.path.name, export.manifest["stage"], len(export.hash)
    ('export', 'export', 64)
    """
    if until not in STAGES:
        raise MemdecError(f"--until must be one of {', '.join(STAGES)}, got {until!r}.")
    if update is None and settings.update.model_fields_set:
        name = min(settings.update.model_fields_set)
        raise MemdecError(f"update.{name} is for --update: give that as well, or leave it out.")
    context = context or Context()
    say = context.progress.say
    base, corpus = model_folder(base, "--base", say), text_path(corpus, "--corpus", say)
    validation = validation and text_path(validation, "--validation", say)
    settings = with_folders(settings, say)
    # Workers have another working directory.
    base, corpus, output = os.path.abspath(base), corpus.absolute(), output.absolute()
    validation, update = validation and validation.absolute(), update and update.absolute()
    check_inputs(base, corpus, validation, output, settings.memory, update)
    with locked(output, context.progress.say):
        hashes = Hashes(output)
        try:
            inputs = find_inputs(base, corpus, validation, settings, hashes, context.progress)
        finally:
            hashes.save()
        if settings.memory.init != "base":
            from vllm_memdec.train.model.decoder import with_defaults

            memory = with_defaults(settings.memory, base, context.progress.say)
            settings = settings.model_copy(update={"memory": memory})
        made = Build(base, corpus, validation, output, settings, context)
        if update is None:
            return run(made, inputs, until)
        from vllm_memdec.train.stages.updating import check_old, cost, open_old

        made = replace(made, old=open_old(update, STAGES))
        check_old(made, inputs, stages())
        last = run(made, inputs, until)
        for line in cost(made):
            context.progress.say(line)
        return last


def check_inputs(
    base: str,
    corpus: Path,
    validation: Path | None,
    output: Path,
    settings: MemorySettings,
    update: Path | None = None,
) -> None:
    """Refuse an output that the build could harm something in, before anything is touched.

    And validation text that would be trained on.
    """
    files = corpus_files(corpus).files
    inputs = [("--corpus", corpus), ("--validation", validation), ("--base", base)]
    inputs.append(("--init", None if settings.init == "base" else settings.init))
    inputs += [("--tokenizer", settings.tokenizer), ("--update", update)]
    check_places(inputs, output)
    for stage in STAGES:
        check_ours(output / stage, stage)
    if validation is not None and validation.resolve() != corpus.resolve():
        held_out = {path.resolve() for path in corpus_files(validation).files}
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

    Of a base a stage's hash covers only what the stage reads. A base or memory that could not be
    served is refused.
    """
    from vllm_memdec.train.model.kinds import check_base, check_init

    settings = all_settings.memory
    fields = fields_of(all_settings.corpus, validation)
    tokenizer = tokenizer_hash(base, "--base", hashes)
    check_base(base)
    check_weights(base, "--base")
    weights = weights_hash(base, "--base", hashes)
    of_memory = {"base": weights}
    if settings.init != "base":
        option = "memory.init or --init"
        check_init(str(check_model(settings.init, option)))
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
            text[name] = hashes.text(path, fields)
            files = corpus_files(path)
            if left_out := files.left_out():
                how = f": {files.remedies()}" if files.remedies() else ""
                progress.say(f"{name}: left out of {path}: {left_out} ({TABLE}){how}")
    if hashes.separated:
        progress.say(
            f"text files whose documents a line of <|endoftext|> separates, each of them read by "
            f"itself: {len(hashes.separated):,}, such as {hashes.separated[0]}"
        )
    if text.get("validation") == text["corpus"]:
        raise MemdecError(
            "--validation is the text of --corpus, which the memory learns by heart: give text "
            "that it does not see, or leave --validation out."
        )
    if hashes.chats:
        from vllm_memdec.train.data.chat import chat_template
        from vllm_memdec.train.model.huggingface import load_tokenizer

        text["chat_template"] = json_sha256(chat_template(load_tokenizer(base)))
    return {
        "corpus": {"tokenizer": tokenizer} | text,
        "datastore": {"base": weights},
        "memory": of_memory,
        "export": {"base": weights},
    }


def stages() -> dict[str, Callable[[Build], Stage]]:
    """Return what describes each stage, in order.

    Imported late: what is wrong with a command is told before torch and faiss are there.
    """
    from vllm_memdec.train.stages import corpus, datastore, export, index, targets, training

    modules = (corpus, datastore, index, targets, training, export)
    return {name: module.stage for name, module in zip(STAGES, modules, strict=True)}


def run(
    build: Build,
    inputs: dict[str, dict[str, str]],
    until: str,
    described: Mapping[str, Callable[[Build], Stage]] | None = None,
) -> Artifact:
    """Make or find every stage up to one, of `described` or of a build; return its artifact."""
    from vllm_memdec.train.stages.updating import updated

    for name, describe in (described or stages()).items():
        stage = updated(build, name, describe(build))
        try:
            build.done[name] = make_or_find(build, name, stage, inputs.get(name, {}))
        except Exception as error:
            if out_of_memory(error):
                raise MemdecError(
                    f"out of memory in the {name} stage: {stage.remedy} {AGAIN}"
                ) from error
            raise
        if name == until:
            break
    return build.done[until]


def make_or_find(build: Build, name: str, stage: Stage, inputs: dict[str, str]) -> Artifact:
    """Return one stage's artifact; inputs: hashes of the files of the user's that it reads."""

    def make(work: Path) -> None:
        check_memory(build)
        stage.make(work)

    earlier = {each: build.done[each].hash for each in stage.reads}
    if build.old is not None and name != "export":
        earlier["old"] = build.old[name].hash
    path, say = build.output / name, build.context.progress.say
    sources = {each: place for each in inputs if (place := origin(build.source(name, each)))}
    return build_artifact(
        path, name, stage.settings, inputs | earlier, make, say, stage.files, sources
    )


def check_memory(build: Build) -> None:
    """Refuse what only the fifth stage would stumble on."""
    from vllm_memdec.train.model.decoder import memory_config
    from vllm_memdec.train.stages.faiss_gpu import check_width

    settings = build.settings
    memory_config(settings.memory, build.base, settings.corpus.block_tokens)
    check_width(settings.targets.neighbours, settings.index.probes, build.context.executor)
