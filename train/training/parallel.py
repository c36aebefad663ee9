"""Training on several processes: how the memory is spread over them, and what they agree on.

memory.parallel: `replicate` gives every process the whole memory (torch DDP: gradients are summed
while the backward pass goes on); `shard` a part of each layer (torch FSDP2). Both are a few calls
of torch.distributed, which is why accelerate, one more dependency over the same calls, is not used.

Bytes a parameter on a GPU, weights and sums in float32, matrix products in bfloat16:

    weight 4 + gradient 4 + Adam's two averages 8     = 16, sharded: 16 / GPUs
    bfloat16 copy of a layer at work, by autocast       2 of one layer, 0 at the step's end
    sharded: a gathered layer and its gradient          8 of one layer, of the head's V x D at least

A memory of 1.7 B (Qwen3-1.7B: 28 layers, D = 2,048, V = 151,936, its 311 M of tied embeddings
counted) on 8 GPUs of 80 GB: 1.72 x 16 / 8 = 3.4 GB of shards; head and embedding gathered, with the
gradient of a micro-batch as head_loss makes it and the one of the lookup, 3 x 1.2 GB, and 0.6 GB of
the head in bfloat16; 1 to 3 GB of logits; activations of 16,384 tokens at some 120 kB a token and
layer, 55 GB, or 2 GB with memory.gradient_checkpointing. About 64 GB, 11 GB with checkpointing: it
fits. Replicated, 27.5 GB of weights and sums leave room for half the tokens a pass, or for all with
checkpointing. 8 B: sharded 16 GB + activations, with checkpointing.
(By arithmetic; not measured.)
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from vllm_memdec.train.executor.ray_executor import World
from vllm_memdec.train.model.devices import default_device
from vllm_memdec.train.model.huggingface import layers_of
from vllm_memdec.train.settings import MemorySettings
from vllm_memdec.train.training.optimizers import Average, Optimizer


class Spread(torch.nn.Module):
    """A memory, on one process or on several: functions of it are run through forward().

    DDP and FSDP follow the forward pass of one module. That of a causal LM ends in logits, which
    never exist here at once, so the module's forward pass is whatever function it is given.
    """

    def __init__(self, memory: Any) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return function(memory, *arguments)."""
        return function(self.memory, *arguments)


def spread(memory: Any, settings: MemorySettings, world: World) -> torch.nn.Module:
    """Return a memory on its device as a module to be called as Spread is, over all processes.

    Layers are compiled on a GPU: with 0.5B on an H100 that is 1.6 times as fast (see devices.py).
    """
    if settings.gradient_checkpointing:
        memory.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.compile if settings.compile is not None else default_device().type == "cuda":
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        for layer in layers_of(memory):  # each by itself: they share one compiled function
            layer.compile()
    module = Spread(memory)
    if world.size == 1:
        return module
    if settings.parallel == "shard":
        from torch.distributed.fsdp import FSDPModule, fully_shard

        for layer in layers_of(memory):
            fully_shard(layer)
        fully_shard(module)
        for part in module.modules():
            if isinstance(part, FSDPModule):  # a batch's rows are the divisor already
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)  # gloo multiplies nothing
        return module
    experts = any(name.endswith("experts") for name, _ in memory.named_modules())
    with warnings.catch_warnings():  # torch 2.13 has another name for what 2.11 calls so
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        replicated = torch.nn.parallel.DistributedDataParallel(
            module,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,  # else a second copy of the gradients
            find_unused_parameters=experts,  # an expert may have got no token here
        )
    replicated.register_comm_hook(None, _summed)
    return replicated


def _summed(_state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sum a bucket of gradients: a batch's rows are the divisor already."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def memory_of(module: torch.nn.Module) -> Any:
    """Return the memory inside what spread() returned."""
    return getattr(module, "module", module).memory


def unreduced(module: torch.nn.Module) -> contextlib.AbstractContextManager:
    """Return a context for all micro-batches of a step but its last: gradients stay here.

    FSDP reduces every time: unreduced, each process would hold the gradients of the whole memory.
    """
    return getattr(module, "no_sync", contextlib.nullcontext)()


def run_alone(module: torch.nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return function(memory, *arguments), no backward pass to come; all processes call it."""
    inner = getattr(module, "module", module)  # DDP would prepare one
    with torch.no_grad():
        return inner(function, *arguments)


def agreed(value: Any, world: World) -> Any:
    """Return rank 0's value on every training process."""
    if world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=default_device())
    return values[0]


def total(values: torch.Tensor, world: World) -> torch.Tensor:
    """Return the sum of a tensor over all training processes."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the parts that other processes hold; all of them have to call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def state_of(
    module: torch.nn.Module, optimizer: Optimizer | None = None, average: Average | None = None
) -> dict[str, Any]:
    """Return a copy of the weights, the optimiser's state and the average on the CPU.

    However they are spread: all processes have to call it; only rank 0's is whole.
    """
    keep = not dist.is_initialized() or dist.get_rank() == 0
    copies: dict[tuple, torch.Tensor] = {}  # tied weights are copied, and written, once

    def copied(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: copied(v) for key, v in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        local = value.to_local() if hasattr(value, "to_local") else value
        key = (local.data_ptr(), tuple(value.shape), value.stride())
        if not local.numel() or key not in copies:
            full = whole(value.detach())
            copies[key] = full.to("cpu", copy=True) if keep else full.new_empty(0)
        return copies[key]

    memory = memory_of(module)
    state = {"model": copied(dict(memory.state_dict()))}
    if optimizer is not None:
        optimizer_state = optimizer.state_dict()
        state["optimizer"] = optimizer_state | {"state": copied(optimizer_state["state"])}
    if average is not None:
        state["average"] = copied(average.means)
    return state


def restore(
    module: torch.nn.Module, optimizer: Optimizer, state: dict, average: Average | None = None
) -> None:
    """Put back what state_of() returned, however the memory is spread now."""
    own = memory_of(module).state_dict()
    if own.keys() != state["model"].keys():
        raise ValueError("a checkpoint of another model.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(_like(state["model"][name], tensor))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots = {
        number: {
            name: value if name == "step" else _like(value, parameters[number])
            for name, value in slot.items()
        }
        for number, slot in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict(state["optimizer"] | {"state": slots})
    if average is not None:
        for number, mean in state.get("average", {}).items():  # older checkpoints have none
            like = average.parameters[number]
            average.means[number] = _like(mean, like).to(like.device)


def _like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or this process's part of it where `other` is sharded."""
    if not (hasattr(other, "device_mesh") and hasattr(other, "placements")):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
