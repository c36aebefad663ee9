"""Settings of `memdec build`: one frozen model per stage, read from YAML, unknown keys refused.

The defaults suit a small corpus; configs/wikitext103.yaml holds the paper's set-up.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.settings_errors import is_number, sentence

Model = TypeVar("Model", bound=BaseModel)

# The defaults where a memory starts from trained weights (arXiv 2508.09874).
PRETRAINED: dict[str, Any] = {"learning_rate": 1e-4, "epochs": 15.0}

# Settings of a memory that are for one value of another setting; and those that came later.
ONLY_FOR = {
    "mixture_alpha": ("objective", "mixture"),
    "mixture_ramp": ("objective", "mixture"),
    "muon_learning_rate": ("optimizer", "muon"),
}
LATER = ("objective", "optimizer", "average_fraction")


class StageSettings(BaseModel):
    """The settings of one stage; a subclass names each with its range."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _read_number(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name
        if value is None or name is None or not is_number(cls.model_fields[name]):
            return value
        number = float(value) if isinstance(value, str) else value  # YAML 1.1 reads 1e-3 as text
        if isinstance(number, bool) or not isinstance(number, (int, float)) or number != number:
            raise ValueError("not a number")
        return number

    def changed(self, **changes: Any) -> Self:
        """Return a copy with some settings changed; MemdecError if one of them is wrong."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return _checked(type(self), given | changes)

    def _given(self, name: str) -> bool:
        """Return whether a setting was set, to something else than nothing."""
        return name in self.model_fields_set and getattr(self, name) is not None


class CorpusSettings(StageSettings):
    block_tokens: int = Field(512, ge=8, le=1 << 20)  # predicted tokens of a token block
    # The share of the documents that is held out, unless a validation text is given.
    validation_fraction: float = Field(0.05, ge=1e-6, le=0.5)
    group: str | None = None  # a field of the rows: rows of one value are held out together
    # The field of the rows that holds the text; a.b is the field b in the field a.
    text_field: str = Field("text", min_length=1)
    loss_on: Literal["all", "assistant"] = "all"  # tokens of a chat that are keys and are learnt
    # Token blocks of a file, in every stage: what a killed worker does again, at most.
    shard_blocks: int = Field(64, ge=1, le=1 << 24)


class DatastoreSettings(StageSettings):
    # The paper's: the last MLP's input, or its experts'; of a base with neither the final state.
    key: Literal["last_mlp_input", "final_hidden", "layer"] = "last_mlp_input"
    # The layer whose output is the key, as a share of the base's depth, where key is layer.
    layer_fraction: float = Field(0.7, ge=1e-3, le=1)
    # Whether keys stay on disk, 2 bytes a number, or are computed again for the search.
    keep_keys: StrictBool = True
    # Token blocks of a forward pass; None: by the device.
    batch_blocks: int | None = Field(None, ge=1, le=1 << 16)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # the base's, in its forward pass

    @model_validator(mode="after")
    def _uses_what_it_is_given(self) -> Self:
        if self._given("layer_fraction") and self.key != "layer":
            raise ValueError(
                "datastore.layer_fraction is for datastore.key layer: set that as well, or leave "
                "it out."
            )
        return self

    @property
    def key_layer(self) -> str | float:
        """Return the name of the key, or the share of the layers it is the output of."""
        return self.layer_fraction if self.key == "layer" else self.key


class IndexSettings(StageSettings):
    kind: Literal["auto", "flat", "fp16", "sq8", "pq"] = "auto"  # auto: by the number of keys
    probes: int = Field(32, ge=1, le=1 << 20)  # nprobe: inverted lists that a query visits
    seed: int = Field(42, ge=0, le=(1 << 31) - 1)

    @model_validator(mode="after")
    def _uses_what_it_is_given(self) -> Self:
        if self._given("probes") and self.kind == "flat":
            raise ValueError(
                "index.probes is for inverted lists, which index.kind flat has not: leave it out."
            )
        return self


class TargetSettings(StageSettings):
    neighbours: int = Field(256, ge=1, le=1 << 16)  # the paper's: 1024
    # A neighbour weighs exp(-distance / temperature); None: fitted.
    temperature: float | None = Field(None, ge=1e-9, le=1e9)
    min_probability: float = Field(1e-4, ge=0, le=0.5)  # smaller target probabilities are dropped


class MemorySettings(StageSettings):
    # "base": its first layers, or its embedding alone where they are not attention with dense MLPs
    # (fresh.py has the rule); or a folder with a causal LM or only its config.
    init: str = "base"
    # Whether init gets the base's tokenizer: see vocabulary_transfer.py.
    adapt_tokenizer: StrictBool = False
    tokenizer: str | None = None  # adapt_tokenizer as it was written before: the base's folder
    # The share of the epochs that is trained where init is adapted.
    transfer_fraction: float = Field(0.1, ge=1e-6, le=1)
    # Layers kept of the base, or made fresh; None: 4, or as many as a base with fewer has.
    layers: int | None = Field(None, ge=1, le=1 << 10)
    beta: float = Field(0.5, ge=0, le=1)  # weight of KL(kNN || memory); 1 - beta is cross-entropy's
    # What is learnt from a row's label: its likelihood in the memory, or in the mixture with the
    # base, so that a row that the base predicts well counts less. The datastore keeps the base's.
    objective: Literal["cross_entropy", "mixture"] = "cross_entropy"
    # The memory's weight in that mixture, and the share of the steps over which it takes the place
    # of cross-entropy, which an untrained memory needs.
    mixture_alpha: float = Field(0.5, ge=0.01, le=0.99)
    mixture_ramp: float = Field(0.5, ge=0, le=1)
    # Muon for the matrices of the layers, AdamW for all else; or AdamW for all.
    optimizer: Literal["adamw", "muon"] = "adamw"
    muon_learning_rate: float = Field(0.02, ge=1e-9, le=1)
    # The share of the steps, at the end, whose weights are averaged and exported; 0: the last ones.
    average_fraction: float = Field(0.0, ge=0, le=1)
    # Two defaults for init base, a folder without weights, or an adapted one; else see PRETRAINED.
    epochs: float = Field(20.0, ge=1e-6, le=1e6)
    learning_rate: float = Field(1e-3, ge=1e-9, le=1)
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # down to a tenth, to 0, or level
    # Steps between evaluations on validation text; None: no evaluations.
    evaluate_steps: int | None = Field(None, ge=1, le=1 << 30)
    # Evaluations in a row without a better one, after which the training ends.
    early_stop: int | None = Field(None, ge=1, le=1 << 20)
    weight_decay: float = Field(0.0, ge=0, le=1)
    gradient_clip: float = Field(1.0, ge=1e-9, le=1e9)
    # Token blocks of an optimiser step, over all GPUs; None: by the corpus, see batch().
    batch_blocks: int | None = Field(None, ge=1, le=1 << 20)
    # Token blocks of a forward pass; None: by the device.
    micro_batch_blocks: int | None = Field(None, ge=1, le=1 << 20)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # matrix products; weights stay float32
    # Columns of the output head beside the corpus's own; None: all, see output_head.py.
    sampled_negatives: int | None = Field(None, ge=1, le=1 << 24)
    checkpoint_seconds: float = Field(60.0, ge=0, le=1e9)
    # Whether activations are computed twice instead of kept: slower, but a larger memory fits.
    gradient_checkpointing: StrictBool = False
    compile: StrictBool | None = None  # whether torch.compile gets the layers; None: on a GPU
    # What each of several GPUs holds: the whole memory, or a part of each layer (parallel.py).
    parallel: Literal["replicate", "shard"] = "replicate"
    seed: int = Field(42, ge=0, le=(1 << 31) - 1)

    @model_validator(mode="after")
    def _uses_what_it_is_given(self) -> Self:
        if self.early_stop and not self.evaluate_steps:
            raise ValueError("memory.early_stop needs memory.evaluate_steps: set that as well.")
        for name, (other, value) in ONLY_FOR.items():
            if self._given(name) and getattr(self, other) != value:
                raise ValueError(
                    f"memory.{name} is for memory.{other} {value}: set that as well, or leave it "
                    "out."
                )
        if self.objective == "mixture" and self.beta == 1:
            raise ValueError(
                "memory.objective mixture weighs 1 - memory.beta, which is nothing where "
                "memory.beta is 1: lower it, or leave memory.objective out."
            )
        if self.optimizer == "muon" and self.parallel == "shard":
            raise ValueError(
                "memory.optimizer muon needs whole matrices, and memory.parallel shard cuts them: "
                "set memory.parallel to replicate, or memory.optimizer to adamw."
            )
        if self.average_fraction and self.early_stop:
            raise ValueError(
                "memory.average_fraction exports the mean of the last weights, memory.early_stop "
                "the best: leave one of them out."
            )
        if self.layers is not None and self.init != "base":
            raise ValueError(
                f"memory.layers cuts the base, but memory.init {self.init} keeps all its layers: "
                "leave memory.layers out, or set it to null."
            )
        if self.adapts and self.init == "base":
            raise ValueError(
                "memory.adapt_tokenizer is for a memory that was compiled for another tokenizer: "
                "give that memory with --init, or leave --adapt-tokenizer out."
            )
        if self._given("transfer_fraction") and not self.adapts:
            raise ValueError(
                "memory.transfer_fraction is for memory.adapt_tokenizer: set that as well, or "
                "leave it out."
            )
        return self

    @property
    def adapts(self) -> bool:
        """Return whether init is to be adapted to the base's tokenizer."""
        return self.adapt_tokenizer or self.tokenizer is not None

    def batch(self, blocks: int) -> int:
        """Return how many of a corpus's blocks a step takes, unless it has fewer.

        By default 8, doubled for a larger corpus, up to 512, as long as 1,000 steps an epoch are
        left. So eight GPUs have work from 64,000 blocks on, and the result does not depend on how
        many GPUs there are.
        """
        if self.batch_blocks is not None:
            return self.batch_blocks
        size = 8
        while size < 512 and blocks >= 2 * size * 1000:
            size *= 2
        return size

    def recorded(self) -> dict[str, Any]:
        """Return all settings but unused ones that came later: hashes stay as they were."""
        settings = self.model_dump()
        for name in LATER:
            if settings[name] == type(self).model_fields[name].default:
                for unused in (name, *(n for n, (other, _) in ONLY_FOR.items() if other == name)):
                    settings.pop(unused)
        return settings

    def pretrained(self) -> Self:
        """Return a copy with the defaults for a memory that starts from trained weights."""
        missing = PRETRAINED.keys() - self.model_fields_set
        return self.changed(**{name: PRETRAINED[name] for name in missing})


class ExportSettings(StageSettings):
    # The memory's weight; None: tuned on the validation text, for each length of context.
    alpha: float | None = Field(None, ge=0, le=1)
    # Tokens of the longest requests on which alpha is tuned; None: as many as the text fills.
    context_tokens: int | None = Field(None, ge=32, le=1 << 20)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class UpdateSettings(StageSettings):
    """What `memdec build --update` trains: see training/replay.py."""

    # Passes over the text that is new and over what is to be forgotten; None: memory.epochs.
    epochs: float | None = Field(None, ge=1e-6, le=1e6)
    replay: float = Field(0.5, ge=0, le=0.9)  # share of a step's blocks that are old ones
    learning_rate: float = Field(0.6, ge=1e-6, le=10)  # times memory.learning_rate


class Settings(BaseModel):
    """The settings of all stages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    corpus: CorpusSettings = CorpusSettings()
    datastore: DatastoreSettings = DatastoreSettings()
    index: IndexSettings = IndexSettings()
    targets: TargetSettings = TargetSettings()
    memory: MemorySettings = MemorySettings()
    export: ExportSettings = ExportSettings()
    update: UpdateSettings = UpdateSettings()

    def changed(self, changes: dict[str, dict[str, Any]]) -> "Settings":
        """Return a copy with {stage: {name: value}} changed; MemdecError if one is wrong."""
        given = self.model_dump(exclude_unset=True)
        stages = {stage: given.get(stage, {}) | entries for stage, entries in changes.items()}
        return parse_settings(given | stages)


def load_settings(
    path: Path | None, assignments: Sequence[str] = (), memory: dict[str, Any] | None = None
) -> Settings:
    """Return the settings of a YAML file, defaults for what it leaves out; MemdecError if wrong.

    assignments: values of --set, such as "memory.epochs=3", which win over the file, a later one
    over an earlier one. memory: settings of that stage that have options of their own, which win
    over all.
    """
    changes = _assigned(assignments)
    if memory:
        changes["memory"] = changes.get("memory", {}) | memory
    values = {} if path is None else _read_yaml(path)
    if isinstance(values, dict) and all(isinstance(entries, dict) for entries in values.values()):
        # Before any is checked: a setting of the file may need what an option gives.
        values |= {stage: values.get(stage, {}) | entries for stage, entries in changes.items()}
    return parse_settings(values)


def _read_yaml(path: Path) -> Any:
    import yaml

    if not path.is_file():
        raise MemdecError(f"settings file {path} does not exist: check --config.")
    try:
        return yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        raise MemdecError(f"{path} is not valid YAML ({what}): mend it.") from None


def _assigned(assignments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return {stage: {name: value}} of texts STAGE.NAME=VALUE, each value read as YAML."""
    import yaml

    changes: dict[str, dict[str, Any]] = {}
    for text in assignments:
        match = re.fullmatch(r"\s*([^.=]+?)\.([^.=]+?)\s*=(.*)", text, re.DOTALL)
        if match is None:
            raise MemdecError(
                f"--set must be STAGE.NAME=VALUE, such as memory.epochs=3, got {text!r}."
            )
        stage, name, value = match.groups()
        try:
            changes.setdefault(stage, {})[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise MemdecError(f"--set {text}: the value is no YAML, put it in quotes.") from None
    return changes


def parse_settings(values: dict[str, Any]) -> Settings:
    """Return Settings of {stage: {name: value}}, every name, type and range checked."""
    return _checked(Settings, values)


def _checked(kind: type[Model], values: Any) -> Model:
    """Return a model of values; MemdecError, one sentence on the first that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
    where = list(first["loc"])
    if kind is not Settings:
        where.insert(0, next(n for n, f in Settings.model_fields.items() if f.annotation is kind))
    raise MemdecError(sentence(where, first, Settings))
