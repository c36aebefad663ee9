"""The device, in what it multiplies, and how many token blocks a forward pass takes on it."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

# Tokens a forward pass on CUDA, by arithmetic for an H100 (not measured). transformers launches a
# layer's forward pass in about 0.6 ms. The 24 layers of a 0.5B base take 14 ms to launch; on 2,048
# tokens they take 3.5 ms to run at 60 % of 989 TFLOP/s, on 16,384 28 ms, so that the GPU is what is
# waited for. Activations of a layer, the widest of a 7B base: 1.2 GB.
EMBEDDED = 1 << 14
BLOCKS = 4  # a forward pass on a CPU
# A training step of 0.5B on an H100 (speed/training_gpu.py, blocks of 512), without and with
# compiled layers: on 8,192 tokens 67,000 and 84,000 tokens/s in 23 and 18 GB, on 16,384 75,000 and
# 119,000 in 37 and 27 GB, on 24,576 79,000 and 124,000 in 51 and 37 GB.
TRAINED = 1 << 13
LARGE_GPU = 64 * 10**9  # bytes, from which on a training step takes twice as many


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def product_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products on a device, where settings ask for one.

    A CPU without AVX-512 or the like takes 4 to 60 times as long in bfloat16 as in float32, in
    which the same weights give what bfloat16 only rounds.
    """
    if name != "bfloat16" or device.type != "cpu":
        return getattr(torch, name)
    # Some builds of PyTorch have no oneDNN, which is asked here.
    has = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has else torch.float32


def products(name: str) -> str:
    """Return the name of the dtype of matrix products here, where settings ask for one."""
    return str(product_dtype(name, default_device())).removeprefix("torch.")


def tell_dtype(dtypes: Iterable[str], say: Callable[[str], None]) -> None:
    """Say so where a dtype of the settings is not that of the products."""
    for name in sorted({*dtypes}):
        if (real := products(name)) != name:
            say(f"{name} is slow on this CPU: models run in {real}, as precise or more so")


def blocks_at_once(blocks: int | None, block_tokens: int, device: torch.device, tokens: int) -> int:
    """Return how many blocks a forward pass takes: those set, else so many tokens on CUDA."""
    if blocks is not None:
        return blocks
    return max(BLOCKS, tokens // block_tokens) if device.type == "cuda" else BLOCKS


def trained_tokens(device: torch.device) -> int:
    """Return how many tokens a forward pass of the training takes on CUDA."""
    if device.type != "cuda":
        return TRAINED
    large = torch.cuda.get_device_properties(device).total_memory >= LARGE_GPU
    return 2 * TRAINED if large else TRAINED


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return an array as a tensor on a device; nobody waits until CUDA has it."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
