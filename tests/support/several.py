"""Requests that mix several memories: folders, what is asked for, and the float64 mixture.

Shapes: T tokens of one sequence, V base vocabulary.
"""

import shutil
from pathlib import Path

import torch
from support import oracle
from support.gate_oracle import gate_weights, random_gate

from vllm_memdec.gate import write_gate

ALPHAS = {"law": "auto", "bio": 0.7, "plain": 0.5, "short": 0.4}  # two have gates, one a cap
ENDS = {"short": 40}  # positions of the memory that ends
EVEN = {"spread": 0.15}  # of the weights, see tiny_config(): gates add to float32's errors
AUTO = "auto"
# What requests ask for, of every kind; the sums of weights are below 1, 1 and 1 but for rounding.
ASKED = [
    {"law": 0.3, "bio": 0.3},
    {"plain": 0.6, "law": 0.25},
    {"law": 0.1, "bio": 0.2, "plain": 0.7},
    "bio:0.7,plain:0.2,law:0.1",
    {"plain": 0.5, "bio": 0.5},
    {"law": 0.3},
    {"law": 0.4, "plain": 0},
    {"short": 0.5, "law": 0.3},
    {"short": 0.2, "bio": 0.8},
    AUTO,
    None,
    "none",
    "plain",
]


def make(tiny_model, folder):
    """Return the folders by name; the memories differ from the base in shape and in weights."""
    made = {"base": tiny_model("llama", **EVEN), "plain": tiny_model("llama", seed=4, **EVEN)}
    made["short"] = tiny_model("llama", seed=5, layers=1, positions=ENDS["short"], **EVEN)
    for seed, (name, kind, width) in enumerate((("law", "llama", 96), ("bio", "gpt2", 64)), 1):
        made[name] = str(Path(folder) / name)
        shutil.copytree(tiny_model(kind, seed=seed, hidden=width, **EVEN), made[name])
        write_gate(Path(made[name]), random_gate(width, seed))
    return made


def block(folders, **more):
    """Return the memdec block of a server that mixes up to three of the memories."""
    memories = {
        name: {"model": folders[name]} | ({} if alpha == AUTO else {"alpha": alpha})
        for name, alpha in ALPHAS.items()
    }
    return {"memories": memories, "default": "law", "at_once": 3} | more


def extra_args(asked):
    return {} if asked is None else {"memdec_memory": asked}


def shares(folders, asked, ids):
    """Return the share of each memory that runs, by name, at every position [T, 1], in float64.

    asked: as in ASKED. Gates share by the sequential definition, memories in the server's order.
    """
    ones_T1 = torch.ones(len(ids), 1, dtype=torch.float64)
    if isinstance(asked, str) and ":" in asked:
        asked = {name: float(w) for name, w in (part.split(":") for part in asked.split(","))}
    if isinstance(asked, dict):
        found = {name: weight * ones_T1 for name, weight in asked.items() if weight}
    elif asked in (None, "law"):
        found = {"law": gate_weights(folders, "law", 1.0, ids)}
    elif asked == "none":
        found = {}
    elif asked == AUTO:
        found, rest_T1 = {}, ones_T1
        for name in ("law", "bio"):
            score_T1 = (gate_weights(folders, name, 1.0, ids) / 0.999).logit()
            cap = 1.0 if ALPHAS[name] == AUTO else ALPHAS[name]
            b_T1 = (0.999 * (score_T1 + rest_T1.log()).sigmoid()).clamp(max=cap)
            found = {other: share * (1 - b_T1) for other, share in found.items()}
            found[name] = b_T1
            rest_T1 = rest_T1 * (1 - b_T1)
    else:
        found = {asked: ALPHAS[asked] * ones_T1}
    for name in found.keys() & ENDS.keys():
        found[name][ENDS[name] :] = 0
    return found


def mixture(folders, asked, ids):
    """Return the log-probabilities [T, V] of what follows each token."""
    base_TV = oracle.log_probs(folders["base"], ids).exp()
    mixed_TV, rest_T1 = torch.zeros_like(base_TV), torch.ones(len(ids), 1, dtype=torch.float64)
    for name, share_T1 in shares(folders, asked, ids).items():
        known = ids[: ENDS.get(name)]
        p_TV = oracle.log_probs(folders[name], known, base_TV.shape[1]).exp()
        mixed_TV[: len(known)] += share_T1[: len(known)] * p_TV
        rest_T1 = rest_T1 - share_T1
    return (mixed_TV + rest_T1.clamp(min=0) * base_TV).log()


def worst(folders, asked, prompt, sampled, prompt_rows, sampled_rows):
    """Return the largest error of the (token -> log-probability) rows of one request."""
    key_TV = mixture(folders, asked, [*prompt, *sampled])
    return oracle.worst_row(prompt, sampled, prompt_rows, sampled_rows, key_TV)
