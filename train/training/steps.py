"""What a training step is made of: learning rate, precision, loss and gradients."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_memdec.kernels.head_loss import head_loss
from vllm_memdec.kernels.sparse_kl import Mixture, SparseRows
from vllm_memdec.train.model.devices import default_device, product_dtype
from vllm_memdec.train.model.output_head import Candidates, logits_transform
from vllm_memdec.train.settings import MemorySettings
from vllm_memdec.train.training.batches import Batches
from vllm_memdec.train.training.parallel import Spread


def warmup_steps(steps: int, fraction: float) -> int:
    """Return how many steps the learning rate rises over."""
    return max(1, round(steps * fraction))


def learning_rate_factor(
    step: int, steps: int, warmup_fraction: float, schedule: str = "cosine"
) -> float:
    """Return the factor of the peak rate: linear warm-up, then as the schedule says."""
    warmup = warmup_steps(steps, warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - progress
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def mixture_share(step: int, steps: int, ramp: float) -> float:
    """Return the share that the mixture's likelihood has of the cross-entropy at a step."""
    return min(1.0, step / (ramp * steps)) if ramp else 1.0


def autocast_to(dtype: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which matrix products are of a dtype, where the device has them."""
    products = product_dtype(dtype, device)
    if products is not torch.float32:
        return torch.autocast(device.type, dtype=products)
    return contextlib.nullcontext()


def memory_loss(
    memory: Any,
    batch: tuple,
    candidates: Candidates,
    settings: MemorySettings,
    scale: float,
    alone: bool,
    share: float = 0.0,
    beta: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a micro-batch's loss times `scale` and its sums, those of head_loss().

    alone: no other process waits for the gradients; share: of the mixture's likelihood; beta: in
    place of the settings'.
    """
    tokens, positions, places, labels, targets, *base = batch
    with autocast_to(settings.dtype, tokens.device):
        trunk = memory.base_model(input_ids=tokens, position_ids=positions, use_cache=False)
    layer = memory.get_output_embeddings()
    return head_loss(
        trunk.last_hidden_state.flatten(0, 1)[places],
        layer.weight,
        candidates.rank(labels),
        SparseRows(targets.offsets, candidates.rank(targets.token), targets.probability),
        settings.beta if beta is None else beta,
        bias_V=getattr(layer, "bias", None),
        transform=logits_transform(memory.config),
        columns=candidates.columns,
        mixture=Mixture(base[0], settings.mixture_alpha, share) if base else None,
        dtype=product_dtype(settings.dtype, tokens.device),
        scale=scale,
        accumulate=alone,
    )


def add_gradients(
    module: torch.nn.Module,
    batches: Batches,
    blocks: np.ndarray,
    scale: float,
    candidates: Candidates,
    settings: MemorySettings,
    following: Sequence[np.ndarray] = (),
    share: float = 0.0,
) -> torch.Tensor:
    """Backpropagate one micro-batch times `scale`; return its sums, those of head_loss().

    following: the blocks of the micro-batches after it, to be read meanwhile.
    """
    batch = batches.load(blocks, default_device())
    batches.expect(following, default_device())
    alone, beta = type(module) is Spread, batches.beta(blocks, settings.beta)
    loss, sums = module(memory_loss, batch, candidates, settings, scale, alone, share, beta)
    loss.backward()
    return sums
