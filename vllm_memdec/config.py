"""The settings of a server: the `memdec` section of --additional-config, parsed and checked."""

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_memdec.checkpoint import MemoryBlock, brief, check_alpha, check_table, read_block
from vllm_memdec.draft_length import MAX_DRAFTS
from vllm_memdec.gate import check_gate, gate_path, read_gate

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ARCHITECTURE = "MemDecForCausalLM"
MODEL_IMPL = "memdec"
NONE = "none"  # the name by which a request asks for the base alone
ONLY = "memory"  # the name of a memory that was given without one
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"  # of a memory
MAX_MEMORIES = 256  # bfloat16, which carries their numbers, is exact up to there
NOT_SETTINGS = ("name", "block", "gate_file")
# Types of the settings that are not text; alpha and served_as are checked apart.
TYPES: dict[str, type] = {
    "tensor_parallel_size": int,
    "gate": bool,
    "alpha_by_context": list,
    "with_images": bool,
}
SPECULATIVE, OVERLAP, AT_ONCE = "speculative_tokens", "overlap", "at_once"
SERVED_AS, BASE_SERVED_AS = "served_as", "base_served_as"
SLOTS = "slots"
MAX_STEPS = 64  # [position, alpha] pairs of a memory in a slot
# Settings of the places for memories that come while the server runs: all have one shape.
SLOT_SETTINGS = ("model", "revision", "dtype", "quantization", "kv_cache_dtype")
MAX_SPECULATIVE_TOKENS = 16  # a step; even a memory that is always right gains little beyond
AUTO = "auto"  # in place of their number, or of a weight: what is best
ALONE = "alone"  # in place of a weight: the memory alone, whatever its gate would give it
EXAMPLE = '--additional-config \'{"memdec": {"model": "MEMORY"}}\''


@dataclass(frozen=True)
class MemoryConfig:
    """One memory of a server, checked, with its default weight filled in."""

    name: str
    model: str  # folder or hub id
    alpha: float | str  # weight for requests that do not give their own; "auto": the gate's
    revision: str | None = None  # of a hub id
    dtype: str | None = None  # the base's by default
    quantization: str | None = None  # what its config.json names by default
    kv_cache_dtype: str | None = None  # the base's by default
    tensor_parallel_size: int | None = None  # 1: a whole copy on each rank; the base's by default
    gate: bool = True  # False: a gate in the memory's folder is not used
    with_images: bool = True  # False: off for requests with images, or with video or audio
    # Its names as a model, each with its weight; None is `alpha`.
    served_as: dict[str, float | str | None] = field(default_factory=dict)
    block: MemoryBlock | None = None  # of its config.json; None for a plain causal LM
    # [position, alpha], each from its position on, in place of a gate: "auto" is these then.
    alpha_by_context: list[list[float]] | None = None
    gate_file: Path | None = None  # its gate; where there is one, weights are caps

    @property
    def weight(self) -> str:
        """Return in words what weight a request gets that does not ask for one."""
        if self.alpha != AUTO:
            return f"{self.alpha:g}"
        if not self.alpha_by_context:
            return AUTO
        pairs = self.alpha_by_context
        steps = ", ".join(f"{alpha:g} from position {start}" for start, alpha in pairs)
        return f"by context ({steps})"

    @classmethod
    def parse(cls, name: str, settings: Any) -> "MemoryConfig":
        """Return the configuration for one memory's settings, or raise ValueError."""
        known = {field.name for field in fields(cls)} - {*NOT_SETTINGS}
        which = "" if name == ONLY else f" of {name!r}"
        model = settings.get("model") if isinstance(settings, dict) else None
        if not isinstance(model, str) or not model:
            raise ValueError(f"memdec needs the folder of a memory{which}: {EXAMPLE}.")
        settings = settings | {"model": os.path.expanduser(model)}  # JSON is no shell's
        if unknown := sorted(set(settings) - known, key=str):
            raise ValueError(
                f"Unknown memdec setting {unknown[0]!r}{which}: the settings are {sorted(known)}."
            )
        for key, value in settings.items():
            kind = TYPES.get(key, str)
            if key in ("alpha", SERVED_AS):
                continue
            if value is not None and type(value) is not kind:
                raise ValueError(
                    f"memdec setting {key!r}{which} must be of type {kind.__name__}, got {value!r}."
                )
        block = read_block(settings["model"], settings.get("revision"))
        gate_file, table = None, settings.get("alpha_by_context")
        check_table(table, f"memdec alpha_by_context{which}")
        if table and settings.get("gate"):
            raise ValueError(
                f"memdec 'alpha_by_context'{which} takes the place of a gate: drop it or 'gate'."
            )
        if settings.get("gate") is not False and not table:
            gate_file = gate_path(settings["model"], settings.get("revision"))
        if gate_file is not None:
            check_gate(gate_file, read_gate(gate_file))
        elif settings.get("gate"):
            raise ValueError(f"{settings['model']} has no gate: run memdec calibrate.")
        alpha = settings.get("alpha")
        if table is None and gate_file is None and block is not None:
            table = block.alpha_by_context
        if alpha is None and (gate_file is not None or table):
            alpha = AUTO
        elif alpha is None:
            if block is None:
                raise ValueError(
                    f"{settings['model']} has no memdec block, so it has no default weight: "
                    'give one between 0 and 1, e.g. {"memdec": {"model": ..., "alpha": 0.5}}.'
                )
            alpha = block.alpha
        if alpha != AUTO:
            alpha = check_alpha(alpha, f"memdec alpha{which}")
        elif gate_file is None and not table:
            raise ValueError(
                f"memdec alpha{which} {AUTO!r} needs a gate or alpha_by_context, which "
                f"{settings['model']} has not: "
                "give a number between 0 and 1, or run memdec calibrate."
            )
        derived = {"name": name, "alpha": alpha, "block": block, "gate_file": gate_file}
        derived["alpha_by_context"] = table
        derived[SERVED_AS] = parse_names(
            name, settings.get(SERVED_AS), which, gate_file is not None or bool(table)
        )
        return cls(**settings | derived | {"gate": gate_file is not None})


@dataclass(frozen=True)
class MemDecConfig:
    """The `memdec` block of --additional-config, checked."""

    memories: tuple[MemoryConfig, ...]
    default: str  # name of the memory of requests that do not name one, or "none"
    speculative_tokens: int = 0  # maximum of drafts per step, for the mixture to verify
    adapts: bool = False  # whether fewer are drafted where that is faster
    overlap: bool = False  # whether memories run beside the base within a full CUDA graph
    base_served_as: str | None = None  # the base without a memory as a model; None: none such
    at_once: int = 1  # how many memories a request may mix
    # Places for memories that come while the server runs, numbered after `memories`. An empty one
    # is no memory of a request's; `model` is the folder whose config is its shape.
    slots: tuple[MemoryConfig, ...] = ()

    @property
    def built(self) -> tuple[MemoryConfig, ...]:
        """All that a worker builds, in the order of their numbers: memories, then slots."""
        return (*self.memories, *self.slots)

    @classmethod
    def parse(cls, settings: Any) -> "MemDecConfig":
        """Return the configuration for a `memdec` block, or raise ValueError.

        {"model": ..., ...} is one memory, named "memory"; {"memories": {NAME: {...}}, "default":
        NAME, "at_once": K} are several, or none where there are "slots". Beside either,
        "speculative_tokens", "overlap", "base_served_as", "slots".
        """
        tokens, overlap, base_name = 0, False, None
        slots: tuple[MemoryConfig, ...] = ()
        if isinstance(settings, dict):
            settings = dict(settings)
            slots = parse_slots(settings.pop(SLOTS, None))
            if slots and settings.get("memories") is None and "model" not in settings:
                settings["memories"] = {}
            tokens = settings.pop(SPECULATIVE, 0)
            overlap = settings.pop(OVERLAP, False)
            base_name = settings.pop(BASE_SERVED_AS, None)
        adapts = tokens == AUTO
        if adapts:
            tokens = MAX_DRAFTS
        if type(tokens) is not int or not 0 <= tokens <= MAX_SPECULATIVE_TOKENS:
            raise ValueError(
                f"memdec {SPECULATIVE!r} must be an integer from 0 to {MAX_SPECULATIVE_TOKENS} "
                f"or {AUTO!r}, got {tokens!r}."
            )
        if type(overlap) is not bool:
            raise ValueError(f"memdec {OVERLAP!r} must be true or false, got {overlap!r}.")
        if base_name is not None and (not isinstance(base_name, str) or not base_name):
            raise ValueError(f"memdec {BASE_SERVED_AS!r} must be a name, got {base_name!r}.")
        if not isinstance(settings, dict) or "memories" not in settings:
            memory = MemoryConfig.parse(ONLY, settings)
            check_count(1 + len(slots))
            base_name = check_names([memory], base_name or NONE)
            return cls((memory,), ONLY, tokens, adapts, overlap, base_name, slots=slots)
        if unknown := sorted(set(settings) - {"memories", "default", AT_ONCE}, key=str):
            raise ValueError(
                f"Unknown memdec setting {unknown[0]!r} beside 'memories': "
                "the settings there are "
                f"{[AT_ONCE, BASE_SERVED_AS, 'default', 'memories', OVERLAP, SLOTS, SPECULATIVE]}."
            )
        names = [*settings["memories"]] if isinstance(settings["memories"], dict) else []
        if not names and not (slots and settings["memories"] == {}):
            raise ValueError('memdec "memories" must be an object of at least one named memory.')
        for name in names:
            check_name(name)
        check_count(len(names) + len(slots))
        default: Any = settings.get("default")
        if default is None and len(names) < 2:
            default = names[0] if names else NONE
        if default not in (*names, NONE, AUTO):
            raise ValueError(f'memdec "default" must be one of {[*names, NONE]}, got {default!r}.')
        at_once = settings.get(AT_ONCE, 1)
        most = len(names) + len(slots)
        if type(at_once) is not int or not 1 <= at_once <= most:
            raise ValueError(
                f"memdec {AT_ONCE!r} must be an integer from 1 to {most}, the number of "
                f"memories{' and slots' if slots else ''}, got {at_once!r}."
            )
        memories = [MemoryConfig.parse(*item) for item in settings["memories"].items()]
        if default == AUTO:
            gated = sum(memory.gate for memory in memories)
            check_auto('memdec "default"', gated, at_once)
        if (
            base_name is None and default != NONE
        ):  # else the base's own name is that of the base alone
            base_name = NONE
        base_name = check_names(memories, base_name)
        return cls(tuple(memories), default, tokens, adapts, overlap, base_name, at_once, slots)

    @classmethod
    def from_vllm(cls, vllm_config: "VllmConfig") -> "MemDecConfig":
        """Return the configuration a worker was started with."""
        return cls.parse(memdec_block(vllm_config.additional_config))


def check_name(name: Any) -> None:
    """Raise ValueError unless a memory can be called that."""
    if name in (NONE, AUTO) or not re.fullmatch(NAME, str(name)):
        raise ValueError(
            f"A memory cannot be called {brief(name)}: use letters, digits, '_', '-' and '.', and "
            f"neither {NONE!r}, which means {in_words(NONE)}, nor {AUTO!r}, {in_words(AUTO)}."
        )


def check_count(count: int) -> None:
    """Raise ValueError for more memories and slots than a row can tell apart."""
    if count > MAX_MEMORIES:
        raise ValueError(
            f"memdec serves at most {MAX_MEMORIES} memories, got {count}, slots included."
        )


def parse_slots(settings: Any) -> tuple[MemoryConfig, ...]:
    """Return the slots that a "slots" setting reserves; raise ValueError if it is wrong."""
    if settings is None:
        return ()
    count = settings.get("count") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or type(count) is not int or count < 1:
        raise ValueError(
            f"memdec {SLOTS!r} must be the folder whose shape they have and their number, as in "
            f'{{"model": "MEMORY", "count": 2}}, got {brief(settings)}.'
        )
    check_count(count)
    if unknown := sorted({*settings} - {*SLOT_SETTINGS, "count"}, key=str):
        raise ValueError(
            f"Unknown setting {unknown[0]!r} of memdec {SLOTS!r}: the settings are "
            f"{sorted([*SLOT_SETTINGS, 'count'])}."
        )
    for key in SLOT_SETTINGS:
        value = settings.get(key)
        if value is not None and not isinstance(value, str) or (key == "model" and not value):
            raise ValueError(f"memdec {SLOTS!r}: {key!r} must be a text, got {brief(value)}.")
    given: dict[str, Any] = {key: settings.get(key) for key in SLOT_SETTINGS}
    given["model"] = os.path.expanduser(given["model"])
    # No name of a memory has a space in it.
    return tuple(
        MemoryConfig(name=f"slot {number}", alpha=0.0, gate=False, **given)
        for number in range(count)
    )


def parse_names(
    memory: str, given: Any, which: str, has_auto: bool
) -> dict[str, float | str | None]:
    """Return the names of a memory as a model, each with its weight, or raise ValueError.

    given: its setting "served_as"; None, its own name. has_auto: whether a weight may be "auto".
    """
    if given is None:
        given = memory
    names = {given: None} if isinstance(given, str) else given
    known = isinstance(names, dict) and all(isinstance(name, str) and name for name in names)
    if not known or not names:
        raise ValueError(
            f"memdec {SERVED_AS!r}{which} must be a name, or names with their weights, as in "
            f'{{"law": null, "law-cautious": 0.2}}, got {given!r}.'
        )
    for name, alpha in names.items():
        what = f"memdec {SERVED_AS!r}{which}: the weight of {name!r}"
        if alpha == AUTO and not has_auto:
            raise ValueError(
                f"{what} is {AUTO!r}, which needs a gate or alpha_by_context: give a number "
                "between 0 and 1, or run memdec calibrate."
            )
        if alpha not in (None, AUTO, ALONE):
            check_alpha(alpha, what)
    return names


def check_names(memories: "list[MemoryConfig]", base_name: str | None) -> str | None:
    """Return the name of the base alone as a model; raise ValueError if a name means two things.

    The name of a memory, by which vllm_xargs choose, is no other's as a model.
    """
    meant = {name: in_words(name) for name in (NONE, *(memory.name for memory in memories))}
    served = [(name, in_words(memory.name)) for memory in memories for name in memory.served_as]
    for name, what in [*([(base_name, in_words(NONE))] if base_name else []), *served]:
        if meant.setdefault(name, what) != what:
            raise clash(name, meant[name], what)
    return base_name


def check_auto(what: str, gated: int, at_once: int) -> None:
    """Raise ValueError if a server cannot mix all its memories with gates in one request.

    what: the setting or argument that is "auto". gated: how many there are.
    """
    if gated < 2:
        raise ValueError(
            f"{what} {AUTO!r} means {in_words(AUTO)}, and this server has {gated} with a gate: "
            "name a memory, or run memdec calibrate for two."
        )
    if gated > at_once:
        raise ValueError(
            f"{what} {AUTO!r} means {in_words(AUTO)}, and a request may mix {at_once} of {gated}: "
            f'start the server with "{AT_ONCE}": {gated} beside "memories".'
        )


def in_words(memory: str) -> str:
    """Return in words what the name of a memory, "none" or "auto" stands for."""
    words = {NONE: "the base alone", AUTO: "all memories with gates together"}
    return words.get(memory) or f"the memory {memory!r}"


def clash(name: str, one: str, other: str) -> ValueError:
    """Return the error of a name of a model that would mean two things."""
    return ValueError(
        f"The model {name!r} would be both {one} and {other}: give one of them another name, a "
        f"memory by {SERVED_AS!r}, the base alone by {BASE_SERVED_AS!r}."
    )


def memdec_block(additional_config: Any) -> Any:
    """Return the memdec block of vLLM's additional_config, or None."""
    return additional_config.get("memdec") if isinstance(additional_config, dict) else None
