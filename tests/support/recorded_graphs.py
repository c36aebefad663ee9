"""CUDA graphs on a CPU: a capture records every operator, a replay runs them on the same tensors.

No Python runs again at a replay, so what the code decided at a capture stays decided, as on CUDA.
Of memory that a graph did not allocate itself it keeps addresses, not references: a replay raises
where it was freed. Nor may a capture read a value on the host. Before each replay the results of
all graphs are filled with NaN, because graphs share one pool: code that reads an old one fails.
install() lets vLLM's V2 runner capture such graphs on a CPU.
"""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# In inference mode composite operators such as item() arrive as themselves.
WAITS = {
    *("nonzero", "nonzero_numpy", "argwhere", "item", "_local_scalar_dense", "is_nonzero", "equal"),
    *("masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"),
}
UNSET = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}  # no values


def check_no_wait(func: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
    """Raise where an operator makes the host wait for the device."""
    name = func._schema.name.split("::")[1]
    counts = name == "repeat_interleave" and func._overloadname in ("Tensor", "self_Tensor")
    unknown = counts and (kwargs or {}).get("output_size") is None
    masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and [
        index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)
    ]
    if masks or unknown or name in WAITS:
        raise RuntimeError(f"{func} makes the host wait for the device")


def block(tensor: torch.Tensor) -> int:
    """Return the address of the memory that a tensor lies in."""
    return tensor.untyped_storage().data_ptr()


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Address:
    """A tensor in memory that a graph uses and does not own."""

    def __init__(self, tensor: torch.Tensor):
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype, self.layout = (
            tensor.dtype,
            (tensor.storage_offset(), tensor.size(), tensor.stride()),
        )

    def tensor(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise RuntimeError(f"a graph uses freed memory: {self.dtype} {tuple(self.layout[1])}")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


def resolved(tree: Any) -> Any:
    """Return the same with tensors for addresses."""
    return pytree.tree_map(lambda x: x.tensor() if isinstance(x, Address) else x, tree)


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    all: list["Graph"] = []
    recording: "Graph | None" = None
    piecewise = False
    replayed: Callable[["Graph"], None] = staticmethod(lambda graph: None)

    def __init__(self) -> None:
        self.steps: list[tuple[Callable, Any, list]] = []  # function, (args, kwargs), results
        self.pool: dict[int, torch.Tensor] = {}  # what the graph allocated, by address
        self.contexts: dict[int, tuple[Any, Context]] = {}
        self.ran: list[list] = []  # what the test wants to know of each model that it runs

    def keep(self, tree: Any) -> Any:
        """Return arguments with addresses for the tensors that are not the graph's own."""
        return pytree.tree_map(
            lambda x: (
                Address(x) if isinstance(x, torch.Tensor) and block(x) not in self.pool else x
            ),
            tree,
        )

    def record(self, function: Callable, inputs: tuple[tuple, dict], found: Any) -> None:
        given = {block(tensor) for tensor in tensors(inputs)}
        kept = self.keep(inputs)
        results = [None if block(tensor) in given else tensor for tensor in tensors(found)]
        self.pool.update({block(tensor): tensor for tensor in results if tensor is not None})
        self.steps.append((function, kept, results))

    def replay(self) -> None:
        for graph in Graph.all:
            for tensor in graph.pool.values():
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
        Graph.replayed(self)
        for function, inputs, results in self.steps:
            args, kwargs = resolved(inputs)
            found = tensors(function(*args, **kwargs))
            for old, new in zip(results, found, strict=True) if results else ():
                if old is not None:
                    old.copy_(new)


class Recording(TorchDispatchMode):
    """Records operators into a graph while they run."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        check_no_wait(func, args, kwargs)
        found = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1] in UNSET:
            self.graph.pool.update({block(tensor): tensor for tensor in tensors(found)})
        else:
            self.graph.record(self.in_context(func), (args, kwargs or {}), found)
        return found

    def in_context(self, func: Any) -> Callable:
        """Return an operator that finds the forward context of its capture, if it looks for it."""
        from vllm import forward_context

        if not func._schema.name.startswith("vllm::"):
            return func
        context = forward_context.get_forward_context()
        if id(context) not in self.graph.contexts:
            self.graph.contexts[id(context)] = context, Context(self.graph, context)
        kept = self.graph.contexts[id(context)][1]

        def call(*args: Any, **kwargs: Any) -> Any:
            with forward_context.override_forward_context(kept.context()):
                return func(*args, **kwargs)

        return call


class Context:
    """A forward context of vLLM's that keeps addresses in place of tensors."""

    def __init__(self, graph: Graph, context: Any):
        self.rest = copy.copy(context)
        self.slots = graph.keep(dict(context.slot_mapping))
        self.metadata = {
            layer: metadata and (type(metadata), graph.keep(fields(metadata)))
            for layer, metadata in context.attn_metadata.items()
        }
        self.rest.slot_mapping = self.rest.attn_metadata = self.rest.is_padding = None

    def context(self) -> Any:
        context = copy.copy(self.rest)
        context.slot_mapping = resolved(self.slots)
        context.attn_metadata = {
            layer: kept and kept[0](**resolved(kept[1])) for layer, kept in self.metadata.items()
        }
        return context


def fields(metadata: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, None for those that are computed when asked for."""
    computed = {name for name, value in vars(type(metadata)).items() if isinstance(value, property)}
    names = [field.name for field in dataclasses.fields(metadata)]
    return {name: None if name in computed else getattr(metadata, name) for name in names}


class capture:
    """Stands in for the context manager torch.cuda.graph."""

    def __init__(self, graph: Graph, pool: Any = None, stream: Any = None, **options: Any):
        self.graph, self.mode = graph, Recording(graph)

    def __enter__(self) -> None:
        Graph.recording = self.graph
        self.mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)
        Graph.recording = None
        # From here on the memory of the caller is the caller's again.
        self.graph.contexts = {key: (None, kept) for key, (_, kept) in self.graph.contexts.items()}
        Graph.all.append(self.graph)


def recorded_launch(original: Callable) -> Callable:
    """Record a launch of Triton's interpreter too: it does not go through PyTorch's dispatcher."""

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            original(self, *args, **kwargs)
            if Graph.recording is not None:
                again = functools.partial(original, self)
                Graph.recording.record(again, (args, kwargs), None)

    return launch


def live_plan(original: Callable) -> Callable:
    """Let CPU attention plan by the lengths that are in memory when it runs.

    A back end that CUDA graphs can hold does so: its kernels read them, or vLLM writes the plan in
    place before a replay.
    """
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        builder = self

        class LivePlan(CPUAttentionMetadata):
            @property
            def scheduler_metadata(self) -> torch.Tensor:
                return ops.cpu_attn_get_scheduler_metadata(
                    num_reqs=len(self.query_start_loc) - 1,
                    num_heads=builder.num_heads,
                    num_kv_heads=builder.num_kv_heads,
                    head_dim=builder.head_dim,
                    seq_lens=self.seq_lens,
                    dtype=builder.dtype,
                    query_start_loc=self.query_start_loc,
                    causal=self.causal,
                    sliding_window_size=builder.window_size,
                    isa=builder.isa,
                    enable_kv_split=False,
                    dynamic_causal=self.dynamic_causal,
                    kv_cache_dtype=builder.kv_cache_dtype,
                )

            @scheduler_metadata.setter
            def scheduler_metadata(self, value: Any) -> None:
                """Keep nothing."""

        metadata = original(self, *args, **kwargs)
        return LivePlan(**{f.name: getattr(metadata, f.name) for f in dataclasses.fields(metadata)})

    return build


def begin(graphs: str | None) -> None:
    """Forget the graphs of the last engine; the next one has full ones, piecewise too, or none."""
    Graph.all.clear()
    Graph.piecewise = graphs == "piecewise"


def install() -> None:
    """Let vLLM's V2 runner capture graphs on a CPU, in this process and for good.

    With piecewise ones too it pads other batches and says so in the forward context, but then the
    models run eagerly.
    """
    from triton.runtime.interpreter import GridExecutor
    from vllm.config import CompilationConfig, CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner

    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capture
    cudagraph_utils.graph_capture = lambda device: contextlib.nullcontext()
    for module in (cudagraph_utils, model_runner):
        module.has_compiled_submodule = lambda model: True
    model_runner.lock_workspace = lambda: None  # a CPU worker has none
    model_runner.use_workspace_lane = lambda lane: contextlib.nullcontext()
    GridExecutor.__call__ = recorded_launch(GridExecutor.__call__)
    CpuPlatform.support_static_graph_mode = classmethod(lambda cls: True)
    CpuPlatform.graph_pool_handle = classmethod(lambda cls: (0, 0))
    CPUAttentionMetadataBuilder._cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    CPUAttentionMetadataBuilder.supports_draft_decode_metadata_update = True
    CPUAttentionMetadataBuilder.update_draft_decode_metadata = lambda self, metadata: None
    CPUAttentionMetadataBuilder.build = live_plan(CPUAttentionMetadataBuilder.build)

    check = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        sizes = vllm_config.compilation_config.cudagraph_capture_sizes
        check(cls, vllm_config)
        vllm_config.compilation_config.cudagraph_capture_sizes = sizes  # which it has emptied

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    resolve = CompilationConfig.resolve_cudagraph_mode_and_sizes

    def resolve_mode(self: CompilationConfig, *args: Any, **kwargs: Any) -> Any:
        mode = resolve(self, *args, **kwargs)
        if Graph.piecewise:  # before, vLLM would ask for compiled models
            mode = self.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        return mode

    CompilationConfig.resolve_cudagraph_mode_and_sizes = resolve_mode
    warm_up = CPUWorker.compile_or_warm_up_model

    def compile_or_warm_up_model(self: CPUWorker) -> Any:
        times = warm_up(self)
        self.model_runner.capture_model()
        return times

    CPUWorker.compile_or_warm_up_model = compile_or_warm_up_model
