"""Recall, speed and size of the index on 300,000 real keys, and what they do to a kNN-LM.

    python benchmarks/index.py                  # embeds the keys once, into build/index-benchmark
    python benchmarks/index.py --probes 8 16 32 64 128

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
import random
from itertools import groupby
from pathlib import Path

import data
import numpy as np
from common import RESULTS, append_csv, interleaved_rounds, provenance, spread
from demo import write_corpus
from knn_lm import Neighbours, tune
from transformers import AutoTokenizer

from vllm_memdec.train.artifacts import build_artifact, open_artifact, write_json
from vllm_memdec.train.cluster import Here
from vllm_memdec.train.config import DatastoreSettings, IndexSettings, TargetSettings
from vllm_memdec.train.corpus import pack, tokenise
from vllm_memdec.train.datastore import Keys, embed, load_model
from vllm_memdec.train.evaluate import label_logprobs, mix, perplexity
from vllm_memdec.train.exact import nearest, recall, take
from vllm_memdec.train.index import Index, build_index, factory_string
from vllm_memdec.train.pipeline import MEMORY_BUDGET, model_hash
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.shards import save_array, shards
from vllm_memdec.train.targets import fit_temperature, neighbours_without_self
from vllm_memdec.train.text import documents

FOLDER = data.BUILD / "index-benchmark"
REGIONS = (
    "africa", "europe", "central-america-n-caribbean", "australia-oceania", "middle-east",
    "east-n-southeast-asia", "south-america", "south-asia", "north-america", "central-asia",
)  # fmt: skip
SECTIONS = ("Introduction", "Geography", "People and Society", "Government", "Economy")
BLOCK, BATCH = 512, 4  # tokens a block, blocks a forward pass
SHARD = 50_000  # keys a file
LONGEST = 20_000  # characters of a fact
KINDS = {
    "default": IndexSettings(),
    "flat": IndexSettings(kind="flat"),
    "sq8": IndexSettings(kind="sq8"),
    "pq64": IndexSettings(kind="pq"),
    "fp16": IndexSettings(kind="fp16"),
}
SCORED = 10_000  # tokens of validation and of held-out text
SEARCH_ROWS = 2048  # queries timed at once
RECALL_AT, RECALL_QUERIES = 64, 2048


def write_text(keys: int, path: Path) -> dict[str, Path]:
    """Write three corpora of other countries each, a document a section; return name -> file.

    Text to score is one section of each country, so that it is of many.
    """
    pages: dict[str, list[str]] = {}
    for region in REGIONS:
        for section in SECTIONS:
            facts = data.factbook(region, section, LONGEST)
            for country, group in groupby(facts, key=lambda fact: fact.country):
                pages.setdefault(country, []).append("\n".join(fact.line for fact in group))
    rng = random.Random(0)
    countries = rng.sample(sorted(pages), len(pages))
    files = {}
    for name, tokens in (("validation", SCORED), ("held_out", SCORED), ("datastore", keys)):
        chosen: list[str] = []
        # Five characters a token are enough; what is too much is cut after tokenising.
        while sum(map(len, chosen)) < 5 * tokens and countries:
            sections = pages[countries.pop()]
            chosen += sections if name == "datastore" else [rng.choice(sections)]
        files[name] = write_corpus(path / f"{name}.jsonl", chosen)
    return files


def make_keys(base: Path, n_keys: int, work: Path, progress: Progress) -> None:
    """Write keys and labels of the datastore in shards; of the other texts, log p_base too."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_model(str(base), "bfloat16")
    for name, path in write_text(n_keys, work / "text").items():
        wanted = n_keys if name == "datastore" else SCORED
        tokens, positions = pack(
            tokenise(tokenizer, documents(path)), BLOCK, tokenizer.eos_token_id
        )
        blocks = min(len(tokens), wanted // BLOCK + 8)  # some rows of a block are no pairs
        tokens, positions = tokens[:blocks], positions[:blocks]
        keys, labels = [], []
        with progress.task(f"embedding {name}", len(tokens), "blocks") as advance:
            for batch_keys, batch_labels in embed(
                model, "last_mlp_input", tokens, positions, BATCH
            ):
                keys.append(batch_keys)
                labels.append(batch_labels)
                advance(min(BATCH, blocks))
        keys, labels = np.concatenate(keys)[:wanted], np.concatenate(labels)[:wanted]
        if len(keys) < wanted:
            raise ValueError(f"the text has only {len(keys)} keys for {name}: lower --keys.")
        folder = work / name
        folder.mkdir(exist_ok=True)
        for n, start in enumerate(range(0, wanted, SHARD)):
            save_array(folder / f"keys-{n:05d}.npy", keys[start : start + SHARD])
            save_array(folder / f"labels-{n:05d}.npy", labels[start : start + SHARD])
        # As a corpus with a block a shard would have it.
        rows = [len(keys[start : start + SHARD]) for start in range(0, wanted, SHARD)]
        save_array(folder / "rows-train.npy", np.array(rows, dtype=np.int32))
        write_json(folder / "corpus.json", {"shard_blocks": 1})
        if name != "datastore":
            logprobs = label_logprobs(model, tokens, positions, BATCH, progress, f"base, {name}")
            save_array(folder / "logprobs.npy", logprobs[:wanted])


def cached_keys(n_keys: int, progress: Progress) -> Path:
    """Return a folder of n keys, and of the text to score; embedded unless it is there."""
    base = data.smollm2()
    return build_artifact(
        FOLDER / f"keys-{n_keys}",
        "index-benchmark",
        {"keys": n_keys, "scored": SCORED, "block": BLOCK},
        {"base": model_hash(str(base), "base")},
        lambda work: make_keys(base, n_keys, work, progress),
        progress.say,
    ).path


def cached_index(name: str, n_keys: int, progress: Progress) -> Path:
    """Return the folder of one kind of index over n keys, built unless it is there."""
    keys = cached_keys(n_keys, progress)
    settings = KINDS[name]

    def make(work: Path) -> None:
        stored = Keys(DatastoreSettings(), "", keys / "datastore", keys / "datastore")
        build_index(settings, stored, MEMORY_BUDGET, work, progress, Here())

    return build_artifact(
        FOLDER / f"index-{name}-{n_keys}",
        "index-benchmark",
        {"kind": settings.kind, "seed": settings.seed, "name": name},
        {
            "keys": open_artifact(keys).hash,
            "lists": factory_string("sq8", n_keys, 1, MEMORY_BUDGET),
        },
        make,
        progress.say,
    ).path


def knn_perplexity(
    index: Index, stored: np.ndarray, keys: Path, k: int, temperature: float
) -> dict[str, float]:
    """Return the kNN-LM's held-out perplexity with lambda and temperature tuned on validation."""
    found = {}
    for name in ("validation", "held_out"):
        queries, labels = (np.concatenate(shards(keys / name, a)) for a in ("keys", "labels"))
        distances, ids = index.search(queries, k)
        found[name] = Neighbours(distances, ids, stored[ids] == labels[:, None])
    base = {name: np.load(keys / name / "logprobs.npy") for name in found}
    weight, best = tune(base["validation"], found["validation"], temperature)
    mixed = mix(base["held_out"], found["held_out"].logprobs(best), weight)
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
    indexes = {
        variant: Index(path, variant[1], MEMORY_BUDGET) for variant, path in variants.items()
    }

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
        found = index.search(queries, neighbours + 1)
        kept = neighbours_without_self(*found, own)[1]
        size = sum(p.stat().st_size for p in variants[name, probes].glob("index*.faiss"))
        row = {
            "index": name,
            "probes": probes if name != "flat" else "",
            "keys": arguments.keys,
            "width": queries.shape[1],
            "recall_at_64": recall(keys, queries, kept[:, :RECALL_AT], true_distances, true_ids),
            "leaks": int((kept == own[:, None]).any(axis=1).sum()),
            "self_not_first": float((found[1][:, 0] != own).mean()),
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
