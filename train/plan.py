"""`memdec plan`: what a build will cost, before it starts.

Sizes follow from what the stages write; times are amounts of work times the rates of calibrate.py.
For a GPU that is not here, rates follow from its published figures: an estimate, and called so.
"""

import math
import os
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.calibrate import Rates, calibrate, count_tokens
from vllm_memdec.train.cluster import Cluster
from vllm_memdec.train.config import Settings
from vllm_memdec.train.decoder import with_defaults
from vllm_memdec.train.export import CALIBRATION_TOKENS
from vllm_memdec.train.index import (
    PART_SHARE,
    POINTS_PER_LIST,
    factory_string,
    key_bytes,
    most_sampled,
)
from vllm_memdec.train.progress import Progress, human_seconds
from vllm_memdec.train.targets import FIT_ROWS
from vllm_memdec.train.text import corpus_files
from vllm_memdec.train.trainer import EVALUATION_TOKENS, warmup_steps
from vllm_memdec.train.trust import code_allowed

TABLE = tuple(10**n for n in range(6, 11))  # tokens
HEAPS = 0.5  # the vocabulary in use grows as this power of the text
PLOT = 1.5  # seconds
FAISS = 0.5  # seconds until two processes have imported it and started its threads
KMEANS_PASSES = 10  # faiss's own number for the lists of an index
GPU_STAGES = ("datastore", "index", "targets", "memory")


@dataclass(frozen=True)
class Gpu:
    """Published dense bf16 FLOP/s and memory bandwidth in bytes/s."""

    flops: float
    bandwidth: float


GPUS = {
    "a100": Gpu(312e12, 2.04e12),
    "a800": Gpu(312e12, 2.04e12),
    "h100": Gpu(989e12, 3.35e12),
    "h200": Gpu(989e12, 4.8e12),
    "l4": Gpu(121e12, 0.3e12),
    "l40s": Gpu(362e12, 0.864e12),
}
UTILISATION = 0.35  # of a GPU's FLOP/s and bandwidth that is taken to be reached


@dataclass(frozen=True)
class Stage:
    """What one stage is predicted to cost."""

    name: str
    seconds: float
    disk: int  # bytes
    memory: int  # bytes of the largest process, at its peak


def on_gpu(rates: Rates, gpu: Gpu, base_parameters: int, key_bytes: int) -> Rates:
    """Return rates for a GPU, from its figures; what runs on CPUs keeps those measured.

    key_bytes: of a key in the index, all of which a search reads of each that it visits.
    """
    flop, byte = 1 / (gpu.flops * UTILISATION), 1 / (gpu.bandwidth * UTILISATION)
    memory = rates.memory_parameters
    return replace(
        rates,
        key=2 * base_parameters * flop,
        score_base=2 * base_parameters * flop,
        score_memory=2 * memory * flop,
        step=6 * memory * flop,
        sampled_step=6 * memory * flop,
        train_index=KMEANS_PASSES * 2 * rates.width * flop,
        compare=2 * rates.width * flop,
        encode=2 * rates.width * byte,
        scan=key_bytes * byte,
    )


@dataclass(frozen=True)
class Job:
    """A build whose cost is asked for: amounts of work, and each stage's cost.

    validation: tokens of a validation text, None if a part of the corpus is held out; budget: bytes
    a process may take for what grows with the corpus.
    """

    rates: Rates
    settings: Settings
    tokens: int
    validation: int | None
    budget: int
    workers: int

    def stages(self) -> list[Stage]:
        """Return the cost of every stage, in order."""
        return [
            self.corpus(),
            self.datastore(),
            self.index(),
            self.targets(),
            self.memory(),
            self.export(),
        ]

    @cached_property
    def held_out(self) -> int:
        """Tokens that are not trained on."""
        if self.validation is not None:
            return self.validation
        return round(self.tokens * self.settings.corpus.validation_fraction)

    @cached_property
    def trained_on(self) -> int:
        """Tokens of the corpus that are trained on."""
        return self.tokens - (self.held_out if self.validation is None else 0)

    @cached_property
    def rows(self) -> int:
        return max(2, round(self.trained_on * self.rates.rows_per_token))

    @cached_property
    def blocks(self) -> int:
        return max(1, math.ceil((self.trained_on - 1) / self.settings.corpus.block_tokens))

    @cached_property
    def side_by_side(self) -> int:
        """Workers that have a shard to do."""
        return min(self.workers, math.ceil(self.blocks / self.settings.corpus.shard_blocks))

    @cached_property
    def kind(self) -> str:
        return factory_string(self.settings.index.kind, self.rows, self.rates.width, self.budget)

    @cached_property
    def lists(self) -> int:
        """Inverted lists of the index, 0 if it has none."""
        return int(self.kind.split("IVF")[1].split(",")[0]) if "IVF" in self.kind else 0

    @cached_property
    def key_bytes(self) -> int:
        return key_bytes(self.kind, self.rates.width)

    @cached_property
    def parts(self) -> int:
        """Parts of the index."""
        return math.ceil(self.rows * self.key_bytes / (self.budget / PART_SHARE))

    @cached_property
    def keys_again(self) -> float:
        """Seconds to compute all keys anew, where they are not kept."""
        return 0.0 if self.settings.datastore.keep_keys else self.rows * self.rates.key

    def corpus(self) -> Stage:
        rates, tokens = self.rates, self.trained_on + self.held_out
        # The command itself imports, too, what its workers do.
        seconds = rates.prepare + rates.start + 2 * rates.first + rates.map
        seconds += tokens * rates.tokenise / self.side_by_side
        return Stage("corpus", seconds, 8 * tokens, rates.process_bytes)

    def datastore(self) -> Stage:
        rates, kept = self.rates, self.settings.datastore.keep_keys
        embedded = rates.load + self.rows * rates.key / self.side_by_side if kept else 0.0
        disk = self.rows * (4 + 2 * rates.width * kept)
        return Stage("datastore", rates.map + embedded, disk, rates.embed_bytes)

    def index(self) -> Stage:
        rates, share = self.rates, self.budget // PART_SHARE
        wanted = min(POINTS_PER_LIST * self.lists, most_sampled(rates.width, self.budget))
        sample = min(self.rows, max(40 * self.lists, wanted))
        seconds = FAISS + rates.call + rates.train_index * sample * self.lists
        seconds += self.keys_again * sample / self.rows
        fill = (rates.compare * self.lists + rates.encode) * self.rows + self.keys_again
        seconds += rates.map + fill / min(self.workers, self.parts)
        filled = self.rows * self.key_bytes
        disk = filled + 4 * self.lists * rates.width + 4 * self.rows
        peak = max(min(filled, share), 6 * rates.width * sample)  # the sample in fp16 and float32
        return Stage("index", seconds, disk, rates.process_bytes + peak)

    def targets(self) -> Stage:
        rates = self.rates
        k = min(self.settings.targets.neighbours, self.rows - 1)
        visited = float(self.rows)
        if self.lists:
            visited *= min(1.0, self.settings.index.probes / self.lists * rates.imbalance)
        search = rates.compare * self.lists + rates.scan * visited
        search += rates.aggregate * k
        seconds = rates.map + (search * self.rows + self.keys_again) / self.side_by_side
        if self.settings.targets.temperature is None:
            fitted = min(FIT_ROWS, self.rows)
            seconds += rates.call + search * fitted + rates.fit * fitted / FIT_ROWS
        opened = min(self.rows * self.key_bytes, self.budget // 2)
        at_once = min(36 * k * self.rows / self.side_by_side, self.budget // 8)
        disk = round(self.rows * (12 + 6 * rates.entries))
        return Stage("targets", seconds, disk, round(rates.process_bytes + opened + at_once))

    def memory(self) -> Stage:
        rates, settings = self.rates, self.settings.memory
        batch = min(settings.batch(self.blocks), self.blocks)
        epochs = settings.epochs * (settings.transfer_fraction if settings.adapts else 1)
        steps = max(1, round(epochs * self.blocks / batch))
        warm = min(steps, warmup_steps(steps, settings.warmup_fraction))
        used = rates.used * max(1, self.tokens / rates.sample_tokens) ** HEAPS
        sampling = (settings.sampled_negatives or math.inf) < rates.vocabulary - used
        later = rates.sampled_step if sampling else rates.step
        rows_a_step = batch * self.rows / self.blocks / min(self.workers, batch)
        seconds = rows_a_step * (warm * rates.step + (steps - warm) * later)
        if settings.evaluate_steps:
            scored = min(self.held_out, EVALUATION_TOKENS)
            seconds += steps // settings.evaluate_steps * scored * rates.score_memory
        seconds *= 1 + rates.checkpoint / max(settings.checkpoint_seconds, rates.checkpoint)
        seconds += rates.train + rates.build_memory + rates.checkpoint + PLOT
        return Stage("memory", seconds, 4 * rates.memory_parameters, rates.train_bytes)

    def export(self) -> Stage:
        rates = self.rates
        scored = 2 * min(self.held_out, CALIBRATION_TOKENS)  # in short and in long contexts
        # Beside the base only weights of the memory are read and written.
        seconds = rates.reload + rates.checkpoint / 2
        seconds += scored * (rates.score_base + rates.score_memory)
        disk = {"float32": 4, "bfloat16": 2}[self.settings.export.dtype] * rates.memory_parameters
        return Stage("export", seconds, disk, rates.embed_bytes)


@dataclass(frozen=True)
class Plan:
    """Predictions for one corpus, and for a table of sizes."""

    tokens: int
    where: str
    workers: int
    gpus: int
    stages: list[Stage]
    sizes: dict[int, list[Stage]]
    rates: Rates


def plan(
    base: str,
    corpus: Path | None,
    validation: Path | None,
    tokens: int | None,
    settings: Settings,
    work: Path,
    progress: Progress,
    cluster: Cluster,
    budget: int,
    gpu: str | None = None,
    gpus: int = 1,
) -> Plan:
    """Return what a build of a corpus, or of so many tokens, would cost here or on GPUs."""
    if corpus is None and tokens is None:
        raise MemdecError("memdec plan needs --corpus or --tokens: give the text or its size.")
    if gpu is not None and gpu.lower() not in GPUS:
        raise MemdecError(f"--gpu must be one of {', '.join(GPUS)}, got {gpu!r}.")
    if validation is not None:
        corpus_files(validation)  # says what is wrong with it before anything is measured
    base = os.path.abspath(base)  # workers have another working directory
    memory = with_defaults(settings.memory, base, progress.say)
    settings = settings.model_copy(update={"memory": memory})
    rates, total = calibrate(base, corpus, tokens, settings, work, progress, cluster, budget)
    held_out = None if validation is None else count_tokens(base, validation, work)
    workers, where = cluster.workers(), "this machine, measured"
    gpus = gpus if gpu else workers if torch.cuda.is_available() else 0
    if gpu is not None:
        workers, where = gpus, f"{gpus} x {gpu.upper()}, not measured: {UTILISATION:.0%} of its"
        where += " published FLOP/s and bandwidth"
        parameters = base_parameters(base)

    def job(n: int, held_out: int | None) -> Job:
        found = Job(rates, settings, n, held_out, budget, workers)
        if gpu is None:
            return found
        there = on_gpu(rates, GPUS[gpu.lower()], parameters, found.key_bytes)
        return replace(found, rates=there)

    sizes = {n: job(n, None).stages() for n in TABLE}
    mine = job(total, held_out)
    return Plan(total, where, workers, gpus, mine.stages(), sizes, mine.rates)


def base_parameters(base: str) -> int:
    """Return how many weights a model has, from its config alone."""
    from transformers import AutoModelForCausalLM

    from vllm_memdec.train.corpus import load_config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            load_config(base), trust_remote_code=code_allowed()
        )
    return sum(p.numel() for p in model.parameters())


def human_bytes(count: float) -> str:
    """Return a size as people say it, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def show(found: Plan, console: Console) -> None:
    """Print the stages of the corpus, and the totals of other sizes."""
    gpus = found.gpus
    console.print(f"{found.tokens:,} tokens on {found.where}")
    table = Table("stage", "time", *(["GPU-hours"] if gpus else []), "disk", "peak RAM a process")
    for stage in found.stages:
        hours = [f"{gpu_hours(stage, gpus):.3g}"] if gpus else []
        cells = human_bytes(stage.disk), human_bytes(stage.memory)
        table.add_row(stage.name, human_seconds(stage.seconds), *hours, *cells)
    total = [f"{sum(gpu_hours(s, gpus) for s in found.stages):.3g}"] if gpus else []
    table.add_row(
        "all",
        human_seconds(sum(s.seconds for s in found.stages)),
        *total,
        human_bytes(sum(s.disk for s in found.stages)),
        human_bytes(max(s.memory for s in found.stages)),
    )
    console.print(table)
    sizes = Table("tokens", "keys", "index", "targets", "peak RAM", "time")
    if gpus:
        sizes.add_column("GPU-hours")
    for tokens, stages_ in found.sizes.items():
        disk = {stage.name: human_bytes(stage.disk) for stage in stages_}
        cells = [f"{tokens:.0e}", disk["datastore"], disk["index"], disk["targets"]]
        cells.append(human_bytes(max(s.memory for s in stages_)))
        cells.append(human_seconds(sum(s.seconds for s in stages_)))
        if gpus:
            cells.append(f"{sum(gpu_hours(s, gpus) for s in stages_):.3g}")
        sizes.add_row(*cells)
    console.print(sizes)


def gpu_hours(stage: Stage, gpus: int) -> float:
    """Return for how many GPU-hours a stage keeps the GPUs."""
    return stage.seconds / 3600 * gpus if stage.name in GPU_STAGES else 0.0


def report(found: Plan) -> dict[str, Any]:
    """Return the plan as JSON."""
    return asdict(found)
