"""Slots: what a worker is asked to do with them, and what of a layer's weights lies elsewhere.

SlotWorker is mixed into vLLM's worker, by `worker_extension_cls`, which vLLM offers for this.
EngineCore.collective_rpc  Between two steps, where all requests of the engine are known: a slot
    that any of them uses, waiting and preempted ones too, is not touched. The count of these
    requests is asked for in the same way, and does not go on to the workers.
dispatch_cpu_unquantized_gemm  On a CPU it leaves a layer without its weight: a function of the
    layer has it, packed, in a tensor or behind the address of a handler.

May go when vLLM replaces a processed model's weights beside running steps.
Relies on the names in the closure of that function, and on a handler's address being read from its
tensor in every call.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.engine.core import EngineCore

from vllm_memdec.compat.hooks import wrap
from vllm_memdec.request import SETTLED

WORKER = f"{__name__}.SlotWorker"
BUSY = "busy"  # in place of a result: a request of the slot runs
COUNT, MOVE = "memdec_count", "memdec_move"  # names of what an engine is asked
SIGNATURES = {
    "vllm.v1.engine.core:EngineCore.collective_rpc": "self method timeout args kwargs",
    "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm": "layer remove_weight",
    "vllm.model_executor.model_loader.utils:process_weights_after_loading": (
        "model model_config target_device"
    ),
    "vllm.model_executor.model_loader:DefaultModelLoader._get_weights_iterator": "self source",
}
ATTRIBUTES = {
    "vllm.v1.engine.core:EngineCore": "scheduler",
    "vllm.v1.core.sched.scheduler:Scheduler": "requests",
    "vllm._custom_ops:CPUDNNLGEMMHandler": "handler_tensor",
    "vllm.config:LoadConfig": "safetensors_load_strategy use_tqdm_on_load",
}


def install() -> None:
    """Hook the engine core, in whichever process it is."""
    wrap(EngineCore, "collective_rpc", _when_free)


def _when_free(original: Callable) -> Callable:
    def collective_rpc(
        self: Any, method: Any, timeout: Any = None, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if method == COUNT:
            return [[number, count] for number, count in running(self.scheduler).items()]
        if method == MOVE and running(self.scheduler)[args[0]]:
            return [BUSY]
        return original(self, method, timeout, args, kwargs)

    return collective_rpc


def running(scheduler: Any) -> Counter[int]:
    """Return how many requests that have not ended use each slot, by its number."""
    params = [request.sampling_params for request in scheduler.requests.values()]
    chosen = [(each.extra_args or {}).get(SETTLED, ()) for each in params if each is not None]
    return Counter(int(number) for of_request in chosen for number, *_ in of_request)


class SlotWorker:
    """What all workers do for a slot, each with its own part of the memory."""

    model_runner: Any

    def memdec_read(self, settings: dict[str, Any]) -> None:
        """Begin to read a memory."""
        self.model_runner.get_model().memories.spare.begin(settings)

    def memdec_state(self) -> dict[str, Any] | None:
        """Return what has come of it; None while it is being read."""
        return self.model_runner.get_model().memories.spare.state()

    def memdec_move(self, number: int) -> None:
        """Put what was read into a slot."""
        self.model_runner.get_model().memories.move(number)

    def memdec_drop(self) -> None:
        """Forget what was read."""
        self.model_runner.get_model().memories.spare.drop()


class Packed:
    """Weights behind an address, which is in a tensor."""

    def __init__(self, handler: Any):
        self.address = handler.handler_tensor

    def exchange(self, other: "Packed") -> None:
        """Have the other's weights, and leave it these, which it frees."""
        mine = self.address.clone()
        self.address.copy_(other.address)
        other.address.copy_(mine)


def packed(layer: Any) -> list[Any]:
    """Return what a layer's function for a CPU has of its weights: tensors and Packed."""
    closure = getattr(vars(layer).get("cpu_linear"), "__closure__", None) or ()
    found: list[Any] = []
    for cell in closure:
        content = cell.cell_contents
        if isinstance(content, torch.Tensor):
            found.append(content)
        elif isinstance(getattr(content, "handler_tensor", None), torch.Tensor):
            found.append(Packed(content))
    return found
