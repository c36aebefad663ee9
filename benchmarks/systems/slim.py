"""Fine-tuning all weights of a base where AdamW has no room: Adafactor, a weight at a time.

AdamW takes 16 bytes a weight: weight 4, gradient 4, averages 8. Here it is 4: Adafactor (arXiv
1804.04235) keeps sums of rows and columns in place of averages, every matrix is changed as soon as
its gradient is there, which then goes, and activations are computed twice. So no norm of all
gradients is known: Adafactor clips each matrix's change by itself. A rate is relative to the size
of a matrix's weights.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_memdec.train.data.artifacts import write_atomic
from vllm_memdec.train.model.devices import default_device
from vllm_memdec.train.model.huggingface import load_config, load_model, skeleton
from vllm_memdec.train.model.output_head import ALL
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import MemorySettings
from vllm_memdec.train.training.batches import Batches
from vllm_memdec.train.training.steps import learning_rate_factor, memory_loss

ADAMW = 16  # bytes a weight
SHARE = 0.75  # of the device's memory that weights, gradients and averages may take
SAVED = "checkpoint.pt"
SECONDS = 600  # between checkpoints


def device_bytes() -> int:
    """Return how much memory the device has."""
    if default_device().type == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_tight(base: str) -> bool:
    """Return whether AdamW over all weights of a base has no room on this machine."""
    weights = sum(p.numel() for p in skeleton(load_config(base)).parameters())
    return weights * ADAMW > SHARE * device_bytes()


def resumable(
    work: Path, steps: int, step: Callable[[int], None], state: dict[str, Any], advance: Callable
) -> None:
    """Call step(number) for every step, from the last checkpoint on.

    state: objects with state_dict() and load_state_dict(), by name.
    """
    done, saved = 0, time.monotonic()
    if (work / SAVED).exists():
        read = torch.load(work / SAVED, weights_only=True)
        done = read.pop("step")
        for name, entries in read.items():
            state[name].load_state_dict(entries)
        advance(done, done_before=True)
    for number in range(done, steps):
        step(number)
        advance(1)
        if time.monotonic() - saved > SECONDS and number + 1 < steps:
            entries = {name: part.state_dict() for name, part in state.items()}
            entries["step"] = number + 1
            write_atomic(work / SAVED, lambda path, entries=entries: torch.save(entries, path))
            saved = time.monotonic()
    (work / SAVED).unlink(missing_ok=True)


class Adafactors:
    """An optimiser of each weight by itself, which changes it as soon as its gradient is there."""

    def __init__(self, model: torch.nn.Module, weight_decay: float) -> None:
        self.parameters = list(model.parameters())
        self.each = [torch.optim.Adafactor([p], weight_decay=weight_decay) for p in self.parameters]
        for n, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(lambda _, n=n: self.change(n))

    def change(self, number: int) -> None:
        """Change a weight, and let its gradient go."""
        self.each[number].step()
        self.parameters[number].grad = None

    def rest(self) -> None:
        """Change the weights whose gradients came past autograd."""
        for number, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                self.change(number)

    def rate(self, rate: float) -> None:
        for optimizer in self.each:
            optimizer.param_groups[0]["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        return {str(n): optimizer.state_dict() for n, optimizer in enumerate(self.each)}

    def load_state_dict(self, entries: dict[str, Any]) -> None:
        for n, optimizer in enumerate(self.each):
            optimizer.load_state_dict(entries[str(n)])


def train_slim(
    settings: MemorySettings,
    base: str,
    corpus: Path,
    targets: Path,
    work: Path,
    progress: Progress,
) -> None:
    """Write the base, all its weights trained with cross-entropy; settings as a memory's."""
    batches = Batches(settings, corpus, targets)
    model = load_model(base, "float32").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = Adafactors(model, settings.weight_decay)

    def step(number: int) -> None:
        factor = learning_rate_factor(
            number, batches.steps, settings.warmup_fraction, settings.schedule
        )
        optimizer.rate(settings.learning_rate * factor)
        batch = batches.load(batches.blocks(number), default_device())
        rows = max(1, len(batch[2]))
        loss, _ = memory_loss(model, batch, ALL, settings, 1 / rows, alone=True)
        loss.backward()
        optimizer.rest()

    with progress.task("DAPT: training", batches.steps, "steps") as advance:
        resumable(work, batches.steps, step, {"model": model, "optimizer": optimizer}, advance)
    model.gradient_checkpointing_disable()
    model.to("cpu", torch.bfloat16).save_pretrained(work)
