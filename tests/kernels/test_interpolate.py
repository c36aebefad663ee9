"""The mixture op against its float64 oracle: the Triton kernel and both PyTorch paths alike.

Without CUDA the kernel runs in Triton's interpreter (tests/conftest.py sets TRITON_INTERPRET=1).
Run: pytest tests/kernels/test_interpolate.py
Shape suffixes: N rows, V vocabulary of the base, W width of the memory.
"""

import os
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
import torch._dynamo.config

from vllm_memdec.kernels import interpolate as op
from vllm_memdec.kernels.interpolate import interpolate
from vllm_memdec.kernels.reference import interpolate_reference

# Absolute up to magnitude 1, relative above: next to 1e4, float32 numbers lie 1e-3 apart.
TOLERANCE = 1e-5
ALPHAS = (0.0, 1e-6, 0.5, 1.0)
# What is special about a row of (base, memory). With 4 weights: 32 different rows.
KINDS = ("", "base empty", "memory empty", "both empty", "holes", "base 1e4", "memory 1e4", "1e4")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (N, V, W, base dtype, memory dtype).
CASES = [
    *((33, V, V, FP32, FP32) for V in (1, 7, 1000)),
    *((N, V, V, FP32, FP32) for N, V in ((1, 8193), (9, 50257))),
    *((4, V, V, FP32, FP32) for V in (49152, 128256, 151936, 262144)),
    *((33, 1000, 1003, b, m) for b in (BF16, FP16, FP32) for m in (BF16, FP16, FP32)),
    *((33, V, W, FP32, FP32) for V, W in ((1, 7), (7, 1), (4097, 4095), (4095, 4097))),
    *((33, V, W, BF16, BF16) for V, W in ((4096, 8192), (8192, 4096), (9000, 100))),
    *((4, V, W, BF16, BF16) for V, W in ((151936, 152064), (152064, 151936))),
]
# The interpreter takes milliseconds for a row and a slice, so the kernels get fewer cases: all
# kinds of rows and types, odd and even widths, a slice and several, the memory narrower or wider.
KERNELS = [
    (33, 1000, 1003, BF16, FP16),
    (33, 2051, 2049, FP32, FP32),
    *((4, V, W, FP32, BF16) for V, W in ((7, 1), (1, 7), (1000, 1000), (4095, 4097))),
    *((4, V, W, BF16, BF16) for V, W in ((9000, 100), (4097, 4095), (4096, 8192))),
    *((2, V, W, BF16, BF16) for V, W in ((50257, 50257), (151936, 152064))),
]
# Each new kind of shape takes seconds to compile: one row, more, a narrower memory, a wider one.
COMPILED = [
    *((N, V, V, FP32, FP32) for N, V in ((33, 7), (33, 1000), (1, 8193), (4, 151936), (4, 262144))),
    *((33, V, W, FP32, FP32) for V, W in ((7, 1), (4095, 4097))),
    (4, 151936, 152064, BF16, BF16),
]


def make(N, V, W, base_dtype=FP32, memory_dtype=FP32):
    """Return base [N, V], memory [N, W], alpha [N]: consecutive rows differ in kind and weight."""
    generator = torch.Generator().manual_seed(V + W)
    base_NV = torch.randn(N, V, generator=generator) * 3
    memory_NW = torch.randn(N, W, generator=generator) * 3
    order = [13 * n % 32 for n in range(N)]
    for n, kind in enumerate(KINDS[i // 4] for i in order):
        for name, row in (("base", base_NV[n]), ("memory", memory_NW[n])):
            if kind in (f"{name} empty", "both empty"):
                row.fill_(-torch.inf)
            elif kind == "holes":
                row[torch.rand(len(row), generator=generator) < 0.3] = -torch.inf
            elif kind in (f"{name} 1e4", "1e4"):
                row[0], row[len(row) // 2] = -1e4, 1e4
    alpha_N = torch.tensor([ALPHAS[i % 4] for i in order])
    return base_NV.to(base_dtype), memory_NW.to(memory_dtype), alpha_N


def assert_close(got, want):
    got, want = got.cpu().double(), want.cpu().double()
    assert not got.isnan().any() and not want.isnan().any()
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    finite = want > -torch.inf
    error = (got - want)[finite].abs() / want[finite].abs().clamp(min=1)
    assert error.numel() == 0 or error.max() <= TOLERANCE


def check(device, case):
    base_NV, memory_NW, alpha_N = (x.to(device) for x in make(*case))
    for as_logits in (False, True):
        got = interpolate(base_NV, memory_NW, alpha_N, as_logits=as_logits)
        assert got.dtype == FP32 and got.shape == base_NV.shape
        assert_close(got, interpolate_reference(base_NV, memory_NW, alpha_N, as_logits))
    off_N = alpha_N == 0
    assert bits(got[off_N]) == bits(base_NV[off_N].float())


def bits(x):
    return x.cpu().contiguous().view(torch.int32).tolist()


@pytest.fixture(params=["whole", "split", "torch"])
def device(request, monkeypatch):
    """Make interpolate() run one implementation, and return the device that does it."""
    if request.param in ("whole", "split"):
        split = request.param == "split"
        monkeypatch.setitem(globals(), "interpolate", partial(interpolate, split=split))
        yield "cpu" if op.INTERPRETED else "cuda"
        return
    monkeypatch.setattr(op, "INTERPRETED", False)
    if request.param == "compiled":
        monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # the engine tests set it
        monkeypatch.setitem(globals(), "interpolate", partial(interpolate, compiled=True))
    # All cases of this file in one process are more graphs than a server ever has.
    limits = {"recompile_limit": 100, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limits):
        yield "cpu"


@pytest.mark.parametrize(
    ("device", "case"),
    [
        *(("torch", case) for case in CASES),
        *((path, case) for path in ("whole", "split") for case in KERNELS),
        *(("compiled", case) for case in COMPILED),
    ],
    indirect=["device"],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_matches_oracle(device, case):
    check(device, case)


def test_two_graphs_serve_every_shape(monkeypatch):
    monkeypatch.setattr(op, "INTERPRETED", False)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for N, V in ((5, 70), (1, 70), (3, 90), (33, 1000), (1, 33)):
        base_NV, memory_NW, alpha_N = make(N, V, V)
        got = interpolate(base_NV, memory_NW, alpha_N, compiled=True)
        assert_close(got, interpolate_reference(base_NV, memory_NW, alpha_N, False))
    assert graphs["unique_graphs"] - before == 2


# A gate's weights are tested with fewer shapes: one block, blocks of which the last is not full, a
# narrower memory, a wider one.
GATED = [
    *((33, V, W, FP32, FP32) for V, W in ((7, 7), (1000, 1003), (4097, 4095), (8193, 8193))),
    (4, 49152, 49152, BF16, BF16),
]


def check_gated(device, case):
    base_NV, memory_NW, alpha_N = make(*case)
    N, generator = len(alpha_N), torch.Generator().manual_seed(len(alpha_N))
    # A cap that binds or does not, and every third row's weight a plain number.
    asked_N = torch.where(torch.arange(N) % 3 == 0, alpha_N, -(alpha_N + 0.3).clamp(max=1))
    gate = torch.randn(N, generator=generator) * 2, torch.randn(4, 5, generator=generator)
    given = [x.to(device) for x in (base_NV, memory_NW, asked_N)]
    gate = tuple(x.to(device) for x in gate)
    for as_logits in (False, True):
        got = interpolate(*given, gate=gate, as_logits=as_logits)
        assert_close(got, interpolate_reference(*given, as_logits, gate))
    plain, still = asked_N >= 0, tuple(x.to(device) for x in (torch.zeros(N), gate[1].cpu() * 0))
    # A gate that says one half: 0.999 / 2 where the cap allows.
    half_N = torch.where(plain, asked_N, (-asked_N).clamp(max=op.LARGEST / 2)).to(device)
    assert_close(interpolate(*given, gate=still), interpolate(*given[:2], half_N))


@pytest.mark.parametrize(
    ("device", "case"),
    [
        *(("torch", case) for case in GATED),
        *((path, (9, *case[1:])) for path in ("whole", "split") for case in GATED[1:3]),
        *(("compiled", case) for case in GATED[1:3]),
    ],
    indirect=["device"],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_a_gate_matches_the_oracle(device, case):
    check_gated(device, case)


def test_a_sure_gate_leaves_the_base_its_share(device):
    """Of tokens that the memory rules out the base's 1 - weight, near 0.001, is all there is."""
    base_NV, memory_NW, _ = (x.to(device) for x in make(6, 100, 50))
    score_N, certainty_4K = torch.linspace(4, 14, 6), torch.zeros(4, 3)
    gate = tuple(x.to(device) for x in (score_N, certainty_4K))
    for cap in (-1.0, -0.9995, -0.5):
        alpha_N = torch.full((6,), cap, device=device)
        for as_logits in (False, True):
            got = interpolate(base_NV, memory_NW, alpha_N, gate=gate, as_logits=as_logits)
            want = interpolate_reference(base_NV, memory_NW, alpha_N, as_logits, gate)
            assert_close(got, want)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of NaN
@pytest.mark.parametrize("as_logits", [False, True])
def test_a_broken_gate_or_memory_stays_in_its_row(device, as_logits):
    base_NV, memory_NW, asked_N = torch.zeros(4, 9), torch.zeros(4, 9), -torch.ones(4)
    memory_NW[0, 4], memory_NW[1, 4] = torch.nan, torch.inf
    score_N = torch.tensor([0.0, 0.0, torch.nan, 0.0])
    given = (x.to(device) for x in (base_NV, memory_NW, asked_N))
    gate = score_N.to(device), torch.ones(4, 3, device=device)
    got = interpolate(*given, gate=gate, as_logits=as_logits).cpu()
    assert got[:3].isnan().all() and got[3].isfinite().all()


def test_an_extreme_memory_is_sure_or_not(device):
    """Masks written as finfo.min leave the entropy what it is, over any number of blocks."""
    V = 3 * op.SLICE + 5
    memory_NW = torch.full((2, V), torch.finfo(FP32).min)
    memory_NW[0, -1], memory_NW[1, -3:] = 3.0, -7.0  # sure; three alike
    # top - entropy, and so the gate's score, up to gelu's rest: 1, and 1/3 - ln 3.
    units = torch.tensor([[1.0], [-1.0], [20.0], [1.0]])
    gate = torch.full((2,), -20.0, device=device), units.to(device)
    base_NV = torch.zeros(2, V)
    given = (x.to(device) for x in (base_NV, memory_NW, -torch.ones(2)))
    alpha_N = op.LARGEST * torch.tensor([1.0, 1 / 3 - torch.tensor(3.0).log()]).sigmoid()
    rest_N = (1 - alpha_N) / V  # what a masked token keeps
    got_N = interpolate(*given, gate=gate).cpu()[:, 0]
    assert torch.allclose(got_N, rest_N.log(), atol=1e-5)


@pytest.mark.gpu
def test_compiled_kernels_match_oracle(monkeypatch):
    assert not op.INTERPRETED, "unset TRITON_INTERPRET to test the compiled kernel"
    for split in (False, True):
        monkeypatch.setitem(globals(), "interpolate", partial(interpolate, split=split))
        for case in (*CASES, *KERNELS):
            check("cuda", case)
        for case in GATED:
            check_gated("cuda", case)


def test_strided_rows(device):
    base_NV, memory_NW, alpha_N = (x.to(device) for x in make(12, 1000, 1003))
    wide = torch.full((24, 3000), torch.nan, device=device)
    base, memory, out = wide[::2, 7:1007], wide[::2, 1010:2013], wide[1::2, 5:1005]
    base.copy_(base_NV), memory.copy_(memory_NW)
    assert interpolate(base, memory, alpha_N, out=out) is out
    assert torch.equal(out, interpolate(base_NV, memory_NW, alpha_N))
    assert wide[1::2, 1005:].isnan().all() and wide[1::2, :5].isnan().all()


def test_offsets_beyond_31_bits(device):
    """Row 2 starts 2^31 elements in. Nearly all of the 4 GB stay untouched, hence unallocated."""
    base = torch.empty(2**31 + 5, dtype=BF16, device=device).as_strided((3, 5), (2**30, 1))
    base_NV, memory_NW, alpha_N = (x.to(device) for x in make(3, 5, 5, BF16, BF16))
    base.copy_(base_NV)
    assert torch.equal(
        interpolate(base, memory_NW, alpha_N), interpolate(base_NV, memory_NW, alpha_N)
    )


def test_out_may_be_the_base(device):
    base_NV, memory_NW, alpha_N = (x.to(device) for x in make(33, 5000, 5000))
    want = interpolate(base_NV, memory_NW, alpha_N, as_logits=True)
    assert interpolate(base_NV, memory_NW, alpha_N, as_logits=True, out=base_NV) is base_NV
    assert torch.equal(base_NV, want)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_empty_batch(device, alpha):
    empty = torch.empty(0, 50, device=device)
    for as_logits in (False, True):
        out = interpolate(empty, empty, torch.full((0,), alpha, device=device), as_logits=as_logits)
        assert out.shape == (0, 50) and out.dtype == FP32


def test_properties(device):
    generator = torch.Generator().manual_seed(0)
    base_NV, memory_NW = (
        (torch.randn(9, 5000, generator=generator) * 3).to(device) for _ in range(2)
    )
    alpha_N = torch.linspace(0, 1, 9, device=device)
    logp_NV = interpolate(base_NV, memory_NW, alpha_N)
    # Rows sum to one, and shifting a model's logits changes nothing.
    assert_close(logp_NV.double().logsumexp(-1), torch.zeros(9))
    assert_close(interpolate(base_NV + 3, memory_NW - 5, alpha_N), logp_NV)
    # The logits form differs by the base's logsumexp.
    lse_N1 = base_NV.double().logsumexp(-1, keepdim=True)
    logits_NV = interpolate(base_NV, memory_NW, alpha_N, as_logits=True)
    assert_close(logits_NV, logp_NV.double() + lse_N1)
    # A memory equal to the base changes nothing, whatever the weight.
    assert_close(interpolate(base_NV, base_NV, alpha_N), base_NV.double() - lse_N1)
    assert_close(interpolate(base_NV, base_NV, alpha_N, as_logits=True), base_NV)


def test_weight_zero_is_the_base_bit_for_bit(device):
    """Down to the sign of zero, and even if the memory is broken."""
    base_NV = torch.tensor([[-0.0, 0.0, -torch.inf, 1e4], [1e-40, 1e30, -1e4, 0.1]])
    memory_NV = torch.full((2, 4), torch.nan)
    got = interpolate(
        base_NV.to(device), memory_NV.to(device), torch.zeros(2).to(device), as_logits=True
    )
    assert bits(got) == bits(base_NV)
    # Beside a row that is mixed, and in place.
    base, memory_NV[1] = base_NV.clone().to(device), 0
    interpolate(
        base, memory_NV.to(device), torch.tensor([0.0, 0.5]).to(device), as_logits=True, out=base
    )
    assert bits(base)[0] == bits(base_NV)[0] and not base.isnan().any()


def test_output_is_float32_whatever_the_default(device):
    """vLLM makes the model's dtype the default while it loads and profiles a model."""
    base_NV, memory_NW, alpha_N = (x.to(device) for x in make(3, 50, 50))
    want = interpolate(base_NV, memory_NW, alpha_N)
    torch.set_default_dtype(BF16)
    try:
        assert torch.equal(interpolate(base_NV, memory_NW, alpha_N), want)
    finally:
        torch.set_default_dtype(FP32)


def test_uniform_rows_at_the_lowest_finite_logit(device):
    """Masks written as finfo.min are numbers, not holes: the row is uniform."""
    lowest = torch.full((1, 4), torch.finfo(FP32).min, device=device)
    got = interpolate(lowest, lowest, torch.full((1,), 0.5, device=device))
    assert_close(got, torch.full((1, 4), 0.25).log())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of NaN
@pytest.mark.parametrize("as_logits", [False, True])
@pytest.mark.parametrize("device", ["whole", "split", "torch", "compiled"], indirect=True)
def test_broken_numbers_stay_in_their_row(device, as_logits):
    base_NV, memory_NW = torch.zeros(6, 9), torch.zeros(6, 5)
    base_NV[0, 3] = base_NV[1].fill_(torch.nan)[0]
    memory_NW[2, 1], base_NV[3, 1] = torch.nan, torch.inf
    alpha_N = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.5, 0.5])
    inputs = (x.to(device) for x in (base_NV, memory_NW, alpha_N))
    got = interpolate(*inputs, as_logits=as_logits).cpu()
    assert got[:5].isnan().all() and got[5].isfinite().all()


GOOD = {"base_NV": torch.zeros(2, 5), "memory_NW": torch.zeros(2, 6), "weights": torch.zeros(2)}


@pytest.mark.parametrize(
    "change",
    [
        {"base_NV": torch.zeros(5)},
        {"base_NV": torch.zeros(2, 0)},
        {"base_NV": torch.zeros(5, 2).t()},
        {"base_NV": torch.zeros(2, 5, dtype=torch.float64)},
        {"base_NV": torch.zeros(2, 5, device="meta")},
        {"memory_NW": torch.zeros(3, 6)},
        {"memory_NW": torch.zeros(2, 6, dtype=torch.int32)},
        {"weights": torch.zeros(3)},
        {"weights": torch.zeros(2, 1)},
        {"weights": torch.zeros(2, dtype=FP16)},
        {"gate": (torch.zeros(3), torch.zeros(4, 5))},
        {"gate": (torch.zeros(2), torch.zeros(3, 5))},
        {"gate": (torch.zeros(2, dtype=FP16), torch.zeros(4, 5))},
        {"out": torch.zeros(2, 6)},
        {"out": torch.zeros(2, 5, dtype=BF16)},
    ],
    ids=lambda change: "-".join(
        f"{k}{'-'.join(f'{tuple(x.shape)}{x.dtype}' for x in (v if k == 'gate' else [v]))}"
        for k, v in change.items()
    ),
)
def test_misuse_is_a_value_error(change):
    with pytest.raises(ValueError, match=r"(must|has|give|needs) .*\.$"):
        interpolate(**(GOOD | change))


@pytest.mark.parametrize("interpreted", [False, True])
def test_dispatch_of_cpu_tensors(monkeypatch, interpreted):
    called = []
    monkeypatch.setattr(op, "INTERPRETED", interpreted)
    monkeypatch.setattr(op, "interpolate_triton", lambda *_: called.append("kernel"))
    monkeypatch.setattr(op, "interpolate_torch", lambda *inputs: called.append(inputs[-1]))
    interpolate(**GOOD)
    interpolate(**GOOD, compiled=True)
    assert called == (["kernel", "kernel"] if interpreted else [False, True])


def test_works_without_triton():
    code = """
        import sys; sys.modules["triton"] = None
        import torch
        from vllm_memdec.kernels.interpolate import interpolate
        x = torch.zeros(2, 4)
        print(interpolate(x, x, torch.tensor([0.5, 1.0])).exp().sum().item())
    """
    assert float(run_python(code, os.environ)) == pytest.approx(2, abs=TOLERANCE)


def run_python(code, env):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout
