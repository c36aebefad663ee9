"""Mamba 1 for a CPU, in PyTorch: vLLM 0.32 has no kernel, and for decoding one of Mamba 2 alone.

Shapes: D channels, N numbers of state for each, T tokens of the prompts of a step,
R requests that decode.
"""

from itertools import pairwise

import torch
from torch.nn import functional as F


def install(patch):
    """Put both in the place of vLLM's, through pytest's MonkeyPatch."""
    from vllm import _custom_ops

    patch.setattr(_custom_ops, "selective_scan_fwd", scan)
    patch.setattr(_custom_ops, "selective_state_update_cpu", update)
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


def update(state, x_RD, dt_RD, a_DN, b_RN, c_RN, d_D, z_RD, bias_D, softplus, slots, *rest):
    """Write each request's output into `out`, and its state where it was."""
    out_RD, slots = rest[2], slots.flatten()
    assert softplus and len(slots) == len(x_RD)
    dt_RD1 = F.softplus(dt_RD + bias_D)[..., None]
    state[slots] = state[slots] * (dt_RD1 * a_DN).exp() + dt_RD1 * x_RD[..., None] * b_RN[:, None]
    y_RD = (state[slots] * c_RN[:, None]).sum(-1) + d_D * x_RD
    out_RD.copy_(y_RD * F.silu(z_RD))
