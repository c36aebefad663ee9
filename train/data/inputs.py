"""Hashes of what a build is made from: the parts of a model folder that a stage reads, and text.

What changes nothing in a stage's result is left out of its hash: a chat template, a README or a
generation_config.json beside a base rebuild nothing.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vllm_memdec.checkpoint import TEKKEN
from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.artifacts import file_sha256, folder_sha256, json_sha256, write_json
from vllm_memdec.train.data.documents import READER, Reading, read_whole
from vllm_memdec.train.data.files import corpus_files
from vllm_memdec.train.data.ownership import read_object
from vllm_memdec.train.data.readers import TEXT, Fields

CONFIG = "config.json"
WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "adapter_*",
)
WHOLE = (  # one of these is in a folder with weights
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    TEKKEN,
)
# Entries of JSON files that change nothing in what a model or tokenizer computes.
NO_MATTER = (
    "_name_or_path",
    "chat_template",
    "memdec",  # what an export says of itself
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
    "transformers_version",
)
MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")
REMEMBERED = ".memdec-hashes.json"  # the file of known hashes in an output folder
SETTLED = 2_000_000_000  # age in ns below which a file may change without a new time


class Hashes:
    """SHA-256 of files, remembered by path, size, times and inode: a base of 70B takes minutes.

    They are kept in an output folder, never beside the files.
    """

    def __init__(self, output: Path | None = None) -> None:
        """output: where hashes of earlier runs are, and are saved; None: they are not kept."""
        self.place = output and output / REMEMBERED
        self.known = (self.place and read_object(self.place)) or {}
        self.changed = False
        self.separated: list[str] = []  # text files that hold several documents
        self.chats = False  # whether a corpus has some

    def file(self, path: Path) -> str:
        """Return the SHA-256 of a file's content."""
        return self._of(str(path.resolve()), [path], lambda: file_sha256(path))

    def text(self, path: Path, fields: Fields = TEXT) -> str:
        """Return the hash of the documents of a corpus, and of a field that groups them, if any.

        All of them are read and checked.
        """
        name = f"text {READER} of {path.resolve()}" + (
            f" by {fields.group}" if fields.group else ""
        )
        name += f" in {fields.text}" if fields.text != TEXT.text else ""
        files = corpus_files(path).files
        reading = Reading()

        def read() -> str:
            nonlocal reading
            reading = read_whole(path, fields)
            return reading.hash

        digest = self._of(name, files, read)
        known = self.known.get(name) or []
        if reading.hash:
            known[2:] = [reading.separated, reading.chats]
        self.separated += reading.separated if reading.hash else sum(known[2:3], [])
        self.chats |= bool(reading.chats if reading.hash else sum(known[3:]))
        return digest

    def _of(self, name: str, files: list[Path], find: Callable[[], str]) -> str:
        states = [file_state(path) for path in files]
        known = self.known.get(name)
        if isinstance(known, list) and known[:1] == [states]:
            return str(known[1])
        digest = find()
        newest = max(max(state[2:4]) for state in states)
        if time.time_ns() - newest > SETTLED:
            self.known[name] = [states, digest]
            self.changed = True
        return digest

    def save(self) -> None:
        """Write the known hashes to the output folder, which is this process's to write to."""
        if self.place and self.changed:
            write_json(self.place, self.known)


def file_state(path: Path) -> list[Any]:
    """Return what changes with a file's content: [path, bytes, two times in ns, inode]."""
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def check_model(folder: str, option: str) -> Path:
    """Return a model folder's path; MemdecError if it is none, or a model in another format."""
    path = Path(folder)
    if not (path / CONFIG).is_file():
        check_format(path, option)
        raise MemdecError(f"{folder} is not a model folder, it has no {CONFIG}: check {option}.")
    return path


def check_weights(folder: str, option: str) -> None:
    """Raise MemdecError if a model folder has no weights that transformers reads."""
    path = check_model(folder, option)
    named = "transformers_weights" in (read_object(path / CONFIG) or {})
    if not named and not any((path / name).is_file() for name in WHOLE):
        check_format(path, option)
        raise MemdecError(
            f"{folder} has no weights, neither {WHOLE[0]} nor {WHOLE[2]}: copy the whole model "
            f"again, or check {option}."
        )


def check_format(path: Path, option: str) -> None:
    """Raise MemdecError if what lies at a path is known, but no model in Hugging Face's format."""
    files = [path] if path.is_file() else [*path.iterdir()] if path.is_dir() else []
    names = [file.name for file in files]
    if "adapter_config.json" in names:
        adapter = read_object(path / "adapter_config.json") or {}
        raise MemdecError(
            f"{path} is an adapter (LoRA) of {adapter.get('base_model_name_or_path')}, no model: "
            f"merge it into that (peft's merge_and_unload), save the result, and give it as "
            f"{option}."
        )
    if any(name.endswith(".gguf") for name in names):
        what = "a GGUF file"
    elif any(name.startswith("consolidated") or name == "params.json" for name in names):
        what = "a model in its makers' own format (consolidated weights, params.json)"
    else:
        return
    raise MemdecError(
        f"{path} holds {what}, which a build does not read: give {option} the folder of the model "
        f"in Hugging Face's format, with {CONFIG} and {WHOLE[0]}."
    )


def model_hash(folder: str, option: str) -> str:
    """Return a hash over all files of a model folder that a library may read."""
    return folder_sha256(check_model(folder, option), MODEL_FILES)


def weights_hash(folder: str, option: str, hashes: Hashes) -> str:
    """Return a hash over what a model computes: its weights and config; MemdecError if none."""
    path = check_model(folder, option)
    config = read_object(path / CONFIG)
    shape = hashes.file(path / CONFIG) if config is None else without_what_does_not_matter(config)
    return json_sha256([shape, contents(path, (*WEIGHTS, *code(path)), hashes)])


def tokenizer_hash(folder: str, option: str, hashes: Hashes) -> str:
    """Return a hash over what turns text into a model's tokens; MemdecError if none.

    That is the tokenizer, and of the config the model's type, vocabulary and positions.
    """
    path = check_model(folder, option)
    config = read_object(path / CONFIG) or {}
    text = config.get("text_config")
    of_model = [
        [part.get(name) for name in ("model_type", "vocab_size", "max_position_embeddings")]
        for part in (config, text if isinstance(text, dict) else {})
    ]
    return json_sha256([of_model, contents(path, (*TOKENIZER, *code(path)), hashes)])


def code(folder: Path) -> tuple[str, ...]:
    """Return the pattern of a folder's own code if its model or tokenizer is made of that."""
    configs = (read_object(folder / name) or {} for name in (CONFIG, "tokenizer_config.json"))
    return ("*.py",) if any("auto_map" in config for config in configs) else ()


def contents(folder: Path, patterns: Iterable[str], hashes: Hashes) -> list[list[Any]]:
    """Return [name, hash or relevant content] of the files that match."""
    files = sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()})
    states = []
    for path in files:
        small = read_object(path) if path.name.endswith("_config.json") else None
        relevant = hashes.file(path) if small is None else without_what_does_not_matter(small)
        states.append([path.name, relevant])
    return states


def without_what_does_not_matter(entries: dict[str, Any]) -> dict[str, Any]:
    """Return JSON entries without those that change nothing."""
    return {name: value for name, value in entries.items() if name not in NO_MATTER}


def same_base(base: Path, manifests: list[dict[str, Any]], hashes: Hashes | None = None) -> bool:
    """Tell whether the manifests of some stages name this base; also those of older releases."""
    hashes, option = hashes or Hashes(), "--base"
    of_corpus = [m["inputs"] for m in manifests if m["stage"] == "corpus"]
    tokenizers = {inputs["tokenizer"] for inputs in of_corpus if "tokenizer" in inputs}
    weights = {m["inputs"]["base"] for m in manifests if "base" in m["inputs"]}
    if not tokenizers | weights:
        return False
    if weights and weights_hash(str(base), option, hashes) not in weights:
        return model_hash(str(base), option) in weights
    return not tokenizers or tokenizer_hash(str(base), option, hashes) in tokenizers
