"""A finished build, opened to be looked at: its folders, a sample of rows, their neighbours."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_memdec.train.data.artifacts import open_artifact
from vllm_memdec.train.data.ownership import MANIFEST
from vllm_memdec.train.data.shards import Shards, shards
from vllm_memdec.train.executor.context import RAM_BUDGET
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.pipeline import STAGES
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.verify.brute_force import evenly, nearest, take

WORK = 4e12  # multiplications of the brute force: of a large datastore fewer rows are searched
RECALL_AT = 64  # neighbours whose recall is measured


class NotChecked(Exception):
    """Says why a check cannot run."""


@dataclass(frozen=True)
class Build:
    """The folders of a build, and how to look at them."""

    root: Path
    broken: frozenset[str]  # stages whose files are not whole
    sample: int
    base: Path | None
    progress: Progress

    def has(self, stage: str) -> bool:
        """Tell whether a stage is there and whole."""
        return stage in self.whole

    @functools.cached_property
    def whole(self) -> frozenset[str]:
        """The stages that are there and whole, looked up once: one may have 100,000 files."""
        there = {stage for stage in STAGES if open_artifact(self.root / stage) is not None}
        return frozenset(there) - self.broken

    def folder(self, *stages: str) -> Path:
        """Return the first of some stages' folders that is there and whole, or raise NotChecked."""
        for stage in stages:
            if self.has(stage):
                return self.root / stage
        broken = any((self.root / stage).exists() for stage in stages)
        raise NotChecked(f"{' or '.join(stages)} is {'damaged' if broken else 'not there'}")

    def settings(self, stage: str) -> dict[str, Any]:
        return json.loads((self.folder(stage) / MANIFEST).read_text())["settings"]

    @functools.cached_property
    def keys(self) -> Shards:
        keys = shards(self.folder("datastore"), "keys")
        if not len(keys):
            raise NotChecked("the keys were not kept")
        return keys

    @functools.cached_property
    def labels(self) -> Shards:
        return shards(self.folder("datastore"), "labels")

    @functools.cached_property
    def neighbours(self) -> int:
        """How many the targets were made of; of a build without targets, RECALL_AT."""
        if not self.has("targets"):
            return min(RECALL_AT, self.labels.rows - 1)
        return json.loads((self.root / "targets" / "targets.json").read_text())["neighbours"]

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Rows of the datastore that are searched."""
        size = self.labels.rows * self.keys[0].shape[1]
        return evenly(self.labels.rows, min(self.sample, max(64, int(WORK / size))))

    @functools.cached_property
    def true(self) -> tuple[np.ndarray, np.ndarray]:
        """Distances and ids of the sampled rows' nearest neighbours, by brute force."""
        k = max(self.neighbours, min(RECALL_AT, self.labels.rows - 1))
        self.progress.say(f"brute force: {len(self.rows)} rows against {self.labels.rows:,} keys")
        return nearest(self.keys, take(self.keys, self.rows), k, self.rows)

    @functools.cached_property
    def by_index(self) -> tuple[np.ndarray, np.ndarray]:
        """Distances and ids as the index finds them, one more than `true`, own row among them."""
        from vllm_memdec.train.settings import IndexSettings
        from vllm_memdec.train.stages.search import Index

        nprobe = IndexSettings().probes
        if self.has("targets"):
            nprobe = self.settings("targets")["probes"]
        index = Index(self.folder("index"), nprobe, RAM_BUDGET)
        return index.search(take(self.keys, self.rows), self.true[1].shape[1] + 1)

    @functools.cached_property
    def models(self) -> dict[str, Any]:
        """The memory, and the base if it was given, as they computed in training."""
        folder = self.folder("memory", "export")
        dtype = self.settings(folder.name)["dtype"]
        folders = {"memory": folder} | ({"base": self.base} if self.base else {})
        return {name: load_model(str(path), dtype) for name, path in folders.items()}


def without_own(
    distances: np.ndarray, ids: np.ndarray, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return k of k+1 neighbours: own row moved to the end, the last cut off."""
    order = np.argsort(ids == own[:, None], axis=1, kind="stable")[:, :-1]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(ids, order, axis=1)
