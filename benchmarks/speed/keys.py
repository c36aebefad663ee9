"""Real keys of SmolLM2-135M and indices over them, made once, for the benchmarks of the search."""

import random
from itertools import groupby
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from benchmarks.corpora.download import BUILD, smollm2
from benchmarks.corpora.factbook import factbook
from benchmarks.corpora.jsonl import write_jsonl
from vllm_memdec.train.data.artifacts import build_artifact, json_sha256, open_artifact, write_json
from vllm_memdec.train.data.blocks import pack, tokenise
from vllm_memdec.train.data.documents import documents
from vllm_memdec.train.data.inputs import model_hash
from vllm_memdec.train.data.shards import save_array
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model.hidden_states import Keys, embed
from vllm_memdec.train.model.huggingface import load_model
from vllm_memdec.train.model.scoring import label_logprobs
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import DatastoreSettings, IndexSettings
from vllm_memdec.train.stages.index import build_index, shaping

FOLDER = BUILD / "index-benchmark"
REGIONS = (
    "africa", "europe", "central-america-n-caribbean", "australia-oceania", "middle-east",
    "east-n-southeast-asia", "south-america", "south-asia", "north-america", "central-asia",
)  # fmt: skip
SECTIONS = ("Introduction", "Geography", "People and Society", "Government", "Economy")
WIDTH = 576  # numbers of a key of SmolLM2-135M
BLOCK, BATCH = 512, 4  # tokens a block, blocks a forward pass
SHARD = 50_000  # keys of a file
MAX_VALUE = 20_000  # characters of a fact
KINDS = {
    "default": IndexSettings(),
    "flat": IndexSettings(kind="flat"),
    "sq8": IndexSettings(kind="sq8"),
    "pq64": IndexSettings(kind="pq"),
    "fp16": IndexSettings(kind="fp16"),
}
SCORED = 10_000  # tokens of the validation text, and of the held-out text
SEARCH_ROWS = 2048  # queries searched at once


def write_text(keys: int, path: Path) -> dict[str, Path]:
    """Write three corpora of other countries each, a document a section; return name -> file.

    Text to score is one section of each country, so that it is of many.
    """
    pages: dict[str, list[str]] = {}
    for region in REGIONS:
        for section in SECTIONS:
            facts = factbook(region, section, MAX_VALUE)
            for country, group in groupby(facts, key=lambda fact: fact.country):
                pages.setdefault(country, []).append("\n".join(fact.line for fact in group))
    rng = random.Random(0)
    countries = rng.sample(sorted(pages), len(pages))
    files = {}
    for name, tokens in (("validation", SCORED), ("held_out", SCORED), ("datastore", keys)):
        chosen: list[str] = []
        # Five characters a token are enough; the surplus is cut after tokenising.
        while sum(map(len, chosen)) < 5 * tokens and countries:
            sections = pages[countries.pop()]
            chosen += sections if name == "datastore" else [rng.choice(sections)]
        files[name] = write_jsonl(path / f"{name}.jsonl", chosen)
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
        # A corpus with one block a shard would have the same files.
        rows = [len(keys[start : start + SHARD]) for start in range(0, wanted, SHARD)]
        save_array(folder / "rows-train.npy", np.array(rows, dtype=np.int32))
        write_json(folder / "corpus.json", {"shard_blocks": 1})
        if name != "datastore":
            logprobs = label_logprobs(model, tokens, positions, BATCH, progress, f"base, {name}")
            save_array(folder / "logprobs.npy", logprobs[:wanted])


def cached_keys(n_keys: int, progress: Progress) -> Path:
    """Return a folder of n keys, and of the text to score; embedded unless it is there."""
    base = smollm2()
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
        build_index(settings, stored, work, Context(progress))

    return build_artifact(
        FOLDER / f"index-{name}-{n_keys}",
        "index-benchmark",
        {"kind": settings.kind, "seed": settings.seed, "name": name},
        {
            "keys": open_artifact(keys).hash,
            "shape": json_sha256(shaping(settings, n_keys, WIDTH)),
        },
        make,
        progress.say,
    ).path
