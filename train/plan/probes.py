"""Measure, in a minute or two, what the stages cost on this machine: the rates `memdec plan` needs.

Every rate is taken from the stages' own code on a sample of the text, in the processes the build
would use, so that what a process costs to start is measured with it.
"""

import hashlib
import io
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from rich.console import Console

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.artifacts import write_atomic, write_json
from vllm_memdec.train.data.blocks import load_blocks, tokenise
from vllm_memdec.train.data.chat import Chat
from vllm_memdec.train.data.documents import pieces, read_documents
from vllm_memdec.train.data.files import corpus_files, format_of
from vllm_memdec.train.data.readers import Fields, Piece
from vllm_memdec.train.data.shards import save_array, shard_path
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.executor.executor import Executor
from vllm_memdec.train.executor.ray_executor import World
from vllm_memdec.train.model.decoder import build_memory, memory_config
from vllm_memdec.train.model.devices import EMBEDDED, blocks_at_once, default_device, product_dtype
from vllm_memdec.train.model.hidden_states import blocks_gathered, embed
from vllm_memdec.train.model.huggingface import load_model, load_tokenizer
from vllm_memdec.train.model.scoring import label_logprobs
from vllm_memdec.train.model.windows import TOKENS_AT_ONCE
from vllm_memdec.train.plan.index_rates import measure_index
from vllm_memdec.train.plan.rates import Rates
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import Settings
from vllm_memdec.train.stages.corpus import build_corpus
from vllm_memdec.train.stages.datastore import BASE, scores_labels
from vllm_memdec.train.stages.targets import sparse_targets
from vllm_memdec.train.stages.training import Training
from vllm_memdec.train.training.batches import Batches
from vllm_memdec.train.training.optimizers import new_optimizer
from vllm_memdec.train.training.parallel import spread
from vllm_memdec.train.verify.brute_force import nearest

SAMPLE_BYTES = 2**23  # bytes of text in the sample
EMBED_SECONDS = 12.0  # seconds for which the sample is embedded
SCORED_BLOCKS = 8  # token blocks whose scoring is timed
SEARCHED_ROWS = 256  # rows whose targets the timed training uses
STORAGE_BYTES = 1 << 26  # bytes written and read to time the disk
LINK = 1e9  # bytes a second between machines without GPUs: assumed, not measured
STEPS = 8  # timed steps of each kind, after one that warms up


def blocks_scored(tokens: np.ndarray) -> int:
    """Return how many blocks [B, T+1] go through a forward pass where text is scored."""
    return max(1, TOKENS_AT_ONCE // (tokens.shape[1] - 1))


def seconds(function: Any, *arguments: Any) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def peak_bytes() -> int:
    """Return the peak RAM of this process."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def piece_bytes(piece: Piece) -> int:
    """Return how large a piece is, of a .parquet its share of the file."""
    size = piece.path.stat().st_size
    if format_of(piece.path) == ".parquet" and piece.stop is not None:
        return max(1, size // sum(other.path == piece.path for other in pieces(piece.path)))
    return max(1, min(size, piece.stop or size) - piece.start)


def sample_text(corpus: Path, work: Path, fields: Fields) -> tuple[Path, int, int]:
    """Write pieces spread evenly over a corpus; return (file, their bytes, bytes of all)."""
    parts = pieces(corpus)
    total = sum(path.stat().st_size for path in corpus_files(corpus).files)
    wanted = max(1, round(len(parts) * min(1, SAMPLE_BYTES / max(total, 1))))
    chosen = [parts[n] for n in np.linspace(0, len(parts) - 1, wanted).astype(int)]
    sample, read = work / "sample.jsonl", 0.0
    with open(sample, "w") as file:
        for piece in chosen:
            written = characters = 0  # a compressed file is one piece, however large
            for text in read_documents(piece, fields):
                if written < SAMPLE_BYTES:
                    row = {"messages": text.messages} if isinstance(text, Chat) else {"text": text}
                    file.write(json.dumps(row) + "\n")
                    written += len(text)
                characters += len(text)
            read += piece_bytes(piece) * written / max(characters, 1)
    return sample, max(1, round(read)), total


def count_tokens(base: str, text: Path, work: Path, fields: Fields) -> int:
    """Return about how many tokens a text has, counted on a sample."""
    sample, read, total = sample_text(text, work, fields)
    documents = tokenise(load_tokenizer(base), first_texts(sample))
    return round(sum(map(len, documents)) * total / read)


def random_text(base: str, work: Path) -> Path:
    """Write text of random tokens, which costs as much as any other."""
    tokenizer = load_tokenizer(base)
    rng = np.random.default_rng(0)
    sample = work / "sample.jsonl"
    with open(sample, "w") as file:
        for _ in range(200):
            text = tokenizer.decode(rng.integers(len(tokenizer), size=500).tolist())
            text = text.replace("\0", " ")  # a sign of binary files
            file.write(json.dumps({"text": text}) + "\n")
    return sample


@dataclass
class StageProbe:
    """Embeds, indexes and searches the beginning of the sample; leaves a corpus and its targets."""

    gpu: ClassVar[bool] = True
    settings: Settings
    base: str
    corpus: Path
    work: Path
    n_keys: int  # keys of the whole corpus

    def __call__(self, _: int) -> int:
        began = time.perf_counter()
        settings = self.settings
        measured: dict[str, float] = {"process_bytes": peak_bytes()}
        model = load_model(self.base, settings.datastore.dtype)
        measured["load"] = time.perf_counter() - began
        measured["reload"] = seconds(load_model, self.base, settings.datastore.dtype)
        keys, labels, blocks, measured["key"] = self.embed(model)
        measured["embed_bytes"] = peak_bytes()
        measured |= measure_index(keys, labels, settings, self.n_keys)
        entries = self.write(keys, labels, blocks)
        tokens, positions = (a[:SCORED_BLOCKS] for a in load_blocks(self.corpus, "train"))
        scored = seconds(label_logprobs, model, tokens, positions, blocks_scored(tokens))
        measured["score_base"] = scored / (len(tokens) * settings.corpus.block_tokens)
        measured |= {"entries": entries, "width": keys.shape[1]}
        measured["threads"] = torch.get_num_threads()
        measured["inside"] = time.perf_counter() - began
        write_json(self.work / "stages.json", measured)
        return 1

    def embed(self, model: Any) -> tuple[np.ndarray, np.ndarray, int, float]:
        """Return keys, labels, their blocks and the seconds a row, the first batch left out."""
        tokens, positions = load_blocks(self.corpus, "train")
        batch = blocks_at_once(
            self.settings.datastore.batch_blocks, tokens.shape[1] - 1, model.device, EMBEDDED
        )
        batches: list[tuple[np.ndarray, ...]] = []
        spent: list[float] = []
        each = blocks_gathered(model, batch)
        for start in range(0, len(tokens), each):
            part = slice(start, start + each)
            began = time.perf_counter()
            read = tokens[part], positions[part], batch, scores_labels(self.settings)
            batches += embed(model, self.settings.datastore.key_layer, *read)
            spent.append(time.perf_counter() - began)
            if sum(spent) > EMBED_SECONDS:
                break
        warm = slice(int(len(spent) > 1), None)
        rows = sum(len(labels) for _, labels, *_ in batches[warm])
        keys, labels, *base = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        for logprobs in base:
            (self.work / "targets").mkdir()
            save_array(shard_path(self.work / "targets", BASE, 0), logprobs)
        return keys, labels, min(len(spent) * each, len(tokens)), sum(spent[warm]) / max(rows, 1)

    def write(self, keys: np.ndarray, labels: np.ndarray, blocks: int) -> float:
        """Write the embedded blocks and their targets, each as one shard; return tokens a row."""
        corpus, targets = self.work / "corpus", self.work / "targets"
        for folder in (corpus, targets):
            folder.mkdir(exist_ok=True)
        tokens, positions = load_blocks(self.corpus, "train")
        save_array(shard_path(corpus, "tokens-train", 0), tokens[:blocks])
        save_array(shard_path(corpus, "positions-train", 0), positions[:blocks])
        for name in ("rows", "used"):
            array = np.load(self.corpus / f"{name}-train.npy")
            save_array(corpus / f"{name}-train.npy", array[:blocks] if name == "rows" else array)
        facts = json.loads((self.corpus / "corpus.json").read_text())
        facts["train"]["blocks"] = facts["shard_blocks"] = blocks
        write_json(corpus / "corpus.json", facts)
        # Of each row's own neighbours only the number matters here: those of the queries, in turn.
        offsets, ids, probs = sparse_sample(keys, labels, self.settings)
        lengths = np.resize(np.diff(offsets), len(labels))
        offsets = np.r_[0, np.cumsum(lengths)]
        save_array(shard_path(targets, "offsets", 0), offsets)
        save_array(shard_path(targets, "labels", 0), labels)
        save_array(shard_path(targets, "ids", 0), np.resize(ids, offsets[-1]))
        save_array(shard_path(targets, "probs", 0), np.resize(probs, offsets[-1]))
        return float(lengths.mean())


def sparse_sample(
    keys: np.ndarray, labels: np.ndarray, settings: Settings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the targets of some rows, searched exactly among the sample's keys, probs in fp16."""
    rows = np.arange(min(SEARCHED_ROWS, len(keys)))
    k = min(settings.targets.neighbours + 1, len(keys))
    distances, ids = nearest([keys], keys[rows], k)
    temperature = settings.targets.temperature or float(np.median(distances)) / 10 or 1.0
    used, threshold = np.unique(labels), settings.targets.min_probability
    offsets, tokens, probs = sparse_targets(
        distances, ids, rows, labels, used, temperature, threshold
    )
    return offsets, tokens, probs.astype(np.float16)


@dataclass
class TrainingProbe:
    """Trains for some steps on what the other probe left."""

    settings: Settings
    base: str
    work: Path

    def __call__(self, world: World) -> None:
        began = time.perf_counter()
        settings, corpus, targets = (
            self.settings.memory,
            self.work / "corpus",
            self.work / "targets",
        )
        model = build_memory(settings, self.base, self.settings.corpus.block_tokens)
        module = spread(model.to(default_device()).train(), settings, world)
        optimizer = new_optimizer(module, settings)
        measured = {"build_memory": time.perf_counter() - began}
        for name, sampled in (("step", None), ("sampled_step", settings.sampled_negatives)):
            if name == "sampled_step" and sampled is None:
                measured[name] = measured["step"]
                continue
            training = Training(
                # Warm-up steps take the whole vocabulary: one of them, or all.
                settings.changed(sampled_negatives=sampled, warmup_fraction=0, epochs=1e3),
                self.base,
                corpus,
                targets,
                self.work,
            )
            batches, spent, rows = Batches(training.settings, corpus, targets), [], []
            for step in range(1, STEPS + 2):
                started = time.perf_counter()
                rows.append(training.step(module, optimizer, batches, step, world)["rows"])
                spent.append(time.perf_counter() - started)
            # Of chats a batch may have no row that is predicted.
            measured[name] = statistics.median(spent[1:]) / max(statistics.mean(rows[1:]), 1)
        if world.rank:
            return
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        measured["checkpoint"] = seconds(torch.save, state, self.work / "checkpoint.pt")
        (self.work / "checkpoint.pt").unlink()
        tokens, positions = (a[:SCORED_BLOCKS] for a in load_blocks(corpus, "train"))
        model = model.eval().to(product_dtype(self.settings.export.dtype, model.device))
        label_logprobs(model, tokens[:1], positions[:1], 1)  # warms up
        scored = seconds(label_logprobs, model, tokens, positions, blocks_scored(tokens))
        measured["score_memory"] = scored / (len(tokens) * self.settings.corpus.block_tokens)
        measured["memory_parameters"] = sum(p.numel() for p in model.parameters())
        measured |= {"train_bytes": peak_bytes(), "inside": time.perf_counter() - began}
        write_json(self.work / "training.json", measured)


def measure_storage(work: Path) -> dict[str, float]:
    """Return seconds a byte of hashing, of writing to the disk and of reading from it."""
    path, block = work / "storage", np.random.default_rng(0).bytes(STORAGE_BYTES)
    spent_on = {"hash": seconds(lambda: hashlib.sha256(block).hexdigest())}
    spent_on["write"] = seconds(write_atomic, path, lambda p: p.write_bytes(block))
    with open(path, "rb") as file:  # what was just written is in RAM, too
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    spent_on["read"] = seconds(path.read_bytes)
    path.unlink()
    return {name: spent / STORAGE_BYTES for name, spent in spent_on.items()}


def nothing() -> None:
    """Do nothing, in a process that has to be started for it."""


def probe_rates(
    base: str,
    corpus: Path | None,
    tokens: int | None,
    settings: Settings,
    work: Path,
    progress: Progress,
    executor: Executor,
) -> tuple[Rates, int]:
    """Return (rates, tokens of the corpus), measured in a working folder.

    corpus: text to take the sample from; tokens: how large the corpus is, if not as large as that.
    """

    def prepare() -> None:
        load_tokenizer(base)
        memory_config(settings.memory, base, settings.corpus.block_tokens)

    with progress.task("probing costs", 4, "probes") as advance:
        # Numbers as JSON has them: Rates says which are whole.
        measured: dict[str, Any] = {"prepare": seconds(prepare), "start": seconds(executor.workers)}
        measured["first"] = seconds(executor.call, nothing)
        measured["call"] = seconds(executor.call, nothing)
        measured |= executor.call(measure_storage, work) | {"launch": 0.0, "reduce": 1 / LINK}
        read = total = 1
        if corpus is None:
            sample = random_text(base, work)
        else:
            sample, read, total = sample_text(corpus, work, Fields(settings.corpus.text_field))
        advance(1)
        texts = list(first_texts(sample))
        tokenizer = load_tokenizer(base)
        measured["tokenise"] = seconds(lambda: list(tokenise(tokenizer, texts)))
        blocks = work / "sample"
        blocks.mkdir()
        quiet = Progress(Console(file=io.StringIO()))  # no bar inside another
        try:
            of_sample = settings.corpus.changed(text_field="text", group=None)
            build_corpus(of_sample, base, sample, None, blocks, Context(quiet, executor))
        except MemdecError as error:  # the user knows the text, not the sample
            raise MemdecError(str(error).replace(str(sample), str(corpus or "--tokens"))) from None
        facts = json.loads((blocks / "corpus.json").read_text())
        counted = sum(facts[split]["tokens"] for split in ("train", "validation"))
        measured["tokenise"] /= counted
        measured["tokens_per_byte"] = counted / read
        measured["rows_per_token"] = facts["train"]["rows"] / facts["train"]["tokens"]
        measured["sample_tokens"] = counted
        measured["used"] = len(np.load(blocks / "used-train.npy"))
        if tokens is None:
            tokens = round(total * measured["tokens_per_byte"])
        advance(1)
        probe = StageProbe(settings, base, blocks, work, round(tokens * measured["rows_per_token"]))
        spent = seconds(lambda: list(executor.map(probe, [0])))
        measured |= json.loads((work / "stages.json").read_text())
        measured["map"] = max(0.0, spent - measured.pop("inside"))
        advance(1)
        spent = seconds(executor.train, TrainingProbe(settings, base, work), work)
        measured |= json.loads((work / "training.json").read_text())
        measured["train"] = max(0.0, spent - measured.pop("inside"))
        advance(1)
    measured["vocabulary"] = len(tokenizer)
    return Rates(**measured), tokens


def first_texts(sample: Path) -> Iterator[str]:
    """Yield the documents of the sample."""
    for piece in pieces(sample):
        yield from read_documents(piece)
