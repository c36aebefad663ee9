"""What each stage of a build costs: amounts of work times rates, and what it holds and writes.

Work is divided among the workers; files are written and read at the speed of one disk, which they
share.
"""

import math
import os
from dataclasses import dataclass, field
from functools import cached_property

from vllm_memdec.train.model.devices import BLOCKS, TRAINED
from vllm_memdec.train.plan.rates import Rates
from vllm_memdec.train.settings import Settings
from vllm_memdec.train.stages.datastore import scores_labels
from vllm_memdec.train.stages.export import TUNING_TOKENS
from vllm_memdec.train.stages.index import (
    CODE_SAMPLE,
    KMEANS_PASSES,
    PART_SHARE,
    Shape,
    key_bytes,
    shape,
    trained_bytes,
    training_bytes,
)
from vllm_memdec.train.stages.search import (
    BLOCK_SHARE,
    GPU_PARTS,
    PARTS_SHARE,
    group_rows,
    table_bytes,
)
from vllm_memdec.train.stages.targets import CACHE_ROWS, FIT_ROWS, GROUPS_A_WORKER
from vllm_memdec.train.stages.training import EVALUATION_TOKENS
from vllm_memdec.train.training.steps import warmup_steps

HEAPS = 0.5  # the power of the text's size with which the vocabulary in use grows (Heaps' law)
PLOT = 1.5  # seconds to draw the loss
FAISS = 0.5  # seconds until two processes have imported faiss and started its threads
GRAPH_LISTS = 40_000  # lists with which a key is compared in the time of a walk of their graph
OPQ_PASSES = 15  # times that codes are trained until the rotation before them is fitted
CACHED = 1.5e-10  # seconds a byte read from RAM and sent to a GPU: assumed, not measured


# Work beside a stage's own: its files are hashed, read and written; parts of an index are merged;
# optimiser steps wait for their launch and for the gradients of other workers.
OVERHEADS = ("hashing", "reading", "writing", "merging", "steps")


@dataclass(frozen=True)
class Stage:
    """What one stage is predicted to cost."""

    name: str
    seconds: float
    disk: int  # bytes
    peak_ram: int  # bytes of the largest process
    of: dict[str, float] = field(default_factory=dict)  # seconds of each of the OVERHEADS


@dataclass(frozen=True)
class CostModel:
    """The cost of a build: amounts of work, and what each stage of them takes.

    validation: tokens of a validation text, None if a part of the corpus is held out; budget: bytes
    a process may take for what grows with the corpus; gpu_memory: bytes of a worker's GPU, 0: none;
    host_ram: bytes of a machine.
    """

    rates: Rates
    settings: Settings
    tokens: int
    validation: int | None
    budget: int
    workers: int
    gpu_memory: float = 0.0
    host_ram: float = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

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
    def shard_rows(self) -> float:
        return self.rows / math.ceil(self.blocks / self.settings.corpus.shard_blocks)

    @cached_property
    def used(self) -> float:
        """Tokens of the vocabulary that occur."""
        rates = self.rates
        used = rates.used * max(1, self.tokens / rates.sample_tokens) ** HEAPS
        return min(used, rates.vocabulary)

    @cached_property
    def shape(self) -> Shape:
        return shape(self.settings.index, self.rows, self.rates.width)

    @cached_property
    def key_bytes(self) -> int:
        return key_bytes(self.shape.kind, self.rates.width)

    @cached_property
    def parts(self) -> int:
        """Parts of the index."""
        return math.ceil(self.rows * self.key_bytes / (self.budget / PART_SHARE))

    @property
    def scored(self) -> bool:
        """Whether the datastore holds the base's log p of the labels."""
        return scores_labels(self.settings)

    @cached_property
    def keys_again(self) -> float:
        """Seconds to compute all keys anew, where they are not kept."""
        return 0.0 if self.settings.datastore.keep_keys else self.rows * self.rates.key

    def read(self, size: float) -> float:
        """Seconds to read files again: none of what stays in RAM."""
        return 0.0 if size < self.host_ram / 2 else size * self.rates.read

    def stage(self, name: str, seconds: float, disk: float, peak_ram: float, **of: float) -> Stage:
        """Return a stage's cost, its own files hashed and written on top of the seconds."""
        of["hashing"] = disk * self.rates.hash / self.side_by_side
        of["writing"] = disk * self.rates.write
        seconds += of["hashing"] + of["writing"]
        return Stage(name, seconds, round(disk), round(peak_ram), of)

    def corpus(self) -> Stage:
        rates, tokens = self.rates, self.trained_on + self.held_out
        # The command itself imports, too, what its workers do.
        seconds = rates.prepare + rates.start + 2 * rates.first + rates.map
        seconds += tokens * rates.tokenise / self.side_by_side
        return self.stage("corpus", seconds, 12 * tokens, rates.process_bytes)

    def datastore(self) -> Stage:
        rates, kept, scored = self.rates, self.settings.datastore.keep_keys, self.scored
        embedded = rates.load + self.rows * rates.key / self.side_by_side
        embedded *= kept or scored
        disk = self.rows * (4 + 4 * scored + 2 * rates.width * kept)
        return self.stage("datastore", rates.map + embedded, disk, rates.embed_bytes)

    @cached_property
    def lists_compared(self) -> float:
        """Lists that could be compared in the time in which a key's own are looked up."""
        lists = self.shape.lists
        return (
            min(lists, GRAPH_LISTS) if "HNSW" in self.shape.kind and not self.gpu_memory else lists
        )

    @cached_property
    def keys_read(self) -> float:
        """Seconds to read all keys, where they are kept."""
        kept = self.settings.datastore.keep_keys
        return self.read(2 * self.rates.width * self.rows) if kept else 0.0

    def index(self) -> Stage:
        rates, share, lists = self.rates, self.budget // PART_SHARE, self.shape.lists
        sample = self.shape.sample
        # In two levels a key of the sample is compared with the clusters, then with those within.
        compared = math.sqrt(lists) * (1 + 1 / KMEANS_PASSES) if self.shape.levels == 2 else lists
        seconds = FAISS + rates.call + rates.train_index * sample * compared
        codes = rates.codes * min(sample, CODE_SAMPLE)
        seconds += codes * (1 + OPQ_PASSES * ("OPQ" in self.shape.kind))
        seconds += self.keys_again * sample / self.rows
        fill = (rates.compare * self.lists_compared + rates.encode) * self.rows + self.keys_again
        seconds += rates.map + fill / min(self.workers, self.parts) + self.keys_read
        filled = self.rows * self.key_bytes
        trained = trained_bytes(self.shape, rates.width)
        peak = max(min(filled, share) + trained, training_bytes(self.shape, rates.width))
        disk, peak_ram = filled + trained + 4 * self.rows, rates.process_bytes + peak
        return self.stage("index", seconds, disk, peak_ram, reading=self.keys_read)

    @cached_property
    def parts_read(self) -> float:
        """Seconds in which all workers have read the parts of the index that do not stay open."""
        size = self.rows * self.key_bytes
        left, groups = self.left_closed, self.rows / self.group_rows / self.side_by_side
        if left <= 0:  # all of it once
            left, groups = size, 1.0
        if self.gpu_memory:  # each worker has its own way from RAM to its GPU
            return left * groups * CACHED
        return left * groups * self.side_by_side * self.read(size) / size

    @cached_property
    def left_closed(self) -> float:
        """Bytes of the index that a worker does not keep open; negative: so much more it could."""
        room = self.gpu_memory * GPU_PARTS or self.budget // PARTS_SHARE
        return self.rows * self.key_bytes - room

    @cached_property
    def group_rows(self) -> float:
        """Queries that are searched together where parts do not stay open: a shard at least."""
        on_gpu, k = self.gpu_memory > 0, self.settings.targets.neighbours
        max_rows = group_rows(self.rates.width, k + 1, self.nprobe, self.budget, on_gpu)
        mine = self.rows / self.side_by_side
        return max(self.shard_rows, min(max_rows, mine / GROUPS_A_WORKER))

    def searching_bytes(self, k: int) -> float:
        """Return what a worker holds of queries, of their neighbours and of what sums them up."""
        rates, codes = self.rates, self.shape.kind.rpartition("PQ")[2]
        held = min(36 * k * self.shard_rows, self.budget // BLOCK_SHARE)
        if self.left_closed > 0:  # then it waits for the last part
            held += self.group_rows * (4 * rates.width + 12 * (k + 1 + self.nprobe))
        if codes.isdigit() and not self.gpu_memory:
            held += table_bytes(self.shape.lists, int(codes), rates.width)
        return held + 4 * CACHE_ROWS * self.used * rates.threads

    @cached_property
    def nprobe(self) -> int:
        return min(self.settings.index.probes, self.shape.lists)

    def targets(self) -> Stage:
        rates = self.rates
        k = min(self.settings.targets.neighbours, self.rows - 1)
        visited = float(self.rows)
        if self.shape.lists:
            visited *= min(1.0, self.nprobe / self.shape.lists * rates.imbalance)
        # On a GPU all parts are merged at once, at a cost that grows with their logarithm; else one
        # after the other.
        merged = math.log2(self.parts) if self.gpu_memory else self.parts - 1
        merging, aggregate = rates.merge * k * merged, rates.aggregate * k
        search = rates.compare * self.lists_compared + rates.scan * visited + merging
        done = [(search * self.rows + self.keys_again) / self.side_by_side + self.parts_read]
        done += [aggregate * self.rows / self.side_by_side, self.keys_read]
        # While a GPU searches, its last results are summed and the next keys are read.
        seconds = rates.map + (max(done) if self.gpu_memory else sum(done))
        if self.settings.targets.temperature is None:
            fitted = min(FIT_ROWS, self.rows)
            seconds += rates.call + (search + aggregate) * fitted + rates.fit * fitted / FIT_ROWS
        # Parts and what is done with them; the labels are mapped, and count.
        opened: float = min(self.rows * self.key_bytes, self.budget // 2)
        opened += trained_bytes(self.shape, rates.width) + 4 * self.rows
        opened += rates.process_bytes + self.searching_bytes(k)
        disk = self.rows * (12 + 4 * self.scored + 6 * rates.entries)
        return self.stage(
            "targets",
            seconds,
            disk,
            opened,
            reading=self.keys_read + self.parts_read,
            merging=merging * self.rows / self.side_by_side,
        )

    def memory(self) -> Stage:
        rates, settings = self.rates, self.settings.memory
        batch = min(settings.batch(self.blocks), self.blocks)
        epochs = settings.epochs * (settings.transfer_fraction if settings.adapts else 1)
        steps = max(1, round(epochs * self.blocks / batch))
        warm = min(steps, warmup_steps(steps, settings.warmup_fraction))
        sampling = (settings.sampled_negatives or math.inf) < rates.vocabulary - self.used
        later = rates.sampled_step if sampling else rates.step
        busy = min(self.workers, batch)  # each has a block at least
        rows_a_step = batch * self.rows / self.blocks / busy
        micro = settings.micro_batch_blocks or BLOCKS
        if self.gpu_memory and settings.micro_batch_blocks is None:
            micro = max(BLOCKS, TRAINED // self.settings.corpus.block_tokens)
        launches = math.ceil(batch / busy / micro) * rates.launch
        reduce = 8 * rates.memory_parameters * (busy - 1) / busy * rates.reduce
        computed = rows_a_step * (warm * rates.step + (steps - warm) * later)
        seconds = max(computed, launches * steps) + reduce * steps
        waited = seconds - computed
        # A prefetching thread reads what the next steps are trained on.
        reading = epochs * self.read(self.rows * (20 + 6 * rates.entries))
        seconds = max(seconds, reading)
        if settings.evaluate_steps:
            scored = min(self.held_out, EVALUATION_TOKENS)
            seconds += steps // settings.evaluate_steps * scored * rates.score_memory
        seconds *= 1 + rates.checkpoint / max(settings.checkpoint_seconds, rates.checkpoint)
        seconds += rates.train + rates.build_memory + rates.checkpoint + PLOT
        disk = 4 * rates.memory_parameters
        return self.stage("memory", seconds, disk, rates.train_bytes, reading=reading, steps=waited)

    def export(self) -> Stage:
        rates = self.rates
        scored = 2 * min(self.held_out, TUNING_TOKENS)  # two readings: short and long contexts
        # Beside the base only weights of the memory are read and written.
        seconds = rates.reload + rates.checkpoint / 2
        seconds += scored * (rates.score_base + rates.score_memory)
        disk = {"float32": 4, "bfloat16": 2}[self.settings.export.dtype] * rates.memory_parameters
        return self.stage("export", seconds, disk, rates.embed_bytes)
