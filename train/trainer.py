"""Memory stage: train the memory on the sparse kNN targets.

One step: a batch of blocks through the memory's trunk once, then its head and the loss in chunks
of rows, so that logits never exist for the whole batch. Checkpoints are whole or absent; a
resumed run repeats the undisturbed one, step for step.
"""

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_memdec.errors import MemdecError
from vllm_memdec.kernels.head_loss import head_loss
from vllm_memdec.kernels.sparse_kl import SparseRows
from vllm_memdec.train.artifacts import LOGS, write_atomic
from vllm_memdec.train.batches import Batches
from vllm_memdec.train.cluster import Cluster, World, followed
from vllm_memdec.train.config import MemorySettings
from vllm_memdec.train.datastore import EMBEDDED, TRAINED, blocks_at_once, device, load_model
from vllm_memdec.train.decoder import build_memory
from vllm_memdec.train.evaluate import (
    best_alpha,
    label_logprobs,
    mix,
    perplexity,
    sampled_validation,
)
from vllm_memdec.train.head import Candidates, logits_transform
from vllm_memdec.train.metrics import (
    CURVE,
    METRICS,
    judgement,
    metrics_file,
    plot_loss,
    read_metrics,
    stopped_early,
)
from vllm_memdec.train.progress import Progress

CHECKPOINT = "checkpoint.pt"
BEST = "best.pt"  # weights of the best evaluation, where training may stop early
EVALUATION_TOKENS = 2**15
BASE = "base-logprobs.npy"  # of the validation text, computed once
SCRATCH = (CHECKPOINT, BEST, BASE)  # in the working folder while training goes on


def warmup_steps(steps: int, fraction: float) -> int:
    """Return how many steps the learning rate rises over."""
    return max(1, round(steps * fraction))


def learning_rate_factor(
    step: int, steps: int, warmup_fraction: float, schedule: str = "cosine"
) -> float:
    """Return the factor of the peak rate: linear warm-up, then as the schedule says."""
    warmup = warmup_steps(steps, warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - progress
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def autocast_to(dtype: str, where: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which matrix products are of a dtype."""
    if dtype == "bfloat16":
        return torch.autocast(where.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def new_optimizer(model: Any, settings: MemorySettings) -> torch.optim.Optimizer:
    """Return AdamW over all weights of a model."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def add_gradients(
    model: Any,
    batches: Batches,
    blocks: np.ndarray,
    rows: int,
    candidates: Candidates,
    settings: MemorySettings,
    following: np.ndarray | None = None,
) -> np.ndarray:
    """Backpropagate one micro-batch, scaled by 1/rows; return its summed [KL, cross-entropy].

    following: the blocks of the micro-batch after it, to be read meanwhile.
    """
    where = next(model.parameters()).device
    tokens, positions, mask, labels, targets = batches.load(blocks, where)
    if following is not None:
        batches.expect(following, where)
    dtype = getattr(torch, settings.dtype)
    with autocast_to(settings.dtype, where):
        trunk = model.base_model(input_ids=tokens, position_ids=positions, use_cache=False)
    layer = model.get_output_embeddings()
    loss, sums = head_loss(
        trunk.last_hidden_state[mask],
        layer.weight,
        candidates.rank(labels),
        SparseRows(targets.offsets, candidates.rank(targets.token), targets.probability),
        settings.beta,
        bias_V=getattr(layer, "bias", None),
        transform=logits_transform(model.config),
        columns=candidates.columns,
        dtype=dtype,
        scale=1 / max(rows, 1),
    )
    loss.backward()
    return sums.cpu().numpy()


def reduce_gradients(model: Any, sums: np.ndarray, world: World) -> np.ndarray:
    """Sum the gradients of all training processes, in place, and return the sum of the losses."""
    if world.size == 1:
        return sums
    import torch.distributed as dist

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:  # this process had no block
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # One message, not hundreds: a small model's are mostly latency.
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    total = torch.from_numpy(sums).to(flat.device, torch.float64)
    dist.all_reduce(total)
    return total.cpu().numpy()


def from_rank_0(value: Any, world: World) -> Any:
    """Return rank 0's value on every training process."""
    if world.size == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0, device=device())
    return values[0]


def save_npy(path: Path, array: np.ndarray) -> None:
    """Save an array under a name that need not end in .npy."""
    with open(path, "wb") as file:
        np.save(file, array)


@dataclass
class Training:
    """The training loop, run by one process or, on the same batches, by several side by side."""

    settings: MemorySettings
    base: str
    corpus: Path
    targets: Path
    work: Path

    def __call__(self, world: World) -> None:
        """Train from the last checkpoint to the end; rank 0 writes weights, config and logs/."""
        settings, logs = self.settings, self.work / LOGS
        batches = Batches(settings, self.corpus, self.targets)
        base_N = self.base_logprobs(world)
        model = build_memory(settings, self.base, batches.tokens.shape[1] - 1)
        model = model.to(device()).train()
        optimizer = new_optimizer(model, settings)
        step = 0
        if (self.work / CHECKPOINT).exists():
            state = torch.load(self.work / CHECKPOINT, weights_only=True, map_location=device())
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step = state["step"]

        def save_checkpoint() -> None:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
            }
            write_atomic(self.work / CHECKPOINT, lambda p: torch.save(state, p))

        saved = time.monotonic()
        with metrics_file(logs, step, world) as (write, evaluations):
            while step < batches.steps and not stopped_early(evaluations, settings.early_stop):
                began = time.monotonic()
                row = self.step(model, optimizer, batches, step, world)
                step += 1
                row |= {"step": step, "tokens_per_second": row["rows"] / seconds_since(began)}
                if not math.isfinite(row["kl"] + row["ce"]):
                    raise MemdecError(
                        f"the loss is no longer finite at step {step}: lower memory.learning_rate."
                    )
                if settings.evaluate_steps and step % settings.evaluate_steps == 0:
                    row |= self.evaluate(model, base_N, world)
                    best = judgement(row) < min(evaluations, default=(math.inf,))
                    evaluations.append(judgement(row))
                    if best and settings.early_stop and world.rank == 0:
                        write_atomic(self.work / BEST, lambda p: torch.save(model.state_dict(), p))
                write(row)
                if world.rank == 0 and seconds_since(saved) >= settings.checkpoint_seconds:
                    save_checkpoint()
                    saved = time.monotonic()
        if world.rank == 0:
            if (self.work / BEST).exists():
                model.load_state_dict(torch.load(self.work / BEST, weights_only=True))
            model.to(torch.float32).save_pretrained(self.work)

    def base_logprobs(self, world: World) -> np.ndarray | None:
        """Return the base's log-probabilities [rows] of the validation text; None if not needed.

        Rank 0 computes them, before the memory takes its room on the device, once: they are kept in
        the working folder.
        """
        if self.settings.evaluate_steps is None or world.rank != 0:
            return None
        if not (self.work / BASE).exists():
            tokens, positions = sampled_validation(self.corpus, EVALUATION_TOKENS)
            base = load_model(self.base, self.settings.dtype)
            found = label_logprobs(base, tokens, positions, self.scored_blocks(tokens))
            del base
            write_atomic(self.work / BASE, lambda p: save_npy(p, found))
        return np.load(self.work / BASE)

    def scored_blocks(self, tokens: np.ndarray) -> int:
        """Return how many of the validation blocks [B, T+1] a forward pass takes."""
        most = self.settings.micro_batch_blocks
        return blocks_at_once(most, tokens.shape[1] - 1, device(), EMBEDDED)

    def evaluate(self, model: Any, base_N: np.ndarray | None, world: World) -> dict[str, float]:
        """Return perplexities of the validation text, and alpha, at which the mixture's is least.

        All processes run the memory; all get what rank 0 found, so that they stop at one step.
        """
        tokens, positions = sampled_validation(self.corpus, EVALUATION_TOKENS)
        model.eval()
        with autocast_to(self.settings.dtype, device()):
            memory_N = label_logprobs(model, tokens, positions, self.scored_blocks(tokens))
        model.train()
        found = {}
        if base_N is not None:
            alpha = best_alpha(base_N, memory_N)
            found = {
                "validation_base": perplexity(base_N),
                "validation_memory": perplexity(memory_N),
                "validation_mixture": perplexity(mix(base_N, memory_N, alpha)),
                "validation_alpha": alpha,
            }
        return from_rank_0(found, world)

    def step(
        self, model: Any, optimizer: Any, batches: Batches, step: int, world: World
    ) -> dict[str, float]:
        """Take one step of the optimiser; return its metrics, losses as means over its rows."""
        settings = self.settings
        # Of dropout, which some models have.
        torch.manual_seed(batches.step_seed(step) + world.rank)
        blocks = batches.blocks(step)
        rows = int(batches.rows[blocks].sum())
        factor = learning_rate_factor(
            step, batches.steps, settings.warmup_fraction, settings.schedule
        )
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        # An untrained memory puts its mass anywhere: warm-up pushes all of it down.
        warm = step < warmup_steps(batches.steps, settings.warmup_fraction)
        sampled = None if warm else settings.sampled_negatives
        candidates = batches.candidates(step, model.config.vocab_size, sampled).to(device())
        sums = np.zeros(2)
        micros = self.micro_batches(batches, step, world)
        after = self.micro_batches(batches, step + 1, world) if step + 1 < batches.steps else []
        for micro, following in zip(micros, [*micros[1:], *after[:1], None], strict=False):
            sums += add_gradients(model, batches, micro, rows, candidates, settings, following)
        sums = reduce_gradients(model, sums, world)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        kl, ce = (sums / max(rows, 1)).tolist()
        found = {
            "kl": kl,
            "ce": ce,
            "rows": rows,
            "epoch": (step + 1) * batches.size / len(batches.tokens),
            "learning_rate": settings.learning_rate * factor,
            "gradient_norm": float(norm),
        }
        if device().type == "cuda":
            found["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return found

    def micro_batches(self, batches: Batches, step: int, world: World) -> list[np.ndarray]:
        """Return the block numbers of a training process's forward passes of a step."""
        mine, most = (
            batches.blocks(step)[world.rank :: world.size],
            self.settings.micro_batch_blocks,
        )
        n = blocks_at_once(most, batches.block_tokens, device(), TRAINED)
        return [mine[start : start + n] for start in range(0, len(mine), n)]


def seconds_since(moment: float) -> float:
    """Return the seconds since a moment of time.monotonic()."""
    return time.monotonic() - moment


def train_memory(
    settings: MemorySettings,
    base: str,
    corpus: Path,
    targets: Path,
    work: Path,
    progress: Progress,
    cluster: Cluster,
) -> None:
    """Write the trained memory (weights and config), and logs/ with metrics and a loss curve."""
    logs = work / LOGS
    logs.mkdir(exist_ok=True)
    if (logs / CURVE).exists():  # killed just before the end
        for name in SCRATCH:
            (work / name).unlink(missing_ok=True)
        return
    steps = Batches(settings, corpus, targets).steps
    done = 0
    if (work / CHECKPOINT).exists():
        done = torch.load(work / CHECKPOINT, weights_only=True, mmap=True)["step"]
        progress.say(f"memory: resuming at step {done} of {steps}")
    # Steps after the checkpoint are done again: they are not to be counted twice.
    with metrics_file(logs, done, World()):
        pass
    with progress.task("memory: training", steps, "steps") as advance:
        advance(done, done_before=True)
        with followed(logs / METRICS, advance):
            cluster.train(Training(settings, base, corpus, targets, work), work)
    metrics = read_metrics(logs / METRICS)
    if len(metrics) < steps:
        progress.say(f"memory: stopped early after step {len(metrics)} of {steps}")
    write_atomic(logs / CURVE, lambda p: plot_loss(metrics, settings.beta, p))
    for name in SCRATCH:
        (work / name).unlink(missing_ok=True)
