"""What `memdec plan` predicts for the demo, beside what its build then took.

    make demo && python -m benchmarks.speed.plan        # a minute or two
    python -m benchmarks.speed.plan --again         # builds the demo's memory anew, into build/plan
    python -m benchmarks.speed.plan --build build/plan   # against that build

Compares the time of each stage, as its manifest tells it, and the size of each artifact. Appends to
results/plan.csv; the last line is JSON.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.common import RESULTS, append_csv, provenance
from benchmarks.corpora.download import BUILD, smollm2
from benchmarks.demo.texts import FULL
from benchmarks.server import environment
from vllm_memdec.train.pipeline import STAGES

ACCEPTED = 0.3
MEMDEC = str(Path(sys.executable).with_name("memdec"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="build anew and compare with that")
    parser.add_argument("--build", type=Path, default=FULL.out, help="the build to compare with")
    arguments = parser.parse_args()
    text = FULL.texts
    common = ["--base", str(smollm2()), "--corpus", str(text / "corpus.jsonl")]
    common += ["--validation", str(text / "validation_facts.jsonl"), "--config", str(FULL.config)]
    report = BUILD / "plan.json"
    subprocess.run([MEMDEC, "plan", *common, "--json", str(report)], check=True, env=environment())
    output = arguments.build
    if arguments.again:
        output = BUILD / "plan"
        shutil.rmtree(output, ignore_errors=True)
        subprocess.run(
            [MEMDEC, "build", *common, "--output", str(output)], check=True, env=environment()
        )
    predicted = {stage["name"]: stage for stage in json.loads(report.read_text())["stages"]}
    origin, results = provenance("torch", "faiss-cpu", "ray"), []
    print(f"\n{'stage':>10} {'predicted s':>12} {'took s':>8} {'ratio':>6} {'MB':>8} {'MB was':>8}")
    for stage in STAGES:
        manifest = json.loads((output / stage / "manifest.json").read_text())
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        plan, took = predicted[stage], manifest["seconds"]
        ratio = plan["seconds"] / took
        print(
            f"{stage:>10} {plan['seconds']:>12.1f} {took:>8.1f} {ratio:>6.2f} "
            f"{plan['disk'] / 1e6:>8.1f} {size / 1e6:>8.1f}"
        )
        point = {
            "stage": stage,
            "predicted_s": round(plan["seconds"], 2),
            "took_s": took,
            "ratio": round(ratio, 4),
            "predicted_bytes": plan["disk"],
            "bytes": size,
        }
        results.append(origin | point)
    off = max(abs(row["ratio"] - 1) for row in results)
    print(f"furthest off: {off:.0%} (accepted: {ACCEPTED:.0%})")
    append_csv(RESULTS / "plan.csv", results)
    print(json.dumps({"benchmark": "plan", "furthest_off": off, "results": results}))


if __name__ == "__main__":
    main()
