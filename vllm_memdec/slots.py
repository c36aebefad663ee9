"""Memories that come and go while the server runs, as its front end knows them.

    load_memory(llm, "law", FOLDER)    unload_memory(llm, "law")    list_memories(llm)

of an LLM whose settings reserve "slots"; compat/slot_routes.py has the same over HTTP. A load first
checks a memory as a start does, then lets the workers read it beside running steps, and only when
all of them have it whole is it moved into a slot, between two steps. Whatever fails before leaves
all as it was. Requests carry the number of their slot, so what its name means to others is decided
here alone: an unload takes it away at once, and running requests do not notice.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_memdec.checkpoint import brief
from vllm_memdec.compat.slots import BUSY, COUNT, MOVE
from vllm_memdec.config import (
    MAX_STEPS,
    MemDecConfig,
    MemoryConfig,
    check_name,
    check_names,
)
from vllm_memdec.engine_config import memory_model_config
from vllm_memdec.errors import said_by
from vllm_memdec.gate import check_gate, read_gate
from vllm_memdec.memory_checks import build_memory, check_tokenizers
from vllm_memdec.request import Choices, Loaded, choices_of

if TYPE_CHECKING:
    from vllm import LLM

logger = init_logger("vllm.plugins.memdec")  # vLLM configures handlers for its own namespace only
PATIENCE = 10.0  # seconds that a load waits for the last requests of a slot
# Seconds from one question to the workers to the next; each comes between two steps.
READING, MOVING = 0.1, 0.02
# What of a memory may differ from its slot's: the rest is the slot's own.
SETTINGS = ("revision", "alpha", "served_as", "gate", "alpha_by_context", "with_images")
# Of a config what no tensor and no step depends on.
IMMATERIAL = (
    "_name_or_path",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "memdec",
    "oracle",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


class UnknownMemory(ValueError):
    """No slot has a memory of that name."""


@dataclass(frozen=True)
class Ask:
    """A question to all workers, between two steps."""

    method: str
    args: tuple = ()


@dataclass(frozen=True)
class Work:
    """What may take long and concerns the front end alone."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Pause:
    """A while without questions."""

    seconds: float


Steps = Generator[Ask | Work | Pause, Any, Any]


@dataclass
class Slots:
    """What is in the slots of a server. Its methods yield what they wait for."""

    engine: Any  # with a vllm_config and an input_processor
    loaded: dict[int, Loaded] = field(default_factory=dict)  # by number
    described: dict[str, dict[str, Any]] = field(default_factory=dict)  # for /v1/models, by name
    taken: dict[str, str] = field(default_factory=dict)  # other names of models, and what they are
    # Requests that were on their way to the engine when a slot was emptied: of some it is theirs.
    leaving: dict[int, set[object]] = field(default_factory=dict)  # by number
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # one change after the other

    def __post_init__(self) -> None:
        self.config = MemDecConfig.from_vllm(self.engine.vllm_config)
        first = len(self.config.memories)
        self.numbers = range(first, first + len(self.config.slots))

    def load(self, name: str, settings: dict[str, Any], taken: dict[str, str]) -> Steps:
        """Put a memory into a slot that no request uses; return a sentence.

        settings: "model", and those of SETTINGS. taken: other names of models, and what they are.
        Raises ValueError, and nothing has changed.
        """
        free = [number for number in self.numbers if number not in self.loaded]
        if not self.numbers:
            raise ValueError("This server has no slots: start it with memdec 'slots'.")
        if not free:
            raise ValueError(f"All {len(self.numbers)} slots have a memory: unload one first.")
        self.taken = taken
        try:
            memory = yield Work(lambda: self.checked(name, settings))
        except ValueError:
            raise
        except Exception as error:  # whatever a malformed config makes vLLM raise
            raise ValueError(
                f"The memory {brief(settings['model'])} cannot be read "
                f"({type(error).__name__}: {said_by(error)}): copy it again."
            ) from error
        wanted = {key: getattr(memory, key) for key in ("name", "model", "revision")}
        wanted["gate_file"] = memory.gate_file and str(memory.gate_file)
        wanted["alpha_by_context"] = None if memory.gate_file else memory.alpha_by_context
        description = yield Work(lambda: self.describe(memory))
        yield Ask("memdec_read", (wanted,))
        try:
            digest = yield from self.digest(memory)
            number = yield from self.move(free)
        except Exception:
            yield Ask("memdec_drop")
            raise
        self.described[name] = description
        self.publish({**self.loaded, number: Loaded(number, memory, digest)})
        return logged(f"Success: memory {name!r} loaded from {memory.model}.")

    def unload(self, name: str) -> str:
        """Take a name away from all requests to come; return a sentence."""
        number = next((n for n, each in self.loaded.items() if each.settings.name == name), None)
        if number is None:
            if name in (memory.name for memory in self.config.memories):
                raise ValueError(
                    f"The memory {name!r} is of the server's settings, not in a slot: only "
                    "memories in slots can be unloaded."
                )
            raise UnknownMemory(f"No slot has a memory {name!r}.")
        self.publish({n: each for n, each in self.loaded.items() if n != number})
        self.leaving[number] = {*on_their_way(self.engine)}
        del self.described[name]
        return logged(f"Success: memory {name!r} unloaded.")

    def listing(self) -> Steps:
        """Return the slots, what is in each and how many requests use it, and other memories."""
        counts = dict((yield Ask(COUNT)))
        slots = []
        for number in self.numbers:
            slot: dict[str, Any] = {"name": None, "running_requests": counts.get(number, 0)}
            if (each := self.loaded.get(number)) is not None:
                memory = each.settings
                slot |= {"name": memory.name, "model": memory.model, "fingerprint": each.digest}
            slots.append(slot)
        fixed = [{"name": m.name, "model": m.model} for m in self.config.memories]
        return {"slots": slots, "memories": fixed}

    def publish(self, loaded: dict[int, Loaded]) -> None:
        """Let requests to come choose from these."""
        self.loaded = loaded
        choices = Choices.of(self.config, [*loaded.values()])
        choices.give_up(self.taken)
        self.engine.memdec_choices = self.engine.input_processor.memdec_choices = choices

    def checked(self, name: str, settings: dict[str, Any]) -> MemoryConfig:
        """Return the configuration of a memory that fits a slot, or raise ValueError."""
        check_name(name)
        if unknown := sorted({*settings} - {"model", *SETTINGS}):
            raise ValueError(
                f"{unknown[0]!r} is the slot's own: of a memory in it only {sorted(SETTINGS)} can "
                "be set."
            )
        slot, base = self.config.slots[0], self.engine.vllm_config.model_config
        own = {"dtype": slot.dtype, "kv_cache_dtype": slot.kv_cache_dtype}
        memory = MemoryConfig.parse(
            name, {k: v for k, v in settings.items() if v is not None} | own
        )
        present = [*self.config.memories, *(each.settings for each in self.loaded.values())]
        if name in (each.name for each in present):
            raise ValueError(f"The memory {name!r} is there already: unload it first.")
        check_names([*present, memory], self.config.base_served_as)
        choices = Choices.of(self.config, [*self.loaded.values(), Loaded(-1, memory, "")])
        for other, what in self.taken.items():
            choices.check_served([other], what)
        now = choices_of(self.engine)
        assert now is not None
        if 1 < len(now.gated) <= self.config.at_once:
            choices.check_auto("With this memory")  # what requests ask for now would be refused
        if len(memory.alpha_by_context or ()) > MAX_STEPS:
            raise ValueError(
                f"A memory in a slot has at most {MAX_STEPS} pairs of alpha_by_context, "
                f"{memory.model} has {len(memory.alpha_by_context or ())}: give fewer."
            )
        model, shape = build_memory(memory, base), memory_model_config(slot, base)
        mine, theirs = model.hf_config.to_dict(), shape.hf_config.to_dict()
        for key in sorted({*mine, *theirs} - {*IMMATERIAL}):
            if mine.get(key) != theirs.get(key):
                raise ValueError(
                    f"The memory {memory.model} has not the shape of the slots: its {key} is "
                    f"{mine.get(key)!r}, theirs {theirs.get(key)!r}. Start the server with slots "
                    "of that shape."
                )
        check_tokenizers(base, memory)
        if memory.gate_file is not None:
            check_gate(memory.gate_file, read_gate(memory.gate_file, model.get_hidden_size()))
        return memory

    def describe(self, memory: MemoryConfig) -> dict[str, Any]:
        """Return what /v1/models tells of a memory."""
        from vllm_memdec.describe import describe

        settings = replace(self.config, slots=(memory, *self.config.slots[1:]))
        return describe(self.engine.vllm_config, settings)["memories"][memory.name]

    def digest(self, memory: MemoryConfig) -> Steps:
        """Return the digest of what the workers read, once all have it whole."""
        while True:
            states = yield Ask("memdec_state")
            if None not in states:
                break
            yield Pause(READING)
        if error := next((state["error"] for state in states if state["error"]), None):
            raise ValueError(error)
        if len({state["digest"] for state in states}) > 1:
            raise ValueError(f"{memory.model} changed while it was read: load it again.")
        return states[0]["digest"]

    def move(self, free: list[int]) -> Steps:
        """Put what was read into one of these slots; return its number."""
        end = time.monotonic() + PATIENCE
        while True:
            for number in free:
                if self.leaving.get(number, set()) & on_their_way(self.engine):
                    continue
                if BUSY not in (yield Ask(MOVE, (number,))):
                    self.leaving.pop(number, None)
                    return number
            if time.monotonic() > end:
                raise ValueError(
                    "Requests of the memories that were unloaded still run in all free slots: "
                    "load again when they have ended."
                )
            yield Pause(MOVING)


def logged(sentence: str) -> str:
    """Log a sentence, and return it."""
    logger.info("memdec: %s", sentence)
    return sentence


def slots_of(engine: Any) -> Slots:
    """Return the slots of a server, which are kept on its engine, as the front end has it."""
    if not hasattr(engine, "memdec_slots"):
        engine.memdec_slots = Slots(engine)
    return engine.memdec_slots


def on_their_way(engine: Any) -> set[object]:
    """Return a mark of each request on its way to an engine, with a memory or without."""
    return vars(engine).setdefault("memdec_on_their_way", set())


@contextmanager
def adding(engine: Any) -> Generator[None]:
    """Note that a request is on its way to the engine."""
    marks, mark = on_their_way(engine), object()
    marks.add(mark)
    try:
        yield
    finally:
        marks.discard(mark)


async def run(answer: Callable[[Ask | Work | Pause], Awaitable[Any]], steps: Steps) -> Any:
    """Return what the steps come to; answer: a function that does what a step waits for."""
    result, error = None, None
    while True:
        try:
            step = steps.send(result) if error is None else steps.throw(error)
        except StopIteration as end:
            return end.value
        result, error = None, None
        try:
            result = await answer(step)
        except Exception as failure:
            error = failure


async def run_beside(engine: Any, steps: Steps) -> Any:
    """Return what the steps come to, beside the other tasks of an asynchronous engine."""

    async def answer(step: Ask | Work | Pause) -> Any:
        if isinstance(step, Ask):
            return await engine.collective_rpc(step.method, args=step.args)
        if isinstance(step, Work):
            return await asyncio.to_thread(step.function)
        return await asyncio.sleep(step.seconds)

    return await run(answer, steps)


def run_here(llm: "LLM", steps: Steps) -> Any:
    """Return what the steps come to, of an LLM, which does nothing else meanwhile."""

    async def answer(step: Ask | Work | Pause) -> Any:
        if isinstance(step, Ask):
            return llm.collective_rpc(step.method, args=step.args)
        return step.function() if isinstance(step, Work) else time.sleep(step.seconds)

    try:
        run(answer, steps).send(None)  # nothing in it waits
    except StopIteration as end:
        return end.value
    raise AssertionError("a step that waits")


def load_memory(llm: "LLM", name: str, folder: str, **settings: Any) -> str:
    """Put the memory of a folder or hub id into a free slot of an LLM; return a sentence.

    settings: those of SETTINGS, as beside "model". Raises ValueError, and nothing has changed.
    """
    slots = slots_of(llm.llm_engine)
    return run_here(llm, slots.load(name, {"model": folder, **settings}, {}))


def unload_memory(llm: "LLM", name: str) -> str:
    """Empty the slot of a memory; return a sentence. Raises ValueError if it is in none."""
    return slots_of(llm.llm_engine).unload(name)


def list_memories(llm: "LLM") -> dict[str, Any]:
    """Return the slots of an LLM, what is in each, and its other memories."""
    return run_here(llm, slots_of(llm.llm_engine).listing())
