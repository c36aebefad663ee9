"""Microseconds and GB/s of the mixture op against the formula in PyTorch and against a copy.

    python -m benchmarks.speed.interpolate          # the kernels, or the CPU path without CUDA
    python -m benchmarks.speed.interpolate --vocab 151936 --rows 1 8 --dtype float32 --seconds 0.1

GB/s counts what any implementation must move: both inputs read once, a float32 output written once
(bf16: 2 + 2 + 4 = 8 bytes an element). So a variant that reads twice shows half of what the memory
delivered, and one whose rows stay in cache may show more than the memory can deliver. `add` is the
ceiling: it moves the same bytes and computes next to nothing.

Variants: `chosen` is ours in the logits form, as serving calls it: with weights in columns of the
rows. On a GPU `whole` and `split` force one plan, `gated` adds a gate, and `invariant` is what
VLLM_BATCH_INVARIANT asks for. On a CPU `chosen` is compiled and `chosen eager` is not. `logprobs`
is the other form; `eager` is the formula in five ops; `compiled` is torch.compile of those ("not
measured" where no compiler works). Triton's interpreter is never timed.

On a GPU a variant is timed inside a CUDA graph, so without the host: again and again on the same
rows, as `... cold` with the L2 cache written over before each call. `... launched` is what a call
costs where the host waits in between, launches and Python included: vLLM calls the op outside its
graphs, while the device still works on what came before. Appends to results/kernel.csv, in ms; last
line: JSON.
Shape suffixes: N rows, V vocabulary.
"""

import argparse
import json

import torch

from benchmarks.common import RESULTS, append_csv, interleaved_ms, provenance
from vllm_memdec.batch import encode
from vllm_memdec.kernels.interpolate import INTERPRETED, RowWeights, interpolate

ALPHA = 0.4
FLUSH = 2**28  # bytes, several times the L2 cache of any GPU
CALLS = 20  # calls of a function in a graph


def eager(base_NV, memory_NV, alpha_N):
    """Two log_softmax, two additions, one logaddexp: the formula as one would write it."""
    base_NV = torch.log_softmax(base_NV, -1, dtype=torch.float32)
    memory_NV = torch.log_softmax(memory_NV, -1, dtype=torch.float32)
    return torch.logaddexp(
        base_NV + torch.log1p(-alpha_N)[:, None], memory_NV + torch.log(alpha_N)[:, None]
    )


def row_weights(N, dtype, device):
    """Return the weights as serving has them, behind hidden states of 2,048 columns."""
    rows_ND = torch.zeros(N, 2056, dtype=dtype, device=device)
    rows_ND[:, 2048:2051] = encode(torch.full((N,), ALPHA), dtype).to(device)
    return RowWeights(rows_ND[:, 2048:], 0)


def variants(base_NV, memory_NV, compiled):
    """Return name -> function of no arguments, each warmed up."""
    N, device = len(base_NV), base_NV.device
    alpha_N = torch.full((N,), ALPHA, device=device)
    given = (base_NV, memory_NV, row_weights(N, base_NV.dtype, device))
    gate = (torch.randn(N, device=device), torch.randn(4, 16, device=device))
    out_NV = torch.empty(base_NV.shape, device=device)

    def ours(**options):
        return lambda: interpolate(*given, **{"as_logits": True, "compiled": True} | options)

    functions = {"chosen": ours(), "logprobs": ours(as_logits=False)}
    if base_NV.is_cuda:
        functions |= {
            "whole": ours(split=False),
            "split": ours(split=True),
            "gated": lambda: interpolate(base_NV, memory_NV, -alpha_N, gate=gate, as_logits=True),
            "invariant": ours(invariant=True),
        }
    else:
        functions["chosen eager"] = ours(compiled=False)
    functions |= {
        "eager": lambda: eager(base_NV, memory_NV, alpha_N),
        "compiled": lambda: compiled(base_NV, memory_NV, alpha_N),
        "add": lambda: torch.add(base_NV, memory_NV, out=out_NV),
    }
    for name, function in list(functions.items()):
        try:
            function()
        except torch._dynamo.exc.BackendCompilerFailed as error:  # e.g. no C++ compiler
            print(f"{name}: not measured ({str(error).strip().splitlines()[-1]})")
            del functions[name]
    return functions


def graph_of(function, calls):
    """Return what replays a CUDA graph of so many calls of a function."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph.replay


def device_ms(functions, seconds):
    """Return the milliseconds of each function on the device, warm and cold."""
    warm = {name: graph_of(function, CALLS) for name, function in functions.items()}
    measured = {name: ms / CALLS for name, ms in interleaved_ms(warm, seconds).items()}
    flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")

    def flushed(function):
        flush.zero_()
        function()

    cold = {name: graph_of(lambda f=f: flushed(f), 5) for name, f in functions.items()}
    cold["flush"] = graph_of(flush.zero_, 5)
    replayed = {name: ms / 5 for name, ms in interleaved_ms(cold, seconds).items()}
    return measured | {f"{name} cold": replayed[name] - replayed["flush"] for name in functions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    rows = [1, 4, 8, 32, 64, 256, 1024] if on_gpu else [1, 8, 64]
    parser.add_argument("--vocab", type=int, nargs="+", default=[151936, 50257])
    parser.add_argument("--rows", type=int, nargs="+", default=rows)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each V and N, warm")
    parser.add_argument("--dry", action="store_true", help="write no CSV rows")
    arguments = parser.parse_args()

    if INTERPRETED:
        parser.error("unset TRITON_INTERPRET: the interpreter's speed says nothing")
    dtype = getattr(torch, arguments.dtype)
    origin = provenance("torch", "triton")
    compiled = torch.compile(eager, dynamic=True)
    results = []
    print(" ".join(f"{name}: {value}" for name, value in origin.items()))
    print(f"{'V':>7} {'N':>4} {'variant':>14} {'us':>10} {'GB/s':>8}")
    for V in arguments.vocab:
        for N in arguments.rows:
            width = -(-V // 64) * 64  # vLLM pads the head
            base_NV, memory_NV = (
                (torch.randn(N, width, device="cuda" if on_gpu else "cpu") * 3).to(dtype)[:, :V]
                for _ in range(2)
            )
            functions = variants(base_NV, memory_NV, compiled)
            size = N * V * (2 * dtype.itemsize + 4)
            measured = interleaved_ms(functions, arguments.seconds, 20 if on_gpu else 1)
            if on_gpu:
                measured = {f"{name} launched": ms for name, ms in measured.items()}
                measured = device_ms(functions, arguments.seconds) | measured
            for name, ms in measured.items():
                if ms <= 0:  # a cold time below the noise of writing the cache over
                    print(f"{V:>7} {N:>4} {name:>14} not measured")
                    continue
                rate = size / ms / 1e6
                print(f"{V:>7} {N:>4} {name:>14} {ms * 1e3:>10.1f} {rate:>8.2f}")
                point = {"vocab": V, "rows": N, "dtype": arguments.dtype, "variant": name}
                results.append(point | {"ms": round(ms, 4), "gb_per_s": round(rate, 2)})
    if not arguments.dry:
        append_csv(RESULTS / "kernel.csv", [origin | result for result in results])
    print(json.dumps({"benchmark": "kernel", **origin, "results": results}))


if __name__ == "__main__":
    main()
