"""The gate: what weight each token's memory gets, by what the memory sees and how sure it is.

    score_t = w2 . gelu(W1 h_t + b1) + b2
    alpha_t = LARGEST * sigmoid(score_t + sum_k out_k gelu(t_k top_t + e_k entropy_t + bias_k))

h_t is what the memory's head sees: a memory knows its domain when it reads it. The top probability
and the entropy of what the head makes of it tell what it has learnt by heart from what it guesses;
the kernel that mixes has both (kernels/interpolate.py). Nothing of the base is looked at: a gate
goes wherever its memory goes. `memdec calibrate` trains it and writes it into the memory's folder;
serving and training share this module.

Shapes: N rows, D width of the memory, H hidden units, K units for the memory's certainty.
"""

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from vllm_memdec.errors import MemdecError

FILE = "memdec_gate.npz"  # .safetensors would be taken for weights of the memory
FORMAT_VERSION = 2  # 1 did without the memory's certainty
# [H, D], [H], [H], [], [4, K]: a row each of t, e, bias and out.
NAMES = ("w1", "b1", "w2", "b2", "certainty")


class Gate:
    """A trained gate; float32, on one device."""

    def __init__(self, arrays: dict[str, np.ndarray], device: Any = "cpu"):
        import torch

        self.w1, self.b1, self.w2, self.b2, self.certainty = (
            torch.from_numpy(arrays[name].astype(np.float32)).to(device) for name in NAMES
        )

    def score(self, h_ND: Any) -> Any:
        """Return scores [N] for hidden states [N, D] of any dtype."""
        import torch.nn.functional as F

        h_NH = F.gelu(F.linear(h_ND.float(), self.w1, self.b1))
        return F.linear(h_NH, self.w2[None])[:, 0] + self.b2

    def __call__(self, features_NF: Any) -> Any:
        """Return weights [N] between 0 and LARGEST for rows of `features`."""
        from vllm_memdec.kernels.weights import gate_weights

        h_ND, top_N, entropy_N = features_NF[:, :-2], features_NF[:, -2], features_NF[:, -1]
        return gate_weights(self.score(h_ND), self.certainty, top_N, entropy_N)


def features(h_ND: Any, logits_NV: Any) -> Any:
    """Return a memory's hidden states, its top probability and its entropy: [N, D + 2], float32."""
    import torch

    logp_NV = logits_NV.float().log_softmax(-1)
    p_NV = logp_NV.exp()
    # A logit of -inf has no share in the entropy, and 0 times it would be NaN.
    entropy_N = -(p_NV * logp_NV.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
    return torch.cat([h_ND.float(), p_NV.amax(-1)[:, None], entropy_N[:, None]], -1)


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
    """Return a gate's arrays, or raise MemdecError; width: D of the memory it is to serve."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
            version = arrays.get("format_version")
            version = None if version is None else int(version)
            whole = all(np.isfinite(arrays[name]).all() for name in NAMES if name in arrays)
    except (OSError, ValueError, TypeError, AttributeError, EOFError, BadZipFile) as error:
        raise MemdecError(f"{path} cannot be read ({error}): run memdec calibrate again.") from None
    if version != FORMAT_VERSION:
        raise MemdecError(
            f"{path}: gate format version {version} is not supported (this release reads "
            f"{FORMAT_VERSION}): run memdec calibrate again."
        )
    shapes = [arrays[name].shape if name in arrays else None for name in NAMES]
    H, D = shapes[0] if shapes[0] and len(shapes[0]) == 2 else (0, 0)
    K = shapes[4][-1] if shapes[4] else 0
    if not (whole and H and K) or shapes != [(H, D), (H,), (H,), (), (4, K)]:
        raise MemdecError(f"{path} is not a whole gate: run memdec calibrate again.")
    if width is not None and width != D:
        raise MemdecError(
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
