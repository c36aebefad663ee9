"""The optimisers of a training: AdamW for all weights, or Muon for the matrices of the layers.

Muon (torch.optim.Muon) orthogonalises the averaged gradient of a matrix, so that all directions of
it are learnt at one rate. Embedding, head and vectors are AdamW's. And the average of the weights
over the last steps, whose noise cancels.
"""

from collections.abc import Callable
from typing import Any

import torch

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.model.huggingface import layers_of
from vllm_memdec.train.settings import MemorySettings


class Pair:
    """Several optimisers as one, whose state is numbered and saved as that of one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for each in self.optimizers for group in each.param_groups]

    def step(self) -> None:
        for each in self.optimizers:
            each.step()

    def zero_grad(self) -> None:
        for each in self.optimizers:
            each.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for first, each in self._numbered():
            own = each.state_dict()
            state |= {first + n: slot for n, slot in own["state"].items()}
            groups += [_renumbered(group, first) for group in own["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        groups = iter(state["param_groups"])
        for first, each in self._numbered():
            own = [_renumbered(next(groups), -first) for _ in each.param_groups]
            numbers = [n for group in own for n in group["params"]]
            slots = {n: state["state"][first + n] for n in numbers if first + n in state["state"]}
            each.load_state_dict({"state": slots, "param_groups": own})

    def _numbered(self) -> list[tuple[int, torch.optim.Optimizer]]:
        """Return each optimiser with the number of its first parameter."""
        numbered, first = [], 0
        for each in self.optimizers:
            numbered.append((first, each))
            first += sum(len(group["params"]) for group in each.param_groups)
        return numbered


def _renumbered(group: dict[str, Any], by: int) -> dict[str, Any]:
    return group | {"params": [by + n for n in group["params"]]}


Optimizer = torch.optim.Optimizer | Pair


def new_optimizer(module: torch.nn.Module, settings: MemorySettings) -> Optimizer:
    """Return the optimiser of a memory's weights, as spread() returned it."""
    decay = settings.weight_decay
    every = list(module.parameters())
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(every, lr=settings.learning_rate, weight_decay=decay, fused=True)
    muon: Callable[..., torch.optim.Optimizer] | None = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise MemdecError(
            f"memory.optimizer muon needs PyTorch 2.9, this is {torch.__version__}: install it, or "
            "set adamw."
        )
    memory = getattr(module, "module", module).memory
    matrices = [p for layer in layers_of(memory) for p in layer.parameters() if p.ndim == 2]
    if not matrices:
        raise MemdecError(
            f"memory.optimizer muon is for matrices, and the layers of a {type(memory).__name__} "
            "have none: set adamw."
        )
    theirs = {id(p) for p in matrices}
    others = [p for p in every if id(p) not in theirs]
    return Pair(
        torch.optim.AdamW(others, lr=settings.learning_rate, weight_decay=decay, fused=True),
        muon(matrices, lr=settings.muon_learning_rate, weight_decay=decay),
    )


def peak_rate(group: dict[str, Any], settings: MemorySettings) -> float:
    """Return the learning rate of a group of weights before the schedule's factor."""
    return settings.muon_learning_rate if "ns_steps" in group else settings.learning_rate


class Average:
    """The mean of a module's weights over the last steps of a training, exported in their place."""

    def __init__(self, module: torch.nn.Module, steps: int, fraction: float) -> None:
        self.parameters = list(module.parameters())
        self.first = steps - max(1, round(fraction * steps)) if fraction else steps
        self.means: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the weights after a step, if it is one of the last; steps count from 1."""
        if step <= self.first:
            return
        for number, parameter in enumerate(self.parameters):
            if number in self.means:
                self.means[number].lerp_(parameter, 1 / (step - self.first))
            else:
                self.means[number] = parameter.detach().clone()

    @torch.no_grad()
    def put(self) -> None:
        """Give the module the mean, where there is one."""
        for number, mean in self.means.items():
            self.parameters[number].copy_(mean)
