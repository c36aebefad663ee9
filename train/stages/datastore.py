"""Datastore stage: token blocks -> (key, next token) of every valid row, in shards.

A key is a hidden state of the base after a context, a value the token that followed. Rows are
numbered through all blocks in order, counting valid pairs only; that number is the row's id in
the index and in the targets.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from vllm_memdec.train.data import completeness
from vllm_memdec.train.data.blocks import load_blocks, shard_rows, valid_rows
from vllm_memdec.train.data.shards import save_array, shard_path, unfinished
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model.devices import tell_dtype
from vllm_memdec.train.model.hidden_states import Keys, key_fallback
from vllm_memdec.train.settings import DatastoreSettings, Settings
from vllm_memdec.train.stages.stage import Build, Stage, lowered

BASE = "base"  # the name of the files that hold the base's log p of the labels
SAMPLE_SHARDS = 64  # shards, evenly spread, from which a sample of keys is taken, at least
MAX_SAMPLE_SHARDS = 2048  # the same at most: each is a file to open


def sampled(keys: Keys, starts: np.ndarray, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (row numbers, keys fp16) of so many rows in all, evenly spread over the shards."""
    n_shards, n_rows = len(starts) - 1, int(starts[-1])
    max_shards = MAX_SAMPLE_SHARDS
    if not keys.settings.keep_keys:  # each costs a forward pass: take more rows of fewer shards
        max_shards = max(SAMPLE_SHARDS, -(-2 * rows * n_shards // n_rows))
    shards = np.unique(np.linspace(0, n_shards - 1, min(n_shards, max_shards)).astype(int))
    ends = np.cumsum(np.diff(starts)[shards])  # where each shard ends, one after the other
    wanted = np.linspace(0, int(ends[-1]) - 1, min(rows, int(ends[-1]))).astype(np.int64)
    for shard, end in zip(shards.tolist(), ends.tolist(), strict=True):
        first = end - (starts[shard + 1] - starts[shard])
        local = wanted[slice(*np.searchsorted(wanted, (first, end)))] - first
        if len(local):
            yield local + starts[shard], keys(shard)[local]


def sample_rows(keys: Keys, starts: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (row numbers, keys fp16) of so many rows, or of all, evenly spread over the shards."""
    numbers, keys_of_rows = zip(*sampled(keys, starts, rows), strict=True)
    return np.concatenate(numbers), np.concatenate(keys_of_rows)


@dataclass
class Embedder:
    """Writes the keys and labels of one shard of blocks, and the base's log p of these."""

    gpu: ClassVar[bool] = True
    keys: Keys
    work: Path

    def __call__(self, shard: int) -> int:
        keys, labels, *logprobs = self.keys.compute(shard, self.keys.scored)
        if self.keys.settings.keep_keys:
            save_array(shard_path(self.work, "keys", shard), keys)
        for array in logprobs:
            save_array(shard_path(self.work, BASE, shard), array)
        save_array(shard_path(self.work, "labels", shard), labels)
        return len(labels)


@dataclass
class Labeller:
    """Writes the labels of one shard of blocks, where its keys are not kept."""

    corpus: Path
    work: Path

    def __call__(self, shard: int) -> int:
        tokens, positions = (array.shard(shard) for array in load_blocks(self.corpus, "train"))
        labels = tokens[:, 1:][valid_rows(positions)]
        save_array(shard_path(self.work, "labels", shard), labels)
        return len(labels)


def arrays(keep_keys: bool, scored: bool) -> tuple[str, ...]:
    """Return the names of a shard's files."""
    return ("keys",) * keep_keys + (BASE,) * scored + ("labels",)


def build_datastore(keys: Keys, work: Path, context: Context) -> None:
    """Write keys-N.npy [rows, D] fp16 and labels-N.npy [rows] int32 for each shard of blocks.

    And base-N.npy [rows] float32, the base's log p of the labels, where they are asked for.
    """
    starts = shard_rows(keys.corpus)
    n_shards = len(starts) - 1
    names = arrays(keys.settings.keep_keys, keys.scored)
    todo = unfinished(work, names, n_shards)
    worker = Embedder(keys, work) if len(names) > 1 else Labeller(keys.corpus, work)
    with context.progress.task("datastore", int(starts[-1]), "rows") as advance:
        done = sorted(set(range(n_shards)) - set(todo))
        advance(int(np.diff(starts)[done].sum()), done_before=True)
        for rows in context.executor.map(worker, todo):
            advance(rows)


def keys_of(build: Build, datastore: Path) -> Keys:
    """Return the keys of the corpus's rows, of which a datastore may hold some."""
    where = build.path("corpus"), datastore
    return Keys(build.settings.datastore, build.base, *where, scores_labels(build.settings))


def scores_labels(settings: Settings) -> bool:
    """Return whether the memory's objective needs the base's log p of the labels."""
    return settings.memory.objective == "mixture"


def further_pass(settings: DatastoreSettings) -> str | None:
    """Return what log-probabilities cost beside the head's products; None if nothing."""
    if not settings.keep_keys:
        return "a pass of the base that keys which are not kept would not take here"
    if settings.key == "layer":
        return "its pass goes on from the keys' layer to the head"
    return None


def stage(build: Build) -> Stage:
    """Return how the datastore is made."""
    settings = build.settings.datastore.model_dump()
    batch = settings.pop("batch_blocks")  # bounds RAM, changes no key
    if build.settings.datastore.key != "layer":
        settings["layer_fraction"] = None
    scored, kept = scores_labels(build.settings), settings["keep_keys"]
    if scored:
        settings["base_logprobs"] = True

    def make(work: Path) -> None:
        say, given = build.context.progress.say, build.settings
        tell_dtype((part.dtype for part in (given.datastore, given.memory, given.export)), say)
        if said := key_fallback(build.base, build.settings.datastore.key_layer):
            say(said)
        if scored and (why := further_pass(build.settings.datastore)):
            say(f"datastore: memory.objective mixture needs the base's log-probabilities: {why}")
        build_datastore(keys_of(build, work), work, build.context)

    def files(work: Path) -> Iterable[str]:
        shards = completeness.n_shards(build.path("corpus"))
        return completeness.numbered(arrays(kept, scored), shards)

    remedy = lowered("datastore.batch_blocks", batch)
    return Stage(settings, ("corpus",), make, files, remedy)
