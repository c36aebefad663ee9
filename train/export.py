"""Export stage: the trained memory -> a Hugging Face folder that vLLM serves beside any base.

Its config carries the `memdec` block, whose default alpha is calibrated here: the log-probabilities
of both models on the validation text are computed once, then every alpha is tried on them.
"""

import json
from pathlib import Path

import torch

from vllm_memdec.checkpoint import MemoryBlock, write_block
from vllm_memdec.train.artifacts import versions
from vllm_memdec.train.config import ExportSettings
from vllm_memdec.train.corpus import load_tokenizer
from vllm_memdec.train.datastore import load_model
from vllm_memdec.train.evaluate import (
    best_alpha,
    label_logprobs,
    mix,
    perplexity,
    sampled_validation,
)
from vllm_memdec.train.progress import Progress

SCORE_BLOCKS = 4  # blocks a forward pass
CALIBRATION_TOKENS = 2**18  # that alpha is calibrated on, at most


def export_memory(
    settings: ExportSettings,
    base: str,
    corpus: Path,
    targets: Path,
    memory: Path,
    provenance: dict,
    work: Path,
    progress: Progress,
) -> None:
    """Write weights, tokenizer and config with the memdec block into work."""
    tokens, positions = sampled_validation(corpus, CALIBRATION_TOKENS)
    model = load_model(str(memory), settings.dtype)
    scores = {
        "base": label_logprobs(
            load_model(base, settings.dtype), tokens, positions, SCORE_BLOCKS, progress, "base"
        ),
        "memory": label_logprobs(model, tokens, positions, SCORE_BLOCKS, progress, "memory"),
    }
    alpha = settings.alpha
    if alpha is None:
        alpha = best_alpha(scores["base"], scores["memory"])
    scores["mixture"] = mix(scores["base"], scores["memory"], alpha)
    found = {name: round(perplexity(s), 4) for name, s in scores.items()}
    progress.say(
        f"validation perplexity: base {found['base']:.2f}, memory {found['memory']:.2f}, "
        f"mixture {found['mixture']:.2f} at alpha {alpha:.2f}"
    )
    if alpha == 0:
        progress.say(
            "the memory does not help on the validation text: at alpha 0 it serves only requests "
            "that ask for it"
        )
    model.to(torch.device("cpu")).save_pretrained(work)
    load_tokenizer(base).save_pretrained(work)
    corpus_facts = json.loads((corpus / "corpus.json").read_text())
    block = MemoryBlock(
        alpha=alpha,
        tokenizer_fingerprint=corpus_facts["tokenizer_fingerprint"],
        base=Path(base).resolve().name,
        temperature=json.loads((targets / "targets.json").read_text())["temperature"],
        provenance=provenance
        | {
            "versions": versions(),
            "validation_perplexity": found,
            "training_tokens": corpus_facts["train"]["tokens"],
        },
    )
    write_block(work, block)
