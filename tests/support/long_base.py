"""A base of 64 positions that --hf-overrides stretches to 256, and requests at both ends of these.

"same" is the base with these overrides in its own config.json: what it drafts is all accepted.
"""

import json
import shutil
from pathlib import Path

from support import oracle

POSITIONS = 256
YARN = {
    "max_position_embeddings": POSITIONS,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
DRAFTS = 3
NEAR = 250  # tokens of a prompt that leave one token, without a draft, for the last step
SEEDED = {"temperature": 1.0, "seed": 7}


def make(tiny_model, folder):
    """Return the folders by name: the base as it is, and the memories."""
    base = tiny_model("llama", positions=64)
    same = shutil.copytree(base, Path(folder) / "same")
    config = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps(config | YARN))
    return {"base": base, "same": str(same), "law": tiny_model("llama", seed=1, layers=1)}


def block(folders):
    """Return the memdec block of a server whose memories draft."""
    memories = {name: {"model": folders[name], "alpha": 0.4} for name in ("same", "law")}
    return {"memories": memories, "default": "same", "speculative_tokens": DRAFTS}


OPTIONS = {
    "hf_overrides": YARN,
    "block_size": 32,
    "disable_log_stats": False,
    "per_request_spec_decode_metrics": "summary",
}


def prompt(tokens):
    [ids] = oracle.prompts(1, tokens, tokens, 1000, seed=tokens)
    return ids


def request(tokens, memory="same", **params):
    """Return [prompt ids, SamplingParams arguments], greedy if nothing else is said."""
    defaults = {"temperature": 0, "max_tokens": 9, "ignore_eos": True}
    return [prompt(tokens), defaults | {"extra_args": {"memdec_memory": memory}} | params]


# Prompts within and beyond the native length; then one that ends at the context's.
LONG = [request(20), request(120)]
BESIDE = [request(20), request(NEAR), request(NEAR, "none"), request(120, "law")]
