"""Export stage: the trained memory -> a Hugging Face folder that vLLM serves beside any base.

The `memdec` section of its config.json holds weights that are tuned here: both models read the
validation text once, in contexts as long as those that are served (windows.py), then every alpha is
tried on their log-probabilities, for all contexts and for each length of context.
"""

import json
import math
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from vllm_memdec.checkpoint import MemoryBlock, write_block
from vllm_memdec.errors import MemdecError
from vllm_memdec.gate import FILE, MEMORY, read_gate, weights_fingerprint
from vllm_memdec.train.data import completeness
from vllm_memdec.train.data.artifacts import versions
from vllm_memdec.train.data.blocks import bos_of
from vllm_memdec.train.data.hub import origin
from vllm_memdec.train.data.shards import load_shard, save_array, shard_path
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model.huggingface import load_model, load_text_config, load_tokenizer
from vllm_memdec.train.model.scoring import best_alpha, mix, perplexity
from vllm_memdec.train.model.windows import (
    Windows,
    alpha_at,
    alphas_by_context,
    by_context,
    validation_documents,
    window_logprobs,
    window_tokens,
    windows,
)
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import ExportSettings
from vllm_memdec.train.stages.stage import OTHERS, Build, Stage

TUNING_TOKENS = 2**18  # tokens of each reading on which alpha is tuned, at most
SHARD_TOKENS = 2**14  # tokens scored at once: what a killed run loses, at most
SCORES = "scores"  # the folder of scores in the working folder
PARTS = ("tokens", "positions", "scored")  # arrays of a shard of windows


@dataclass
class Scorer:
    """Writes the log-probabilities that a model gives to a shard of windows."""

    gpu: ClassVar[bool] = True
    folder: str
    dtype: str
    name: str
    work: Path

    @cached_property
    def model(self) -> Any:
        return load_model(self.folder, self.dtype)

    def __call__(self, number: int) -> int:
        text = Windows(*(np.array(load_shard(self.work, part, number)) for part in PARTS))
        save_array(shard_path(self.work, self.name, number), window_logprobs(self.model, text))
        return len(text)


def score(
    folders: dict[str, str],
    dtype: str,
    text: Windows,
    work: Path,
    context: Context,
) -> dict[str, np.ndarray]:
    """Return log-probabilities [N] of each model's folder; what work holds is not done again."""
    work.mkdir(exist_ok=True)
    each = max(1, SHARD_TOKENS // (text.tokens.shape[1] - 1))
    shards = [text[start : start + each] for start in range(0, len(text), each)]
    for number, shard in enumerate(shards):
        for part in PARTS:
            save_array(shard_path(work, part, number), getattr(shard, part))
    logprobs = {}
    for name, folder in folders.items():
        todo = [n for n in range(len(shards)) if not shard_path(work, name, n).exists()]
        with context.progress.task(f"export: scoring with {name}", len(text), "windows") as advance:
            done = set(range(len(shards))) - set(todo)
            advance(sum(len(shards[n]) for n in done), done_before=True)
            for count in context.executor.map(Scorer(folder, dtype, name, work), todo):
                advance(count)
        logprobs[name] = np.concatenate([load_shard(work, name, n) for n in range(len(shards))])
    return logprobs


def export_memory(
    settings: ExportSettings,
    base: str,
    corpus: Path,
    targets: Path,
    memory: Path,
    provenance: dict,
    work: Path,
    context: Context,
) -> None:
    """Write weights, tokenizer and config with the memdec section into work."""
    documents = validation_documents(corpus, TUNING_TOKENS)
    tokenizer = load_tokenizer(base)
    width = window_tokens(
        settings.context_tokens,
        sum(map(len, documents)),
        [load_text_config(base), load_text_config(str(memory))],
    )
    ends = tokenizer.eos_token_id, 2 * TUNING_TOKENS, bos_of(tokenizer)
    text = windows(documents, width, *ends)
    folders = {"base": base, "memory": str(memory)}
    scores = score(folders, settings.dtype, text, work / SCORES, context)
    shutil.rmtree(work / SCORES)
    tuned = tune(text.position_N, scores["base"], scores["memory"], settings.alpha)
    tell(tuned, width, context.progress)

    model = load_model(str(memory), settings.dtype, torch.device("cpu"))
    model.to(getattr(torch, settings.dtype)).save_pretrained(work)
    tokenizer.save_pretrained(work)
    corpus_facts = json.loads((corpus / "corpus.json").read_text())
    section = MemoryBlock(
        alpha=tuned["alpha"],
        alpha_by_context=tuned["alpha_by_context"],
        tokenizer_fingerprint=corpus_facts["tokenizer_fingerprint"],
        base=origin(base) or Path(base).resolve().name,
        temperature=json.loads((targets / "targets.json").read_text())["temperature"],
        provenance=provenance
        | {
            "versions": versions(),
            "validation_perplexity": tuned["perplexity"],
            "validation_by_context": tuned["by_context"],
            "context_tokens": width,
            "training_tokens": corpus_facts["train"]["tokens"],
        },
    )
    write_block(work, section)
    keep_gate(work.with_name(work.name.removesuffix(".partial")), work, context.progress)


def tune(
    position_N: np.ndarray, base_N: np.ndarray, memory_N: np.ndarray, alpha: float | None
) -> dict[str, Any]:
    """Return the best weights of the memory on some rows, and the perplexities that they give.

    alpha: one weight for all contexts in place of the best ones. The mixture is what is served: the
    weights by context, where there are any.
    """
    table = None
    if alpha is None:
        alpha = best_alpha(base_N, memory_N)
        table = [list(pair) for pair in alphas_by_context(position_N, base_N, memory_N)]
    weights = alpha if table is None else alpha_at(table, position_N)
    systems = {
        "base": base_N,
        "memory": memory_N,
        "mixture": mix(base_N, memory_N, weights),
        "fixed": mix(base_N, memory_N, alpha),
    }
    mixed = {name: systems[name] for name in ("mixture", "fixed")}
    return {
        "alpha": alpha,
        "alpha_by_context": table,
        "perplexity": {name: number(perplexity(logp_N)) for name, logp_N in systems.items()},
        "by_context": [
            {name: number(value) for name, value in row.items()}
            for row in by_context(position_N, base_N, memory_N, mixed)
        ],
    }


def number(value: float) -> float | None:
    """Return a number to four digits behind the point; None for infinity, which JSON lacks."""
    if isinstance(value, int):
        return value
    return round(value, 4) if math.isfinite(value) else None


def tell(tuned: dict[str, Any], width: int, progress: Progress) -> None:
    """Say what was tuned, and what is odd about it."""
    said = {name: value or math.inf for name, value in tuned["perplexity"].items()}
    progress.say(
        f"validation perplexity: base {said['base']:.2f}, memory {said['memory']:.2f}, "
        f"mixture {said['mixture']:.2f}; {said['fixed']:.2f} at alpha {tuned['alpha']:.2f} for all "
        "contexts"
    )
    for row in tuned["by_context"]:
        base, mixture = (row[name] or math.inf for name in ("base", "mixture"))
        progress.say(
            f"  {row['from']}-{min(row['to'], width)} tokens of context: base {base:.2f}, "
            f"mixture {mixture:.2f}, best alpha {row['best_alpha']:.2f} ({row['tokens']:,} tokens)"
        )
    if tuned["alpha"] == 0:
        progress.say(
            "the memory does not help on the validation text: at alpha 0 it serves only requests "
            "that ask for it"
        )
    if tuned["alpha"] == 1:
        progress.say(
            "at alpha 1 the base is ignored: is the validation text, or text like it, part of the "
            "corpus?"
        )


def keep_gate(before: Path, work: Path, progress: Progress) -> None:
    """Copy the gate of the export before, if it was trained for the same weights; say if not."""
    path = before / FILE
    if not path.exists():
        return
    try:
        arrays = read_gate(path)
        trained_for = str(arrays.get(MEMORY, weights_fingerprint(before)))
    except MemdecError as error:
        progress.say(f"export: the gate of the export before is not kept: {error}")
        return
    if trained_for != weights_fingerprint(work):
        progress.say(
            "export: the gate of the export before is not kept, it was trained for other weights: "
            "run memdec calibrate again"
        )
        return
    for kept in (path, path.with_suffix(".png")):
        if kept.exists():
            shutil.copyfile(kept, work / kept.name)
    progress.say("export: the gate is kept, its memory is the same")


def stage(build: Build) -> Stage:
    """Return how the memory's folder is made."""
    settings = build.settings.export.model_dump()
    read = ("corpus", "targets", "memory")

    def make(work: Path) -> None:
        made = {name: artifact.manifest["settings"] for name, artifact in build.done.items()}
        provenance = {
            "artifacts": {name: build.done[name].hash for name in read},
            "settings": made | {"export": settings},
        }
        corpus, targets, memory = (build.path(name) for name in read)
        paths = corpus, targets, memory
        export_memory(build.settings.export, build.base, *paths, provenance, work, build.context)

    return Stage(settings, read, make, completeness.model_files, OTHERS)
