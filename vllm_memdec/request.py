"""What requests may ask for: memory and weight, in their extra_args.

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
    clash,
    in_words,
    memdec_block,
)

ALPHA, MEMORY = "memdec_alpha", "memdec_memory"
# What the front end makes of both where the memory is in a slot: [its number, weight]. Nobody else
# resolves its name, which may be another's by the time that the request runs.
PLACE = "memdec_place"
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
        for path, name in names_within(value, str(key)) if choices else ():
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
        elif not isinstance(value, str) or value not in (*names, NONE):
            raise ValueError(
                f"{MEMORY} must be one of {[*names, NONE]}, the memories of this server, "
                f"got {brief(value)}."
            )
    if choices and choices.default == NONE and MEMORY not in extra_args and extra_args.get(ALPHA):
        raise ValueError(
            f"{ALPHA} needs {MEMORY} here, whose default on this server is {NONE!r}: name one of "
            f"{[*names]}."
        )
    if choices and extra_args.get(ALPHA) == AUTO:
        name = extra_args.get(MEMORY, choices.default)
        if name != NONE and name not in choices.gated and name not in choices.by_context:
            raise ValueError(
                f"{ALPHA} {AUTO!r} needs a gate or alpha_by_context, which the memory {name!r} has "
                "not: give a number between 0 and 1, or run memdec calibrate."
            )


def check_images(extra_args: dict[str, Any] | None, choices: "Choices") -> None:
    """Raise ValueError where a request with images asks for a memory that is off for these."""
    asked = {ALPHA, MEMORY} & {*(extra_args or {})}
    name = choices.name(extra_args)
    if asked and name in choices.without_images:
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
        loaded: Collection[Loaded] = (),
    ):
        self.names, self.alphas, self.default, self.gated = (*alphas,), alphas, default, gated
        self.by_context = by_context  # memories with an alpha for each length of context
        self.drafts = drafts  # whether the memories draft
        self.without_images = without_images  # memories that are off for requests with images
        self.served = served or {}  # models that are a memory, as extra_args of their requests
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
        return cls(
            alphas, config.default, gated, drafts, by_context, without_images, served, loaded
        )

    def check_served(self, names: Collection[str], what: str) -> None:
        """Raise ValueError if one of these names of models is a memory's or the base's alone."""
        meant = {name: name for name in (*self.names, NONE)}
        meant |= {name: asked[MEMORY] for name, asked in self.served.items()}
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
    ) -> tuple[int, float]:
        """Return the memory's number and the weight; negative: a gate's cap, or one by context.

        images: of the request, in vLLM's form (mm_features). Either both results mean "no memory"
        or neither does.
        """
        extra_args = extra_args or {}
        if PLACE in extra_args:
            number, alpha = extra_args[PLACE]
            return int(number), float(alpha)
        name = extra_args.get(MEMORY, self.default)
        if name == NONE or (images and name in self.without_images):
            return NO_MEMORY, 0.0
        asked = extra_args.get(ALPHA, self.alphas[name])
        alpha = 1.0 if asked in (AUTO, ALONE) else float(asked)
        if not alpha:
            return NO_MEMORY, 0.0
        # By context a number is the weight itself.
        capped = asked == AUTO or (name in self.gated and asked != ALONE)
        return self.numbers[name], -alpha if capped else alpha

    def drafted(self, params: Any, images: Collection[Any] | None = None) -> bool:
        """Return whether the memories draft for a request, by its SamplingParams and its images.

        Not without a memory, nor for samples with a seed: what its generator draws for a token
        depends on how many drafts came before, and these on the batch, the cache and the clock.
        """
        if not self.drafts or params.sampling_type.name == "RANDOM_SEED":
            return False
        return self.resolve(params.extra_args, images)[0] != NO_MEMORY

    def name(self, extra_args: dict[str, Any] | None, images: Collection[Any] | None = None) -> str:
        """Return the name of the memory that runs for a request, or "none"."""
        number, _ = self.resolve(extra_args, images)
        return NONE if number == NO_MEMORY else (extra_args or {}).get(MEMORY, self.default)

    def salt(self, name: str) -> str:
        """Return what keeps blocks of the KV cache apart of memories that had the same name."""
        return f"{self.loaded[name].salt}\0" if name in self.loaded else ""

    def placed(
        self, extra_args: dict[str, Any] | None, images: Collection[Any] | None = None
    ) -> dict[str, Any] | None:
        """Return the extra_args that a request whose memory is in a slot runs with; else None."""
        if (name := self.name(extra_args, images)) not in self.loaded:
            return None
        return {**(extra_args or {}), MEMORY: name, PLACE: [*self.resolve(extra_args, images)]}

    def described(
        self, extra_args: dict[str, Any] | None, images: Collection[Any] | None = None
    ) -> str:
        """Return memory and weight of a request in words, for a log."""
        number, alpha = self.resolve(extra_args, images)
        if number == NO_MEMORY:
            return "no memory"
        weight = f"alpha {alpha}"
        if alpha < 0:
            weight = f"alpha {AUTO!r}" + (f", at most {-alpha}" if alpha > -1 else "")
        return f"memory {self.name(extra_args, images)!r}, {weight}"


def choices_of(holder: Any) -> Choices | None:
    """Return what the server of an object with a vllm_config offers; None without a memory.

    It is kept on the object.
    """
    if not hasattr(holder, "memdec_choices"):
        settings = memdec_block(holder.vllm_config.additional_config)
        choices = None if settings is None else Choices.of(MemDecConfig.parse(settings))
        holder.memdec_choices = choices
    return holder.memdec_choices
