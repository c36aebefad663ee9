"""Run the stages in order: corpus -> datastore -> index -> targets -> memory -> export.

Every stage is a function of its settings and of finished artifacts; what is up to date is skipped.
"""

from dataclasses import asdict
from pathlib import Path

from vllm_memdec.train.artifacts import Artifact, build_artifact, folder_sha256, json_sha256
from vllm_memdec.train.config import Settings
from vllm_memdec.train.progress import Progress

MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")
STAGES = ("corpus", "datastore", "index", "targets", "memory", "export")


def model_hash(folder: str) -> str:
    """Return a hash over a model folder's weights, configs and tokenizer; ValueError if none."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json.")
    return folder_sha256(Path(folder), MODEL_FILES)


def text_hash(path: Path) -> str:
    """Return a hash over the files of a corpus."""
    from vllm_memdec.train.artifacts import file_sha256
    from vllm_memdec.train.corpus import corpus_files

    return json_sha256([file_sha256(file) for file in corpus_files(path)])


def build(
    base: str,
    corpus: Path,
    output: Path,
    settings: Settings,
    validation: Path | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Compile a corpus into a memory under output/; return the export artifact.

    Raises ValueError, in one sentence, for input or settings that cannot work.
    """
    progress = progress or Progress()
    inputs = {"corpus": text_hash(corpus)}
    if validation is not None:
        inputs["validation"] = text_hash(validation)
    base_hash = model_hash(base)
    output.mkdir(parents=True, exist_ok=True)

    def stage(name: str, stage_settings: dict, stage_inputs: dict, make) -> Artifact:
        return build_artifact(
            output / name, name, stage_settings, stage_inputs, make, say=progress.say
        )

    def make_corpus(work: Path) -> None:
        from vllm_memdec.train.corpus import build_corpus

        build_corpus(settings.corpus, base, corpus, validation, work)

    blocks = stage("corpus", asdict(settings.corpus), inputs | {"base": base_hash}, make_corpus)

    def make_datastore(work: Path) -> None:
        from vllm_memdec.train.datastore import build_datastore

        build_datastore(settings.datastore, base, blocks.path, work, progress)

    datastore = stage(
        "datastore",
        asdict(settings.datastore),
        {"corpus": blocks.hash, "base": base_hash},
        make_datastore,
    )

    def make_index(work: Path) -> None:
        from vllm_memdec.train.index import build_index

        build_index(settings.index, datastore.path, work, progress)

    index_settings = asdict(settings.index)
    probes = index_settings.pop("probes")  # of the search: another value needs no other index
    index = stage("index", index_settings, {"datastore": datastore.hash}, make_index)

    def make_targets(work: Path) -> None:
        from vllm_memdec.train.targets import build_targets

        build_targets(settings.targets, probes, datastore.path, index.path, work, progress)

    targets = stage(
        "targets",
        asdict(settings.targets) | {"probes": probes},
        {"datastore": datastore.hash, "index": index.hash},
        make_targets,
    )

    def make_memory(work: Path) -> None:
        from vllm_memdec.train.trainer import train_memory

        train_memory(settings.memory, base, blocks.path, targets.path, work, progress)

    memory_settings = asdict(settings.memory)
    memory_settings.pop("checkpoint_seconds")  # changes nothing in the result
    memory_inputs = {"corpus": blocks.hash, "targets": targets.hash, "base": base_hash}
    if settings.memory.init != "base":
        memory_inputs["init"] = model_hash(settings.memory.init)
    memory = stage("memory", memory_settings, memory_inputs, make_memory)

    def make_export(work: Path) -> None:
        from vllm_memdec.train.export import export_memory

        artifacts = {"corpus": blocks, "targets": targets, "memory": memory}
        provenance = {
            "artifacts": {name: artifact.hash for name, artifact in artifacts.items()},
            "settings": asdict(settings),
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
        )

    return stage(
        "export",
        asdict(settings.export),
        {"memory": memory.hash, "corpus": blocks.hash, "targets": targets.hash, "base": base_hash},
        make_export,
    )
