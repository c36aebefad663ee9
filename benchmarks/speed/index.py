"""Recall, speed and size of the index on 300,000 real keys, and what they do to a kNN-LM.

    python -m benchmarks.speed.index           # embeds the keys once, into build/index-benchmark
    python -m benchmarks.speed.index --probes 8 16 32 64 128

Keys are SmolLM2-135M's of the CIA World Factbook, countries drawn at random; validation and
held-out text are sections of other countries. `default` is what `memdec build` takes for so many
keys; flat, fp16, sq8 and pq64 are its other kinds.
Recall@64 is that of the targets stage: queries are keys of the datastore, each without itself,
against brute force in float64. The kNN-LM's lambda and temperature are tuned on the validation
text for every index by itself. `leaks` counts rows among their own neighbours, `self_not_first` is
the share of rows that are not the first found, whose label "drop rank 1" would leak.
Searches are timed for as many neighbours, and in batches as large, as the targets stage asks for.
Appends to results/index.csv; the last line is JSON.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.common import RESULTS, append_csv, interleaved_rounds, provenance, spread
from benchmarks.speed.keys import KINDS, SEARCH_ROWS, cached_index, cached_keys
from benchmarks.systems.knn_lm import Neighbours, tune
from vllm_memdec.train.data.shards import shards
from vllm_memdec.train.executor.context import RAM_BUDGET
from vllm_memdec.train.model.scoring import mix, perplexity
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import IndexSettings, TargetSettings
from vllm_memdec.train.stages.search import Index
from vllm_memdec.train.stages.targets import fit_temperature, neighbours_without_self
from vllm_memdec.train.verify.brute_force import nearest, recall, take

RECALL_AT, RECALL_QUERIES = 64, 2048


def knn_perplexity(
    index: Index, stored: np.ndarray, keys: Path, k: int, temperature: float
) -> dict[str, float]:
    """Return the kNN-LM's held-out perplexity with lambda and temperature tuned on validation."""
    near = {}
    for name in ("validation", "held_out"):
        queries, labels = (np.concatenate(shards(keys / name, a)) for a in ("keys", "labels"))
        distances, ids = index.search(queries, k)
        near[name] = Neighbours(distances, ids, stored[ids] == labels[:, None])
    base = {name: np.load(keys / name / "logprobs.npy") for name in near}
    weight, best = tune(base["validation"], near["validation"], temperature)
    mixed = mix(base["held_out"], near["held_out"].logprobs(best), weight)
    return {
        "knn_ppl": perplexity(mixed),
        "base_ppl": perplexity(base["held_out"]),
        "knn_lambda": weight,
        "knn_temperature": best,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=300_000)
    parser.add_argument("--probes", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--embed-only", action="store_true", help="stop when the keys are there")
    arguments = parser.parse_args()

    progress = Progress()
    made = cached_keys(arguments.keys, progress)
    if arguments.embed_only:
        return
    datastore = made / "datastore"
    default, neighbours = IndexSettings(), TargetSettings().neighbours
    folders = {name: cached_index(name, arguments.keys, progress) for name in KINDS}
    variants = {(name, default.probes): folders[name] for name in ("default", "flat", "fp16")}
    for name in ("sq8", "pq64"):
        variants |= {(name, probes): folders[name] for probes in arguments.probes}
    indexes = {variant: Index(path, variant[1], RAM_BUDGET) for variant, path in variants.items()}

    keys = shards(datastore, "keys")
    stored = np.concatenate(shards(datastore, "labels"))
    own = np.linspace(0, len(stored) - 1, RECALL_QUERIES).astype(np.int64)
    queries = take(keys, own)
    progress.say("brute force ...")
    true_distances, true_ids = nearest(keys, queries, RECALL_AT, own)
    distances, ids = neighbours_without_self(
        *indexes["flat", default.probes].search(queries, neighbours + 1), own
    )
    temperature, _ = fit_temperature(distances, ids, stored[ids] == stored[own][:, None])
    results = []
    for (name, probes), index in indexes.items():
        near = index.search(queries, neighbours + 1)
        kept = neighbours_without_self(*near, own)[1]
        size = sum(p.stat().st_size for p in variants[name, probes].glob("*.faiss"))
        row = {
            "index": name,
            "probes": probes if name != "flat" else "",
            "keys": arguments.keys,
            "width": queries.shape[1],
            "recall_at_64": recall(keys, queries, kept[:, :RECALL_AT], true_distances, true_ids),
            "leaks": int((kept == own[:, None]).any(axis=1).sum()),
            "self_not_first": float((near[1][:, 0] != own).mean()),
            "bytes_per_key": size / arguments.keys,
            **knn_perplexity(index, stored, made, neighbours, temperature),
        }
        results.append(row)
        progress.say(
            " ".join(f"{k}={v:.4g}" if v != name else v for k, v in row.items() if v != "")
        )
    progress.say("timing ...")
    batch = queries[:SEARCH_ROWS]
    times = interleaved_rounds(
        {v: lambda i=i: i.search(batch, neighbours + 1) for v, i in indexes.items()}, seconds=0
    )
    origin = provenance("faiss-cpu", "numpy", "torch")
    exact = next(row["knn_ppl"] for row in results if row["index"] == "flat")
    for row, values in zip(results, times.values(), strict=True):
        row["knn_ppl_vs_exact"] = row["knn_ppl"] / exact - 1
        rates = spread([len(batch) / ms * 1e3 for ms in values])
        row |= {f"queries_per_s{suffix}": round(rate, 1) for suffix, rate in rates.items()}
        row |= {k: round(v, 5) for k, v in row.items() if isinstance(v, float)}
    append_csv(RESULTS / "index.csv", [origin | {"neighbours": neighbours} | r for r in results])
    print(json.dumps({"benchmark": "index", **origin, "results": results}))


if __name__ == "__main__":
    main()
