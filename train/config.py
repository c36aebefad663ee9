"""Settings of `memdec build`: one frozen dataclass per stage, read from YAML, unknown keys refused.

The defaults suit a small corpus; configs/wikitext103.yaml holds the paper's set-up.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from vllm_memdec.errors import MemdecError

BLOCKS = 4  # a forward pass, by default; on CUDA this number stands for more: see datastore.py


@dataclass(frozen=True)
class CorpusSettings:
    block_tokens: int = 512  # predicted tokens a block
    validation_fraction: float = 0.05  # of the documents, unless a validation text is given
    group: str | None = None  # a field of the rows: rows of one value are held out together
    shard_blocks: int = 64  # blocks a file of every stage, and the most that is done twice


@dataclass(frozen=True)
class DatastoreSettings:
    key: Literal["last_mlp_input", "final_hidden", "layer"] = "last_mlp_input"  # the paper's
    layer_fraction: float = 0.7  # of the base's depth, where key is layer
    keep_keys: bool = True  # on disk, 2 bytes a number; else computed again for the search
    batch_blocks: int = BLOCKS  # a forward pass
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the base's forward pass

    @property
    def key_layer(self) -> str | float:
        """Return the name of the key, or the share of the layers it is the output of."""
        return self.layer_fraction if self.key == "layer" else self.key


@dataclass(frozen=True)
class IndexSettings:
    kind: Literal["auto", "flat", "fp16", "sq8", "pq"] = "auto"  # auto: by the number of keys
    probes: int = 32  # inverted lists visited a query
    seed: int = 42


@dataclass(frozen=True)
class TargetSettings:
    neighbours: int = 256  # the paper's: 1024
    temperature: float | None = None  # of exp(-distance / temperature); None: fitted
    min_probability: float = 1e-4  # smaller target probabilities are dropped


@dataclass(frozen=True)
class MemorySettings:
    init: str = "base"  # "base": its first layers; or a folder with a causal LM or only its config
    tokenizer: str | None = None  # folder of the base's, if init is to be adapted to it
    transfer_fraction: float = 0.1  # of the epochs, trained where init is adapted
    layers: int | None = None  # kept of the base; None: 4, or all of a base with fewer
    beta: float = 0.5  # weight of KL(kNN || memory); 1 - beta is cross-entropy's
    epochs: float = 20.0
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.05
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # to a tenth, to 0, or level
    evaluate_steps: int | None = None  # steps between evaluations on validation text; None: none
    early_stop: int | None = None  # evaluations without a better one that end the training
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    batch_blocks: int = 8  # blocks an optimiser step
    micro_batch_blocks: int = BLOCKS  # a forward pass
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of matrix products; weights stay float32
    sampled_negatives: int | None = None  # columns beside the corpus's own; None: all, see head.py
    checkpoint_seconds: float = 60.0
    seed: int = 42


@dataclass(frozen=True)
class ExportSettings:
    alpha: float | None = None  # None: tuned on the validation text, for each length of context
    # Of the longest requests that alpha is tuned on; None: as many as the text fills (windows.py)
    context_tokens: int | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


@dataclass(frozen=True)
class Settings:
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    datastore: DatastoreSettings = field(default_factory=DatastoreSettings)
    index: IndexSettings = field(default_factory=IndexSettings)
    targets: TargetSettings = field(default_factory=TargetSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    export: ExportSettings = field(default_factory=ExportSettings)


RANGES: dict[str, tuple[float, float]] = {
    "corpus.block_tokens": (8, 1 << 20),
    "corpus.validation_fraction": (1e-6, 0.5),
    "corpus.shard_blocks": (1, 1 << 24),
    "datastore.layer_fraction": (1e-3, 1),
    "datastore.batch_blocks": (1, 1 << 16),
    "index.probes": (1, 1 << 20),
    "index.seed": (0, (1 << 31) - 1),
    "targets.neighbours": (1, 1 << 16),
    "targets.temperature": (1e-9, 1e9),
    "targets.min_probability": (0, 0.5),
    "memory.transfer_fraction": (1e-6, 1),
    "memory.layers": (1, 1 << 10),
    "memory.beta": (0, 1),
    "memory.epochs": (1e-6, 1e6),
    "memory.learning_rate": (1e-9, 1),
    "memory.warmup_fraction": (0, 1),
    "memory.evaluate_steps": (1, 1 << 30),
    "memory.early_stop": (1, 1 << 20),
    "memory.weight_decay": (0, 1),
    "memory.gradient_clip": (1e-9, 1e9),
    "memory.batch_blocks": (1, 1 << 20),
    "memory.micro_batch_blocks": (1, 1 << 20),
    "memory.sampled_negatives": (1, 1 << 24),
    "memory.checkpoint_seconds": (0, 1e9),
    "memory.seed": (0, (1 << 31) - 1),
    "export.alpha": (0, 1),
    "export.context_tokens": (32, 1 << 20),
}


def load_settings(path: Path | None) -> Settings:
    """Return the settings of a YAML file, defaults for what it leaves out; MemdecError if wrong."""
    if path is None:
        return Settings()
    import yaml

    if not path.is_file():
        raise MemdecError(f"settings file {path} does not exist: check --config.")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        raise MemdecError(f"{path} is not valid YAML ({what}): mend it.") from None
    return parse_settings(values)


def parse_settings(values: dict[str, Any]) -> Settings:
    """Return Settings of {stage: {name: value}}, every name, type and range checked."""
    stages = {f.name: f.default_factory for f in dataclasses.fields(Settings)}
    if not isinstance(values, dict):
        raise MemdecError("settings must be a mapping of stages, as in configs/tiny.yaml.")
    for stage, entries in values.items():
        _check_name(stage, list(stages), "stage")
        if not isinstance(entries, dict):
            raise MemdecError(f"settings of stage {stage} must be a mapping, got {entries!r}.")
    parsed = {s: _parse_stage(s, make, values.get(s, {})) for s, make in stages.items()}
    if parsed["memory"].early_stop and not parsed["memory"].evaluate_steps:
        raise MemdecError("memory.early_stop needs memory.evaluate_steps: set that as well.")
    return Settings(**parsed)


def _parse_stage(stage: str, make: Any, entries: dict[str, Any]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(make)}
    checked = {}
    for name, value in entries.items():
        _check_name(name, list(fields), f"setting of stage {stage}")
        checked[name] = _convert(f"{stage}.{name}", value, fields[name].type)
    return make(**checked)


def _check_name(name: Any, known: list[str], what: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(str(name), known, 1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}."
        raise MemdecError(f"unknown {what}: {name}; {hint}")


def _convert(name: str, value: Any, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise MemdecError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}.")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise MemdecError(f"{name} must be true or false, got {value!r}.")
        return value
    if value is None and kind in (float | None, int | None, str | None):
        return None
    if kind in (str, str | None):
        if not isinstance(value, str):
            raise MemdecError(f"{name} must be text, got {value!r}.")
        return value
    number = float if kind in (float, float | None) else int
    kind_name = "an integer" if number is int else "a number"
    wrong = MemdecError(f"{name} must be {kind_name}, got {value!r}.")
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            raise wrong from None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value != value:
        raise wrong
    low, high = RANGES[name]
    if not low <= value <= high:
        raise MemdecError(f"{name} must be between {low:g} and {high:g}, got {value!r}.")
    if number(value) != value:
        raise wrong
    return number(value)
