"""Memory stage: train the memory on the sparse kNN targets.

One step: a batch of blocks through the memory's trunk once, then its head and the loss in chunks
of rows, so that logits never exist for the whole batch. Checkpoints are whole or absent; a
resumed run repeats the undisturbed one, step for step.
"""

import contextlib
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data import completeness
from vllm_memdec.train.data.artifacts import LOGS, write_atomic
from vllm_memdec.train.data.blocks import load_rows
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.executor.ray_executor import World, followed
from vllm_memdec.train.model.decoder import build_memory, starts_from, training_budget
from vllm_memdec.train.model.devices import EMBEDDED, blocks_at_once, default_device, trained_tokens
from vllm_memdec.train.model.scoring import (
    best_alpha,
    label_logprobs,
    mix,
    perplexity,
    sampled_validation,
    validation_logprobs,
)
from vllm_memdec.train.settings import MemorySettings
from vllm_memdec.train.stages.stage import Build, Stage, lowered
from vllm_memdec.train.training.batches import AHEAD, Batches
from vllm_memdec.train.training.checkpoints import (
    BEST,
    CHECKPOINT,
    NEXT,
    PREVIOUS,
    STOP,
    Checkpoints,
    newest,
    saved_step,
    stop_file,
)
from vllm_memdec.train.training.metrics import (
    CURVE,
    METRICS,
    judgement,
    metrics_file,
    plot_loss,
    read_metrics,
    stopped_early,
)
from vllm_memdec.train.training.optimizers import Average, Optimizer, new_optimizer, peak_rate
from vllm_memdec.train.training.parallel import (
    agreed,
    memory_of,
    restore,
    run_alone,
    spread,
    state_of,
    total,
    unreduced,
    whole,
)
from vllm_memdec.train.training.replay import Replay, new_batches
from vllm_memdec.train.training.steps import (
    add_gradients,
    autocast_to,
    learning_rate_factor,
    mixture_share,
    warmup_steps,
)

EVALUATION_TOKENS = 2**15
# Settings that change nothing in a memory, or whose meaning is among its inputs.
UNRECORDED = ("adapt_tokenizer", "checkpoint_seconds", "compile", "gradient_checkpointing",
              "micro_batch_blocks", "parallel", "tokenizer")  # fmt: skip
BASE = "base.pt"  # the base's log-probabilities of the validation text, computed once
# Files of the working folder while training goes on.
SCRATCH = (CHECKPOINT, PREVIOUS, NEXT, BEST, BASE, STOP)


@dataclass
class Training:
    """The training loop, run by one process or, on the same batches, by several side by side."""

    settings: MemorySettings
    base: str
    corpus: Path
    targets: Path
    work: Path
    replay: Replay | None = None  # of an update

    @property
    def batches(self) -> Batches:
        """Return what the steps are made of."""
        return new_batches(self.settings, self.corpus, self.targets, self.replay)

    def __call__(self, world: World) -> None:
        """Train from the last checkpoint to the end; rank 0 writes weights, config and logs/."""
        settings, logs = self.settings, self.work / LOGS
        batches = self.batches
        base_N = self.base_logprobs(batches.block_tokens, world)
        path = agreed(newest(self.work), world)
        memory = build_memory(settings, self.base, batches.block_tokens, path is not None)
        module = spread(memory.to(default_device()).train(), settings, world)
        optimizer = new_optimizer(module, settings)
        average = Average(module, batches.steps, settings.average_fraction)
        step, saved = 0, time.monotonic()
        if path:
            state = torch.load(path, weights_only=True, map_location="cpu")
            restore(module, optimizer, state, average)
            step = state["step"]
            del state
        checkpoints, stop = Checkpoints(self.work), False
        with (
            contextlib.closing(checkpoints),
            metrics_file(logs, step, world) as (write, evaluations),
        ):
            evaluations = agreed(evaluations, world)
            while step < batches.steps and not stopped_early(evaluations, settings.early_stop):
                began = time.monotonic()
                row = self.step(module, optimizer, batches, step, world)
                step += 1
                average.add(step)
                row |= {"step": step, "tokens_per_second": row["rows"] / seconds_since(began)}
                if not math.isfinite(row["kl"] + row["ce"]):
                    raise MemdecError(
                        f"the loss is no longer finite at step {step}: lower memory.learning_rate."
                    )
                if settings.evaluate_steps and step % settings.evaluate_steps == 0:
                    row |= self.evaluate(module, base_N, world)
                    judged = judgement(row)
                    assert judged is not None  # evaluate() has just put it there
                    best = judged < min(evaluations, default=(math.inf,))
                    evaluations.append(judged)
                    if best and settings.early_stop:
                        state = state_of(module)
                        if world.rank == 0:
                            checkpoints.save_best(state["model"])
                write(row)
                checkpoints.check()
                due = seconds_since(saved) >= settings.checkpoint_seconds
                stop, due = agreed(((self.work / STOP).exists(), due), world)
                if stop or due:
                    state = state_of(module, optimizer, average) | {"step": step}
                    if world.rank == 0:
                        checkpoints.save(state)
                    saved = time.monotonic()
                if stop:
                    break
            checkpoints.wait()
        if stop and step < batches.steps:
            return
        average.put()
        weights = state_of(module)["model"]
        if world.rank == 0:
            if (self.work / BEST).exists():
                weights = torch.load(self.work / BEST, weights_only=True)
            memory.save_pretrained(self.work, state_dict=weights)

    def base_logprobs(self, block_tokens: int, world: World) -> np.ndarray | None:
        """Return the base's log-probabilities [rows] of the validation text; None if not needed.

        Rank 0 computes them, before the memory takes its room on the device, once: they are kept in
        the working folder.
        """
        if self.settings.evaluate_steps is None or world.rank != 0:
            return None
        if not (self.work / BASE).exists():
            batch = self.scored_blocks(block_tokens)
            which = self.corpus, EVALUATION_TOKENS, batch
            base_N = validation_logprobs(self.base, self.settings.dtype, *which)
            write_atomic(self.work / BASE, lambda p: torch.save(torch.from_numpy(base_N), p))
        return torch.load(self.work / BASE, weights_only=True).numpy()

    def scored_blocks(self, block_tokens: int) -> int:
        """Return how many of the validation blocks a forward pass takes."""
        return blocks_at_once(
            self.settings.micro_batch_blocks, block_tokens, default_device(), EMBEDDED
        )

    def evaluate(
        self, module: torch.nn.Module, base_N: np.ndarray | None, world: World
    ) -> dict[str, float]:
        """Return perplexities of the validation text, and the alpha of the best mixture.

        All processes run the memory; all get rank 0's figures, so that they stop at one step.
        """
        tokens, positions = sampled_validation(self.corpus, EVALUATION_TOKENS)
        module.eval()
        with autocast_to(self.settings.dtype, default_device()):
            n = self.scored_blocks(tokens.shape[1] - 1)
            memory_N = run_alone(module, label_logprobs, tokens, positions, n)
        module.train()
        figures = {}
        if base_N is not None:
            alpha = best_alpha(base_N, memory_N)
            figures = {
                "validation_base": perplexity(base_N),
                "validation_memory": perplexity(memory_N),
                "validation_mixture": perplexity(mix(base_N, memory_N, alpha)),
                "validation_alpha": alpha,
            }
        return agreed(figures, world)

    def step(
        self,
        module: torch.nn.Module,
        optimizer: Optimizer,
        batches: Batches,
        step: int,
        world: World,
    ) -> dict[str, float]:
        """Take one step of the optimiser; return its metrics, losses as means over its rows."""
        settings, memory = self.settings, memory_of(module)
        # Of dropout, which some models have.
        torch.manual_seed(batches.step_seed(step) + world.rank)
        blocks = batches.blocks(step)
        rows = int(batches.rows[blocks].sum())
        factor = learning_rate_factor(
            step, batches.steps, settings.warmup_fraction, settings.schedule
        )
        for group in optimizer.param_groups:
            group["lr"] = peak_rate(group, settings) * factor
        # An untrained memory puts its mass anywhere: warm-up pushes all of it down.
        warm = step < warmup_steps(batches.steps, settings.warmup_fraction)
        sampled = None if warm else settings.sampled_negatives
        candidates = batches.candidates(step, memory.config.vocab_size, sampled).to(
            default_device()
        )
        share = mixture_share(step, batches.steps, settings.mixture_ramp)
        names = ["kl", "ce"] + ["mixture"] * batches.mixture
        sums = torch.zeros(len(names), dtype=torch.float64, device=default_device())
        micros = self.micro_batches(batches, step, world)
        after = self.micro_batches(batches, step + 1, world) if step + 1 < batches.steps else []
        coming = [micro for micro in micros + after if len(micro)]
        for number, micro in enumerate(micros):
            last = number == len(micros) - 1
            with contextlib.nullcontext() if last else unreduced(module):
                if len(micro):
                    following = coming[number + 1 : number + 1 + AHEAD]
                    weight = 1 / max(rows, 1)
                    how = candidates, settings, following, share
                    sums += add_gradients(module, batches, micro, weight, *how)
                else:  # others have one: all take part, this one with a block that weighs nothing
                    following = coming[number : number + AHEAD]
                    weightless = blocks[:1], 0.0
                    add_gradients(module, batches, *weightless, candidates, settings, following)
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        means = (total(sums, world) / max(rows, 1)).tolist()
        metrics = dict(zip(names, means, strict=True)) | {
            "rows": rows,
            "epoch": (step + 1) * batches.size / len(batches.tokens),
            "learning_rate": settings.learning_rate * factor,
            "gradient_norm": float(whole(norm)),
        }
        if default_device().type == "cuda":
            metrics["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return metrics

    def micro_batches(self, batches: Batches, step: int, world: World) -> list[np.ndarray]:
        """Return the block numbers of a training process's forward passes of a step.

        All processes have as many; of some the last is empty.
        """
        blocks_set = self.settings.micro_batch_blocks
        n = blocks_at_once(
            blocks_set, batches.block_tokens, default_device(), trained_tokens(default_device())
        )
        micros = []
        for blocks in batches.alike(batches.blocks(step)):
            mine = blocks[world.rank :: world.size]
            passes = -(-len(blocks) // world.size)  # blocks of the process that has most
            micros += [mine[start : start + n] for start in range(0, passes, n)]
        return micros


def seconds_since(moment: float) -> float:
    """Return the seconds since a moment of time.monotonic()."""
    return time.monotonic() - moment


def train_memory(
    settings: MemorySettings,
    base: str,
    corpus: Path,
    targets: Path,
    work: Path,
    context: Context,
    replay: Replay | None = None,
) -> None:
    """Write the trained memory (weights and config), and logs/ with metrics and a loss curve."""
    progress, executor = context.progress, context.executor
    logs = work / LOGS
    logs.mkdir(exist_ok=True)
    if (logs / CURVE).exists():  # killed just before the end
        for name in SCRATCH:
            (work / name).unlink(missing_ok=True)
        return
    training = Training(settings, base, corpus, targets, work, replay)
    batches = training.batches
    steps, fed = batches.steps, batches.size
    if fed < (workers := executor.workers()):
        progress.say(
            f"memory: a step of {fed} blocks gives work to {fed} of {workers} processes: raise "
            "memory.batch_blocks to use all of them"
        )
    if done := saved_step(work):
        progress.say(f"memory: resuming at step {done} of {steps}")
    # Steps after the checkpoint are done again: they are not to be counted twice.
    with metrics_file(logs, done, World()):
        pass
    with progress.task("memory: training", steps, "steps") as advance:
        advance(done, done_before=True)
        with stop_file(work) as stop:
            with followed(logs / METRICS, advance):
                executor.train(training, work)
            asked = stop.exists()
    stopped = asked and not (work / "config.json").exists()
    metrics = read_metrics(logs / METRICS)
    if stopped:
        progress.say(
            f"memory: stopped at step {len(metrics)} of {steps}, with a checkpoint: run the same "
            "command again to go on"
        )
        raise SystemExit(128 + signal.SIGTERM)
    if len(metrics) < steps:
        progress.say(f"memory: stopped early after step {len(metrics)} of {steps}")
    write_atomic(logs / CURVE, lambda p: plot_loss(metrics, settings.beta, p))
    for name in SCRATCH:
        (work / name).unlink(missing_ok=True)
    if asked:  # too late to stop the training
        raise SystemExit(128 + signal.SIGTERM)


def stage(build: Build) -> Stage:
    """Return how the memory is trained."""

    def make(work: Path) -> None:
        say = build.context.progress.say
        trained = training_budget(build.settings.memory, build.base, say)
        say(starts_from(trained, build.base))
        if trained.init != "base":
            trained = trained.changed(init=os.path.abspath(trained.init))
        if trained.tokenizer is not None:
            trained = trained.changed(tokenizer=os.path.abspath(trained.tokenizer))
        read = build.path("corpus"), build.path("targets")
        train_memory(trained, build.base, *read, work, build.context)

    micro = build.settings.memory.micro_batch_blocks
    remedy = lowered("memory.micro_batch_blocks", micro)
    if micro == 1 and not build.settings.memory.gradient_checkpointing:
        remedy = "set memory.gradient_checkpointing to true"
    settings = recorded_settings(build.settings.memory, build.path("corpus"))
    return Stage(settings, ("corpus", "targets"), make, completeness.model_files, remedy)


def recorded_settings(memory: MemorySettings, corpus: Path) -> dict[str, Any]:
    """Return what decides what is trained; what is read from folders is among the inputs."""
    settings = memory.recorded()
    for name in UNRECORDED:
        settings.pop(name)
    settings["batch_blocks"] = memory.batch(len(load_rows(corpus, "train")))
    if settings["init"] != "base":
        settings["init"] = "folder"
    if settings["early_stop"] is None:
        settings["evaluate_steps"] = None  # only looked at
    if not memory.adapts:  # else the tokenizer's hash is an input
        settings.pop("transfer_fraction")
    return settings
