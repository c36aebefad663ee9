"""Watch the memory of CUDA graphs: what is read must still be there, and lie where graphs read it.

vLLM captures the pieces of each inner model into one pool of memory. What the last piece of a model
returned is free in that pool once it was captured, so graphs captured later, another model's among
them, write there. Three rules follow, whatever the composite looks like inside:

overwritten  After a model's graphs ran, nothing is read from where they write, unless it was
             written since, or that model returned it.
moved        A graph is replayed with the addresses that it was captured with.
dangling     What a graph reads outside the pool is kept for as long as the graph.

Kernels need not run for that: allocations, captures and addresses are PyTorch's own.
"""

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from vllm_memdec import drafter, model

REPLACE = ("copy_", "zero_", "fill_")  # operators that read nothing of what they write
SHAPE = ("new_empty", "new_zeros", "empty_like", "zeros_like")  # that read a shape, no elements


@dataclass(frozen=True)
class Span:
    """Addresses from `start` to `end`."""

    start: int
    end: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Span":
        """Return where a tensor's elements lie, with what is between them."""
        if not tensor.numel():
            return cls(0, 0)
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        return cls(start, start + (last + 1) * tensor.element_size())

    def common(self, other: "Span") -> "Span | None":
        """Return the part that both have."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return Span(start, end) if start < end else None

    def without(self, other: "Span") -> "list[Span]":
        """Return what is left of it."""
        if self.common(other) is None:
            return [self]
        parts = Span(self.start, other.start), Span(other.end, self.end)
        return [part for part in parts if part.start < part.end]


class Watch(TorchDispatchMode):
    """Sees every operator of the composite outside its inner models."""

    def __init__(self) -> None:
        super().__init__()
        self.serving = False
        self.overwritten: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.dangling: Counter[str] = Counter()
        self.passes: Counter[str] = Counter()  # forward passes of each inner model that Python saw
        self.pieces: Counter[str] = Counter()  # the same, of those that replayed graphs
        self.writes: dict[str, list[Span]] = {}  # by label: where graphs of the pool write
        self.pools: list[Span] = []
        self.captured: list[tuple[str, Span, StorageWeakRef]] = []  # what captured graphs read
        self.forget()

    # -- Set-up ------------------------------------------------------------------------------------

    def install(self) -> None:
        """Watch every composite that is made from now on."""
        watch, made = self, model.MemDecForCausalLM.__init__

        @functools.wraps(made)  # vLLM looks at its signature
        def __init__(self, *args, **kwargs):
            made(self, *args, **kwargs)
            watch.see_inner("base", self.base)
            for memory in self.memories:
                watch.see_inner(memory.name, memory.module)

        model.MemDecForCausalLM.__init__ = __init__
        self.see(model.MemDecForCausalLM, "forward", first=True)
        self.see(model.MemDecForCausalLM, "compute_logits")
        self.see(drafter.Drafter, "__call__")
        self.see(drafter.Drafter, "compute_logits")
        CUDAGraphWrapper.__call__ = self.checked(CUDAGraphWrapper.__call__)
        torch.cuda.init()
        torch.cuda.memory._record_memory_history(max_entries=10_000_000, context=None)

    def see(self, owner: type, name: str, first: bool = False) -> None:
        """Watch the operators of a method, and what it returns; `first` of a step."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def method(*args, **kwargs):
            if first:
                self.forget()
            with self:
                result = original(*args, **kwargs)
            self.read(f"what {owner.__name__}.{name} returned", result)
            return result

        setattr(owner, name, method)

    def see_inner(self, name: str, module: torch.nn.Module) -> None:
        """Label what an inner model allocates, and take note that it ran."""
        original = module.forward

        @functools.wraps(original)
        def forward(*args, **kwargs):
            context = get_forward_context()
            label = f"{name} {context.cudagraph_runtime_mode.name} {context.batch_descriptor}"
            torch.cuda.memory._set_memory_metadata(label)
            if torch.cuda.is_current_stream_capturing():  # of a full graph: attention is in it
                self.keep_attention(name, context)
            try:
                with _disable_current_modes():  # or torch.compile would not take its own way
                    result = original(*args, **kwargs)
            finally:
                torch.cuda.memory._set_memory_metadata("")
            if self.serving:
                self.passes[name] += 1
                if context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
                    self.pieces[name] += 1
                    self.ran(name, self.writes.get(label, []), result)
            return result

        module.forward = forward

    def keep_attention(self, name: str, context: Any) -> None:
        """Take note of what the attention of a captured graph is told."""
        for layer, metadata in (context.attn_metadata or {}).items():
            for field, value in getattr(metadata, "__dict__", {}).items():
                self.read(f"{name} with {field} of {layer}", value)
        for layer, slots in (context.slot_mapping or {}).items():
            self.read(f"{name} with the slots of {layer}", slots)

    def started(self) -> None:
        """Take note of where the graphs write: to be called once all are captured."""
        snapshot = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(enabled=None)
        self.pools = [
            Span(segment["address"], segment["address"] + segment["total_size"])
            for segment in snapshot["segments"]
            if tuple(segment["segment_pool_id"]) != (0, 0)
        ]
        for event in (event for trace in snapshot["device_traces"] for event in trace):
            if event["action"] == "alloc" and event.get("user_metadata"):
                span = Span(event["addr"], event["addr"] + event["size"])
                if self.in_pool(span):
                    self.writes.setdefault(event["user_metadata"], []).append(span)
        for name, span, storage in self.captured:
            is_read = span.start < span.end  # not of prefills, which a decode graph has none of
            if is_read and storage.expired() and not self.in_pool(span):
                self.dangling[f"{name} in a graph reads memory that was freed since"] += 1
        self.serving = True

    # -- Rules -------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Begin a step."""
        self.time = 0
        self.ran_at: list[tuple[int, str, list[Span]]] = []
        self.written_at: list[tuple[int, Span]] = []
        self.returned: dict[str, Span] = {}

    def in_pool(self, span: Span) -> bool:
        return any(pool.common(span) for pool in self.pools)

    def ran(self, name: str, writes: list[Span], result: torch.Tensor) -> None:
        self.time += 1
        self.returned[name] = Span.of(result)
        self.ran_at.append((self.time, name, writes))
        self.written_at.append((self.time, Span.of(result)))

    def read(self, reader: str, tensor: torch.Tensor | None) -> None:
        if not isinstance(tensor, torch.Tensor) or not tensor.is_cuda:
            return
        span = Span.of(tensor)
        if torch.cuda.is_current_stream_capturing():
            self.captured.append((reader, span, StorageWeakRef(tensor.untyped_storage())))
        for time, name, writes in self.ran_at:
            lost = [part for write in writes if (part := span.common(write))]
            for at, again in self.written_at:
                if at >= time:
                    lost = [rest for part in lost for rest in part.without(again)]
            if lost:
                owners = [who for who, other in self.returned.items() if other.common(span)]
                self.overwritten[
                    f"{reader} reads what {' or '.join(owners) or 'a graph'} returned, "
                    f"where graphs of {name} have written since"
                ] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Check what an operator reads; take note of what it writes."""
        kwargs = kwargs or {}
        schema = function._schema
        name = schema.name.split("::")[1]
        if function.is_view or name in SHAPE:
            return function(*args, **kwargs)
        written = []
        given = [*zip(schema.arguments, args, strict=False)]
        given += [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]
        for argument, value in given:
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            replaces = is_written and (argument.is_out or name in REPLACE)
            for tensor in tree_leaves(value):
                if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                    if replaces:
                        written.append(tensor)
                    else:
                        self.read(name, tensor)
        result = function(*args, **kwargs)
        written += [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.is_cuda]
        if name not in REPLACE and any(a.alias_info and a.alias_info.is_write for a, _ in given):
            written = []  # in place, perhaps a part of it
        self.time += 1
        self.written_at += [(self.time, Span.of(tensor)) for tensor in written]
        return result

    def checked(self, original):
        """Compare the addresses that a graph is replayed with and captured with."""

        @functools.wraps(original)
        def __call__(wrapper, *args, **kwargs):
            context = get_forward_context()
            entry = wrapper.concrete_cudagraph_entries.get(context.batch_descriptor)
            is_replay = entry and entry.cudagraph is not None
            if is_replay and context.cudagraph_runtime_mode == wrapper.runtime_mode:
                now = [x.data_ptr() for x in args if isinstance(x, torch.Tensor)]
                count = sum(a != b for a, b in zip(now, entry.input_addresses, strict=True))
                if count:
                    tokens = context.batch_descriptor.num_tokens
                    self.moved[f"{count} inputs of a graph of {tokens} tokens have moved"] += 1
            return original(wrapper, *args, **kwargs)

        return __call__
