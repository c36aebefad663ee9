"""`memdec explain --sources`: the documents of the corpus that a token of the memory comes from.

A memory has learnt what the nearest keys of its build's datastore say, so the keys nearest to a
context are what it goes by there. They are searched as the targets stage searches them, weighed
by its kernel exp(-d / temperature), and summed up by document.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vllm_memdec.checkpoint import read_block, tokenizer_fingerprint
from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.artifacts import Artifact, open_artifact
from vllm_memdec.train.data.blocks import bos_of
from vllm_memdec.train.data.inputs import Hashes, same_base
from vllm_memdec.train.data.places import Passage, Places
from vllm_memdec.train.evaluation.explain import Explanation, Source, Span
from vllm_memdec.train.executor.context import RAM_BUDGET
from vllm_memdec.train.model.hidden_states import embed
from vllm_memdec.train.model.huggingface import load_model, load_tokenizer
from vllm_memdec.train.settings import DatastoreSettings
from vllm_memdec.train.stages.search import Index
from vllm_memdec.train.stages.targets import neighbour_weights

STAGES = ("corpus", "datastore", "index", "targets")  # those that are read
SHOWN = 3  # documents of a token
BEFORE, AFTER = 20, 12  # tokens of a passage on either side of the one that is said


class Sources:
    """The corpus and the datastore of a build, to be asked where tokens come from."""

    def __init__(self, build: Path, base: str, keys_base: str | None = None) -> None:
        """base: the one that is served; keys_base: the one that made the keys, if it is another."""
        self.build, stages = build, open_stages(build)
        corpus, datastore, index, targets = (stages[name] for name in STAGES)
        self.facts, self.tokenizer = read_facts(corpus.path / "corpus.json"), load_tokenizer(base)
        if self.facts["tokenizer_fingerprint"] != tokenizer_fingerprint(self.tokenizer):
            raise MemdecError(
                f"the build {build} has another tokenizer than the base {base}: give --sources a "
                "build of this tokenizer."
            )
        self.base = find_base(build, datastore, base, keys_base)
        made = datastore.manifest["settings"]
        depth = {"layer_fraction": made["layer_fraction"]} if made["key"] == "layer" else {}
        self.settings = DatastoreSettings(key=made["key"], dtype=made["dtype"], **depth)
        self.places, self.targets = Places(corpus.path), targets
        self.kernel = read_facts(targets.path / "targets.json")
        self.index = Index(index.path, targets.manifest["settings"]["probes"], RAM_BUDGET)

    def check_memory(self, memory: str, say: Callable[[str], None]) -> None:
        """Say so if a memory was not trained on this build's targets."""
        section = read_block(memory)
        made_of = {} if section is None else section.provenance.get("artifacts", {})
        if made_of.get("targets") != self.targets.hash:
            say(
                f"sources: {memory} was not trained on {self.targets.path}, so what it says may "
                "come from elsewhere"
            )

    def added(self, explanation: Explanation) -> Explanation:
        """Return an explanation with the sources of the tokens that the memory decided."""
        tokens = list(explanation.tokens)
        decided = [n for n, token in enumerate(tokens) if token.decided == "memory"]
        # The first token of the text has no context, and is none of the explained.
        for n, sources in zip(
            decided, self.of(explanation.ids, [n + 1 for n in decided]), strict=True
        ):
            tokens[n] = replace(tokens[n], sources=sources)
        return replace(explanation, tokens=tokens, build=str(self.build))

    @cached_property
    def model(self) -> Any:
        return load_model(self.base, self.settings.dtype)

    def keys(self, ids: list[int]) -> np.ndarray:
        """Return the key after every token but the last [T-1, D], as the build made its own.

        Contexts are no longer than a block; the later half of one is read where the text goes on.
        """
        n, bos = self.facts["block_tokens"], bos_of(self.tokenizer)
        parts: list[np.ndarray] = []
        done = 0
        while done < len(ids) - 1:
            start = max(0, done - n // 2) if done else 0
            repeated = [bos] if start and bos is not None else []
            block = [*repeated, *ids[start : start + n + 1 - len(repeated)]]
            read = np.array([block]), np.arange(len(block))[None]
            [(keys, _)] = embed(self.model, self.settings.key_layer, *read, 1)
            parts.append(keys[len(repeated) + done - start :])
            done += len(parts[-1])
        return np.concatenate(parts)

    def of(self, ids: list[int], tokens: list[int]) -> list[list[Source]]:
        """Return the likeliest sources of some tokens of a text, given by their places in it."""
        if not tokens:
            return []
        keys_ND = self.keys(ids)[np.array(tokens) - 1]
        k = min(self.kernel["neighbours"], len(self.index.labels))
        at_once = self.index.rows_at_once(k)
        batches = [keys_ND[n : n + at_once] for n in range(0, len(keys_ND), at_once)]
        near = [
            (neighbour_weights(distances, rows, self.kernel["temperature"]), rows)
            for distances, rows in self.index.search_all(batches, k)
        ]
        weight_NK, row_NK = (np.concatenate(parts) for parts in zip(*near, strict=True))
        rows, of_NK = np.unique(row_NK, return_inverse=True)  # -1, where there is none, weighs 0
        document_NK = self.places.documents(rows.clip(min=0))[of_NK].reshape(row_NK.shape)
        found = zip(tokens, weight_NK, row_NK, document_NK, strict=True)
        return [self._sources(ids, *of_token) for of_token in found]

    def _sources(
        self,
        ids: list[int],
        at: int,
        weight_K: np.ndarray,
        row_K: np.ndarray,
        document_K: np.ndarray,
    ) -> list[Source]:
        """Return the documents of a token's nearest keys, those that say the token first."""
        there = row_K >= 0
        weight_K, row_K, document_K = weight_K[there], row_K[there], document_K[there]
        agrees_K = self.index.labels[row_K] == ids[at]
        ranked = []
        for document in np.unique(document_K).tolist():
            mine_K = document_K == document
            agrees = bool(agrees_K[mine_K].any())
            counted = np.flatnonzero(mine_K & agrees_K if agrees else mine_K)  # nearest first
            weight = float(weight_K[counted].sum())
            ranked.append((agrees, weight, document, int(row_K[counted[0]])))
        ranked.sort(key=lambda source: source[:2], reverse=True)
        sources = []
        for agrees, weight, document, row in ranked[:SHOWN]:
            passage = self.places.passage(row, BEFORE, AFTER)
            spans, name = self._spans(passage, ids, at), self.places.name(document)
            found = document + 1, name, weight, agrees, spans, passage.begins, passage.ends
            sources.append(Source(*found))
        return sources

    def _spans(self, passage: Passage, ids: list[int], at: int) -> list[Span]:
        """Return a passage's text, divided where it begins and ends to be the explained text."""
        theirs, here = passage.ids, passage.at
        before = shared(theirs[:here][::-1], ids[:at][::-1])
        after = shared(theirs[here:], ids[at:])
        cuts = (0, here - before, here, here + 1, here + max(1, after), len(theirs))
        text = self.tokenizer.decode(theirs, skip_special_tokens=True)
        # A tokenizer may leave out the space before a first token: no part is decoded by itself.
        parts = (self.tokenizer.decode(theirs[:cut], skip_special_tokens=True) for cut in cuts)
        ends = [len(os.path.commonprefix([part, text])) for part in parts]
        kinds = ((False, False), (True, False), (after > 0, True), (True, False), (False, False))
        spans = (Span(text[a:b], *kind) for (a, b), kind in zip(pairwise(ends), kinds, strict=True))
        return [span for span in spans if span.text]


def shared(one: list[int], other: list[int]) -> int:
    """Return with how many equal tokens both begin."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def open_stages(build: Path) -> dict[str, Artifact]:
    """Return the stages of a build that are read; MemdecError if it has not all, or of two runs."""
    if not any((build / stage).is_dir() for stage in STAGES):
        raise MemdecError(
            f"{build} is no build: give --sources the --output folder of a memdec build."
        )
    stages: dict[str, Artifact] = {}
    for name in STAGES:
        artifact = open_artifact(build / name)
        if artifact is None:
            raise MemdecError(
                f"{build / name} is missing or damaged, and --sources reads it: run the memdec "
                "build of this folder again."
            )
        inputs = artifact.manifest["inputs"]
        if any(inputs.get(earlier, made.hash) != made.hash for earlier, made in stages.items()):
            raise MemdecError(
                f"{build / name} was made of other stages than those beside it: run the memdec "
                "build of this folder again."
            )
        stages[name] = artifact
    return stages


def find_base(build: Path, datastore: Artifact, base: str, keys_base: str | None) -> str:
    """Return the folder of the base that made a build's keys; MemdecError if it was not given."""
    made, hashes = datastore.manifest, Hashes(build)
    given = base if keys_base is None else keys_base
    if not same_base(Path(given), [made], hashes):
        known = made.get("sources", {}).get("base")
        raise MemdecError(
            f"{given} is not the base that made the keys of {build}: give that one"
            f"{f' ({known})' if known else ''} with --keys-base."
        )
    return given


def read_facts(path: Path) -> dict[str, Any]:
    """Return what a stage says of itself in a JSON file."""
    return json.loads(path.read_text())
