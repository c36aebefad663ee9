"""The kernels' tests on the device; with --dry the first test of each file, interpreted.

    python -m benchmarks.gpu.gpu --steps kernel_tests

Writes a row with the counts to results/gpu_kernel_tests.csv. Fails if a test does, or if none ran.
"""

import argparse
import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.common import RESULTS, append_csv, provenance

TESTS = Path(__file__).parents[2] / "tests/kernels"


class Count:
    """Counts outcomes; in a rehearsal only one test a file is kept."""

    def __init__(self, dry: bool) -> None:
        self.dry, self.outcomes = dry, Counter()

    def pytest_collection_modifyitems(self, items) -> None:
        if self.dry:
            items[:] = {item.path: item for item in reversed(items)}.values()

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or not report.passed:
            self.outcomes[report.outcome] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    count = Count(arguments.dry)
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "-rs", str(TESTS)]
    # Tests of compiled code do not need a device.
    options += ["-k", "not register and not 16_bytes"]
    if not arguments.dry and importlib.util.find_spec("xdist"):
        options += ["-n", str(max(1, (os.cpu_count() or 1) // 2))]  # most of it is compilation
    code = pytest.main(options, plugins=[count])
    counts = {name: count.outcomes[name] for name in ("passed", "failed", "skipped")}
    append_csv(RESULTS / "gpu_kernel_tests.csv", [provenance("torch", "triton") | counts])
    print("summary: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
    return int(code) or int(not counts["passed"])


if __name__ == "__main__":
    sys.exit(main())
