"""Rows a second from neighbours to stored sparse targets, against a dense row loop.

    python -m benchmarks.speed.targets        # keys as in speed/index.py, embedded once
    python -m benchmarks.speed.targets --vocab 49152

`ours` is what the targets stage does after its search: own row dropped by id, softmax, equal tokens
summed, compressed sparse rows saved. `dense` is what the Memory Decoder authors' code does
(arXiv 2508.09874): softmax scattered into [rows, V] float32, normalised over V, then a Python loop
over rows that takes the non-zeros, sorts them by falling probability and collects lists, written as
records (id_cnt, token_id, prob fp16, label) with pyarrow. It gets its neighbours without the own
row for nothing. That code takes 16,000 rows at a time; here the largest batch, `authors`, is 8,192,
which fits in 24 GiB. The fastest of the smaller ones, which it never uses, stands beside it.

The neighbours are real: k + 1 of them as the default index finds them among 300,000 real keys
(speed/keys.py). For vocabularies larger than SmolLM2's the token ids are spread by a fixed random
injection, which keeps how many distinct ones a row has. Both results are compared before
anything is timed. Rounds interleave all variants; medians, with the extremes beside them.
Appends to results/targets.csv; the last line is JSON.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from benchmarks.common import RESULTS, append_csv, interleaved_rounds, provenance, spread
from benchmarks.speed.keys import SEARCH_ROWS, cached_index, cached_keys
from vllm_memdec.train.data.shards import save_array, shards
from vllm_memdec.train.executor.context import RAM_BUDGET
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import IndexSettings
from vllm_memdec.train.stages.search import Index
from vllm_memdec.train.stages.targets import (
    SMALLEST,
    fit_temperature,
    neighbours_without_self,
    sparse_targets,
)
from vllm_memdec.train.verify.brute_force import StoredTargets, evenly, take

SMOLLM2_VOCABULARY = 49152
RECORD = pa.schema(
    [
        ("id_cnt", pa.int32()),
        ("token_id", pa.list_(pa.int32())),
        ("prob", pa.list_(pa.float16())),
        ("label", pa.int32()),
    ]
)
FP16 = 2e-3  # tolerance of a probability: fp16, and float32 sums in another order


class RowNeighbours(NamedTuple):
    """What a search over a datastore gave for some rows; labels are those of the datastore."""

    own: np.ndarray  # [rows]
    distances: np.ndarray  # [rows, k + 1]
    ids: np.ndarray  # [rows, k + 1]
    labels: np.ndarray  # [keys]
    temperature: float
    used: np.ndarray  # the tokens among the labels, ascending, as the corpus artifact has them

    def first(self, rows: int) -> "RowNeighbours":
        """Return the same of fewer rows."""
        return self._replace(
            own=self.own[:rows], distances=self.distances[:rows], ids=self.ids[:rows]
        )


def ours(near: RowNeighbours, folder: Path) -> None:
    """Store the targets of some rows as the targets stage does."""
    pieces = []
    for start in range(0, len(near.own), SEARCH_ROWS):
        part = slice(start, start + SEARCH_ROWS)
        rows = (near.distances[part], near.ids[part], near.own[part])
        pieces.append(sparse_targets(*rows, near.labels, near.used, near.temperature, 0.0))
    lengths = np.concatenate([np.diff(offsets) for offsets, _, _ in pieces])
    save_array(folder / "offsets-00000.npy", np.r_[0, np.cumsum(lengths)])
    save_array(folder / "labels-00000.npy", near.labels[near.own])
    save_array(folder / "ids-00000.npy", np.concatenate([p[1] for p in pieces]))
    probs = np.concatenate([p[2] for p in pieces]).astype(np.float16)
    save_array(folder / "probs-00000.npy", probs)


def dense(near: RowNeighbours, vocabulary: int, batch: int, path: Path) -> None:
    """Store the targets of some rows, whose neighbours come without the row, as records."""
    labels = torch.from_numpy(near.labels.astype(np.int64))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, RECORD) as writer:
        for start in range(0, len(near.own), batch):
            part = slice(start, start + batch)
            negative = -torch.from_numpy(near.distances[part])
            p_BK = torch.softmax(negative / near.temperature, dim=-1)
            tokens_BK = labels[torch.from_numpy(near.ids[part])]
            p_BV = torch.zeros(len(p_BK), vocabulary).scatter_add(-1, tokens_BK, p_BK)
            p_BV = torch.nn.functional.normalize(p_BV, p=1, dim=-1)
            tokens, probs = [], []
            for p_V in p_BV:
                token = torch.nonzero(p_V > 0).squeeze(-1)
                p = p_V[token]
                order = torch.argsort(p, descending=True)
                tokens.append(token[order].numpy())
                probs.append(p[order].to(torch.float16).numpy())
            columns = (
                np.array([len(t) for t in tokens], np.int32), tokens, probs,
                near.labels[near.own[part]],
            )  # fmt: skip
            arrays = [pa.array(c, type=f.type) for c, f in zip(columns, RECORD, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=RECORD))


def assert_same(folder: Path, path: Path) -> None:
    """Check that both ways stored the same distributions."""
    stored = StoredTargets(folder)
    with pa.OSFile(str(path)) as file:
        records = pa.ipc.open_stream(file).read_all().to_pylist()
    for row, record in enumerate(records):
        has = dict(zip(*(a.tolist() for a in stored.row(row)), strict=True))
        expected = dict(zip(record["token_id"], map(float, record["prob"]), strict=True))
        assert record["id_cnt"] == len(expected)
        for token in set(has) | set(expected):
            assert abs(has.get(token, 0) - expected.get(token, 0)) < FP16, (row, token)
        assert {t for t, p in expected.items() if p > 2 * SMALLEST} <= set(has), row


def find(rows: int, k: int, keys: int, progress: Progress) -> RowNeighbours:
    """Search the default index over real keys for k + 1 neighbours of some of them."""
    datastore = cached_keys(keys, progress) / "datastore"
    parts, labels = shards(datastore, "keys"), np.concatenate(shards(datastore, "labels"))
    index = Index(cached_index("default", keys, progress), IndexSettings().probes, RAM_BUDGET)
    own = evenly(len(labels), rows)
    with progress.task("searching", len(own), "rows") as advance:
        batches = []
        for start in range(0, len(own), SEARCH_ROWS):
            batches.append(index.search(take(parts, own[start : start + SEARCH_ROWS]), k + 1))
            advance(len(batches[-1][0]))
    distances, ids = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    few = own[:SEARCH_ROWS]
    d, others = neighbours_without_self(distances[: len(few)], ids[: len(few)], few)
    hit = labels[others] == labels[few, None]
    temperature, _ = fit_temperature(d, others, hit)
    return RowNeighbours(own, distances, ids, labels, temperature, np.unique(labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[SMOLLM2_VOCABULARY, 151936])
    parser.add_argument("--neighbours", type=int, default=1024)
    parser.add_argument("--keys", type=int, default=300_000)
    parser.add_argument("--rows", type=int, default=8192, help="rows a round of ours")
    parser.add_argument("--dense-rows", type=int, default=512, help="rows a round of the row loop")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64, 256, 8192])
    parser.add_argument("--seconds", type=float, default=60.0, help="of rounds, five at least")
    arguments = parser.parse_args()

    near = find(arguments.rows, arguments.neighbours, arguments.keys, Progress())
    origin, results = provenance("numpy", "torch", "pyarrow"), []
    for vocabulary in arguments.vocab:
        labels = near.labels
        if vocabulary != SMOLLM2_VOCABULARY:
            spread_out = np.random.default_rng(0).permutation(vocabulary)[:SMOLLM2_VOCABULARY]
            labels = spread_out.astype(np.int32)[labels]
        full = near._replace(labels=labels, used=np.unique(labels))
        d, i = neighbours_without_self(full.distances, full.ids, full.own)
        without = full._replace(distances=d, ids=i)
        few = full.first(arguments.dense_rows)
        with tempfile.TemporaryDirectory() as name:
            folder, path = Path(name), Path(name) / "records.arrow"
            ours(few, folder)
            dense(without.first(len(few.own)), vocabulary, arguments.batch[0], path)
            assert_same(folder, path)
            variants = {("ours", SEARCH_ROWS): lambda f=full, d=folder: ours(f, d)}
            counts = {"ours": len(full.own)}
            for batch in arguments.batch:
                counts[batch] = min(max(arguments.dense_rows, batch), len(full.own))
                part = without.first(counts[batch])
                variants["dense", batch] = lambda n=part, v=vocabulary, b=batch, p=path: dense(
                    n, v, b, p
                )
            for function in variants.values():
                function()
            times = interleaved_rounds(variants, arguments.seconds)
            sizes = {
                "ours": sum(p.stat().st_size for p in folder.glob("*.npy")) / len(full.own),
                "dense": path.stat().st_size / counts[arguments.batch[-1]],
            }
            tokens = len(np.load(folder / "ids-00000.npy")) / len(full.own)
        rates = {}
        for (variant, batch), values in times.items():
            rows = counts["ours" if variant == "ours" else batch]
            rates[variant, batch] = spread([rows / ms * 1e3 for ms in values])
        best = max(rate[""] for (variant, _), rate in rates.items() if variant == "dense")
        authors = rates["dense", max(arguments.batch)][""]
        for (variant, batch), rate in rates.items():
            row = {
                "vocab": vocabulary,
                "neighbours": arguments.neighbours,
                "variant": variant,
                "batch": batch,
                "tokens_per_row": round(tokens, 2),
                **{f"rows_per_s{suffix}": round(value, 1) for suffix, value in rate.items()},
                "bytes_per_row": round(sizes[variant], 1),
                "times_authors": round(rate[""] / authors, 2),
                "times_best_dense": round(rate[""] / best, 2),
            }
            print(json.dumps(row))
            results.append(row)
    append_csv(RESULTS / "targets.csv", [origin | result for result in results])
    print(json.dumps({"benchmark": "targets", **origin, "results": results}))


if __name__ == "__main__":
    main()
