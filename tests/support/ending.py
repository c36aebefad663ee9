"""A base and memories with fewer positions: folders, requests, and what each memory weighs."""

import shutil
from pathlib import Path

from support import oracle
from support.gate_oracle import gate_weights, random_gate
from support.tiny_models import VOCAB

from vllm_memdec.gate import write_gate

POSITIONS, END = 512, 128  # of the base, and of most memories
STEPS = [[0, 0.9], [100, 0.3], [150, 0.6]]
# "long" does not end. "same" is the base, cut short: all that it drafts is accepted.
LENGTHS = {
    "short": END,
    "learned": END,
    "gated": 64,
    "steps": 200,
    "long": POSITIONS,
    "same": END,
}
EVEN = {"spread": 0.15}  # of the weights, see tiny_config()
PAST = 300  # tokens of a prompt


def make(tiny_model, folder):
    """Return the folders by name: one memory has learnt positions, one a gate."""
    made = {
        "base": tiny_model("llama", positions=POSITIONS, **EVEN),
        "short": tiny_model("llama", seed=1, hidden=96, layers=1, positions=END, **EVEN),
        "learned": tiny_model("gpt2", seed=2, positions=END, **EVEN),
        "gated": str(Path(folder) / "gated"),
        "steps": tiny_model("llama", seed=4, positions=LENGTHS["steps"], **EVEN),
        "long": tiny_model("llama", seed=5, layers=1, positions=POSITIONS, **EVEN),
        "same": tiny_model("llama", positions=END, **EVEN),
    }
    plain = tiny_model("llama", seed=3, positions=LENGTHS["gated"], **EVEN)
    shutil.copytree(plain, made["gated"])
    write_gate(Path(made["gated"]), random_gate(64, 3))
    return made


def block(folders, **more):
    """Return the memdec block of a server with all of them."""
    memories = {name: {"model": folders[name], "alpha": 0.6} for name in LENGTHS}
    memories["gated"] = {"model": folders["gated"]}
    memories["steps"] = {"model": folders["steps"], "alpha_by_context": STEPS}
    return {"memories": memories, "default": "short"} | more


def request(size, name, alpha=None, **params):
    """Return [prompt ids, SamplingParams arguments], greedy."""
    [ids] = oracle.prompts(1, size, size, VOCAB, seed=size)
    extra = {"memdec_memory": name} | ({} if alpha is None else {"memdec_alpha": alpha})
    asked = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 3}
    return [ids, asked | {"extra_args": extra} | params]


def mixed(folders, params, ids):
    """Return base, memory, weight and length, as oracle.mixture() takes them, for an answer."""
    asked = params["extra_args"]
    name, alpha = asked["memdec_memory"], asked.get("memdec_alpha")
    length = LENGTHS[name]
    if name == "gated":
        alpha = gate_weights(folders, name, 1.0 if alpha is None else alpha, ids[:length])
    elif alpha is None:
        alpha = gate_weights(folders, name, STEPS, ids[:length]) if name == "steps" else 0.6
    return folders["base"], folders[name], alpha, length
