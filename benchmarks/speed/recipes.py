"""What the recipes in train/configs/ cost, from the shapes of their models and published figures.

Rewrites the comment at the head of each recipe. Nothing is measured and nothing is downloaded:

    python -m benchmarks.speed.recipes
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from vllm_memdec.train.plan.costs import CostModel
from vllm_memdec.train.plan.rates import GPUS, UTILISATION, Rates, on_gpu
from vllm_memdec.train.plan.report import human_bytes
from vllm_memdec.train.settings import Settings, load_settings

CONFIGS = Path(__file__).resolve().parents[2] / "train" / "configs"
TOKENS, GPU, COUNT = 100_000_000, "h100", 8
ENTRIES = 65  # tokens of a target, assumed
START, END = "# Cost,", "# End of the cost."


def llama(hidden: int, layers: int, heads: int, kv: int, mlp: int, vocab: int, tied: bool) -> dict:
    """Return a configuration in the names that Llama, Qwen and Gemma share."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


# Each model's type and shape, as its config.json has it.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M": ("llama", llama(576, 30, 9, 3, 1536, 49_152, True)),
    "SmolLM2-360M": ("llama", llama(960, 32, 15, 5, 2560, 49_152, True)),
    "Qwen2.5-0.5B": ("qwen2", llama(896, 24, 14, 2, 4864, 151_936, True)),
    "Qwen2.5-1.5B": ("qwen2", llama(1536, 28, 12, 2, 8960, 151_936, True)),
    "Qwen3-0.6B-Base": ("qwen3", llama(1024, 28, 16, 8, 3072, 151_936, True) | {"head_dim": 128}),
    "Qwen3-1.7B-Base": ("qwen3", llama(2048, 28, 16, 8, 6144, 151_936, True) | {"head_dim": 128}),
    "Llama-3.2-1B": ("llama", llama(2048, 16, 32, 8, 8192, 128_256, True)),
    "Llama-3.1-8B": ("llama", llama(4096, 32, 32, 8, 14_336, 128_256, False)),
    "gemma-3-270m": ("gemma3_text", llama(640, 18, 4, 1, 2048, 262_144, True) | {"head_dim": 256}),
    "gemma-3-1b-pt": (
        "gemma3_text",
        llama(1152, 26, 4, 1, 6912, 262_144, True) | {"head_dim": 256},
    ),
}
# Recipe -> (base, memory).
RECIPES = {
    "smollm2.yaml": ("SmolLM2-360M", "SmolLM2-135M"),
    "qwen2.5.yaml": ("Qwen2.5-1.5B", "Qwen2.5-0.5B"),
    "qwen3.yaml": ("Qwen3-1.7B-Base", "Qwen3-0.6B-Base"),
    "llama3.2.yaml": ("Llama-3.1-8B", "Llama-3.2-1B"),
    "gemma3.yaml": ("gemma-3-1b-pt", "gemma-3-270m"),
}


def parameters(name: str) -> int:
    """Return how many weights a model has, built without memory for them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, shape = MODELS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    return sum(p.numel() for p in model.parameters())


def cost(name: str, settings: Settings) -> list[str]:
    """Return the lines of a recipe's comment: amounts, and hours by published figures."""
    base, memory = RECIPES[name]
    of_base, of_memory = parameters(base), parameters(memory)
    width = MODELS[base][1]["hidden_size"]
    nothing = {field.name: 0 for field in dataclasses.fields(Rates)}
    known = {"width": width, "entries": ENTRIES, "rows_per_token": 1.0, "imbalance": 1.0}
    known["sample_tokens"] = 1  # of which no word is known
    rates = Rates(**nothing | known | {"memory_parameters": of_memory})
    rates = on_gpu(rates, GPUS[GPU], of_base, key_bytes=0)
    job = CostModel(rates, settings, TOKENS, None, budget=4 * 2**30, workers=COUNT)
    rows, epochs = job.rows, settings.memory.epochs
    embed, train = (n * rows / COUNT / 3600 for n in (rates.key, rates.step * epochs))
    return [
        f"{START} for {TOKENS:,} tokens on {COUNT} x {GPU.upper()} at {UTILISATION:.0%} of the "
        "published FLOP/s",
        f"# (written by benchmarks/speed/recipes.py; targets of {ENTRIES} tokens are assumed, "
        "nothing is measured):",
        f"#   base {base}: {of_base:,} weights, keys of {width} numbers",
        f"#   memory {memory}: {of_memory:,} weights",
        f"#   trained on: {rows:,} tokens, the rest is held out; {epochs:g} epochs",
        f"#   datastore: {human_bytes(job.datastore().disk)}, targets: "
        f"{human_bytes(job.targets().disk)}",
        f"#   keys: 2 x {of_base:.3g} x {rows:.3g} = {2 * of_base * rows:.2e} FLOPs, "
        f"{embed:.2g} hours",
        f"#   training: 6 x {of_memory:.3g} x {rows:.3g} x {epochs:g} = "
        f"{6 * of_memory * rows * epochs:.2e} FLOPs, {train:.2g} hours",
        "# The index and its search come on top: `memdec plan` counts them, on your machine.",
        END,
    ]


def comment(text: str) -> list[str]:
    """Return the lines of a recipe that cost() writes."""
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(START))
    return lines[start : lines.index(END) + 1]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for name in RECIPES:
        path = CONFIGS / name
        text = path.read_text()
        settings = load_settings(path)
        settings = settings.model_copy(update={"memory": settings.memory.pretrained()})
        new = "\n".join(cost(name, settings))
        path.write_text(text.replace("\n".join(comment(text)), new))
        print(f"{name}\n{new}")


if __name__ == "__main__":
    main()
