"""The gate: what weight each token's memory gets, read off the memory's own hidden state.

    alpha_t = LARGEST * sigmoid(w2 . gelu(W1 h_t + b1) + b2)

h_t is what the memory's head sees. A memory knows its domain when it reads it, so nothing of the
base is looked at: a gate goes wherever its memory goes. `memdec calibrate` trains it and writes it
into the memory's folder; serving and training share this module.

Shapes: N rows, D width of the memory, H hidden units.
"""

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

FILE = "memdec_gate.npz"  # .safetensors would be taken for weights of the memory
FORMAT_VERSION = 1
LARGEST = 0.999  # a sure memory that is wrong costs at most ln(1000) nats more than the base
NAMES = ("w1", "b1", "w2", "b2")  # [H, D], [H], [H], []


class Gate:
    """A trained gate; float32, on one device."""

    def __init__(self, arrays: dict[str, np.ndarray], device: Any = "cpu"):
        import torch

        self.w1, self.b1, self.w2, self.b2 = (
            torch.from_numpy(arrays[name].astype(np.float32)).to(device) for name in NAMES
        )

    def __call__(self, h_ND: Any) -> Any:
        """Return weights [N] between 0 and LARGEST for hidden states [N, D] of any dtype."""
        import torch.nn.functional as F

        h_NH = F.gelu(F.linear(h_ND.float(), self.w1, self.b1))
        return LARGEST * (F.linear(h_NH, self.w2[None])[:, 0] + self.b2).sigmoid()


def gate_path(model: str, revision: str | None = None) -> Path | None:
    """Return the path of the gate in a memory's folder or hub repository; None if it has none."""
    if Path(model).is_dir():
        path = Path(model) / FILE
        return path if path.exists() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(
            model,
            FILE,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


def read_gate(path: Path, width: int | None = None) -> dict[str, np.ndarray]:
    """Return a gate's arrays, or raise ValueError; width: D of the memory it is to serve."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
            version = arrays.get("format_version")
            version = None if version is None else int(version)
            whole = all(np.isfinite(arrays[name]).all() for name in NAMES if name in arrays)
    except (OSError, ValueError, TypeError, AttributeError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}): run memdec calibrate again.") from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: gate format version {version} is not supported (this release reads "
            f"{FORMAT_VERSION}): run memdec calibrate again."
        )
    shapes = [arrays[name].shape if name in arrays else None for name in NAMES]
    H, D = shapes[0] if shapes[0] and len(shapes[0]) == 2 else (0, 0)
    if not whole or shapes != [(H, D), (H,), (H,), ()]:
        raise ValueError(f"{path} is not a whole gate: run memdec calibrate again.")
    if width is not None and width != D:
        raise ValueError(
            f"{path} is for a memory of width {D}, this one has {width}: run memdec calibrate "
            "for it."
        )
    return arrays


def write_gate(folder: Path, arrays: dict[str, np.ndarray], name: str = FILE) -> Path:
    """Write a gate into a memory's folder, whole or not at all."""
    path = folder / name
    partial = path.with_suffix(".tmp")
    with open(partial, "wb") as file:
        np.savez(file, format_version=np.array(FORMAT_VERSION), **arrays)
    partial.replace(path)
    return path
