"""`memdec plan`: what a build will cost, before it starts.

Sizes and times follow from costs.py, with rates that probes.py measured. For a GPU that is not
here, rates follow from its published figures: an estimate, and called so.
"""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.files import corpus_files
from vllm_memdec.train.data.hub import model_folder, text_path, with_folders
from vllm_memdec.train.data.readers import Fields
from vllm_memdec.train.executor.executor import Executor
from vllm_memdec.train.model.decoder import starts_from, with_defaults
from vllm_memdec.train.model.hidden_states import key_fallback
from vllm_memdec.train.model.kinds import check_base
from vllm_memdec.train.plan.costs import OVERHEADS, CostModel, Stage
from vllm_memdec.train.plan.probes import count_tokens, probe_rates
from vllm_memdec.train.plan.rates import GPUS, UTILISATION, Rates, base_parameters, on_gpu
from vllm_memdec.train.plan.recall import sentence
from vllm_memdec.train.progress import Progress, human_seconds
from vllm_memdec.train.settings import Settings

TABLE = tuple(10**n for n in range(6, 11))  # tokens of the corpora in the table of sizes
GPU_HOST = 5e11  # bytes of RAM of a machine with GPUs that is not here: assumed
GPU_STAGES = ("datastore", "index", "targets", "memory")


@dataclass(frozen=True)
class Plan:
    """Predictions for one corpus, and for a table of sizes."""

    tokens: int
    hardware: str
    workers: int
    gpus: int
    stages: list[Stage]
    sizes: dict[int, list[Stage]]
    rates: Rates
    facts: str = ""  # how many facts stick, in a sentence


def plan(
    base: str,
    corpus: Path | None,
    validation: Path | None,
    tokens: int | None,
    settings: Settings,
    work: Path,
    progress: Progress,
    executor: Executor,
    budget: int,
    gpu: str | None = None,
    gpus: int | None = None,
) -> Plan:
    """Return what a build of a corpus, or of so many tokens, would cost here or on GPUs."""
    if corpus is None and tokens is None:
        raise MemdecError("memdec plan needs --corpus or --tokens: give the text or its size.")
    if gpu is not None and gpu.lower() not in GPUS:
        raise MemdecError(f"--gpu must be one of {', '.join(GPUS)}, got {gpu!r}.")
    if gpu is None and gpus is not None:
        raise MemdecError(f"--gpus {gpus} needs --gpu: add one of {', '.join(GPUS)}.")
    base = model_folder(base, "--base", progress.say)
    corpus = corpus and text_path(corpus, "--corpus", progress.say)
    settings = with_folders(settings, progress.say)
    if validation is not None:
        validation = text_path(validation, "--validation", progress.say)
        corpus_files(validation)  # says what is wrong with it before anything is measured
    base = os.path.abspath(base)  # workers have another working directory
    memory = with_defaults(settings.memory, base, progress.say)
    settings = settings.model_copy(update={"memory": memory})
    check_base(base)
    progress.say(starts_from(memory, base))
    if said := key_fallback(base, settings.datastore.key_layer):
        progress.say(said)
    rates, total = probe_rates(base, corpus, tokens, settings, work, progress, executor)
    fields = Fields(settings.corpus.text_field)
    held_out = None if validation is None else count_tokens(base, validation, work, fields)
    workers, hardware = executor.workers(), "this machine, measured"
    gpus = (gpus or 1) if gpu else workers if torch.cuda.is_available() else 0
    if gpu is not None:
        workers, hardware = gpus, f"{gpus} x {gpu.upper()}, not measured: {UTILISATION:.0%} of its"
        hardware += " published FLOP/s and bandwidth"
        parameters = base_parameters(base)

    def job(n: int, held_out: int | None) -> CostModel:
        here = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
        model = CostModel(rates, settings, n, held_out, budget, workers, here)
        if gpu is None:
            return model
        figures = GPUS[gpu.lower()]
        layers = {} if settings.memory.layers is None else {"layers": settings.memory.layers}
        there = on_gpu(rates, figures, parameters, model.key_bytes, **layers)
        return replace(model, rates=there, gpu_memory=figures.memory, host_ram=GPU_HOST)

    sizes = {n: job(n, None).stages() for n in TABLE}
    mine = job(total, held_out)
    facts = sentence(settings.memory.epochs)
    return Plan(total, hardware, workers, gpus, mine.stages(), sizes, mine.rates, facts)


def human_bytes(count: float) -> str:
    """Return a size as people say it, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def show(plan: Plan, console: Console) -> None:
    """Print the stages of the corpus, and the totals of other sizes."""
    gpus = plan.gpus
    console.print(f"{plan.tokens:,} tokens on {plan.hardware}")
    table = Table("stage", "time", *(["GPU-hours"] if gpus else []), "disk", "peak RAM a process")
    for stage in plan.stages:
        hours = [f"{gpu_hours(stage, gpus):.3g}"] if gpus else []
        cells = human_bytes(stage.disk), human_bytes(stage.peak_ram)
        table.add_row(stage.name, human_seconds(stage.seconds), *hours, *cells)
    total = [f"{sum(gpu_hours(s, gpus) for s in plan.stages):.3g}"] if gpus else []
    table.add_row(
        "all",
        human_seconds(sum(s.seconds for s in plan.stages)),
        *total,
        human_bytes(sum(s.disk for s in plan.stages)),
        human_bytes(max(s.peak_ram for s in plan.stages)),
    )
    console.print(table)
    sizes = Table("tokens", "keys", "index", "targets", "peak RAM", "time", "longest stage")
    if gpus:
        sizes.add_column("GPU-hours")
    parts = Table("tokens", *OVERHEADS, title="of the time")
    for tokens, stages_ in plan.sizes.items():
        disk = {stage.name: human_bytes(stage.disk) for stage in stages_}
        seconds = sum(s.seconds for s in stages_)
        longest = max(stages_, key=lambda stage: stage.seconds)
        line = [f"{tokens:.0e}", disk["datastore"], disk["index"], disk["targets"]]
        line.append(human_bytes(max(s.peak_ram for s in stages_)))
        line += [human_seconds(seconds), f"{longest.name}, {longest.seconds / seconds:.0%}"]
        if gpus:
            line.append(f"{sum(gpu_hours(s, gpus) for s in stages_):.3g}")
        sizes.add_row(*line)
        spent = [human_seconds(sum(s.of.get(name, 0.0) for s in stages_)) for name in OVERHEADS]
        parts.add_row(f"{tokens:.0e}", *spent)
    console.print(sizes)
    console.print(parts)
    if plan.facts:
        console.print(plan.facts)


def gpu_hours(stage: Stage, gpus: int) -> float:
    """Return for how many GPU-hours a stage keeps the GPUs."""
    return stage.seconds / 3600 * gpus if stage.name in GPU_STAGES else 0.0


def report(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON, whose readers know other names of two fields."""
    known = {"peak_ram": "memory", "hardware": "where"}

    def named(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        return {known.get(name, name): value for name, value in entries}

    return asdict(plan, dict_factory=named)
