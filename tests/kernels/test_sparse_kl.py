"""The loss and its gradient against the float64 dense oracle: Triton kernel and PyTorch alike.

Without CUDA the kernel runs in Triton's interpreter (tests/conftest.py sets TRITON_INTERPRET=1).
Run: pytest tests/kernels/test_sparse_kl.py
Shape suffixes: N rows, V columns.
"""

import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from vllm_memdec.kernels import sparse_kl as op
from vllm_memdec.kernels.reference import sparse_kl_reference
from vllm_memdec.kernels.sparse_kl import Mixture, SparseRows, sparse_kl

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Values are float32 whatever the logits' type: absolute up to magnitude 1, relative above.
VALUE = 1e-5
# Gradients lie in [-1, 1] and end in 8, 11 or 24 bits: one of the last bit below 1, since Triton's
# interpreter cuts bf16 off where compiled code rounds, beside what float32 loses before.
GRADIENT = {BF16: 2**-8 + 1e-6, FP16: 2**-11, FP32: 1e-6}
# What is special about a row.
KINDS = ("", "no targets", "holes", "1e4", "no mass", "label is a target", "many targets", "zero")
# (N, V, dtype). 4,096 is the kernel's block, 128 that of its targets.
CASES = [
    *((33, V, FP32) for V in (1, 7, 1000, 4095, 4097)),
    *((33, 1000, dtype) for dtype in (BF16, FP16)),
    *((8, V, FP32) for V in (49152, 262144)),
    *((8, 151936, dtype) for dtype in (BF16, FP16, FP32)),
    (1, 8193, BF16),
]


def make(N, V, dtype=FP32):
    """Return logits [N, V], labels [N], targets and column weights [V]; rows differ in kind."""
    rng = np.random.default_rng(N + V)
    generator = torch.Generator().manual_seed(V)
    logits_NV = torch.randn(N, V, generator=generator) * 3
    labels_N = torch.randint(V, (N,), generator=generator)
    lengths, tokens, probabilities = [], [], []
    for n, row in enumerate(logits_NV):
        kind = KINDS[n % len(KINDS)]
        count = {"no targets": 0, "many targets": min(V, 300)}.get(kind, rng.integers(1, 6))
        some = rng.choice(V, min(V, count), replace=False)
        p = rng.dirichlet(np.ones(len(some))) if len(some) else np.zeros(0)
        if kind == "holes":  # some of them at the label and at targets, whose loss is infinite
            row[torch.rand(V, generator=generator) < 0.3] = -torch.inf
        elif kind == "1e4":
            row[0], row[V // 2] = -1e4, 1e4
        elif kind == "no mass":
            row.fill_(-torch.inf)
        elif kind == "label is a target":
            labels_N[n] = int(some[0])
        elif kind == "zero":
            p[0], row[some[0]] = 0, -torch.inf
        lengths.append(len(some)), tokens.append(some), probabilities.append(p)
    targets = SparseRows(
        torch.from_numpy(np.r_[0, np.cumsum(lengths)].astype(np.int64)),
        torch.from_numpy(np.concatenate(tokens)),
        torch.from_numpy(np.concatenate(probabilities)).float(),
    )
    return logits_NV.to(dtype), labels_N, targets, torch.rand(V, generator=generator)


def to(device, logits_NV, labels_N, targets, log_weight_V):
    parts = (x.to(device) for x in (targets.offsets, targets.token, targets.probability))
    return logits_NV.to(device), labels_N.to(device), SparseRows(*parts), log_weight_V.to(device)


def dense(targets, V):
    """Return targets [N, V]."""
    row, token, probability = targets.entries()
    shape = (len(targets.offsets) - 1, V)
    return torch.zeros(shape, device=row.device).index_put((row, token), probability)


def assert_close(got, want, tolerance):
    got, want = got.cpu().double(), want.cpu().double()
    assert not got.isnan().any() and not want.isnan().any()
    assert torch.equal(got.isinf(), want.isinf())
    error = (got - want)[want.isfinite()].abs() / want[want.isfinite()].abs().clamp(min=1)
    assert error.numel() == 0 or error.max() <= tolerance


def check(device, case, betas=(0.0, 0.3, 1.0)):
    logits_NV, labels_N, targets, log_weight_V = to(device, *make(*case))
    before, dtype = logits_NV.clone(), logits_NV.dtype
    for beta in betas:
        for log_weight in (None, log_weight_V) if beta == 0.3 else (None,):
            out = torch.full_like(logits_NV, torch.nan)
            kl_N, ce_N = sparse_kl(
                logits_NV, labels_N, targets, beta, log_weight_V=log_weight, out=out
            )
            assert torch.equal(logits_NV, before)  # an input, unless it is `out`
            oracle = (dense(targets, logits_NV.shape[1]).cpu(), beta)
            want = sparse_kl_reference(
                logits_NV.cpu(),
                labels_N.cpu(),
                *oracle,
                None if log_weight is None else log_weight.cpu(),
            )
            assert kl_N.dtype == ce_N.dtype == FP32
            assert_close(kl_N, want[0], VALUE)
            assert_close(ce_N, want[1], VALUE)
            assert_close(out, want[2], GRADIENT[dtype])


def check_mixture(device, case, alpha, share):
    """Base and memory differ by up to e^20 in what they give to a label, or one gives nothing."""
    logits_NV, labels_N, targets, log_weight_V = to(device, *make(*case))
    base_N = torch.linspace(-20, 0, len(labels_N))
    base_N[1::9] = -torch.inf
    mixture = Mixture(base_N.to(device), alpha, share)
    out = torch.full_like(logits_NV, torch.nan)
    how = {"log_weight_V": log_weight_V, "mixture": mixture}
    _, ce_N = sparse_kl(logits_NV, labels_N, targets, 0.3, **how, out=out)
    target_NV = dense(targets, logits_NV.shape[1]).cpu()
    given = logits_NV.cpu(), labels_N.cpu(), target_NV, 0.3, log_weight_V.cpu()
    _, want_N, gradient_NV = sparse_kl_reference(*given, (base_N, alpha, share))
    some = (want_N.isfinite() | base_N.isfinite()).cpu()  # else nobody gives the label anything
    assert_close(out[some], gradient_NV[some], GRADIENT[logits_NV.dtype])
    parts = base_N.double() + math.log(1 - alpha), math.log(alpha) - want_N
    assert_close(mixture.loss(ce_N)[some], -torch.logaddexp(*parts)[some], VALUE)
    assert not out.isnan().any()


@pytest.fixture(params=["triton", "torch"])
def device(request, monkeypatch):
    """Make sparse_kl() run one implementation, and return the device that does it."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    monkeypatch.setattr(op, "INTERPRETED", interpreted and request.param == "triton")
    return "cuda" if request.param == "triton" and not interpreted else "cpu"


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_matches_oracle(device, case):
    check(device, case, (0.3,) if case[1] > 100_000 else (0.0, 0.3, 1.0))


@pytest.mark.parametrize(("alpha", "share"), [(0.5, 1.0), (0.5, 0.3), (0.2, 1.0), (0.99, 0.7)])
@pytest.mark.parametrize("case", CASES[1:4], ids=lambda case: "-".join(map(str, case)))
def test_mixture_matches_oracle(device, case, alpha, share):
    check_mixture(device, case, alpha, share)


def test_a_share_of_the_label_in_its_target_is_a_smaller_beta(device):
    """Targets that hold their own row with a share s are the gradient of beta (1 - s)."""
    logits_NV, labels_N, targets, _ = to(device, *make(33, 1000))
    share, beta = 0.25, 0.6
    target_NV = dense(targets, 1000)
    some_N = target_NV.sum(1) > 0  # a row without neighbours has no target to share
    target_NV[some_N] *= 1 - share
    target_NV[some_N, labels_N[some_N]] += share
    given = logits_NV.cpu(), labels_N.cpu(), target_NV.cpu()
    *_, want_NV = sparse_kl_reference(*given, beta)
    out = torch.empty_like(logits_NV)
    sparse_kl(logits_NV, labels_N, targets, beta * (1 - share), out=out)
    assert_close(out[some_N], want_NV[some_N.cpu()], GRADIENT[FP32])


@pytest.mark.gpu
def test_compiled_kernel_matches_oracle():
    assert not op.INTERPRETED, "unset TRITON_INTERPRET to test the compiled kernel"
    for case in CASES:
        check("cuda", case)
        check_mixture("cuda", case, 0.5, 0.3)


def test_compiles_without_a_gpu(tmp_path):
    """The interpreter accepts what the compiler refuses, so compile for an H100 here, too."""
    code = """
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from vllm_memdec.kernels.sparse_kl import BLOCK, NUM_WARPS, TARGETS, _loss_kernel as kernel
        for optional in ("*fp32", "constexpr"):
            types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("kl", "ce"), "*fp32")
            types |= {"logits": "*bf16", "out": "*bf16", "saved": "*fp32", "beta": "fp32"}
            types |= {"probabilities": "*fp32", "share": "fp32"}
            types |= dict.fromkeys(("log_weight", "odds"), optional)
            types |= dict.fromkeys(("labels", "offsets", "tokens"), "*i64")
            values = {"BLOCK": BLOCK, "TARGETS": TARGETS}
            values |= {"log_weight": None, "odds": None} if optional == "constexpr" else {}
            source = ASTSource(kernel, types | dict.fromkeys(values, "constexpr"), values)
            compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": NUM_WARPS})
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run_python(code, env | {"TRITON_CACHE_DIR": str(tmp_path)})


def test_gradient_over_the_logits(device):
    for dtype in (FP32, BF16):
        logits_NV, labels_N, targets, _ = to(device, *make(16, 5000, dtype))
        out = torch.empty_like(logits_NV)
        want = sparse_kl(logits_NV, labels_N, targets, 0.3, out=out)
        got = sparse_kl(logits_NV, labels_N, targets, 0.3, out=logits_NV)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(logits_NV, out)


def test_strided_rows(device):
    logits_NV, labels_N, targets, _ = to(device, *make(16, 1000))
    wide = torch.full((32, 3000), torch.nan, device=device)
    logits, out = wide[::2, 7:1007], wide[1::2, 5:1005]
    logits.copy_(logits_NV)
    sparse_kl(logits, labels_N, targets, 0.3, out=out)
    plain = torch.empty_like(logits_NV)
    sparse_kl(logits_NV, labels_N, targets, 0.3, out=plain)
    assert torch.equal(out, plain)
    assert wide[1::2, 1005:].isnan().all() and wide[1::2, :5].isnan().all()


def test_offsets_beyond_31_bits(device):
    """Row 2 starts 2^31 elements in. Nearly all of the 4 GB stay untouched, hence unallocated."""
    far = torch.empty(2**31 + 5, dtype=BF16, device=device).as_strided((3, 5), (2**30, 1))
    logits_NV, labels_N, targets, _ = to(device, *make(3, 5, BF16))
    far.copy_(logits_NV)
    sparse_kl(far, labels_N, targets, 0.3, out=far)
    sparse_kl(logits_NV, labels_N, targets, 0.3, out=logits_NV)
    assert torch.equal(far, logits_NV)


def test_slices_are_the_rows_of_the_whole(device):
    logits_NV, labels_N, targets, _ = to(device, *make(24, 50))
    whole = torch.empty_like(logits_NV)
    kl_N, ce_N = sparse_kl(logits_NV, labels_N, targets, 0.3, out=whole)
    for start, stop in [(0, 24), (0, 1), (1, 2), (5, 10), (23, 24), (7, 7)]:
        rows, part = slice(start, stop), torch.empty_like(whole[start:stop])
        kl, ce = sparse_kl(
            logits_NV[rows], labels_N[rows], targets.slice(start, stop), 0.3, out=part
        )
        assert torch.equal(kl, kl_N[rows]) and torch.equal(ce, ce_N[rows])
        assert torch.equal(part, whole[rows])


def test_properties(device):
    logits_NV, labels_N, targets, _ = to(device, *make(16, 5000))
    logits_NV = torch.randn(16, 5000, device=device)
    mass_N = dense(targets, 5000).sum(-1)
    grad_NV, shifted_NV = torch.empty_like(logits_NV), torch.empty_like(logits_NV)
    losses = sparse_kl(logits_NV, labels_N, targets, 0.3, out=grad_NV)
    # Shifting all logits changes nothing, so a row's gradient adds up to nothing.
    for a, b in zip(
        losses, sparse_kl(logits_NV + 3, labels_N, targets, 0.3, out=shifted_NV), strict=True
    ):
        assert_close(a, b, VALUE)
    assert_close(grad_NV, shifted_NV, GRADIENT[FP32])
    assert_close(grad_NV.double().sum(-1), torch.zeros(16), VALUE)
    # KL(p || p) = 0, and no row with targets has less.
    assert (losses[0][mass_N > 0] > 0).all() and (losses[0][mass_N == 0] == 0).all()
    p_V = torch.tensor([0.5, 0.2, 0.3], device=device)
    zero = (torch.tensor([i], device=device) for i in (0,))
    every = SparseRows(torch.tensor([0, 3], device=device), torch.arange(3, device=device), p_V)
    kl_N, _ = sparse_kl(p_V.log()[None], *zero, every, 1.0, out=torch.empty(1, 3, device=device))
    assert_close(kl_N, torch.zeros(1), VALUE)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of NaN
def test_broken_numbers_stay_in_their_row(device):
    logits_NV, labels_N, targets, _ = to(device, *make(16, 50))
    logits_NV = torch.zeros(16, 50, device=device)
    logits_NV[2, 3], logits_NV[4] = torch.nan, torch.nan
    kl_N, ce_N = sparse_kl(logits_NV, labels_N, targets, 0.3, out=logits_NV)
    broken = torch.isin(torch.arange(16), torch.tensor([2, 4]))
    for x in (ce_N, logits_NV.sum(-1), kl_N):
        assert torch.equal(x.isnan().cpu(), broken)


def test_empty_batch(device):
    empty = SparseRows(
        *(torch.zeros(n, dtype=t, device=device) for n, t in ((1, torch.int64),) * 1),
        torch.zeros(0, dtype=torch.int64, device=device),
        torch.zeros(0, device=device),
    )
    labels_N = torch.zeros(0, dtype=torch.int64, device=device)
    out = torch.empty(0, 50, device=device)
    kl_N, ce_N = sparse_kl(out, labels_N, empty, 0.5, out=out)
    assert kl_N.shape == ce_N.shape == (0,)


GOOD = {
    "logits_NV": torch.zeros(2, 5),
    "labels_N": torch.zeros(2, dtype=torch.int64),
    "targets": (torch.tensor([0, 1, 1]), torch.tensor([3]), torch.ones(1)),
    "beta": 0.5,
    "log_weight_V": None,
    "mixture": None,
    "out": torch.zeros(2, 5),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logits_NV", torch.zeros(5)),
        ("logits_NV", torch.zeros(5, 2).t()),
        ("logits_NV", torch.zeros(2, 5, dtype=torch.float64)),
        ("logits_NV", torch.zeros(2, 5, device="meta")),
        ("out", torch.zeros(2, 6)),
        ("out", torch.zeros(2, 5, dtype=torch.int32)),
        ("labels_N", torch.zeros(3, dtype=torch.int64)),
        ("labels_N", torch.zeros(2, dtype=torch.int32)),
        ("labels_N", torch.zeros(4, dtype=torch.int64)[::2]),
        ("log_weight_V", torch.zeros(4)),
        ("log_weight_V", torch.zeros(5, dtype=FP16)),
        ("mixture", Mixture(torch.zeros(3), 0.5, 1.0)),
        ("targets", (torch.tensor([0, 1]), torch.tensor([3]), torch.ones(1))),
        ("targets", (torch.tensor([0, 1, 1]), torch.tensor([3]), torch.ones(2))),
        ("targets", (torch.tensor([0, 1, 1]), torch.tensor([3]), torch.ones(1).double())),
    ],
    ids=str,
)
def test_misuse_is_a_value_error(name, value):
    arguments = GOOD | {name: value}
    arguments["targets"] = SparseRows(*arguments["targets"])
    with pytest.raises(ValueError, match=r"must .*\.$"):
        sparse_kl(**arguments)


def test_works_without_triton():
    code = """
        import sys; sys.modules["triton"] = None
        import torch
        from vllm_memdec.kernels.sparse_kl import SparseRows, sparse_kl
        targets = SparseRows(torch.tensor([0, 1]), torch.tensor([1]), torch.ones(1))
        x = torch.zeros(1, 4)
        print(sparse_kl(x, torch.tensor([0]), targets, 0.5, out=x)[0].exp().item())
    """
    assert float(run_python(code, os.environ)) == pytest.approx(4, abs=VALUE)


def run_python(code, env):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout
