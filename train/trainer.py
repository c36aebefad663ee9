"""Memory stage: train the memory on the sparse kNN targets.

One step: a batch of blocks through the memory's trunk once, then its head and the loss in chunks
of rows, so that logits never exist for the whole batch. Checkpoints are whole or absent; a
resumed run repeats the undisturbed one, step for step.
"""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_memdec.train.artifacts import LOGS, write_atomic
from vllm_memdec.train.batches import Batches
from vllm_memdec.train.config import MemorySettings
from vllm_memdec.train.datastore import device
from vllm_memdec.train.decoder import build_memory
from vllm_memdec.train.head import Candidates, head, rows_at_once
from vllm_memdec.train.loss import SparseRows, sparse_loss
from vllm_memdec.train.progress import Progress

CHECKPOINT = "checkpoint.pt"


def warmup_steps(steps: int, fraction: float) -> int:
    """Return how many steps the learning rate rises over."""
    return max(1, round(steps * fraction))


def learning_rate_factor(step: int, steps: int, warmup_fraction: float) -> float:
    """Return the factor of the peak rate: linear warm-up, then cosine decay to a tenth."""
    warmup = warmup_steps(steps, warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def add_gradients(
    model: Any,
    batches: Batches,
    blocks: np.ndarray,
    rows: int,
    candidates: Candidates,
    settings: MemorySettings,
) -> np.ndarray:
    """Backpropagate one micro-batch, scaled by 1/rows; return its summed [KL, cross-entropy]."""
    where = next(model.parameters()).device
    tokens, positions, mask, labels, targets = batches.load(blocks, where)
    autocast = (
        torch.autocast(where.type, dtype=torch.bfloat16)
        if settings.dtype == "bfloat16"
        else contextlib.nullcontext()
    )
    labels = candidates.rank(labels)
    targets = SparseRows(targets.row, candidates.rank(targets.token), targets.probability)
    sums = torch.zeros(2, dtype=torch.float64)
    # The head runs on leaves, chunk by chunk; trunk and embedding get the collected gradients once.
    weight_CD = leaf_CD = None
    if candidates.ids_C is not None:
        weight_CD = candidates.rows(model.get_output_embeddings().weight)
        leaf_CD = weight_CD.detach().requires_grad_()
    chunk = rows_at_once(model.config.vocab_size if leaf_CD is None else len(leaf_CD))
    with autocast:
        trunk = model.base_model(input_ids=tokens, position_ids=positions, use_cache=False)
        h_ND = trunk.last_hidden_state[mask]
        leaf_ND = h_ND.detach().requires_grad_()
        for start in range(0, len(leaf_ND), chunk):
            part = slice(start, start + chunk)
            logits_NC = head(model, leaf_ND[part], candidates, leaf_CD)
            total, kl, ce = sparse_loss(
                logits_NC, labels[part], targets.slice(start, start + chunk), settings.beta
            )
            (total / rows).backward()
            sums += torch.stack([kl, ce]).double().cpu()
    h_ND.backward(leaf_ND.grad)
    if leaf_CD is not None:
        weight_CD.backward(leaf_CD.grad)
    return sums.numpy()


def train_memory(
    settings: MemorySettings,
    base: str,
    corpus: Path,
    targets: Path,
    work: Path,
    progress: Progress,
) -> None:
    """Write the trained memory (weights and config), and logs/ with metrics and a loss curve."""
    logs = work / LOGS
    logs.mkdir(exist_ok=True)
    if (logs / "metrics.jsonl").exists() and not (work / CHECKPOINT).exists():
        return  # killed just before the end
    batches = Batches(settings, corpus, targets)
    model = build_memory(settings, base, batches.tokens.shape[1] - 1).to(device()).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    metrics: list[dict[str, float]] = []
    step = 0
    if (work / CHECKPOINT).exists():
        state = torch.load(work / CHECKPOINT, weights_only=True, map_location=device())
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, metrics = state["step"], state["metrics"]
        progress.say(f"memory: resuming at step {step} of {batches.steps}")

    def save_checkpoint() -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "metrics": metrics,
        }
        write_atomic(work / CHECKPOINT, lambda p: torch.save(state, p))

    saved = time.monotonic()
    started_at = step
    with progress.task("memory: training", batches.steps, "steps") as advance:
        advance(started_at, done_before=True)
        while step < batches.steps:
            began = time.monotonic()
            torch.manual_seed(batches.step_seed(step))  # of dropout, which some models have
            blocks = batches.blocks(step)
            rows = int(batches.valid[blocks].sum())
            factor = learning_rate_factor(step, batches.steps, settings.warmup_fraction)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * factor
            # An untrained memory puts its mass anywhere: warm-up pushes all of it down.
            warm = step < warmup_steps(batches.steps, settings.warmup_fraction)
            sampled = None if warm else settings.sampled_negatives
            candidates = batches.candidates(step, model.config.vocab_size, sampled).to(device())
            sums = np.zeros(2)
            for start in range(0, len(blocks), settings.micro_batch_blocks):
                micro = blocks[start : start + settings.micro_batch_blocks]
                sums += add_gradients(model, batches, micro, rows, candidates, settings)
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            kl, ce = (sums / max(rows, 1)).tolist()
            metrics.append(
                {
                    "step": step,
                    "kl": kl,
                    "ce": ce,
                    "rows": rows,
                    "rows_per_second": rows / (time.monotonic() - began),
                }
            )
            if not math.isfinite(kl + ce):
                raise ValueError(
                    f"the loss is no longer finite at step {step}: lower memory.learning_rate."
                )
            advance(1)
            if time.monotonic() - saved >= settings.checkpoint_seconds:
                save_checkpoint()
                saved = time.monotonic()
    model.to(torch.float32).save_pretrained(work)
    plot_loss(metrics, settings.beta, logs / "loss.png")
    write_atomic(
        logs / "metrics.jsonl",
        lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in metrics)),
    )
    (work / CHECKPOINT).unlink(missing_ok=True)


def plot_loss(metrics: list[dict[str, float]], beta: float, path: Path) -> None:
    """Draw the two losses over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [row["step"] for row in metrics]
    axes.plot(steps, [row["kl"] for row in metrics], label="KL(kNN || memory)")
    axes.plot(steps, [row["ce"] for row in metrics], label="cross-entropy")
    axes.set(xlabel="step", ylabel="nats per token", title=f"memory training, beta = {beta:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
