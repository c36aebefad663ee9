"""Milliseconds and GB/s of the mixture op against the formula in PyTorch, eager and compiled.

    python benchmarks/kernel.py                      # the CPU path, or the kernel if there is CUDA
    python benchmarks/kernel.py --vocab 151936 --rows 256 --dtype float32

GB/s counts what any implementation must move: both inputs read once, a float32 output written once
(bf16: 2 + 2 + 4 = 8 bytes an element). So a variant that reads twice shows half of what the memory
delivered, and one whose rows stay in cache may show more than the memory can deliver. `add` is the
ceiling: it moves the same bytes and computes next to nothing.

Variants: `fused` is ours, `fused logits` its logits form, on a CPU both compiled; `fused eager` is
the logits form under --enforce-eager; `eager` is the formula in five ops; `compiled` is
torch.compile of those ("not measured" where no compiler works). Triton's interpreter is never
timed. Appends to results/kernel.csv; the last line is JSON.
Shape suffixes: N rows, V vocabulary.
"""

import argparse
import json

import torch
from common import RESULTS, append_csv, interleaved_ms, provenance

from vllm_memdec.kernels.interpolate import INTERPRETED, interpolate


def eager(base_NV, memory_NV, alpha_N):
    """Two log_softmax, two additions, one logaddexp: the formula as one would write it."""
    base_NV = torch.log_softmax(base_NV, -1, dtype=torch.float32)
    memory_NV = torch.log_softmax(memory_NV, -1, dtype=torch.float32)
    return torch.logaddexp(
        base_NV + torch.log1p(-alpha_N)[:, None], memory_NV + torch.log(alpha_N)[:, None]
    )


def variants(base_NV, memory_NV, alpha_N, compiled):
    """Return name -> function of no arguments, each warmed up."""
    inputs = (base_NV, memory_NV, alpha_N)
    out_NV = torch.empty(base_NV.shape, device=base_NV.device)
    functions = {
        "fused": lambda: interpolate(*inputs, compiled=True),
        "fused logits": lambda: interpolate(*inputs, as_logits=True, compiled=True),
        "fused eager": lambda: interpolate(*inputs, as_logits=True),
        "eager": lambda: eager(*inputs),
        "compiled": lambda: compiled(*inputs),
        "add": lambda: torch.add(base_NV, memory_NV, out=out_NV),
    }
    if base_NV.is_cuda:
        del functions["fused eager"]
    for name, function in list(functions.items()):
        try:
            function()
        except torch._dynamo.exc.BackendCompilerFailed as error:  # e.g. no C++ compiler
            print(f"{name}: not measured ({str(error).strip().splitlines()[-1]})")
            del functions[name]
    return functions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    arguments = parser.parse_args()

    if INTERPRETED:
        parser.error("unset TRITON_INTERPRET: the interpreter's speed says nothing")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, arguments.dtype)
    origin = provenance("torch", "triton")
    compiled = torch.compile(eager, dynamic=True)
    results = []
    print(" ".join(f"{name}: {value}" for name, value in origin.items()))
    print(f"{'V':>7} {'N':>4} {'variant':>13} {'ms':>9} {'GB/s':>8}")
    for V in arguments.vocab:
        for N in arguments.rows:
            base_NV, memory_NV = (
                (torch.randn(N, V, device=device) * 3).to(dtype) for _ in range(2)
            )
            alpha_N = torch.full((N,), 0.4, device=device)
            functions = variants(base_NV, memory_NV, alpha_N, compiled)
            inner = 20 if device == "cuda" else 1
            size = N * V * (2 * dtype.itemsize + 4)
            for name, ms in interleaved_ms(functions, inner=inner).items():
                rate = size / ms / 1e6
                print(f"{V:>7} {N:>4} {name:>13} {ms:>9.3f} {rate:>8.2f}")
                point = {"vocab": V, "rows": N, "dtype": arguments.dtype, "variant": name}
                results.append(point | {"ms": round(ms, 4), "gb_per_s": round(rate, 2)})
    append_csv(RESULTS / "kernel.csv", [origin | result for result in results])
    print(json.dumps({"benchmark": "kernel", **origin, "results": results}))


if __name__ == "__main__":
    main()
