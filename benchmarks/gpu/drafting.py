"""What a draft pass costs beside the base's step, launched kernel by kernel and as a CUDA graph.

    python -m benchmarks.gpu.gpu --steps drafting

Plain PyTorch, no vLLM: layers of Qwen2.5's shapes with random bfloat16 weights, attention over 512
tokens of KV. c is a pass of the memory over one token, v the base's over drafts + 1, both in units
of the base's over one; the base has graphs in both, as its decode steps do in vLLM. From c and v
shapes.drafting_ratio predicts the time per token for stated acceptances. `latency.py --shapes`
measures the same on vLLM itself.

Writes a row per base, way of launching and acceptance to results/gpu_drafting.csv. With --dry, on
a CPU, there are no graphs, and none are written about.
Shape suffixes: T tokens, D hidden, V vocabulary.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import RESULTS, append_csv, interleaved_rounds, provenance
from benchmarks.speed.shapes import MEMORIES, SHAPES, cost_rows, cost_sentence

CONTEXT = 512  # tokens of KV


class Layer(nn.Module):
    """A layer of Qwen2 for one request, which writes its keys and values at a fixed place."""

    def __init__(self, shape: dict, kv: int, size: int) -> None:
        super().__init__()
        hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
        self.heads, self.kv, self.size = heads, kv, size
        self.qkv = nn.Linear(hidden, (heads + 2 * kv) * size)
        self.out = nn.Linear(heads * size, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * shape["intermediate_size"], bias=False)
        self.down = nn.Linear(shape["intermediate_size"], hidden, bias=False)
        self.norms = nn.Parameter(torch.ones(2, hidden))
        self.register_buffer("cache", torch.randn(2, 1, kv, CONTEXT, size))

    def forward(self, x_TD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        T, D = x_TD.shape
        rows = self.qkv(F.rms_norm(x_TD, (D,), self.norms[0])).view(T, -1, self.size)
        q, k, v = rows.transpose(0, 1)[None].split([self.heads, self.kv, self.kv], 1)
        q, k = (each * cos + each.roll(self.size // 2, -1) * sin for each in (q, k))
        self.cache[0, :, :, -T:], self.cache[1, :, :, -T:] = k, v
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):  # as vLLM, not cuDNN
            y = F.scaled_dot_product_attention(q, *self.cache, enable_gqa=True)
        x_TD = x_TD + self.out(y[0].transpose(0, 1).reshape(T, -1))
        gate, up = self.gate_up(F.rms_norm(x_TD, (D,), self.norms[1])).chunk(2, -1)
        return x_TD + self.down(F.silu(gate) * up)


class Model(nn.Module):
    """Embedding, layers and head of a shape; returns logits [T, V]."""

    def __init__(self, shape: dict) -> None:
        super().__init__()
        hidden, V = shape["hidden_size"], shape["vocab_size"]
        size = hidden // shape["num_attention_heads"]
        self.embedding = nn.Embedding(V, hidden)
        self.layers = nn.ModuleList(
            Layer(shape, shape["num_key_value_heads"], size)
            for _ in range(shape["num_hidden_layers"])
        )
        self.head = nn.Linear(hidden, V, bias=False)
        self.register_buffer("angles", torch.ones(2, size))

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        x_TD = self.embedding(ids_T)
        for layer in self.layers:
            x_TD = layer(x_TD, *self.angles)
        return self.head(x_TD)


def random_model(name: str, device: str) -> Model:
    """Return a model of a shape, in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Model(SHAPES[name])
    finally:
        torch.set_default_dtype(before)


def as_graph(function: Callable) -> Callable:
    """Return the replay of a function's CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries allocate what they work in before a capture
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=[*MEMORIES], default=["1.5B", "7B"])
    parser.add_argument("--drafts", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2, help="of timing, per base")
    parser.add_argument("--dry", action="store_true", help="on a CPU: tiny, and without graphs")
    arguments = parser.parse_args()
    cuda = not arguments.dry
    device, names = ("cuda", arguments.shapes) if cuda else ("cpu", ["tiny"])
    torch.manual_seed(0)
    for name in names:
        base, memory = (random_model(shape, device) for shape in (name, MEMORIES[name]))
        one, wide = (torch.randint(1000, (T,), device=device) for T in (1, arguments.drafts + 1))
        calls = {
            ("base", "launched"): lambda base=base, one=one: base(one),
            ("wide", "launched"): lambda base=base, wide=wide: base(wide),
            ("draft", "launched"): lambda memory=memory, one=one: memory(one),
        }
        if cuda:
            calls |= {(what, "graph"): as_graph(call) for (what, _), call in calls.items()}
        for call in calls.values():
            call()
        rounds = interleaved_rounds(calls, arguments.seconds, inner=10 if cuda else 1)
        ms = {key: statistics.median(times) for key, times in rounds.items()}
        step = "graph" if cuda else "launched"
        for way in ("launched", "graph")[: 1 + cuda]:
            columns = {"models": f"{name} + {MEMORIES[name]}", "drafts_as": way}
            rows = cost_rows(
                columns, ms["base", step], ms["wide", step], ms["draft", way], arguments.drafts
            )
            origin = provenance("torch")
            append_csv(RESULTS / "gpu_drafting.csv", [origin | row for row in rows])
            print(f"summary: {columns['models']}, drafts {way}: {cost_sentence(rows)}")
        del base, memory, calls
        if cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
