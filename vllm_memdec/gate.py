"""The gate: the weight of the memory for each token, by its hidden state, confidence and position.

    score_t = w2 . gelu(W1 h_t + c log(1 + position_t) + b1) + b2
    alpha_t = LARGEST * sigmoid(score_t + sum_k out_k gelu(t_k top_t + e_k entropy_t + bias_k))

h_t is the input of the memory's head: a memory recognises the text of its domain. The position is
the length of the context, from which a base gains more than a small memory. The top probability and
the entropy of the head's distribution separate facts that it has learnt from guesses; the kernel
that mixes has both (kernels/interpolate.py). Nothing of the base enters: a gate is stored with its
memory and works with every base that the memory serves. `memdec calibrate` trains it and writes it
into the memory's folder with a fingerprint of the memory's weights; serving and training share this
module.

Shapes: N rows, D width of the memory, H hidden units, K units for the memory's certainty.
"""

import hashlib
import json
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from vllm_memdec.checkpoint import model_file
from vllm_memdec.errors import MemdecError

FILE = "memdec_gate.npz"  # .safetensors would be taken for weights of the memory
FORMAT_VERSION = 3  # 2 did without position and fingerprint, 1 without the memory's certainty
# [H, D], [H], [H], [], [4, K]: a row each of t, e, bias and out.
NAMES = ("w1", "b1", "w2", "b2", "certainty")
CONTEXT = ("context", "longest")  # [H], c of the formula, and [], the longest position it has seen
UNITS = 16  # K, of the gates that `memdec calibrate` trains
MEMORY = "memory"  # fingerprint of the weights that it was trained for
WEIGHTS = ("*.safetensors", "*.bin")
PAGES, PAGE_BYTES = 64, 4096  # of a file that its fingerprint is made of


class Gate:
    """A trained gate; float32, on one device."""

    def __init__(self, arrays: dict[str, np.ndarray], device: Any = "cpu"):
        import torch

        self.w1, self.b1, self.w2, self.b2, self.certainty = (
            torch.from_numpy(arrays[name].astype(np.float32)).to(device) for name in NAMES
        )
        self.context = None  # a gate of format 2 goes without
        if CONTEXT[0] in arrays:
            context, max_position = (arrays[name].astype(np.float32) for name in CONTEXT)
            self.context = torch.from_numpy(context).to(device)
            self.max_context = float(np.log1p(max_position))

    def score(self, h_ND: Any, context_N: Any) -> Any:
        """Return scores [N] for hidden states [N, D] of any dtype and log(1 + position) [N]."""
        import torch
        import torch.nn.functional as F

        x_NH = F.linear(h_ND.float(), self.w1, self.b1)
        if self.context is not None:
            x_NH = torch.addr(x_NH, context_N.float().clamp(0, self.max_context), self.context)
        return F.linear(F.gelu(x_NH), self.w2[None])[:, 0] + self.b2

    def __call__(self, features_NF: Any) -> Any:
        """Return weights [N] between 0 and LARGEST for rows of `features`."""
        from vllm_memdec.kernels.weights import gate_weights

        h_ND, (top_N, entropy_N, context_N) = features_NF[:, :-3], features_NF[:, -3:].unbind(1)
        return gate_weights(self.score(h_ND, context_N), self.certainty, top_N, entropy_N)


def features(h_ND: Any, logits_NV: Any, position_N: Any) -> Any:
    """Return the inputs of a gate, [N, D + 3] float32.

    The memory's hidden states, its top probability, its entropy and log(1 + position).
    """
    import torch

    logp_NV = logits_NV.float().log_softmax(-1)
    p_NV = logp_NV.exp()
    # A logit of -inf has no share in the entropy, and 0 times it would be NaN.
    entropy_N = -(p_NV * logp_NV.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
    rest = p_NV.amax(-1), entropy_N, position_N.to(h_ND.device).float().log1p()
    return torch.cat([h_ND.float(), torch.stack(rest, -1)], -1)


def weights_fingerprint(folder: Path) -> str | None:
    """Return a fingerprint of the weights in a memory's folder, None if there are none.

    Sizes of the files and pages spread over them: milliseconds at any size, and other weights have
    another one, as training changes all of them.
    """
    files = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(json.dumps([path.name, size]).encode())
        with open(path, "rb") as file:
            for place in np.linspace(0, max(0, size - PAGE_BYTES), PAGES).astype(int).tolist():
                file.seek(place)
                digest.update(file.read(PAGE_BYTES))
    return digest.hexdigest() if files else None


def check_gate(path: Path, arrays: dict[str, np.ndarray]) -> str | None:
    """Raise MemdecError if a gate lies beside weights that it was not trained for.

    Returns a sentence of warning if it does not record them. Where the weights are not beside it,
    as before a download, nothing is compared.
    """
    if MEMORY not in arrays:
        return (
            f"{path} does not say which weights it was trained for: run memdec calibrate again if "
            "the memory has been trained since."
        )
    fingerprint = weights_fingerprint(path.parent)
    if fingerprint is not None and fingerprint != str(arrays[MEMORY]):
        raise MemdecError(
            f"{path} was trained for other weights than those beside it: run memdec calibrate "
            f'again, or serve with "gate": false.'
        )
    return None


def gate_path(model: str, revision: str | None = None) -> Path | None:
    """Return the path of the gate in a memory's folder or hub repository; None if it has none."""
    return model_file(model, FILE, revision)


def read_gate(path: Path, width: int | None = None) -> dict[str, np.ndarray]:
    """Return a gate's arrays, or raise MemdecError; width: D of the memory it is to serve."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
            version = arrays.get("format_version")
            version = None if version is None else int(version)
            numbers = [arrays[name] for name in NAMES + CONTEXT if name in arrays]
            whole = all(np.isfinite(array).all() for array in numbers)
    except (OSError, ValueError, TypeError, AttributeError, EOFError, BadZipFile) as error:
        raise MemdecError(f"{path} cannot be read ({error}): run memdec calibrate again.") from None
    if version not in (2, FORMAT_VERSION):
        raise MemdecError(
            f"{path}: gate format version {version} is not supported (this release reads "
            f"2 and {FORMAT_VERSION}): run memdec calibrate again."
        )
    names = NAMES if version == 2 else NAMES + CONTEXT
    shapes = [arrays[name].shape if name in arrays else None for name in names]
    H, D = shapes[0] if shapes[0] and len(shapes[0]) == 2 else (0, 0)
    K = shapes[4][-1] if shapes[4] else 0
    wanted = [(H, D), (H,), (H,), (), (4, K), (H,), ()][: len(names)]
    if not (whole and H and K) or shapes != wanted:
        raise MemdecError(f"{path} is not a whole gate: run memdec calibrate again.")
    if width is not None and width != D:
        raise MemdecError(
            f"{path} is for a memory of width {D}, this one has {width}: run memdec calibrate "
            "for it."
        )
    return arrays


def write_gate(folder: Path, arrays: dict[str, np.ndarray], name: str = FILE) -> Path:
    """Write a gate into a memory's folder, with its weights' fingerprint, whole or not at all."""
    path = folder / name
    partial = path.with_suffix(".tmp")
    fingerprint = weights_fingerprint(folder)
    content: dict[str, Any] = dict(arrays)
    if fingerprint is not None and MEMORY not in arrays:
        content[MEMORY] = np.array(fingerprint)
    content["format_version"] = np.array(FORMAT_VERSION if CONTEXT[0] in arrays else 2)
    with open(partial, "wb") as file:
        np.savez(file, **content)
    partial.replace(path)
    return path
