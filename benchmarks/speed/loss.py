"""Time and RAM of the training loss through the head, against dense targets in PyTorch.

    python -m benchmarks.speed.loss      # 4,096 tokens, V = 49,152; on a GPU 151,936 as well

One step is forward and backward from hidden states [N, D] to their gradient and the head's, in
bfloat16 from float32 weights, as training does it. Variants:

    sparse          ours: kernels/head_loss.py
    dense           a dense target [N, V] scattered by the collator, float32 logits, F.kl_div and
                    cross-entropy on one shared log_softmax
    dense folded    both losses as one product with beta * target + (1 - beta) * one-hot
    dense compiled  torch.compile of `dense`, the scatter before it

TFLOP/s counts the three matrix products of the head alone, which no exact variant can do without;
`products` is how long they take by themselves. Time: medians and quartiles of interleaved rounds.
Memory: what a step adds at its peak to what was there, each in a fresh process (VmHWM; on a GPU the
allocator's peak). Appends to results/loss.csv; the last line is JSON.
Shape suffixes: N rows, V vocabulary, D hidden.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.common import RESULTS, append_csv, interleaved_rounds, provenance, status_kb
from benchmarks.speed.dense import PER_ROW, dense_targets, losses
from vllm_memdec.kernels.head_loss import head_loss
from vllm_memdec.kernels.sparse_kl import INTERPRETED, SparseRows

ROOT = Path(__file__).resolve().parents[2]
BETA = 0.5
ACCEPTED_TIME, ACCEPTED_MEMORY = 0.6, 0.25


def inputs(N, V, D, device):
    """Return hidden states and head weight, leaves that require gradients, labels and targets."""
    torch.manual_seed(0)
    h_ND = torch.randn(N, D, device=device).requires_grad_()
    weight_VD = (torch.randn(V, D, device=device) * 0.04).requires_grad_()
    labels_N = torch.randint(V, (N,), device=device)
    token = (torch.randint(V, (N, 1), device=device) + torch.arange(PER_ROW, device=device) * 7) % V
    p = torch.randn(N, PER_ROW, device=device).softmax(-1).flatten()
    offsets = torch.arange(N + 1, device=device) * PER_ROW
    return h_ND, weight_VD, labels_N, SparseRows(offsets, token.flatten(), p)


def sparse(h_ND, weight_VD, labels_N, targets):
    """Our step."""
    scale = 1 / len(h_ND)
    loss, sums = head_loss(
        h_ND, weight_VD, labels_N, targets, BETA, dtype=torch.bfloat16, scale=scale
    )
    loss.backward()
    return sums


def dense(h_ND, weight_VD, labels_N, targets, losses=losses):
    """The same step with dense targets and autograd."""
    target_NV = dense_targets(targets, len(h_ND), len(weight_VD))
    with torch.autocast(h_ND.device.type, torch.bfloat16):
        logits_NV = F.linear(h_ND, weight_VD)
    kl, ce = losses(logits_NV, labels_N, target_NV)
    ((BETA * kl + (1 - BETA) * ce) / len(h_ND)).backward()
    return kl, ce


def dense_folded(h_ND, weight_VD, labels_N, targets):
    """The same step with one dense target for both losses; the target's entropy comes for free."""
    target_NV = dense_targets(targets, len(h_ND), len(weight_VD)).mul_(BETA)
    target_NV[torch.arange(len(h_ND), device=h_ND.device), labels_N] += 1 - BETA
    with torch.autocast(h_ND.device.type, torch.bfloat16):
        logits_NV = F.linear(h_ND, weight_VD)
    total = F.cross_entropy(logits_NV.float(), target_NV, reduction="sum") / len(h_ND)
    total.backward()
    return (total,)


@cache
def compiled_losses():
    """Return losses() compiled, backward pass included."""
    return torch.compile(losses, dynamic=False)


VARIANTS = {
    "sparse": sparse,
    "dense": dense,
    "dense folded": dense_folded,
    "dense compiled": lambda *inputs: dense(*inputs, losses=compiled_losses()),
}


def fresh(variant, tensors):
    """Run one step from no gradients."""
    for leaf in tensors[:2]:
        leaf.grad = None
    return VARIANTS[variant](*tensors)


def products(h_ND, weight_VD, *_):
    """The head's three matrix products, of the whole batch, and nothing else."""
    h_ND, weight_VD = h_ND.detach().bfloat16(), weight_VD.detach().bfloat16()
    logits_NV = h_ND @ weight_VD.t()
    return logits_NV @ weight_VD, logits_NV.t() @ h_ND


def extra_mb(variant, tensors):
    """Return by how many MB (10^6 bytes) RAM rises during a step."""
    if tensors[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fresh(variant, tensors)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(
        0
    )  # else a step reuses RAM that earlier ones freed, and nothing rises
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts at what is resident now
    before = status_kb("VmRSS")
    fresh(variant, tensors)
    return (status_kb("VmHWM") - before) * 1024 / 1e6


def measure_memory(variant, N, V, D, device):
    """Return extra_mb of a variant's first step in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.speed.loss", "--memory-of", variant]
    command += ["--vocab", str(V), "--rows", str(N), "--hidden", str(D), "--device", device]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return float(done.stdout)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 151936][: 1 + cuda])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--seconds", type=float, default=120, help="of timing, per vocabulary")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if INTERPRETED:
        parser.error("unset TRITON_INTERPRET: the interpreter's speed says nothing")
    N, D, device = arguments.rows, arguments.hidden, arguments.device
    if arguments.memory_of:
        # A small step loads libraries and starts threads; compiling stays out of the figure too.
        fresh(arguments.memory_of, inputs(64, 512, D, device))
        tensors = inputs(N, arguments.vocab[0], D, device)
        if arguments.memory_of == "dense compiled":
            fresh(arguments.memory_of, tensors)
        for leaf in tensors[:2]:
            leaf.grad = None
        print(extra_mb(arguments.memory_of, tensors))
        return

    origin = provenance("torch", "triton")
    print(" ".join(f"{name}: {value}" for name, value in origin.items()))
    results = []
    for V in arguments.vocab:
        memory = {name: measure_memory(name, N, V, D, device) for name in VARIANTS}
        tensors = inputs(N, V, D, device)
        functions = {name: partial(fresh, name, tensors) for name in VARIANTS}
        functions["products"] = partial(products, *tensors)
        for function in functions.values():
            function()
        times = interleaved_rounds(functions, arguments.seconds)
        middle = {name: statistics.median(values) for name, values in times.items()}
        print(f"\nN = {N}, V = {V}, D = {D}, {len(times['sparse'])} rounds; ratios are to `dense`")
        print(f"{'variant':>15} {'ms':>9} {'quartiles':>19} {'TFLOP/s':>8} {'time':>6}", end="")
        print(f" {'MB':>8} {'memory':>7}")
        for name, values in times.items():
            low, _, high = statistics.quantiles(values, n=4)
            point = {
                "rows": N,
                "vocab": V,
                "hidden": D,
                "variant": name,
                "ms": round(middle[name], 2),
                "ms_low": round(low, 2),
                "ms_high": round(high, 2),
                "tflop_per_s": round(6 * N * V * D / middle[name] / 1e9, 4),
                "time_ratio": round(middle[name] / middle["dense"], 4),
                "extra_mb": round(memory[name], 1) if name in memory else "",
                "memory_ratio": round(memory[name] / memory["dense"], 4) if name in memory else "",
            }
            results.append(origin | point)
            print(
                f"{name:>15} {point['ms']:>9.1f} {low:>9.1f} {high:>9.1f} "
                f"{point['tflop_per_s']:>8.3f} {point['time_ratio']:>6.3f} "
                f"{point['extra_mb']:>8} {point['memory_ratio']:>7}"
            )
        ours = next(r for r in results if r["vocab"] == V and r["variant"] == "sparse")
        print(
            f"against dense: {ours['time_ratio']:.3f} of the time (accepted: {ACCEPTED_TIME}), "
            f"{ours['memory_ratio']:.3f} of the memory (accepted: {ACCEPTED_MEMORY})"
        )
    append_csv(RESULTS / "loss.csv", results)
    print(f"summary: against dense at V = {ours['vocab']}: {ours['time_ratio']:.3f} of the time, "
          f"{ours['memory_ratio']:.3f} of the memory")  # fmt: skip
    print(json.dumps({"benchmark": "loss", "results": results}))


if __name__ == "__main__":
    main()
