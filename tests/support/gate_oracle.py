"""Random gates, and the weights that they should give: float64, by the formula."""

import math

import numpy as np
import torch
from support import oracle

from vllm_memdec.gate import gate_path, read_gate


def random_gate(width, seed, hidden=8, context=True):
    """Return a gate whose weights differ from token to token; without context it is of format 2."""
    rng = np.random.default_rng(seed)
    position = {"context": rng.normal(size=hidden) * 2, "longest": np.array(30)}
    return (position if context else {}) | {
        "w1": rng.normal(size=(hidden, width)) / math.sqrt(width),
        "b1": rng.normal(size=hidden),
        "w2": rng.normal(size=hidden) * 2,
        "b2": np.array(0.0),
        # Top probability, entropy, bias, weight. The entropies of tiny models are all but the same.
        "certainty": rng.normal(size=(4, 5)) * [[20], [0.3], [1], [0.7]],
    }


@torch.no_grad()
def gate_weights(models, name, cap, ids):
    """Return the weight [T, 1] of every position, in float64 and by the formula.

    cap: the maximum of the gate; or, without a gate, a number or (position, alpha) pairs.
    """
    if not isinstance(cap, float):
        return torch.tensor(
            [[[a for start, a in cap if start <= n][-1]] for n in range(len(ids))]
        ).double()
    model = oracle.load(models[name])
    h_TD = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    width = oracle.log_probs(models["base"], ids).shape[1]
    logp_TV = oracle.log_probs(models[name], ids, width)
    top_T = logp_TV.exp().amax(-1)
    entropy_T = -(logp_TV.exp() * logp_TV).nan_to_num(0).sum(-1)
    gate = read_gate(gate_path(models[name]))
    gate = {k: torch.from_numpy(v).double() for k, v in gate.items() if v.dtype.kind == "f"}
    x_TH = h_TD @ gate["w1"].T + gate["b1"]
    if "context" in gate:
        position_T = torch.arange(len(ids)).double().clamp(max=30)
        x_TH = x_TH + (1 + position_T).log()[:, None] * gate["context"]
    x_TH = gelu(x_TH)
    top_K, entropy_K, bias_K, out_K = gate["certainty"]
    x_TK = gelu(top_T[:, None] * top_K + entropy_T[:, None] * entropy_K + bias_K)
    alpha_T = 0.999 * (x_TH @ gate["w2"] + gate["b2"] + x_TK @ out_K).sigmoid()
    return alpha_T.clamp(max=cap)[:, None]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2
