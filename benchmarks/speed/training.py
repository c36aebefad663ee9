"""Rows per second of training a memory, ours against dense targets in plain PyTorch.

    make demo                           # leaves build/demo: a corpus and its targets
    python -m benchmarks.speed.training       # 4 layers of SmolLM2-135M on build/demo
    python -m benchmarks.speed.training --shape 0.5B --blocks 4   # for a GPU: nothing to build

Three memories start from the same weights and see the same batches, a step each in turn: `exact` is
ours over the whole vocabulary, `dense` the step one would write (autocast, float32 logits of the
whole batch, dense targets, F.kl_div and cross-entropy), `sampled` ours with sampled negatives, an
estimate of the loss. Everything else of a step (loading, clipping, fused AdamW) is the same code.
The two exact losses must agree: the largest relative difference of any step is reported, beside
that of the dense step in float32, which tells how much bfloat16 itself does.
With --shape weights, tokens and targets are random; the rates and the agreement of the losses still
count. Appends to results/training.csv, or training_shapes.csv; the last line is JSON.
Shape suffixes: N rows, V vocabulary, B blocks, T tokens of a block.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import RESULTS, append_csv, provenance
from benchmarks.corpora.download import BUILD
from benchmarks.speed.dense import dense_targets, losses
from benchmarks.speed.random_batches import RandomBatches
from benchmarks.speed.shapes import SHAPES, make_shape
from vllm_memdec.train.model.decoder import build_memory
from vllm_memdec.train.model.devices import default_device
from vllm_memdec.train.settings import MemorySettings
from vllm_memdec.train.training.batches import Batches
from vllm_memdec.train.training.parallel import Spread
from vllm_memdec.train.training.steps import add_gradients

ACCEPTED = 1.8


def dense_gradients(module, batches, blocks, scale, _candidates, settings):
    """trainer.add_gradients with dense targets and autograd."""
    model = module.memory
    device = default_device()
    tokens, positions, places, labels_N, targets = batches.load(blocks, device)
    target_NV = dense_targets(targets, len(labels_N), model.config.vocab_size)
    with torch.autocast(
        default_device().type, torch.bfloat16, enabled=settings.dtype == "bfloat16"
    ):
        trunk = model.base_model(input_ids=tokens, position_ids=positions, use_cache=False)
        logits_NV = model.lm_head(trunk.last_hidden_state.flatten(0, 1)[places])
    kl, ce = losses(logits_NV, labels_N, target_NV)
    ((settings.beta * kl + (1 - settings.beta) * ce) * scale).backward()
    return torch.stack([kl, ce]).double().detach()


class Run:
    """A memory in training."""

    def __init__(self, gradients, settings, base, batches):
        self.gradients, self.settings, self.batches = gradients, settings, batches
        model = build_memory(settings, base, batches.tokens.shape[1] - 1)
        self.model = model.to(default_device()).train()
        self.module = Spread(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True
        )
        self.losses, self.seconds = [], []

    def step(self, number):
        """Train one step as trainer.Training.step does; note its seconds and its loss a row."""
        began = time.perf_counter()
        blocks = self.batches.blocks(number)
        rows = int(self.batches.rows[blocks].sum())
        candidates = self.batches.candidates(
            number, self.model.config.vocab_size, self.settings.sampled_negatives
        ).to(default_device())
        sums = np.zeros(2)
        size = self.settings.micro_batch_blocks
        for micro in (blocks[i : i + size] for i in range(0, len(blocks), size)):
            how = (1 / rows, candidates, self.settings)
            sums += self.gradients(self.module, self.batches, micro, *how).cpu().numpy()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if default_device().type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - began)
        beta = self.settings.beta
        self.losses.append(float(beta * sums[0] + (1 - beta) * sums[1]) / rows)
        return rows


def apart(one, other):
    """Return the largest relative difference of two loss curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(one.losses, other.losses, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="build/SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, default=Path("build/demo"))
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--blocks", type=int, default=16, help="a step, and a forward pass")
    parser.add_argument("--sampled", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--shape", choices=[*SHAPES], help="of random weights, not --base's")
    parser.add_argument("--tokens", type=int, default=1024, help="of a random block")
    arguments = parser.parse_args()

    settings = MemorySettings(
        layers=4,
        batch_blocks=arguments.blocks,
        micro_batch_blocks=arguments.blocks,
        learning_rate=arguments.learning_rate,
    )
    if arguments.shape:
        # A configuration without weights gives random weights of all its layers.
        arguments.base = str(make_shape(arguments.shape, BUILD / "shapes"))
        settings = settings.changed(init=arguments.base, layers=None)
        known = SHAPES[arguments.shape]["vocab_size"]
        batches = RandomBatches(settings, arguments.blocks, arguments.tokens, known)
    else:
        batches = Batches(settings, arguments.data / "corpus", arguments.data / "targets")
    sampled = settings.changed(sampled_negatives=arguments.sampled)
    runs = {
        "dense": Run(dense_gradients, settings, arguments.base, batches),
        "exact": Run(add_gradients, settings, arguments.base, batches),
        "sampled": Run(add_gradients, sampled, arguments.base, batches),
    }
    full = settings.changed(dtype="float32")
    reference = Run(dense_gradients, full, arguments.base, batches)
    origin = provenance("torch", "transformers")
    print(" ".join(f"{name}: {value}" for name, value in origin.items()))
    rates = {name: [] for name in runs}
    for number in range(arguments.steps):
        for name, run in runs.items():
            rows = run.step(number)
            if number:  # the first step warms up
                rates[name].append(rows / run.seconds[-1])
        reference.step(number)
        shown = " ".join(f"{name} {run.losses[-1]:.5f}" for name, run in runs.items())
        print(f"step {number + 1}: {shown} float32 {reference.losses[-1]:.5f}")
    results = []
    middle = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\n{'variant':>8} {'rows/s':>8} {'quartiles':>17} {'speed-up':>9}")
    for name, values in rates.items():
        low, _, high = statistics.quantiles(values, n=4)
        speedup = middle[name] / middle["dense"]
        print(f"{name:>8} {middle[name]:>8.1f} {low:>8.1f} {high:>8.1f} {speedup:>8.2f}x")
        point = {
            "variant": name,
            "steps": arguments.steps,
            "blocks": arguments.blocks,
            "rows_per_s": round(middle[name], 2),
            "rows_per_s_low": round(low, 2),
            "rows_per_s_high": round(high, 2),
            "speedup": round(speedup, 4),
            "loss_first": round(runs[name].losses[0], 5),
            "loss_last": round(runs[name].losses[-1], 5),
        }
        results.append(origin | point)
    difference = {
        "exact_vs_dense": apart(runs["exact"], runs["dense"]),
        "dense_vs_float32": apart(runs["dense"], reference),
    }
    print(
        f"largest relative difference of a step's loss: exact to dense "
        f"{difference['exact_vs_dense']:.2e}, dense bfloat16 to dense float32 "
        f"{difference['dense_vs_float32']:.2e}"
    )
    print(f"exact: {middle['exact'] / middle['dense']:.2f} x dense (accepted: {ACCEPTED})")
    file = "training.csv"
    if arguments.shape:
        file = "training_shapes.csv"
        shape = {"shape": arguments.shape, "block_tokens": arguments.tokens, **difference}
        results = [row | shape for row in results]
    append_csv(RESULTS / file, results)
    print(f"summary: {middle['exact'] / middle['dense']:.2f} x the rows per second of dense "
          f"targets; losses apart by {difference['exact_vs_dense']:.1e} at most")  # fmt: skip
    print(json.dumps({"benchmark": "training", **difference, "results": results}))


if __name__ == "__main__":
    main()
