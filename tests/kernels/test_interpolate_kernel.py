"""Weights in the columns of rows, the two plans of the kernels, what the compiler makes of them.

Without CUDA the kernels run in Triton's interpreter, and are compiled for GPUs that are not there.
Run: pytest tests/kernels/test_interpolate_kernel.py
Shape suffixes: N rows, V vocabulary of the base, W width of the memory, A columns.
"""

import json
import os
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from test_interpolate import BF16, FP16, FP32, TOLERANCE, assert_close, bits, make
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_memdec.batch import encode
from vllm_memdec.kernels import interpolate as op
from vllm_memdec.kernels.interpolate import RowWeights, interpolate
from vllm_memdec.kernels.reference import (
    gate_reference,
    interpolate_reference,
    log_softmax_or_nothing,
    row_weights_reference,
    several_reference,
)

# Rows: of memory 0, 1, none; weights plain and capped, 0, 1, one that needs all three columns.
NUMBERS = torch.tensor([0, 1, -1, 0, 1, 0, 1, 0])
WEIGHTS = torch.tensor([0.3, 0.7, 0.0, -0.6, 1.0, 0.0, -0.4, 1 / 3])
DEVICE = "cpu" if op.INTERPRETED else "cuda"


@pytest.fixture(params=["whole", "split", "torch", "compiled"])
def mix(request, monkeypatch):
    """Return interpolate() bound to one implementation; in the interpreter slices are small."""
    if request.param in ("torch", "compiled"):
        monkeypatch.setattr(op, "INTERPRETED", False)
        monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
        return partial(interpolate, compiled=request.param == "compiled")
    if op.INTERPRETED:
        monkeypatch.setattr(op, "SLICE", 512)
        monkeypatch.setattr(op, "WHOLE", 1024)
    return partial(interpolate, split=request.param == "split")


def rows(dtype, V, W, gated):
    """Return base [N, V], two memories [N, W], columns [N, A] inside wider rows, and gates."""
    generator = torch.Generator().manual_seed(V + W)
    N = len(NUMBERS)
    base_NV, *memories = (
        (torch.randn(N, X, generator=generator) * 3).to(dtype).to(DEVICE) for X in (V, W, W)
    )
    hidden_ND = torch.randn(N, 40, generator=generator).to(dtype)
    hidden_ND[:, 29:32] = encode(WEIGHTS, dtype)
    hidden_ND[:, 32] = NUMBERS.to(dtype)
    gates = [None, None]
    if gated:
        gates = [
            (torch.randn(N, generator=generator).to(DEVICE), torch.ones(4, 3, device=DEVICE) / n)
            for n in (2, -3)
        ]
    return base_NV, memories, hidden_ND.to(DEVICE)[:, 29:37], gates


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("dtype", "V", "W"), [(BF16, 1000, 1003), (FP16, 1001, 700), (FP32, 1203, 1203)]
)
def test_memories_are_mixed_one_after_the_other(mix, dtype, V, W, gated):
    base_NV, memories, columns_NA, gates = rows(dtype, V, W, gated)
    for as_logits in (True, False):
        out = mix(
            base_NV, memories[0], RowWeights(columns_NA, 0), gate=gates[0], as_logits=as_logits
        )
        nobody, second = bits(out[2]), out[NUMBERS == 1].clone()
        if as_logits:
            others = NUMBERS != 0
            assert bits(out[others]) == bits(base_NV[others].float())
        keep = RowWeights(columns_NA, 1, others="keep")
        mix(base_NV, memories[1], keep, gate=gates[1], as_logits=as_logits, out=out)
        assert bits(out[2]) == nobody and not torch.equal(out[NUMBERS == 1], second)
        want = torch.zeros(out.shape, dtype=torch.float64)
        for number in (0, 1):
            alpha_N, mine_N = row_weights_reference(columns_NA.cpu(), number, gated)
            gate = gates[number] and tuple(x.cpu() for x in gates[number])
            part = interpolate_reference(
                base_NV.cpu(), memories[number].cpu(), alpha_N, as_logits, gate
            )
            keeps = mine_N | (NUMBERS == -1 if number == 0 else False)
            want = torch.where(keeps[:, None], part, want)
        assert_close(out, want)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("others", ["base", "keep"])
def test_the_tally_is_the_sum_of_weights(mix, gated, others):
    """Of the memory's own rows, what was there before included, and the mixture is the same."""
    base_NV, (memory_NW, _), columns_NA, (gate, _) = rows(BF16, 1000, 1003, gated)
    given = (base_NV, memory_NW, RowWeights(columns_NA, 0, others))
    options = {"gate": gate, "as_logits": True}
    if not gated:
        columns_NA[0, 0] = -0.5  # what profile runs send: no weight, but a row
    out, plain = (torch.zeros(base_NV.shape, device=DEVICE) for _ in range(2))
    tally_2 = torch.tensor([10.0, 100.0], dtype=torch.float64, device=DEVICE)
    mix(*given, **options, out=out, tally_2=tally_2)
    assert bits(out) == bits(mix(*given, **options, out=plain))
    asked_N, mine_N = row_weights_reference(columns_NA.cpu(), 0, gated)
    for n in asked_N.lt(0).nonzero().flatten().tolist():
        logp_W, _ = log_softmax_or_nothing(memory_NW[n, :1000].cpu().double())
        weight = gate_reference(logp_W, gate[0][n].cpu(), gate[1].cpu())
        asked_N[n] = min(weight, -asked_N[n])
    total, count = tally_2.tolist()
    assert total == pytest.approx(10 + asked_N.sum().item(), abs=TOLERANCE)
    assert count == 100 + mine_N.sum()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("K", "V"), [(2, 1000), (3, 1003)])
def test_several_memories_of_one_row(mix, K, V, gated):
    """In turns, each into what was left; given weights as vllm_memdec/several.py makes them."""
    generator = torch.Generator().manual_seed(V)
    base_NV, *memories = (
        (torch.randn(5, V, generator=generator) * 3).to(BF16).to(DEVICE) for _ in range(1 + K)
    )
    alpha_KN = torch.rand(K, 5, generator=generator)
    alpha_KN *= torch.tensor([0.1, 0.5, 0.9, 1.0, 1.0]) / alpha_KN.sum(0)
    alpha_KN[0, 4] = 0.01  # the base has nothing, and the first memory little
    alpha_KN[-1, 4] += 1 - alpha_KN[:, 4].sum()
    gates, out, rest_N = None, base_NV, torch.ones(5, device=DEVICE)
    if gated:
        gates = [(torch.randn(5, generator=generator), torch.ones(4, 3) / n) for n in (2, -3, 5)]
    made_N = (1 - alpha_KN.double().sum(0)).clamp(min=0)
    made_N[made_N < 1e-6] = 0
    wanted_KN = alpha_KN.double()
    wanted_KN /= torch.where(made_N == 0, wanted_KN.sum(0), 1)  # what float32 rounded
    for k in range(K):
        made_N = made_N + alpha_KN[k].double()
        weight_N, gate = (alpha_KN[k].double() / made_N).float().to(DEVICE), None
        if gates is not None:
            score_N, certainty_4K = (x.to(DEVICE) for x in gates[k])
            weight_N, gate = torch.full_like(weight_N, -1), (score_N + rest_N.log(), certainty_4K)
        told_N = torch.zeros_like(rest_N)
        given = {"gate": gate, "as_logits": True, "used_N": told_N}
        out = mix(out, memories[k], weight_N, **given, out=None if k == 0 else out)
        rest_N = rest_N * (1 - told_N)
    host = (base_NV.cpu(), [memory_NV.cpu() for memory_NV in memories])
    key_NV = several_reference(*host, wanted_KN, gates and gates[:K])
    lse_N1 = base_NV.double().logsumexp(-1, keepdim=True).cpu()
    assert_close(out, key_NV + lse_N1)
    assert torch.allclose(out.cpu().double().logsumexp(-1, keepdim=True), lse_N1, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of NaN
def test_the_tally_stays_a_number(mix):
    base_NV, memory_NW, _ = (x.to(DEVICE) for x in make(3, 600, 600))
    alpha_N = torch.tensor([0.25, torch.nan, 1.0], device=DEVICE)
    tally_2 = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    mix(base_NV, memory_NW, alpha_N, tally_2=tally_2)
    assert tally_2.tolist() == [1.25, 2]


@pytest.mark.parametrize("gated", [False, True])
def test_the_weights_used_are_told(mix, gated):
    """Of the memory's own rows, as given and as a gate gave them; rows that are kept are not."""
    base_NV, (memory_NW, _), columns_NA, (gate, _) = rows(FP32, 1203, 1203, gated)
    asked_N, mine_N = row_weights_reference(columns_NA.cpu(), 0, gated)
    for n in asked_N.lt(0).nonzero().flatten().tolist():
        logp_W, _ = log_softmax_or_nothing(memory_NW[n].cpu().double())
        asked_N[n] = min(gate_reference(logp_W, gate[0][n].cpu(), gate[1].cpu()), -asked_N[n])
    given = {"gate": gate, "as_logits": True}
    for others, rest in (("base", 0.0), ("keep", 7.0)):
        used_N = torch.full((len(base_NV),), 7.0, device=DEVICE)
        weights = RowWeights(columns_NA, 0, others)
        out, plain = (torch.zeros(base_NV.shape, device=DEVICE) for _ in range(2))
        mix(base_NV, memory_NW, weights, **given, out=out, used_N=used_N)
        assert bits(out) == bits(mix(base_NV, memory_NW, weights, **given, out=plain))
        wanted = torch.where(mine_N, asked_N, rest)
        assert torch.allclose(used_N.cpu().double(), wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_columns_hold_the_float32_weight_bit_for_bit(mix, dtype):
    base_NV, (memory_NW, _), columns_NA, _ = rows(dtype, 50, 50, False)
    alpha_N = torch.where(NUMBERS == 0, WEIGHTS.clamp(min=0), 0).to(DEVICE)
    got = mix(base_NV, memory_NW, RowWeights(columns_NA, 0))
    assert bits(got) == bits(mix(base_NV, memory_NW, alpha_N))


def test_rows_of_others_may_hold_anything(mix):
    """Neither a broken memory nor a broken base reaches a row that is another memory's."""
    base_NV, (memory_NW, _), columns_NA, _ = rows(BF16, 1001, 1001, False)
    memory_NW[NUMBERS != 0] = torch.nan
    got = mix(base_NV, memory_NW, RowWeights(columns_NA, 0), as_logits=True)
    assert bits(got[NUMBERS != 0]) == bits(base_NV[NUMBERS != 0].float())
    base_NV[NUMBERS != 0] = torch.nan
    out = torch.full(base_NV.shape, 7.0, device=DEVICE)
    mix(base_NV, memory_NW, RowWeights(columns_NA, 0, "keep"), as_logits=True, out=out)
    assert (out[NUMBERS != 0] == 7).all() and not out[NUMBERS == 0].isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of NaN
def test_random_columns_are_clamped(mix):
    """vLLM's profile run sends them."""
    base_NV, memory_NW, _ = (x.to(DEVICE) for x in make(6, 50, 50))
    columns_NA = torch.tensor([[9.0, 1, 1, 3], [-9.0, 1, 1, 3], [0.5, 0, 0, 3.5]] * 2).to(DEVICE)
    columns_NA[3, 0] = torch.nan
    got = mix(base_NV, memory_NW, RowWeights(columns_NA, 3))
    plain_N = torch.tensor([1.0, 0, 0, torch.nan, 0, 0], device=DEVICE)
    assert bits(got[:3]) == bits(mix(base_NV, memory_NW, plain_N)[:3])
    assert got[3].isnan().all() and not got[4:].isnan().any()


class NoWaiting(TorchDispatchMode):
    """Raise where the host would wait for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        masked = "index" in name and any(
            x is not None and x.dtype == torch.bool for x in (args[1] if len(args) > 1 else ())
        )
        waits = ("nonzero", "_local_scalar_dense", "masked_select", "is_nonzero", "equal")
        if masked or name.split("::")[-1].split(".")[0] in waits:
            raise AssertionError(f"{name} makes the host wait")
        return function(*args, **(kwargs or {}))


def test_the_host_does_not_wait(monkeypatch):
    monkeypatch.setattr(op, "INTERPRETED", False)
    base_NV, memories, columns_NA, gates = rows(BF16, 100, 103, True)
    with pytest.raises(AssertionError, match="wait"), NoWaiting():
        base_NV[columns_NA[:, 3] == 1]
    with NoWaiting():
        tally_2 = torch.zeros(2, dtype=torch.float64)
        first, keep = RowWeights(columns_NA, 0), RowWeights(columns_NA, 1, "keep")
        out = interpolate(base_NV, memories[0], first, gate=gates[0], tally_2=tally_2)
        interpolate(base_NV, memories[1], keep, gate=gates[1], out=out, tally_2=tally_2)


@pytest.mark.parametrize(
    "weights",
    [
        RowWeights(torch.zeros(2, 3), 0),
        RowWeights(torch.zeros(3, 4), 0),
        RowWeights(torch.zeros(4), 0),
        RowWeights(torch.zeros(2, 4, dtype=torch.float64), 0),
        RowWeights(torch.zeros(4, 2).t(), 0),
        RowWeights(torch.zeros(2, 4), 0, "drop"),
        RowWeights(torch.zeros(2, 4), 0, "keep"),
        RowWeights(torch.zeros(2, 4, device="meta"), 0),
    ],
    ids=range(8),
)
def test_misuse_is_a_value_error(weights):
    with pytest.raises(ValueError, match=r"used weights must be float32 \[2\]"):
        interpolate(*torch.zeros(2, 2, 5), torch.zeros(2), used_N=torch.zeros(3))
    with pytest.raises(ValueError, match=r"(must|needs) .*\.$"):
        interpolate(torch.zeros(2, 5), torch.zeros(2, 6), weights)


# -- The plans ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("V", "W", "dtype", "gated"),
    [(1500, 1500, BF16, True), (1027, 1025, FP16, False), (520, 1000, FP32, True)],
)
def test_bits_do_not_depend_on_the_plan_or_other_rows(monkeypatch, V, W, dtype, gated):
    if op.INTERPRETED:
        monkeypatch.setattr(op, "SLICE", 512)
    base_NV, memory_NW, alpha_N = (x.to(DEVICE) for x in make(3, V, W, dtype, dtype))
    alpha_N += 0.3 * (alpha_N < 0.3)
    gate = None
    if gated:
        alpha_N, gate = -alpha_N, (alpha_N * 2, torch.ones(4, 3, device=DEVICE) / 5)
    for as_logits in (False, True):
        mix = partial(interpolate, as_logits=as_logits, invariant=True)
        want = mix(base_NV, memory_NW, alpha_N, gate=gate)
        for split in (False, True):
            got = mix(base_NV, memory_NW, alpha_N, gate=gate, split=split)
            assert bits(got) == bits(want)
        row = slice(1, 2)
        gate_1 = gate and (gate[0][row], gate[1])
        alone = mix(base_NV[row], memory_NW[row], alpha_N[row], gate=gate_1)
        assert bits(alone) == bits(want[row])


def test_out_may_be_the_base_of_odd_width(monkeypatch):
    monkeypatch.setattr(op, "SLICE", 512)
    for V, W in ((1001, 1001), (1003, 700), (1000, 501)):
        base_NV, memory_NW, alpha_N = (x.to(DEVICE) for x in make(5, V, W))
        for split in (False, True):
            same = {"as_logits": True, "split": split}
            want, base = interpolate(base_NV, memory_NW, alpha_N, **same), base_NV.clone()
            assert bits(interpolate(base, memory_NW, alpha_N, out=base, **same)) == bits(want)


@pytest.mark.parametrize(("V", "split"), [(512, False), (513, True)])
def test_rows_of_several_slices_are_split(monkeypatch, V, split):
    monkeypatch.setattr(op, "SLICE", 512)
    base_NV, memory_NW, alpha_N = (x.to(DEVICE) for x in make(2, V, V))
    chosen = []
    of = op.Plan.of
    monkeypatch.setattr(
        op.Plan, "of", lambda *a, sliced: chosen.append(sliced) or of(*a, sliced=sliced)
    )
    interpolate(base_NV, memory_NW, alpha_N)
    assert chosen == [split]


# -- The compiler ---------------------------------------------------------------------------------

# Registers a thread may have if a multiprocessor's 65,536 are to hold WHOLE_WARPS warps, and of
# split's kernels 4 programs of SLICE_WARPS.
REGISTERS = {"whole": 64, "partial": 64, "combine": 64}

COMPILE = """
    import json, re, subprocess, tempfile
    import torch, triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
    from triton.compiler import ASTSource
    from vllm_memdec.kernels import interpolate as op

    KERNELS = {"whole": op.whole_kernel, "partial": op.partial_kernel, "combine": op.combine_kernel}
    POINTERS = ("base", "memory", "weights", "score", "certainty", "tally", "used", "partials")
    POINTERS += ("out",)

    def build(name, capability, V, dtype, gated, columns):
        kernel, plan = KERNELS[name], op.Plan.of(V, V, (dtype,), sliced=name != "whole")
        flags, warps = dict(plan.flags), plan.warps
        flags |= {"COLUMNS": columns, "KEEP": columns, "GATED": gated, "AS_LOGITS": True}
        flags |= {"COUNT": True, "TELL": gated}  # one store more, of 4 bytes
        flags["UNITS"] = 16
        names = kernel.arg_names
        flags = {k: v for k, v in flags.items() if k in names}
        kind = {"torch.bfloat16": "*bf16", "torch.float32": "*fp32"}[str(dtype)]
        types = dict.fromkeys(names, "i32") | {"number": "fp32"}
        types |= {n: "*fp32" for n in POINTERS if n in names} | {"base": kind, "memory": kind}
        types |= {"tally": "*fp64"} if "tally" in names else {}
        # Rows of the head's logits begin at multiples of 64 columns. The rest is as Triton sees it.
        known = {"V": V, "shared": V, "out_stride": V}
        aligned = ("base_stride", "memory_stride", *POINTERS)
        aligned += tuple(n for n, value in known.items() if value % 16 == 0)
        divides = [["tt.divisibility", 16]]
        source = ASTSource(
            kernel,
            types | dict.fromkeys(flags, "constexpr"),
            flags,
            {(names.index(n),): divides for n in aligned if n in names and n != "weights"},
        )
        options = {"num_warps": warps, "enable_fp_fusion": True}
        target = GPUTarget("cuda", capability, 32)
        ptx = triton.compile(source, target=target, options=options).asm["ptx"]
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(ptx)
            file.flush()
            arch = sm_arch_from_capability(capability)
            ptxas = [get_ptxas(capability).path, "-v", "--regAllocOptLevel=2"]
            command = [*ptxas, f"--gpu-name={arch}", file.name, "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        printed = done.stdout + done.stderr
        return {
            "registers": int(re.search(r"Used (\\d+) registers", printed)[1]),
            "spilled": sum(map(int, re.findall(r"(\\d+) bytes spill", printed))),
            "loads": re.findall(r"ld\\.global[\\w.:]*?((?:v\\d\\.)?b\\d+)", ptx),
            "stores": re.findall(r"st\\.global[\\w.:]*?((?:v\\d\\.)?b\\d+)", ptx),
            "vectors": flags["BLOCK"] * dtype.itemsize // 16 // (32 * warps),
        }
"""


def run_compiler(code, tmp_path):
    """Return what `code`, run behind COMPILE in a process without the interpreter, prints."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = textwrap.dedent(COMPILE) + textwrap.dedent(code)
    command = [sys.executable, "-c", code]
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_vocabularies_are_loaded_16_bytes_at_a_time(tmp_path):
    """By sm_90, from rows as vLLM's heads give them; the base's and the memory's columns alike."""
    loads = run_compiler(
        """
        print(json.dumps([
            (name, V, build(name, 90, V, torch.bfloat16, False, True))
            for V in (151936, 152064, 50257) for name in KERNELS
        ]))
        """,
        tmp_path,
    )
    assert len(loads) == 9
    for name, V, got in loads:
        sweeps = 2 if name == "whole" else 1
        assert got["loads"].count("v4.b32") == 2 * sweeps * got["vectors"], (name, V)
        # Of 50,257 columns the last one, of base and memory: columns of weights are float32 here.
        odd = 2 * sweeps if V % 8 else 0
        assert got["loads"].count("b16") == odd, (name, V)
        if name != "partial" and V % 8 == 0:
            assert set(got["stores"]) == {"v4.b32"}
        assert got["spilled"] == 0 and got["registers"] <= REGISTERS[name], (name, V)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_register_is_spilled(tmp_path, capability):
    """With all features on, for the two sizes of number."""
    spills = run_compiler(
        f"""
        print(json.dumps([
            (name, str(dtype), build(name, {capability}, 50257, dtype, True, True))
            for dtype in (torch.bfloat16, torch.float32) for name in KERNELS
            if dtype == torch.bfloat16 or name != "partial"
        ]))
        """,
        tmp_path,
    )
    for name, dtype, got in spills:
        assert got["spilled"] == 0 and got["registers"] <= REGISTERS[name], (name, dtype, got)
