"""What requests may ask for: memory and weight, or several of them, in their extra_args.

A request with weight 0 or the memory "none" has no memory: nothing of it is computed. Nor has one
with images, or with video or audio, where the memory's settings say so.
"""

import difflib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from vllm_memdec.checkpoint import brief, check_alpha
from vllm_memdec.config import (
    ALONE,
    AUTO,
    NONE,
    MemDecConfig,
    MemoryConfig,
    check_auto,
    clash,
    in_words,
    memdec_block,
)
from vllm_memdec.memory_weights import EXAMPLE, are_weights, check_weights, read_weights

ALPHA, MEMORY = "memdec_alpha", "memdec_memory"
# What the front end makes of both where a memory is in a slot, or several are asked for: number,
# weight and name of each. Nobody else resolves the name of one in a slot, which may be another's by
# the time that the request runs, and no step reads weights again.
SETTLED = "memdec_settled"
NO_MEMORY = -1  # in place of a memory's number
NAMES = ("memdecalpha", "memdecmemory")
PLAIN = ("alpha", "memory")
OTHERS = re.compile("(md|mem|memory|memorydecoder)(alpha|memory|name|weight)|alpha(mem|memory)")
# Names, without what is between their words, under which clients put extra arguments.
EXTRA_FIELDS = ("vllmxargs", "xargs", "extraargs", "extrabody", "samplingparams")
SIMILAR = 0.85  # difflib's ratio: one letter more, less or exchanged


def bare(key: Any) -> str:
    """Return a key's letters and digits, in lower case."""
    return "".join(filter(str.isalnum, str(key))).lower()


def asks(key: Any, plain: bool = True) -> bool:
    """Return whether a key means a memory or a weight, however it is spelt.

    plain: whether "alpha" and "memory" by themselves do, too.
    """
    name = bare(key)
    return (
        "memdec" in name
        or (plain and name in PLAIN)
        or bool(OTHERS.fullmatch(name))
        or bool(difflib.get_close_matches(name, NAMES, cutoff=SIMILAR))
    )


def names_within(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield (path, name) of all keys of a dictionary, and of dictionaries within it.

    Without recursion: a request may nest as deep as JSON can be read.
    """
    todo = [(path, value)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, dict):
            yield from ((f"{path}.{name}", str(name)) for name in value)
            todo += [(f"{path}.{name}", inner) for name, inner in value.items()]


def check_extra_args(extra_args: dict[str, Any] | None, choices: "Choices | None") -> None:
    """Raise ValueError for a wrong memdec argument of a request; every other key is let through.

    choices: None on a server that runs without a memory.
    """
    names = choices.names if choices else ()
    extra_args = extra_args or {}
    for key, value in extra_args.items():
        for path, name in names_within(value, str(key)) if choices and key != MEMORY else ():
            if asks(name, plain=bare(key) in EXTRA_FIELDS):
                raise ValueError(
                    f"{brief(path)} within the extra argument {brief(key)} is not read: put it "
                    f"beside that, as {ALPHA!r} or {MEMORY!r}."
                )
        # On a server without a memory plain names are another plugin's.
        if not asks(key, plain=choices is not None):
            continue
        if key not in (ALPHA, MEMORY):
            raise ValueError(
                f"Unknown extra argument {brief(key)}: the arguments are {ALPHA!r} and {MEMORY!r}."
            )
        if choices is None:
            raise ValueError(f"{key} was given, but this server runs without a memory.")
        if key == ALPHA:
            if value not in (AUTO, ALONE):
                check_alpha(value, ALPHA)
        elif choices:
            check_memory(value, choices)
    if not choices:
        return
    default = choices.default
    memory, alpha = extra_args.get(MEMORY, default), extra_args.get(ALPHA)
    if are_weights(memory) and ALPHA in extra_args:
        raise ValueError(
            f"{ALPHA} goes with one memory, and {MEMORY} has weights of its own: leave {ALPHA} out."
        )
    if memory == AUTO and alpha not in (None, 0, AUTO):
        raise ValueError(
            f"{ALPHA} goes with one memory, and {MEMORY} {AUTO!r} is several, weighed by their "
            f"gates: leave it out, or name one of {[*names]} as {MEMORY}."
        )
    if default == NONE and MEMORY not in extra_args and alpha:
        raise ValueError(
            f"{ALPHA} needs {MEMORY} here, whose default on this server is {NONE!r}: name one of "
            f"{[*names]}."
        )
    if alpha == AUTO and memory not in (NONE, AUTO, *choices.gated, *choices.by_context):
        raise ValueError(
            f"{ALPHA} {AUTO!r} needs a gate or alpha_by_context, which the memory {memory!r} has "
            "not: give a number between 0 and 1, or run memdec calibrate."
        )


def check_memory(value: Any, choices: "Choices") -> None:
    """Raise ValueError for a memory, or memories, that a server has not."""
    if are_weights(value):
        check_weights(MEMORY, value, choices.names, choices.at_once)
        return
    if value == AUTO:
        choices.check_auto(MEMORY)
        return
    if not isinstance(value, str) or value not in (*choices.names, NONE):
        several = f", or weights as in {EXAMPLE!r}" if choices.at_once > 1 else ""
        raise ValueError(
            f"{MEMORY} must be one of {[*choices.names, NONE]}, the memories of this server"
            f"{several}, got {brief(value)}."
        )


def check_images(extra_args: dict[str, Any] | None, choices: "Choices") -> None:
    """Raise ValueError where a request with images asks for a memory that is off for these."""
    asked = {ALPHA, MEMORY} & {*(extra_args or {})}
    if (extra_args or {}).get(MEMORY, choices.default) == AUTO:
        return  # the others mix
    off = [name for name in choices.running(extra_args) if name in choices.without_images]
    for name in off if asked else ():
        raise ValueError(
            f"The memory {name!r} is off for requests with images, video or audio: leave "
            f"{' and '.join(sorted(asked))} out, or ask for the memory {NONE!r}; where the model's "
            "name asks for it, name the base's model."
        )


@dataclass(frozen=True)
class Loaded:
    """A memory in a slot."""

    number: int
    settings: MemoryConfig
    digest: str  # of its weights

    @property
    def salt(self) -> str:
        """What tells its blocks of the KV cache from those of any other memory, ever."""
        return f"{self.number}.{self.digest}"


class Choices:
    """What requests may choose from; resolves their arguments, once checked."""

    def __init__(
        self,
        alphas: dict[str, float | str],
        default: str,
        gated: Collection[str] = (),
        drafts: bool = False,
        by_context: Collection[str] = (),
        without_images: Collection[str] = (),
        served: dict[str, dict[str, Any]] | None = None,
        at_once: int = 1,
        loaded: Collection[Loaded] = (),
    ):
        self.names, self.alphas, self.default, self.gated = (*alphas,), alphas, default, gated
        self.by_context = by_context  # memories with an alpha for each length of context
        self.drafts = drafts  # whether the memories draft
        self.without_images = without_images  # memories that are off for requests with images
        self.served = served or {}  # models that are a memory, as extra_args of their requests
        self.at_once = at_once  # how many memories a request may mix
        self.loaded = {each.settings.name: each for each in loaded}  # those in slots
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.numbers |= {name: each.number for name, each in self.loaded.items()}

    @classmethod
    def of(cls, config: MemDecConfig, loaded: Collection[Loaded] = ()) -> "Choices":
        """Return what a server with this configuration offers; loaded: what is in its slots."""
        memories = [*config.memories, *(each.settings for each in loaded)]
        alphas = {memory.name: memory.alpha for memory in memories}
        gated = {memory.name for memory in memories if memory.gate}
        by_context = {memory.name for memory in memories if memory.alpha_by_context}
        without_images = {memory.name for memory in memories if not memory.with_images}
        drafts = config.speculative_tokens > 0
        served: dict[str, dict[str, Any]] = {}
        for memory in memories:
            for name, alpha in memory.served_as.items():
                served[name] = {MEMORY: memory.name} | ({} if alpha is None else {ALPHA: alpha})
        if config.base_served_as:
            served[config.base_served_as] = {MEMORY: NONE}
        if 1 < len(gated) <= config.at_once:
            served.setdefault(AUTO, {MEMORY: AUTO})
        return cls(
            alphas,
            config.default,
            gated,
            drafts,
            by_context,
            without_images,
            served,
            config.at_once,
            loaded,
        )

    def check_auto(self, what: str) -> None:
        """Raise ValueError if a request cannot have all memories with gates together."""
        check_auto(what, len(self.gated), self.at_once)

    def give_up(self, names: Collection[str]) -> None:
        """Leave the model "auto" to others of that name."""
        if AUTO in names and self.served.get(AUTO) == {MEMORY: AUTO}:
            del self.served[AUTO]

    def check_served(self, names: Collection[str], what: str) -> None:
        """Raise ValueError if one of these names of models is a memory's or the base's alone."""
        meant = {name: name for name in (*self.names, NONE)}
        meant |= {name: a[MEMORY] for name, a in self.served.items() if a[MEMORY] != AUTO}
        if self.default == NONE and what == "the base":
            del meant[NONE]  # that is the base alone
        for name in names:
            if name in meant:
                raise clash(name, what, in_words(meant[name]))

    def asked(self, model: Any, extra_args: dict[str, Any] | None) -> dict[str, Any]:
        """Return the extra_args of a request with those that the model it names stands for.

        Its own weight goes before the name's; raise ValueError if it asks for another memory.
        """
        named = self.served.get(model, {}) if isinstance(model, str) else {}
        given = extra_args or {}
        if named and given.get(MEMORY, named[MEMORY]) != named[MEMORY]:
            raise ValueError(
                f"The model {model!r} is {in_words(named[MEMORY])}, but {MEMORY} is "
                f"{brief(given[MEMORY])}: leave it out, or name the base's model."
            )
        if named and named[MEMORY] == NONE and given.get(ALPHA):
            raise ValueError(
                f"The model {model!r} is {in_words(NONE)}, but {ALPHA} is {brief(given[ALPHA])}: "
                "leave it out, or name a memory's model."
            )
        return named | given

    def resolve(
        self, extra_args: dict[str, Any] | None, images: Collection[Any] | None = None
    ) -> tuple[tuple[int, float], ...]:
        """Return number and weight of each memory that runs, first the one that drafts.

        images: of the request, in vLLM's form (mm_features). A negative weight is a gate's cap, or
        one by context.
        """
        extra_args = extra_args or {}
        if SETTLED in extra_args:
            return tuple((int(number), float(weight)) for number, weight, _ in extra_args[SETTLED])
        weights = self._weights(extra_args, images)
        return tuple((self.numbers[name], weights[name]) for name in weights)

    def _weights(
        self, extra_args: dict[str, Any], images: Collection[Any] | None
    ) -> dict[str, float]:
        """Return the weight of each memory that runs, by its name; see resolve()."""
        asked, alpha = extra_args.get(MEMORY, self.default), extra_args.get(ALPHA)
        if are_weights(asked):
            weights = read_weights(asked)
        elif asked == AUTO:  # each within its own cap
            weights = {n: self._weight(n, alpha) for n in self.names if n in self.gated}
        else:
            weights = {} if asked == NONE else {asked: self._weight(asked, alpha)}
        runs = [n for n in weights if weights[n] and not (images and n in self.without_images)]
        # The heaviest drafts; of gates the default's memory.
        runs.sort(key=self.names.index)
        runs.sort(key=lambda n: n != self.default if asked == AUTO else -weights[n])
        return {name: float(weights[name]) for name in runs}

    def _weight(self, name: str, alpha: Any) -> float:
        """Return the weight of a request's only memory; alpha: None where it asks for none."""
        asked = self.alphas[name] if alpha is None else alpha
        weight = 1.0 if asked in (AUTO, ALONE) else float(asked)
        # By context a number is the weight itself.
        capped = asked == AUTO or (name in self.gated and asked != ALONE)
        return -weight if capped else weight

    def placed(
        self, extra_args: dict[str, Any] | None, images: Collection[Any] | None = None
    ) -> tuple[list[int], list[float]]:
        """Return the numbers and weights of resolve(), one for each place of a row."""
        chosen = list(self.resolve(extra_args, images))
        chosen += [(NO_MEMORY, 0.0)] * (self.at_once - len(chosen))
        return [number for number, _ in chosen], [weight for _, weight in chosen]

    def drafted(self, params: Any, images: Collection[Any] | None = None) -> bool:
        """Return whether the memories draft for a request, by its SamplingParams and its images.

        Not without a memory, nor for samples with a seed: what its generator draws for a token
        depends on how many drafts came before, and these on the batch, the cache and the clock.
        """
        if not self.drafts or params.sampling_type.name == "RANDOM_SEED":
            return False
        return bool(self.resolve(params.extra_args, images))

    def running(
        self, extra_args: dict[str, Any] | None, images: Collection[Any] | None = None
    ) -> list[str]:
        """Return the names of the memories that run for a request, first the one that drafts."""
        extra_args = extra_args or {}
        if SETTLED in extra_args:
            return [name for _, _, name in extra_args[SETTLED]]
        return [*self._weights(extra_args, images)]

    def salt(self, names: Collection[str]) -> str:
        """Return what keeps blocks of the KV cache apart of which other memories wrote a part."""
        marks = {name: f"\0{each.salt}" for name, each in self.loaded.items()}
        return "+".join(name + marks.get(name, "") for name in sorted(names)) or NONE

    def settled(
        self, extra_args: dict[str, Any] | None, images: Collection[Any] | None = None
    ) -> dict[str, Any] | None:
        """Return the extra_args that a request with a memory of a slot, or with several, runs with.

        None for others.
        """
        weights = self._weights(extra_args or {}, images)
        if len(weights) < 2 and not any(name in self.loaded for name in weights):
            return None
        settled = [[self.numbers[name], weight, name] for name, weight in weights.items()]
        return {**(extra_args or {}), SETTLED: settled}

    def described(
        self, extra_args: dict[str, Any] | None, images: Collection[Any] | None = None
    ) -> str:
        """Return memories and weights of a request in words, for a log."""
        words = []
        for name, alpha in self._weights(extra_args or {}, images).items():
            weight = f"alpha {alpha}"
            if alpha < 0:
                weight = f"alpha {AUTO!r}" + (f", at most {-alpha}" if alpha > -1 else "")
            words.append(f"memory {name!r}, {weight}")
        return "; ".join(words) or "no memory"


def choices_of(holder: Any) -> Choices | None:
    """Return what the server of an object with a vllm_config offers; None without a memory.

    It is kept on the object.
    """
    if not hasattr(holder, "memdec_choices"):
        settings = memdec_block(holder.vllm_config.additional_config)
        choices = None if settings is None else Choices.of(MemDecConfig.parse(settings))
        holder.memdec_choices = choices
    return holder.memdec_choices
