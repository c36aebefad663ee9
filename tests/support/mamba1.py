"""Mamba 1 for a CPU, for which vLLM 0.32 has no kernel: its scan over prompts, in PyTorch.

Shapes: D channels, N numbers of state for each, T tokens of all requests of a step.
"""

from itertools import pairwise

import torch
from torch.nn import functional as F


def install(patch):
    """Put the scan in the place of vLLM's, through pytest's MonkeyPatch."""
    from vllm import _custom_ops

    patch.setattr(_custom_ops, "selective_scan_fwd", scan)
    patch.setattr(_custom_ops, "_supports_onednn", False)  # it does not take the layer's output


def scan(
    u_DT,
    delta_DT,
    a_DN,
    b_1NT,
    c_1NT,
    d_D,
    z_DT,
    bias_D,
    softplus,
    starts,
    slots,
    known,
    states,
    *_,
):
    """Write each request's outputs over z_DT, and its last state into states[slot]."""
    assert softplus and slots.dim() == 1
    dt_DT = F.softplus(delta_DT + bias_D[:, None])
    for row, (start, end) in enumerate(pairwise(starts.tolist())):
        state_DN = states[slots[row]].clone() if known[row] else torch.zeros_like(a_DN)
        for t in range(start, end):
            dt_D1, u_D1 = dt_DT[:, t, None], u_DT[:, t, None]
            state_DN = state_DN * (dt_D1 * a_DN).exp() + dt_D1 * u_D1 * b_1NT[0, :, t]
            y_D = state_DN @ c_1NT[0, :, t] + d_D * u_D1[:, 0]
            z_DT[:, t] = y_D * F.silu(z_DT[:, t])
        states[slots[row]] = state_DN
