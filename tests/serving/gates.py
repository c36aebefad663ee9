"""Random gates, and the weights that they should give: float64, by the formula."""

import math

import numpy as np
import oracle
import torch

from vllm_memdec.gate import gate_path, read_gate


def random_gate(width, seed, hidden=8):
    """Return a gate whose weights differ from token to token."""
    rng = np.random.default_rng(seed)
    return {
        "w1": rng.normal(size=(hidden, width)) / math.sqrt(width),
        "b1": rng.normal(size=hidden),
        "w2": rng.normal(size=hidden) * 2,
        "b2": np.array(0.0),
    }


@torch.no_grad()
def gate_weights(models, name, most, ids):
    """Return the weight [T, 1] of every position, in float64 and by the formula."""
    if most is None:
        return 0.5
    model = oracle.load(models[name])
    h_TD = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    gate = {k: torch.from_numpy(v).double() for k, v in read_gate(gate_path(models[name])).items()}
    x_TH = h_TD @ gate["w1"].T + gate["b1"]
    x_TH = x_TH * (1 + torch.erf(x_TH / math.sqrt(2))) / 2
    alpha_T = 0.999 * (x_TH @ gate["w2"] + gate["b2"]).sigmoid()
    return alpha_T.clamp(max=most)[:, None]
