"""Tokens per second of training a memory on one GPU, share of its peak, and where the time goes.

    python -m benchmarks.speed.training_gpu                              # 0.5B, blocks of 512
    python -m benchmarks.speed.training_gpu --blocks 16 32 64 --attention sdpa flex_attention \\
        --compile
    python -m benchmarks.speed.training_gpu --shape tiny --tokens 64 --blocks 4 --steps 3

The steps are those of `memdec build` (Training.step of train/stages/training.py): loading, forward
pass, the loss over the whole vocabulary, backward pass, clipping, AdamW. Weights, tokens and
targets are random; two documents share each block, so that attention has a mask, as real blocks
have. For each number of blocks a forward pass takes, a step of one pass is timed.

Counted are the products of weights with activations, 6 FLOP a parameter and token (the head's and
not the embedding's), without attention: at 512 tokens that is 4 % more. Peak: --peak, 989 TFLOP/s
of an H100's bfloat16 without sparsity. Then the parts by themselves: `trunk` is its forward and
backward pass without the head, `loss` the head's, forward and backward, `optimizer` clipping and
AdamW, `reading` the batch (in other threads while the GPU works). Appends to
results/training_gpu.csv; the last line is JSON. Shape suffixes: N rows, D hidden.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import RESULTS, append_csv, provenance
from benchmarks.corpora.download import BUILD
from benchmarks.speed.random_batches import RandomBatches
from benchmarks.speed.shapes import SHAPES, make_shape
from vllm_memdec.kernels.head_loss import head_loss
from vllm_memdec.train.executor.ray_executor import World
from vllm_memdec.train.model.decoder import build_memory
from vllm_memdec.train.model.devices import default_device
from vllm_memdec.train.settings import MemorySettings
from vllm_memdec.train.stages.training import Training
from vllm_memdec.train.training.optimizers import new_optimizer
from vllm_memdec.train.training.parallel import spread
from vllm_memdec.train.training.steps import autocast_to

WARM_UP = 3  # steps that are not timed: kernels are compiled, the allocator grows


class Packed(RandomBatches):
    """Random blocks of two documents, drawn once: a step reads them as fast as memory allows."""

    def __init__(self, settings, blocks, tokens, vocabulary):
        super().__init__(settings, blocks, tokens, vocabulary)
        half = (tokens + 1) // 2
        positions = np.r_[np.arange(half), np.arange(tokens + 1 - half)].astype(np.int32)
        self.positions = np.broadcast_to(positions, self.tokens.shape)
        self.rows = np.full(blocks, tokens - 1)
        self.steps, self.drawn = 10**6, {}

    def read(self, block, labels):
        if block not in self.drawn:
            self.drawn[block] = super().read(block, labels)
        return self.drawn[block]


def synchronised():
    """Return the time once the device has done all it was given."""
    if default_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def milliseconds(function, times=5):
    """Return the median time of a function, the device's work included."""
    function()
    times_ms = []
    for _ in range(times):
        began = synchronised()
        function()
        times_ms.append((synchronised() - began) * 1e3)
    return statistics.median(times_ms)


def parts(module, optimizer, batches, blocks, settings):
    """Return the milliseconds of the parts of a step."""
    memory, chosen = module.memory, np.arange(blocks)
    tokens, positions, places, labels_N, targets = batches.load(chosen, default_device())
    layer = memory.get_output_embeddings()
    kept = []

    def trunk():
        with autocast_to(settings.dtype, default_device()):
            out = memory.base_model(input_ids=tokens, position_ids=positions, use_cache=False)
        h_ND = out.last_hidden_state.flatten(0, 1)[places]
        kept[:] = [h_ND.detach()]
        h_ND.backward(torch.ones_like(h_ND))

    def loss():
        h_ND = kept[0].requires_grad_()
        how = {"dtype": getattr(torch, settings.dtype), "scale": 1 / len(labels_N)}
        head_loss(h_ND, layer.weight, labels_N, targets, settings.beta, **how)[0].backward()
        h_ND.grad = layer.weight.grad = None

    def update():
        torch.nn.utils.clip_grad_norm_(module.parameters(), settings.gradient_clip)
        optimizer.step()

    measured = {"trunk_ms": milliseconds(trunk), "loss_ms": milliseconds(loss)}
    trunk()
    layer.weight.grad = torch.zeros_like(layer.weight)
    measured["optimizer_ms"] = milliseconds(update)
    optimizer.zero_grad()
    measured["reading_ms"] = milliseconds(lambda: batches.arrays(chosen))
    return measured


def measure(arguments, base, attention, compiled, blocks):
    """Return one row: what a step of so many blocks takes."""
    settings = MemorySettings(
        init=base, batch_blocks=blocks, micro_batch_blocks=blocks, compile=False
    )
    settings = settings.changed(gradient_checkpointing=arguments.checkpointing, compile=compiled)
    batches = Packed(settings, blocks, arguments.tokens, SHAPES[arguments.shape]["vocab_size"])
    memory = arguments.memory
    memory.set_attn_implementation(attention)
    module = spread(memory, settings, World())
    optimizer = new_optimizer(module, settings)
    training = Training(settings, base, Path(), Path(), Path())
    spent, rows = [], []
    if default_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(WARM_UP + arguments.steps):
        began = synchronised()
        rows.append(training.step(module, optimizer, batches, step + 1, World()))
        spent.append(synchronised() - began)
    seconds = statistics.median(spent[WARM_UP:])
    trunk = sum(p.numel() for p in memory.base_model.parameters())
    trunk -= memory.get_input_embeddings().weight.numel()
    head = memory.get_output_embeddings().weight.numel()
    n = blocks * arguments.tokens
    flop = 6 * (trunk * n + head * rows[-1]["rows"])
    row = {
        "shape": arguments.shape,
        "block_tokens": arguments.tokens,
        "blocks": blocks,
        "attention": attention,
        "compiled": compiled,
        "checkpointing": arguments.checkpointing,
        "steps": arguments.steps,
        "tokens_per_s": round(n / seconds, 1),
        "tflop_per_s": round(flop / seconds / 1e12, 3),
        "peak_share": round(flop / seconds / 1e12 / arguments.peak, 4),
        "gpu_gb": round(rows[-1].get("gpu_gb", 0), 2),
        "step_ms": round(seconds * 1e3, 2),
    }
    measured = parts(module, optimizer, batches, blocks, settings)
    return row | {name: round(value, 2) for name, value in measured.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES], default="0.5B")
    parser.add_argument("--tokens", type=int, default=512, help="of a block")
    parser.add_argument("--blocks", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--attention", nargs="+", default=["sdpa"])
    parser.add_argument("--compile", action="store_true", help="as well, each layer by itself")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s")
    arguments = parser.parse_args()
    base = str(make_shape(arguments.shape, BUILD / "shapes"))
    settings = MemorySettings(init=base)
    arguments.memory = build_memory(settings, base, arguments.tokens).to(default_device()).train()
    origin = provenance("torch", "transformers", "triton")
    print(" ".join(f"{name}: {value}" for name, value in origin.items()))
    results = []
    for compiled in (False, True)[: 1 + arguments.compile]:
        for attention, blocks in itertools.product(arguments.attention, arguments.blocks):
            name = f"{attention}{', compiled' if compiled else ''}, {blocks} blocks"
            try:
                row = measure(arguments, base, attention, compiled, blocks)
            except Exception as error:  # a kernel that this machine lacks, or too large a batch
                print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
                arguments.memory.zero_grad()
                if default_device().type == "cuda":
                    torch.cuda.empty_cache()
                continue
            results.append(origin | row)
            append_csv(RESULTS / "training_gpu.csv", [origin | row])
            print(
                f"{name}: {row['tokens_per_s']:,.0f} tokens/s, {row['tflop_per_s']:.1f} TFLOP/s, "
                f"{row['peak_share']:.1%} of the peak, {row['gpu_gb']:.1f} GB; step "
                f"{row['step_ms']:.1f} ms: trunk {row['trunk_ms']:.1f}, loss {row['loss_ms']:.1f}, "
                f"optimizer {row['optimizer_ms']:.1f} (reading {row['reading_ms']:.1f})",
                flush=True,
            )
    if not results:
        parser.error("nothing could be measured, see above.")
    best = max(results, key=lambda row: row["tokens_per_s"])
    print(
        f"summary: {best['tokens_per_s']:,.0f} tokens/s, {best['peak_share']:.1%} of the peak "
        f"({best['attention']}{', compiled' if best['compiled'] else ''}, {best['blocks']} blocks)"
    )
    print(json.dumps({"benchmark": "training_gpu", "results": results}))


if __name__ == "__main__":
    main()
