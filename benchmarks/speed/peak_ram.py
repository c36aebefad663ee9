"""Peak RAM of every stage on a corpus and on one ten times as large.

    python -m benchmarks.speed.peak_ram          # 0.3 M and 3 M tokens; resumes

The text is Wikipedia's and the World Factbook's, repeated with its sentences shuffled where there
is too little of it. The base is SmolLM2-135M cut to its first layer, whose keys are as wide as the
whole model's, so that index and targets are of real size while embedding is quick; training is a
few steps. Measured is the resident memory of every process of the build, workers of Ray included
and Ray's own servers not, by looking ten times a second: the highest of any process, by stage.
Appends to results/memory.csv; the last line is JSON.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import RESULTS, append_csv, provenance
from benchmarks.corpora.domains import wikipedia
from benchmarks.corpora.download import BUILD, smollm2
from benchmarks.corpora.jsonl import write_jsonl
from benchmarks.server import environment
from vllm_memdec.train.data.artifacts import write_json
from vllm_memdec.train.pipeline import STAGES

WORK = BUILD / "memory-benchmark"
ACCEPTED = 1.15
CHARACTERS = 4.2  # characters of a token, about
SETTINGS = {
    "corpus": {"block_tokens": 512, "shard_blocks": 16, "validation_fraction": 0.01},
    "datastore": {"key": "final_hidden"},
    "index": {"kind": "sq8", "probes": 1},
    "targets": {"neighbours": 32},
    "memory": {"layers": 1, "batch_blocks": 4, "checkpoint_seconds": 3600},
}
STEPS = 12
SERVERS = ("raylet", "gcs_server", "ray/_private", "ray/dashboard", "ray/autoscaler")


def short_base() -> Path:
    """Return SmolLM2-135M cut to its first layer."""
    folder = WORK / "base"
    if not (folder / "config.json").exists():
        base = smollm2()
        model = AutoModelForCausalLM.from_pretrained(base)
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def write_text(tokens: int) -> Path:
    """Write a corpus of about so many tokens."""
    path = WORK / f"corpus-{tokens}.jsonl"
    texts = list(wikipedia(20_000))
    sentences = [s for text in texts for s in re.split(r"(?<=[.!?]) ", text) if s]
    rng, written = random.Random(0), sum(map(len, texts))
    while written < tokens * CHARACTERS:
        text = " ".join(rng.choices(sentences, k=rng.randint(5, 60)))
        texts.append(text)
        written += len(text)
    kept, size = [], 0
    for text in texts:
        if size >= tokens * CHARACTERS:
            break
        kept.append(text)
        size += len(text)
    return write_jsonl(path, kept)


def resident(process: psutil.Process) -> dict[str, int]:
    """Return the resident bytes of a process and its workers, by command."""
    sizes = {}
    for each in [process, *process.children(recursive=True)]:
        try:
            command = " ".join(each.cmdline())
            if any(server in command for server in SERVERS):
                continue
            sizes[f"{each.pid} {each.name()}"] = each.memory_info().rss
        except psutil.Error:
            continue
    return sizes


def peaks(base: Path, corpus: Path, tokens: int, budget: str, address: str) -> dict[str, int]:
    """Build a memory; return the peak resident bytes of the largest process in each stage.

    They are kept in a file, so that a run that was stopped goes on.
    """
    output, kept = WORK / f"build-{tokens}", WORK / f"peaks-{tokens}-{budget}-{address}.json"
    peak: dict[str, int] = dict.fromkeys(STAGES, 0)
    if kept.exists():
        peak = json.loads(kept.read_text())
    else:
        shutil.rmtree(output, ignore_errors=True)
    epochs = STEPS * SETTINGS["memory"]["batch_blocks"] * SETTINGS["corpus"]["block_tokens"]
    settings = SETTINGS | {"memory": SETTINGS["memory"] | {"epochs": epochs / tokens}}
    config = WORK / f"settings-{tokens}.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = [str(Path(sys.executable).with_name("memdec")), "build", "--base", str(base)]
    command += ["--corpus", str(corpus), "--output", str(output), "--config", str(config)]
    command += ["--memory-budget", budget, "--ray-address", address]
    build = psutil.Popen(command, env=environment())
    while build.poll() is None:
        stage = next((s for s in STAGES if not (output / s / "manifest.json").exists()), None)
        sizes = resident(build)
        if stage and sizes and max(sizes.values()) > peak[stage]:
            peak[stage] = max(sizes.values())
            write_json(kept, peak)
        time.sleep(0.1)
    if build.wait():
        raise subprocess.CalledProcessError(build.returncode, command)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs=2, default=[300_000, 3_000_000])
    parser.add_argument("--memory-budget", default="512MiB")
    parser.add_argument("--ray-address", default="local")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    base, peak_of, counts = short_base(), [], []
    for tokens in arguments.tokens:
        corpus = write_text(tokens)
        peak_of.append(peaks(base, corpus, tokens, arguments.memory_budget, arguments.ray_address))
        facts = json.loads((WORK / f"build-{tokens}/corpus/corpus.json").read_text())
        counts.append(facts["train"]["tokens"] + facts["validation"]["tokens"])
    origin, results = provenance("torch", "faiss-cpu", "ray"), []
    print(f"\npeak MB of the largest process, budget {arguments.memory_budget}")
    print(f"{'stage':>10} {counts[0]:>10,} {counts[1]:>10,} {'ratio':>6}")
    for stage in STAGES:
        small, large = (peak[stage] / 1e6 for peak in peak_of)
        print(f"{stage:>10} {small:>10.0f} {large:>10.0f} {large / small:>6.3f}")
        point = {
            "stage": stage,
            "tokens": counts[0],
            "tokens_large": counts[1],
            "budget": arguments.memory_budget,
            "ray_address": arguments.ray_address,
            "peak_mb": round(small, 1),
            "peak_mb_large": round(large, 1),
            "ratio": round(large / small, 4),
        }
        results.append(origin | point)
    worst = max(row["ratio"] for row in results)
    print(f"largest growth: {worst - 1:.1%} (accepted: {ACCEPTED - 1:.0%})")
    append_csv(RESULTS / "memory.csv", results)
    for kept in WORK.glob("peaks-*.json"):
        kept.unlink()
    print(json.dumps({"benchmark": "memory", "growth": worst, "results": results}))


if __name__ == "__main__":
    main()
