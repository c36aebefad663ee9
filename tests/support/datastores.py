"""Datastores of clustered keys, and the index and targets of them, for tests of those stages."""

import json

import numpy as np

from vllm_memdec.train.data.artifacts import write_json
from vllm_memdec.train.data.shards import save_array, shards
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model.hidden_states import Keys
from vllm_memdec.train.settings import DatastoreSettings, IndexSettings, TargetSettings
from vllm_memdec.train.stages.index import build_index
from vllm_memdec.train.stages.search import Index
from vllm_memdec.train.stages.targets import build_targets

WIDTH, VOCABULARY = 16, 50
BUDGET = 2**30


def clustered(rows, seed=0, centres=60, spread=0.3):
    """Return keys around few centres and labels that mostly follow the centre, like real text."""
    rng = np.random.default_rng(seed)
    centre = rng.integers(centres, size=rows)
    keys = rng.normal(size=(centres, WIDTH))[centre] + spread * rng.normal(size=(rows, WIDTH))
    labels = np.where(
        rng.random(rows) < 0.7, centre % VOCABULARY, rng.integers(VOCABULARY, size=rows)
    )
    return keys.astype(np.float16), labels.astype(np.int32)


def store(folder, keys, labels, per_shard=400):
    """Write keys and labels as datastore shards, one block of a corpus each."""
    starts = range(0, len(keys), per_shard)
    for n, start in enumerate(starts):
        save_array(folder / f"keys-{n:05d}.npy", keys[start : start + per_shard])
        save_array(folder / f"labels-{n:05d}.npy", labels[start : start + per_shard])
    rows = np.array([len(keys[start : start + per_shard]) for start in starts], dtype=np.int32)
    save_array(folder / "rows-train.npy", rows)
    write_json(folder / "corpus.json", {"shard_blocks": 1})
    save_array(folder / "used-train.npy", np.unique(labels))
    return Keys(DatastoreSettings(), "", folder, folder)


def run(tmp_path, keys, labels, index=None, probes=10_000, budget=BUDGET, **settings):
    """Build index and targets of a datastore; return (list of rows {token: p}, temperature)."""
    for name in ("datastore", "index", "targets"):
        (tmp_path / name).mkdir()
    source = store(tmp_path / "datastore", keys, labels)
    folder, work = tmp_path / "index", tmp_path / "targets"
    build_index(index or IndexSettings(), source, folder, Context(ram_budget=budget))
    searched = Index(folder, probes, budget)
    build_targets(TargetSettings(**settings), source, searched, work, Context())
    rows = []
    parts = (shards(work, name) for name in ("offsets", "ids", "probs", "labels"))
    for offsets, ids, probs, stored in zip(*parts, strict=True):
        assert np.array_equal(stored, labels[len(rows) : len(rows) + len(stored)])
        for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
            assert len(set(ids[start:stop].tolist())) == stop - start
            rows.append(
                dict(zip(ids[start:stop].tolist(), probs[start:stop].tolist(), strict=True))
            )
    return rows, json.loads((work / "targets.json").read_text())["temperature"]
