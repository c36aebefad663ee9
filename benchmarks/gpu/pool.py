"""Two models whose CUDA graphs share one pool: does the second overwrite what the first returned?

    python -m benchmarks.gpu.gpu --steps pool

vLLM captures each compiled piece of a model as a CUDA graph, all in one pool, and keeps only a weak
reference to what a model's last piece returns. That block is then free when the memory's pieces
are captured, and may be part of what they write to. This test does the same in plain PyTorch, with
a base of 7B's width and a memory of 0.5B's, and prints which share of the base's output has changed
before and after the memory is replayed. Before it must be 0: then a copy made in time is right.

Second, an embedding captured on a temporary (`ids.clamp(...)`) and replayed with other ids: the
share of rows that are right. A persistent buffer in its place must give 1.

Writes a row per number of tokens to results/gpu_pool.csv. With --dry there are no graphs: pieces
are called, so nothing can be overwritten.
Shape suffixes: T tokens, D hidden.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import RESULTS, append_csv, provenance

VOCABULARY = 32_000
BASE, MEMORY = (3584, 9472, 4), (896, 4864, 6)  # hidden, intermediate, pieces
TOKENS = (512, 256, 128, 16)


class Piece(nn.Module):
    """A transformer layer but for attention's own kernel; the first piece embeds the ids."""

    def __init__(self, hidden: int, intermediate: int, first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden) if first else None
        self.attention = nn.Linear(hidden, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x):
        x_TD = x if self.embedding is None else self.embedding(x)
        width = (x_TD.shape[-1],)
        x_TD = x_TD + self.attention(F.rms_norm(x_TD, width))
        gate, up = self.gate_up(F.rms_norm(x_TD, width)).chunk(2, -1)
        return F.rms_norm(x_TD + self.down(F.silu(gate) * up), width)


def pieces(hidden: int, intermediate: int, count: int, device: str) -> list[Piece]:
    """Return the pieces of a random model, in bfloat16."""
    with torch.device(device):
        model = [Piece(hidden, intermediate, first=not n) for n in range(count)]
    return [piece.to(torch.bfloat16) for piece in model]


class ArrayInterface:
    """Describes a CUDA tensor's memory without keeping it from being freed."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.numel(),),
            "typestr": "<i2",  # an integer as wide as a bfloat16
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def weak(tensor: torch.Tensor) -> torch.Tensor:
    """Return an alias of a bfloat16 tensor that does not keep its memory."""
    if not tensor.is_cuda:
        return tensor
    alias = torch.as_tensor(ArrayInterface(tensor), device=tensor.device)
    return alias.view(torch.bfloat16).view(tensor.shape)


def captured(model: list[Callable], x: torch.Tensor, pool) -> tuple[list[Callable], torch.Tensor]:
    """Return the replays of a model's pieces, and a weak reference to what the last one returns."""
    replays = []
    for piece in model:
        if not x.is_cuda:
            out = piece(x)
            replays.append(lambda piece=piece, x=x, out=out: out.copy_(piece(x)))
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                out = piece(x)
            replays.append(graph.replay)
        x = out
    return replays, weak(x)


def changed(given: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the share of elements that differ."""
    return (given != wanted).float().mean().item()


def run(model: list[Callable], x: torch.Tensor) -> torch.Tensor:
    """Return what a model's pieces give when they are called."""
    for piece in model:
        x = piece(x)
    return x


def overwritten(base: list, memory: list, tokens: int) -> dict[str, float]:
    """Return which shares of the base's output differ, before and after the memory is replayed."""
    ids_T = torch.randint(VOCABULARY, (tokens,), device=base[0].embedding.weight.device)
    wanted_TD = run(base, ids_T).clone()
    run(memory, ids_T)  # libraries are loaded before a capture
    pool = torch.cuda.graph_pool_handle() if ids_T.is_cuda else None
    base_replays, base_TD = captured(base, ids_T, pool)
    memory_replays, _ = captured(memory, ids_T, pool)
    for replay in base_replays:
        replay()
    copy_TD = base_TD.clone()
    for replay in memory_replays:
        replay()
    return {
        "changed_before": changed(copy_TD, wanted_TD),
        "changed": changed(base_TD, wanted_TD),
    }


def right_rows(persistent: bool) -> float:
    """Return the share of rows that are right when an embedding is replayed with other ids.

    persistent: its input is a buffer that the next ids are copied to, not a temporary.
    """
    table = nn.Embedding(1000, 64, device="cuda")
    ids_T = torch.randint(1000, (64,), device="cuda")
    buffer_T = ids_T.clamp(max=900)
    table(ids_T)
    graph = torch.cuda.CUDAGraph()
    given_T = buffer_T if persistent else ids_T.clamp(max=900)
    with torch.cuda.graph(graph):
        out_TD = table(given_T)
    del given_T
    others = [torch.randint(1000, (64,), device="cuda") for _ in range(64)]  # memory that was freed
    next_T = others[0].clamp(max=900)
    buffer_T.copy_(next_T)
    graph.replay()
    return (out_TD == table(next_T)).all(-1).float().mean().item()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="on a CPU: tiny, and without graphs")
    arguments = parser.parse_args()
    device = "cpu" if arguments.dry else "cuda"
    torch.manual_seed(0)
    sizes = ((64, 128, 2), (32, 64, 3)) if arguments.dry else (BASE, MEMORY)
    base, memory = (pieces(*size, device) for size in sizes)
    clamped = {"temporary_rows_right": "", "buffer_rows_right": ""}
    if not arguments.dry:
        clamped = {"temporary_rows_right": right_rows(persistent=False),
                   "buffer_rows_right": right_rows(persistent=True)}  # fmt: skip
    rows = []
    for tokens in TOKENS[-1:] if arguments.dry else TOKENS:
        row = {"tokens": tokens, "graphs": "no" if arguments.dry else "yes"}
        row |= overwritten(base, memory, tokens) | clamped
        print(
            f"{tokens} tokens: {row['changed_before']:.1%} of the base's output differ before "
            f"the memory's graphs, {row['changed']:.1%} after them"
        )
        rows.append(provenance("torch") | row)
    append_csv(RESULTS / "gpu_pool.csv", rows)
    # If these fail, the test itself is wrong, on any device.
    assert all(row["changed_before"] < 0.01 for row in rows), "the graphs are not the base"
    if arguments.dry:
        print("summary: pieces called, no graphs: nothing measured")
        return
    assert clamped["buffer_rows_right"] == 1
    shares = ", ".join(f"{row['changed']:.0%} at {row['tokens']} tokens" for row in rows)
    print(
        f"summary: of the base's output the memory's graphs changed {shares}; rows right with a "
        f"temporary as input {clamped['temporary_rows_right']:.0%}, with a buffer 100%"
    )


if __name__ == "__main__":
    main()
