"""What `make gpu` does on a machine with a GPU, as far as it can be done without one."""

import csv
import importlib.metadata
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.gpu import gpu, pack, served_mixture
from benchmarks.speed import shapes

ROOT = Path(__file__).parent.parent
OURS = ("VLLM_", "TRITON_", "TORCHDYNAMO_", "PYTEST_")  # set by tests for their own process
RESULTS = ROOT / "benchmarks/results"
WRITTEN = {  # by a rehearsal: file -> rows
    "gpu.csv": len(gpu.STEPS),
    "gpu_pool.csv": 1,
    "gpu_kernel_tests.csv": 1,
    "gpu_smoke.csv": 2,
    "gpu_bases.csv": 2,
    "kernel.csv": None,
    "gpu_drafting.csv": len(shapes.ACCEPTANCES),
    "shapes.csv": 6,  # two batch sizes, three systems
    "gpu_drafting_engine.csv": len(shapes.ACCEPTANCES),
    "loss.csv": 5,
    "training_gpu.csv": 1,
    "overhead_shapes.csv": 1,
}


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def contents() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in RESULTS.iterdir()}


@pytest.fixture
def env():
    """Return the environment of a user's shell."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OURS)}


def script(env, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu.gpu", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_a_rehearsal_runs_every_step(env, tmp_path):
    """Without a GPU's part; the minutes are many, for machines that do other things as well."""
    before = contents()
    options = f"GPU_OPTIONS=--dry --results {tmp_path}"
    command = ["make", "-s", "gpu", f"PYTHON={sys.executable}", "MINUTES=40", options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    rows = read(tmp_path / "gpu.csv")
    assert [row["step"] for row in rows] == [step.name for step in gpu.STEPS]
    assert {row["status"] for row in rows} == {gpu.REHEARSED}
    assert {path.name for path in tmp_path.iterdir()} == {*WRITTEN}
    for name, count in WRITTEN.items():
        found = read(tmp_path / name)
        assert found if count is None else len(found) == count, name
        assert all(row["device"] and row["commit"] and row["torch"] for row in found)
    assert contents() == before
    plain, drafting = read(tmp_path / "gpu_smoke.csv")
    assert (plain["dtype"], drafting["dtype"]) == ("bfloat16", "float32")
    assert 0 < float(plain["mean_error"]) < float(plain["mean_allowed"]) < 0.1
    assert int(plain["values"]) > 1000
    assert 0 < int(drafting["accepted"]) < int(drafting["drafted"])
    assert f"{len(rows)} of {len(rows)} steps rehearsed" in done.stdout


def python_step(tmp_path: Path, name: str, code: str, **options) -> gpu.Step:
    """Return a step that runs some code, a module in a folder that has to be on the path."""
    (tmp_path / f"{name}.py").write_text(code)
    return gpu.Step(name, 1, name, **options)


SLOW = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(__file__).with_suffix(".pid").write_text(str(child.pid))
print("summary: halfway", flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Return whether a process still runs; a zombie does not."""
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rsplit(")")[-1].split()[0] not in "ZX"


def test_a_day_has_no_step_that_takes_half_of_it():
    """What the others took on an H100 is at most a sixth more than the twelve minutes."""
    day = gpu.chosen(None, dry=False)
    assert {step.name for step in gpu.STEPS} - {step.name for step in day} == {"bases"}
    assert sum(step.seconds for step in day) <= 12 * 60 * 7 / 6
    assert gpu.chosen(None, dry=True) == list(gpu.STEPS)
    assert [step.name for step in gpu.chosen(["bases", "pool"], dry=False)] == ["pool", "bases"]


def test_the_next_step_goes_on(env, tmp_path, monkeypatch):
    """After one over its time, whose processes are killed, one that fails, and one skipped."""
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    steps = [
        python_step(tmp_path, "slow", SLOW),
        python_step(tmp_path, "broken", "raise ValueError('no such kernel')"),
        python_step(tmp_path, "absent", "print('never')", needs_vllm=True),
        python_step(tmp_path, "quick", "print('summary: 3 ms')"),
    ]
    env["PYTHONPATH"] = str(tmp_path)
    rows = gpu.run_steps(steps, 40, tmp_path / "results", env, dry=False, vllm=False)
    found = [(row["step"], row["status"], row["what"]) for row in rows]
    assert found == [
        ("slow", gpu.OVER, "halfway"),
        ("broken", gpu.FAILED, "ValueError: no such kernel"),
        ("absent", gpu.SKIPPED, gpu.NO_VLLM),
        ("quick", gpu.PASSED, "3 ms"),
    ]
    assert 10 <= rows[0]["seconds"] < 15  # a quarter of the time
    assert rows[1]["limit_s"] > 8 and rows[3]["limit_s"] > 20  # what is left goes to later ones
    assert not alive(int((tmp_path / "slow.pid").read_text()))
    assert not (tmp_path / "logs/absent.log").exists()
    written = read(tmp_path / "results/gpu.csv")
    assert [row["status"] for row in written] == [row["status"] for row in rows]


def test_what_cannot_be_is_refused(env, tmp_path):
    done = script(env | {"CUDA_VISIBLE_DEVICES": ""}, "--results", tmp_path)
    assert done.returncode == 2 and "there is no CUDA device: --dry" in done.stderr
    done = script(env, "--dry", "--results", RESULTS)
    assert done.returncode == 2 and "no rows to benchmarks/results" in done.stderr
    assert not list(tmp_path.iterdir())


def test_nothing_that_did_not_run_counts(env, tmp_path, monkeypatch):
    """A step that needs vLLM, where there is none: the script as a whole has not passed."""
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu, "environment", lambda *_: env)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name != "vllm" or None)
    options = ["--dry", "--steps", "smoke", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    assert gpu.main() == 1
    [row] = read(tmp_path / "gpu.csv")
    assert (row["status"], row["what"]) == (gpu.SKIPPED, gpu.NO_VLLM)


GOOD = {"fault": 2.0, "mean_allowed": 0.04, "largest_allowed": 0.5, "mean_error": 0.02,
        "largest_error": 0.3, "mean_gap": 0.001, "largest_gap": 0.1, "accepted": 9}  # fmt: skip


@pytest.mark.parametrize(
    "change, drafts, said",
    [
        ({}, 0, ""),
        ({"mean_error": ""}, 3, ""),
        ({"mean_error": 0.05}, 0, "the mean error is too large"),
        ({"mean_error": float("nan")}, 0, "the mean error is too large"),
        ({"largest_error": 0.6}, 0, "the largest error is too large"),
        ({"largest_gap": 1.1}, 3, "a token is not the best one"),
        ({"mean_gap": 0.05}, 3, "the tokens are not the best ones"),
        ({"accepted": 0}, 3, "no draft was accepted"),
        ({"fault": 0.1}, 0, "these models could not show a fault"),
    ],
)
def test_the_smoke_fails(change, drafts, said):
    assert served_mixture.verdict(GOOD | change, drafts) == said


@pytest.mark.parametrize(
    "c, acceptance, drafts, ratio",
    [(0.07, 0.6, 4, 0.61), (0.32, 0.8, 4, 0.79), (0.035, 0.72, 7, 0.40), (0.27, 0.8, 4, 0.71)],
)
def test_the_cost_model(c, acceptance, drafts, ratio):
    """Of 1.5B, 7B and 14B beside 0.5B, computed elsewhere, with v = 1.05."""
    assert shapes.drafting_ratio(c, 1.05, acceptance, drafts) == pytest.approx(ratio, abs=0.006)


def test_a_cost_that_is_noise_predicts_nothing():
    rows = shapes.cost_rows({}, 2.0, 2.1, -0.1, 3)
    assert {(row["c"], row["predicted"], row["v"]) for row in rows} == {("", "", 1.05)}
    assert "not measured" in shapes.cost_sentence(rows)
    rows = shapes.cost_rows({}, 2.0, 2.1, 0.2, 3)
    assert [row["c"] for row in rows] == [0.1] * len(shapes.ACCEPTANCES)
    assert "c 0.100, v 1.050" in shapes.cost_sentence(rows)


def test_shapes_are_qwens():
    """Parameters as Qwen states them: 0.49, 1.54 and 7.61 billion, embeddings included."""
    import torch
    from transformers import AutoModelForCausalLM

    for name, billions in {"0.5B": 0.494, "1.5B": 1.544, "7B": 7.616}.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shapes.shape_config(name))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=1e-3)


def test_vllm_finds_the_plugin(tmp_path):
    folder = gpu.plugin_metadata(tmp_path)
    [found] = importlib.metadata.distributions(path=[str(folder)])
    names = {(entry.group, entry.name): entry.value for entry in found.entry_points}
    assert names["vllm.general_plugins", "memdec"] == "vllm_memdec:register"


def entry(kind: int, sm: int, code: bytes) -> bytes:
    head = struct.pack("<HHIQ", kind, 0, 64, len(code)).ljust(28, b"\0")
    return (head + struct.pack("<I", sm)).ljust(64, b"\0") + code


def test_other_gpus_code_is_dropped():
    """From an ELF file of three sections: none, GPU code, names."""
    old, ours = entry(pack.CUBIN, 80, b"a" * 32), entry(pack.CUBIN, 90, b"b" * 16)
    ptx = entry(pack.PTX, 80, b"c" * 24)
    mixed, only_ptx = old + ours + ptx, entry(pack.CUBIN, 80, b"d" * 8) + ptx
    code = b"".join(
        struct.pack("<IHHQ", pack.CONTAINER, 1, 16, len(body)) + body for body in (mixed, only_ptx)
    )
    names = b"\0.nv_fatbin\0"
    sections = [(0, 0, 0), (1, 64, len(code)), (0, 64 + len(code), len(names))]
    table = b"".join(
        struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, at, size, 0, 0, 8, 0)
        for name, at, size in sections
    )
    header = bytearray(64)
    struct.pack_into("<Q", header, 0x28, 64 + len(code) + len(names))
    struct.pack_into("<2xHH", header, 0x3A, len(sections), 2)
    module = header + code + names + table
    size = len(module)
    assert pack.trim(module) == 3 and len(module) == size
    at = 64
    for kept, length in ((ours, len(mixed)), (ptx, len(only_ptx))):
        assert struct.unpack_from("<IHHQ", module, at)[3] == len(kept)
        body = bytes(module[at + 16 : at + 16 + length])
        assert body == kept.ljust(length, b"\0")
        at += 16 + length
    assert module[at:] == names + table


def test_pieces_are_unpacked(tmp_path, env):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("print('imported')\n")
    piece = tmp_path / "pieces/piece1"
    piece.mkdir(parents=True)
    path = pack.archive(tmp_path / "vllm", piece / "python.tar.xz")
    with tarfile.open(path) as packed:
        assert packed.getnames() == ["__init__.py"]
    command = ["bash", str(ROOT / "benchmarks/gpu/unpack.sh"), str(piece.parent)]
    env = env | {"PYTHON": sys.executable}

    def unpack(target: str) -> int:
        return subprocess.run([*command, str(tmp_path / target)], env=env).returncode

    digest = subprocess.run(["sha256sum", path.name], cwd=piece, capture_output=True, text=True)
    (piece / "SHA256").write_text(digest.stdout)
    assert unpack("kit") == 0
    assert (tmp_path / "kit/__init__.py").read_text() == "print('imported')\n"
    assert list((tmp_path / "kit/__pycache__").glob("*.pyc"))
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    assert unpack("other") != 0
    assert not (tmp_path / "other/__init__.py").exists()
