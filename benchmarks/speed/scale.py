"""What index, search and targets cost a million rows at 1, 10 and 30 million keys of width 96.

    python -m benchmarks.speed.scale                 # hours of one core; keys lie in build/scale
    python -m benchmarks.speed.scale --keys 1000000 --kind pq
    python -m benchmarks.speed.scale --delete              # the keys, 6 GB at 30 million

Keys are hidden states of a tiny random base (4 layers, width 96, SmolLM2-135M's tokenizer) over the
CIA World Factbook, which are repeated until there are enough of them, each time with fresh Gaussian
noise of a fifth of every number's spread. So they are clustered as real ones are, and every key has
near ones, the more of them the more keys there are. Labels are the tokens that followed.

All keys are indexed; search and targets are measured on whole shards of 32,768 rows, evenly spread,
done as the targets stage does them (a group of shards at once, results merged over the parts).
Every stage runs in a process of its own with one thread: seconds are the process's CPU time, so
that they hold on a machine that others use; RAM is its peak, `files` the most descriptors that it
had open. A run that was stopped goes on after the last stage that it finished; the one it was in
starts anew. Nothing is taken from runs of another commit, kind or budget.

A query's cost grows with the keys that its lists hold: from 1,024 lists at a million keys to 8,192
at 30 million their length grows 3.75 times, and with it seconds a million rows. What should stay
the same is the time of a row and key visited, `search_ns_a_key` and `targets_ns_a_key`: compare
these. The index compares every key with all lists: compare `index_ns_a_list`, of a row and list;
at a million keys most of it is the training of codes, on as many keys as ever.
The table that product codes are compared with is made for every query, list and part. Compare one
kind of code, `--kind pq`, not 8-bit numbers at a million keys with product codes at 30 million.
RAM follows the budget once the index is larger than half of that, as that of 10 million keys is;
from there it grows with the centroids and labels alone. Recall is taken by brute force, and beyond
13 million keys not at all. Appends to results/scale.csv; the last line is JSON.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks.common import RESULTS, append_csv, provenance, rounded, status_kb
from benchmarks.corpora.download import BUILD, smollm2
from benchmarks.corpora.factbook import factbook
from vllm_memdec.train.data.artifacts import build_artifact, write_json
from vllm_memdec.train.data.blocks import pack, shard_rows, tokenise
from vllm_memdec.train.data.shards import save_array, shard_path, shards
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model.hidden_states import Keys, embed
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import DatastoreSettings, IndexSettings, TargetSettings
from vllm_memdec.train.stages.index import build_index, inverted
from vllm_memdec.train.stages.search import Index
from vllm_memdec.train.stages.targets import Searcher, grouped
from vllm_memdec.train.verify.brute_force import nearest, recall

ROOT = Path(__file__).resolve().parents[2]
FOLDER = BUILD / "scale"
SIZES = (10**6, 10**7, 3 * 10**7)
WIDTH, LAYERS, BLOCK = 96, 4, 512
SHARD = 64 * BLOCK  # rows a file, as by default
REAL = 400_000  # tokens of text
NOISE = 0.2
SAMPLED = 4  # shards that are searched
RECALL_SHARDS = 400  # shards that brute force reads at most
RECALL_QUERIES = 64
MAX_VALUE = 20_000  # characters of a fact
PACKAGES = ("faiss-cpu", "numpy", "torch")


def real_keys() -> tuple[np.ndarray, np.ndarray]:
    """Return hidden states fp16 [rows, WIDTH] of a tiny base over real text, and next tokens."""
    pages = [
        "\n".join(fact.line for fact in factbook(region, section, MAX_VALUE))
        for region in ("africa", "europe", "south-asia", "middle-east", "south-america")
        for section in ("Introduction", "Geography", "People and Society", "Government")
    ]
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS, num_attention_heads=4, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    blocks = pack(tokenise(tokenizer, pages), BLOCK, tokenizer.eos_token_id)
    blocks = [array[: REAL // BLOCK] for array in blocks]
    keys, labels = zip(*embed(model, "last_mlp_input", *blocks, 8), strict=True)
    return np.concatenate(keys), np.concatenate(labels)


def make_real(work: Path) -> None:
    keys, labels = real_keys()
    save_array(work / "keys.npy", keys)
    save_array(work / "labels.npy", labels)


def make_keys(
    work: Path, real: np.ndarray, tokens: np.ndarray, count: int, progress: Progress
) -> None:
    """Write keys and labels in shards, as a corpus with a block a shard would have them."""
    spread = NOISE * real.astype(np.float32).std(axis=0)
    rng = np.random.default_rng(0)
    sizes = np.diff(np.r_[np.arange(0, count, SHARD), count]).astype(np.int32)
    with progress.task("keys", count, "rows") as advance:
        for shard, size in enumerate(sizes.tolist()):
            rows = (shard * SHARD + np.arange(size)) % len(real)
            noise = rng.standard_normal((size, WIDTH), dtype=np.float32) * spread
            save_array(shard_path(work, "keys", shard), (real[rows] + noise).astype(np.float16))
            save_array(shard_path(work, "labels", shard), tokens[rows])
            advance(size)
    save_array(work / "rows-train.npy", sizes)
    save_array(work / "used-train.npy", np.unique(tokens))
    write_json(work / "corpus.json", {"shard_blocks": 1})


def cached_keys(folder: Path, count: int, progress: Progress) -> None:
    made = build_artifact(
        FOLDER / "real", "scale", {"rows": REAL, "width": WIDTH}, {}, make_real, progress.say
    )
    real, tokens = (np.load(made.path / f"{name}.npy") for name in ("keys", "labels"))
    settings = {"keys": count, "width": WIDTH, "noise": NOISE}
    build_artifact(
        folder / "keys",
        "scale",
        settings,
        {},
        lambda w: make_keys(w, real, tokens, count, progress),
        progress.say,
    )


def measured(stage: str, folder: Path, kind: str, budget: int) -> dict[str, Any]:
    """Do one stage in this process; return its CPU seconds, peak RAM, open files and origin."""
    files = [0]

    def watch() -> None:
        while True:
            files[0] = max(files[0], len(os.listdir("/proc/self/fd")))
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    began, wall = time.process_time(), time.perf_counter()
    measured = STAGES[stage](folder, kind, budget)
    measured |= {
        f"{stage}_s": time.process_time() - began,
        f"{stage}_wall_s": time.perf_counter() - wall,
        f"{stage}_ram_mb": status_kb("VmHWM") / 1024,
        f"{stage}_files": files[0],
    }
    return measured | provenance(*PACKAGES)


def emptied(folder: Path) -> Path:
    """Make a folder without what a stopped run left: a stage is measured as a whole."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def stored(run: Path) -> Keys:
    keys = run.parent / "keys"
    return Keys(DatastoreSettings(), "", keys, keys)


def index_of(run: Path, budget: int) -> Index:
    return Index(run / "index", IndexSettings().probes, budget)


def do_index(run: Path, kind: str, budget: int) -> dict[str, Any]:
    """Train and fill the index."""
    work, times = emptied(run / "index"), {}

    class Timed(Progress):
        def say(self, line: str) -> None:
            times[line.split(":")[1].split()[0]] = time.process_time()
            print(line, file=sys.stderr, flush=True)

    began = time.process_time()
    build_index(IndexSettings(kind=kind), stored(run), work, Context(Timed(), ram_budget=budget))
    return {"train_s": times.get("training", began) - began}


def sampled_shards(starts: np.ndarray) -> list[int]:
    """Return the shards that are searched, neighbours by twos, so that they make groups."""
    count = len(starts) - 1  # the last may be a short one
    return [
        n for first in np.linspace(0, count - 3, SAMPLED // 2) for n in (int(first), int(first) + 1)
    ]


def do_search(run: Path, kind: str, budget: int) -> dict[str, Any]:
    """Search the index for the rows of some shards, as the targets stage does."""
    keys, index = stored(run), index_of(run, budget)
    k, starts = TargetSettings().neighbours + 1, shard_rows(keys.corpus)
    rows = index.rows_at_once(k)
    for group in grouped(sampled_shards(starts), starts, index.group_rows(k), SAMPLED):
        batches = (keys(s)[n : n + rows] for s in group for n in range(0, SHARD, rows))
        for _ in index.search_all(batches, k):
            pass
    return {}


def do_targets(run: Path, kind: str, budget: int) -> dict[str, Any]:
    """Make the targets of those shards, the whole stage but its fit."""
    keys, index, work = stored(run), index_of(run, budget), emptied(run / "targets")
    settings, starts = TargetSettings(), shard_rows(keys.corpus)
    write_json(work / "targets.json", {"temperature": 10.0, "neighbours": settings.neighbours})
    most = index.group_rows(settings.neighbours + 1)
    groups = grouped(sampled_shards(starts), starts, most, SAMPLED)
    searcher = Searcher(settings, keys, index, work, groups)
    return {"targets_rows": sum(searcher(n) for n in range(len(groups)))}


def do_quality(run: Path, kind: str, budget: int) -> dict[str, Any]:
    """Count what queries visit; compare what they find with brute force."""
    keys, index = stored(run), index_of(run, budget)
    ivf = inverted(index.trained)
    sizes = np.zeros(ivf.nlist, np.int64)
    for part in range(len(index.sizes)):
        held = index._open(part)  # which the lists are lent from
        lists = inverted(held).invlists
        sizes += [lists.list_size(n) for n in range(ivf.nlist)]
    own = np.arange(RECALL_QUERIES) * (SHARD // RECALL_QUERIES)
    queries = np.asarray(keys(0))[own]
    stored_keys = shards(keys.datastore, "keys")
    measured = {
        "lists": ivf.nlist,
        "parts": len(index.sizes),
        "kind": index.facts["kind"],
        "visited": float(sizes[index._block(queries).lists].sum(axis=1).mean()),
        "index_bytes_per_key": sum(p.stat().st_size for p in index.folder.glob("*.faiss"))
        / index.facts["keys"],
        "recall_at_64": "",
    }
    if len(stored_keys) <= RECALL_SHARDS:
        true = nearest(stored_keys, queries, 64, own)
        ids = index.search(queries, 65)[1]
        ids = np.stack([row[row != self][:64] for row, self in zip(ids, own, strict=True)])
        measured["recall_at_64"] = round(recall(stored_keys, queries, ids, *true), 4)
    return measured


KINDS = ("auto", "sq8", "fp16", "pq")
STAGES = {"index": do_index, "search": do_search, "targets": do_targets, "quality": do_quality}


def in_a_process(stage: str, run: Path, count: int, kind: str, budget: int) -> dict[str, Any]:
    """Return what measured() does in a process with one thread."""
    words = ["--keys", count, "--kind", kind, "--budget", budget, "--stage", stage, "--run", run]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.scale", *map(str, words)],
        check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, nargs="+", default=SIZES)
    parser.add_argument("--kind", default="auto", choices=KINDS, help="as index.kind")
    parser.add_argument("--budget", type=int, default=2**30, help="bytes, as --memory-budget")
    parser.add_argument("--delete", action="store_true", help="keys and indices, when measured")
    parser.add_argument("--stage", choices=STAGES, help="in this process: for the benchmark itself")
    parser.add_argument("--run", type=Path, help="a folder: for the benchmark itself")
    arguments = parser.parse_args()
    if min(arguments.keys) <= SAMPLED * SHARD:
        parser.error(f"--keys must be above {SAMPLED * SHARD}: so many are searched.")

    kind, budget, run = arguments.kind, arguments.budget, arguments.run
    if arguments.stage:
        print(json.dumps(measured(arguments.stage, run, kind, budget)))
        return
    results, progress, origin = [], Progress(), provenance(*PACKAGES)
    for count in arguments.keys:
        folder = FOLDER / str(count)
        cached_keys(folder, count, progress)
        run = folder / f"{kind}-{budget}-{origin['commit']}"
        run.mkdir(exist_ok=True)
        row: dict[str, Any] = {"keys": count, "width": WIDTH, "budget": budget}
        row["neighbours"], row["probes"] = TargetSettings().neighbours, IndexSettings().probes
        for stage in STAGES:
            kept = run / f"{stage}.json"  # of a run that was stopped
            if not kept.exists():
                write_json(kept, in_a_process(stage, run, count, kind, budget))
            row |= json.loads(kept.read_text())
            if row["commit"] != origin["commit"]:
                raise SystemExit(f"the code changed while it was measured: delete {run}, run again")
            progress.say(f"{count:,} keys, {stage}: done")
        rows = SAMPLED * SHARD
        assert row["targets_rows"] == rows
        row |= {
            "index_s_per_million": row["index_s"] / count * 1e6,
            "search_s_per_million": row["search_s"] / rows * 1e6,
            "targets_s_per_million": row["targets_s"] / rows * 1e6,
        }
        row |= {
            "index_ns_a_list": row["index_s_per_million"] / row["lists"] * 1e3,
            "search_ns_a_key": row["search_s_per_million"] / row["visited"] * 1e3,
            "targets_ns_a_key": row["targets_s_per_million"] / row["visited"] * 1e3,
        }
        results.append(origin | rounded(row, 3))  # with the time of the measurement
        append_csv(RESULTS / "scale.csv", results[-1:])
        progress.say(json.dumps(results[-1]))
        if arguments.delete:
            shutil.rmtree(folder)
    print(json.dumps({"benchmark": "scale", **origin, "results": results}))


if __name__ == "__main__":
    main()
