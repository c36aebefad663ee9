"""What CUDA graphs do to the models inside the composite, done on a CPU so that a fault shows.

Also a guard that raises where code would make the host wait for the device.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.recorded_graphs import Graph, check_no_wait
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, get_forward_context

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)  # tokens of a captured graph


class Rule:
    """Is told of every run of a model inside the composite."""

    def made(self) -> None:
        """Called for every new engine."""

    def before(self, name: str, args: tuple) -> None:
        """Called with the model's name and its inputs."""

    def after(self, name: str, args: tuple, output: torch.Tensor) -> None:
        """Called with what it returned too."""

    def head(self, name: str, rows: torch.Tensor) -> None:
        """Called with the rows that its head is given."""

    def sampled(self) -> None:
        """Called when the logits of a step are there."""


def watch(patch: Any, *rules: Rule) -> None:
    """Apply rules to every composite that is made while `patch` lasts."""
    from vllm_memdec.drafter import Drafter
    from vllm_memdec.model import MemDecForCausalLM

    def follow_all(composite: Any) -> None:
        for rule in rules:
            rule.made()
        follow("base", composite.base, rules)
        for memory in composite.memories:
            follow(memory.name, memory.module, rules)

    once_made(patch, follow_all)
    for owner in (MemDecForCausalLM, Drafter):
        patch.setattr(owner, "compute_logits", telling(owner.compute_logits, rules))


def once_made(patch: Any, change: Callable[[Any], None]) -> None:
    """Change every composite right after it was made."""
    from vllm_memdec.model import MemDecForCausalLM

    made = MemDecForCausalLM.__init__

    @functools.wraps(made)  # vLLM looks at the arguments
    def init(self: Any, **kwargs: Any) -> None:
        made(self, **kwargs)
        change(self)

    patch.setattr(MemDecForCausalLM, "__init__", init)


def follow(name: str, model: torch.nn.Module, rules: tuple[Rule, ...]) -> None:
    def given(args: tuple, kwargs: dict) -> tuple:
        """Return the tensors, ids or positions first: some have embeddings in place of ids."""
        return tuple(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))

    def before(module: Any, args: tuple, kwargs: dict) -> None:
        for rule in rules:
            rule.before(name, given(args, kwargs))

    def after(module: Any, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        for rule in rules:
            rule.after(name, given(args, kwargs), output)

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True)
    logits = model.compute_logits

    def compute_logits(rows: torch.Tensor) -> Any:
        for rule in rules:
            rule.head(name, rows)
        return logits(rows)

    model.compute_logits = compute_logits


def telling(original: Any, rules: tuple[Rule, ...]) -> Any:
    def compute_logits(self: Any, *args: Any) -> Any:
        logits = original(self, *args)
        for rule in rules:
            rule.sampled()
        return logits

    return compute_logits


class Hostile(Rule):
    """Overwrites what a model returned once another graph may have, and after the step."""

    def __init__(self) -> None:
        self.returned: list[torch.Tensor] = []
        self.spoiled = 0

    def before(self, name: str, args: tuple) -> None:
        self.sampled()

    def after(self, name: str, args: tuple, output: torch.Tensor) -> None:
        if Graph.recording is None:  # in a full graph memory is shared by no two live tensors
            self.returned.append(output)

    def sampled(self) -> None:
        if Graph.recording is not None:
            return
        for tensor in self.returned:
            tensor.fill_(float("nan"))
        self.spoiled += len(self.returned)
        self.returned.clear()


class Captured(Rule):
    """Refuses an input at another address than that of the first run with its shape.

    Only in steps that vLLM runs by piecewise graphs: these read what they were captured with.
    """

    def __init__(self) -> None:
        self.addresses: dict[tuple, list[int]] = {}
        self.replayed = 0

    def made(self) -> None:
        self.addresses.clear()

    def before(self, name: str, args: tuple) -> None:
        if get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            return
        found = [tensor.data_ptr() for tensor in args]
        key = (name, *(tuple(tensor.shape) for tensor in args))
        if self.addresses.setdefault(key, found) != found:
            raise RuntimeError(f"{name} was captured with inputs at other addresses")
        self.replayed += 1


def piecewise_v1(patch: Any) -> None:
    """Let the V1 runner pad each batch and call it piecewise, as with CUDA's default graphs.

    The models run eagerly all the same; a CPU captures nothing.
    """
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    original = CudagraphDispatcher.dispatch

    def dispatch(
        self: Any, num_tokens: int, *args: Any, valid_modes: Any = None, **kwargs: Any
    ) -> tuple[CUDAGraphMode, BatchDescriptor]:
        fitting = [size for size in SIZES if num_tokens <= size <= self.most_tokens()]
        if valid_modes == {CUDAGraphMode.NONE} or not fitting:
            return original(self, num_tokens, *args, valid_modes=valid_modes, **kwargs)
        return CUDAGraphMode.PIECEWISE, BatchDescriptor(fitting[0])

    patch.setattr(CudagraphDispatcher, "dispatch", dispatch)
    patch.setattr(
        CudagraphDispatcher,
        "most_tokens",
        lambda self: self.vllm_config.scheduler_config.max_num_batched_tokens,
        raising=False,
    )
    once_made(patch, lambda composite: setattr(composite.memories, "selects_rows", False))


class Log(Rule):
    """Writes down what each step was asked for, and what it ran: [by whom, model, tokens, mode]."""

    def __init__(self) -> None:
        self.steps: list[dict] = []
        self.by = "target"
        Graph.replayed = self.replayed

    def begin(self, runner: Any) -> None:
        """Follow a V2 runner whose graphs are captured."""
        execute, batch = runner.execute_model, runner.model.batch

        def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            self.by = "target"
            if not scheduled.total_num_scheduled_tokens:
                return execute(scheduled, *args, **kwargs)
            self.steps.append({"ran": []})
            found = execute(scheduled, *args, **kwargs)
            drafts = [
                [
                    int(runner.model_state.memory_RS[runner.req_states.req_id_to_index[name], 0]),
                    len(d),
                ]
                for name, d in scheduled.scheduled_spec_decode_tokens.items()
            ]
            self.steps[-1] |= {"used": list(batch.used), "drafts": drafts}
            return found

        runner.execute_model = execute_model
        if runner.speculator is not None:
            propose = runner.speculator.propose

            def drafted(*args: Any, **kwargs: Any) -> Any:
                self.by = "draft"
                return propose(*args, **kwargs)

            runner.speculator.propose = drafted

    def before(self, name: str, args: tuple) -> None:
        if Graph.recording is not None:
            Graph.recording.ran.append([name, args[0].shape[-1], "FULL"])
        elif self.steps:
            mode = get_forward_context().cudagraph_runtime_mode.name
            self.steps[-1]["ran"].append([self.by, name, args[0].shape[-1], mode])

    def head(self, name: str, rows: torch.Tensor) -> None:
        if Graph.recording is None and self.steps:
            self.steps[-1]["ran"].append([self.by, f"{name} head", len(rows), ""])

    def replayed(self, graph: Graph) -> None:
        self.steps[-1]["ran"] += [[self.by, *run] for run in graph.ran]


# -- No waiting -----------------------------------------------------------------------------------


class NoWait(TorchDispatchMode):
    """Raises where an operator makes the host wait for the device, unless paused."""

    active: list[bool] = []  # innermost last

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.active[-1:] == [True]:
            check_no_wait(func, args, kwargs)
        return func(*args, **(kwargs or {}))


def within(active: bool, original: Any) -> Any:
    """Return a function that runs with the guard on, or paused."""

    def call(*args: Any, **kwargs: Any) -> Any:
        NoWait.active.append(active)
        try:
            with NoWait() if active else contextlib.nullcontext():
                return original(*args, **kwargs)
        finally:
            NoWait.active.pop()

    return call


@contextlib.contextmanager
def no_wait(model: Any, speculator: Any = None) -> Iterator[None]:
    """Raise where forward(), compute_logits() or a V2 speculator make the host wait.

    Paused are vLLM's models, which a GPU runs by other kernels, its attention metadata and our
    Batch, which both work on tensors of the host.
    """
    from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

    from vllm_memdec.batch import Batch

    with pytest.MonkeyPatch.context() as patch:
        for name in ("cpu", "tolist", "item", "numpy"):
            patch.setattr(torch.Tensor, name, refusing(name), raising=False)
        move = torch.Tensor.to

        def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if "cpu" in (*args[:1], kwargs.get("device")) and NoWait.active[-1:] == [True]:
                raise RuntimeError("to('cpu') makes the host wait for the device")
            return move(self, *args, **kwargs)

        patch.setattr(torch.Tensor, "to", to)
        for name in ("write", "plan", "write_drafting"):
            patch.setattr(Batch, name, within(False, getattr(Batch, name)))
        for owner, name in ((DraftModelSpeculator, "_build_uniform_attn_metadata"),):
            patch.setattr(owner, name, within(False, getattr(owner, name)))
        for inner in (model.base, *(memory.module for memory in model.memories)):
            for name in ("forward", "compute_logits"):
                patch.setattr(inner, name, within(False, getattr(inner, name)))
        for name in ("forward", "compute_logits"):
            patch.setattr(model, name, within(True, getattr(model, name)))
        if speculator is not None:
            patch.setattr(speculator, "propose", within(True, speculator.propose))
        yield


def refusing(name: str) -> Any:
    original = getattr(torch.Tensor, name)

    def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if NoWait.active[-1:] == [True]:
            raise RuntimeError(f"{name}() makes the host wait for the device")
        return original(self, *args, **kwargs)

    return method
