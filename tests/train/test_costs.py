"""`memdec plan` against the build it predicts: counts and sizes, times on tiny models loosely.

How close times come on a real model is measured by benchmarks/speed/plan.py.
"""

import dataclasses
import json

import numpy as np
import pytest

from vllm_memdec.train.pipeline import STAGES
from vllm_memdec.train.plan.costs import OVERHEADS, CostModel
from vllm_memdec.train.plan.index_rates import time_search
from vllm_memdec.train.plan.rates import GPUS, UTILISATION, Rates, on_gpu
from vllm_memdec.train.plan.report import TABLE
from vllm_memdec.train.settings import IndexSettings, TargetSettings, parse_settings
from vllm_memdec.train.stages.index import trained_bytes, training_bytes
from vllm_memdec.train.stages.search import table_bytes

MB = 2**20


@pytest.fixture
def run_plan(tmp_path, quick, memdec_here):
    """Return a function that runs the command: exit code, what it printed, its report if any."""
    config, report = tmp_path / "settings.yaml", tmp_path / "plan.json"
    config.write_text(json.dumps(quick()))

    def run(base, *options):
        words = ["plan", "--base", base, "--config", config, "--ray-address", "none"]
        code, out, err = memdec_here(*words, "--json", report, *options)
        plan = json.loads(report.read_text()) if report.exists() else None
        assert plan is None or {"where", "stages", "rates"} <= plan.keys()
        return code, out + err, plan

    return run


def test_it_predicts_a_build(pipeline, run_plan):
    code, said, plan = run_plan(pipeline.base, "--corpus", pipeline.corpus)
    assert code == 0, said
    counts = json.loads((pipeline.output / "corpus/corpus.json").read_text())
    tokens = sum(counts[split]["tokens"] for split in ("train", "validation"))
    assert plan["tokens"] == pytest.approx(tokens, rel=0.01)
    stages = {stage["name"]: stage for stage in plan["stages"]}
    assert tuple(stages) == STAGES
    # Small files have headers that nobody plans.
    for name, within in (("corpus", 0.15), ("datastore", 0.1), ("index", 0.15), ("targets", 0.4)):
        files = json.loads((pipeline.output / name / "manifest.json").read_text())["files"]
        assert stages[name]["disk"] == pytest.approx(
            sum(entry["bytes"] for entry in files.values()), rel=within
        ), name
    seconds = sum(stage["seconds"] for stage in stages.values())
    # Where everything takes fractions of a second, only the magnitude can be told.
    assert 0.05 < seconds < 60 and all(s["memory"] > 50 * MB for s in stages.values())
    assert [int(n) for n in plan["sizes"]] == list(TABLE)
    for name in STAGES:
        assert name in said
    assert "measured" in said and "1e+10" in said


@pytest.mark.parametrize(
    "options, sentence",
    [
        ((), "memdec plan needs --corpus or --tokens: give the text or its size."),
        (("--tokens", "2000", "--gpu", "abacus"), "--gpu must be one of a100"),
        (("--tokens", "2000", "--gpus", "8"), "--gpus 8 needs --gpu: add one of a100, a800"),
        (("--corpus", "nowhere.txt"), "nowhere.txt does not exist"),
        (("--tokens", "2000", "--validation", "nowhere.txt"), "nowhere.txt does not exist"),
        (("--tokens", "2000", "--json", "nowhere/plan.json"), "nowhere is no folder: create it"),
    ],
)
def test_bad_input(pipeline, run_plan, options, sentence):
    code, said, plan = run_plan(pipeline.base, *options)
    assert code == 1 and plan is None
    assert sentence in " ".join(said.split()) and "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("", "corpus.txt: give other text."), ("a word", "tokens, less than one block of 32")],
)
def test_text_that_is_too_short_is_named(pipeline, run_plan, tmp_path, text, sentence):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(text)
    code, said, plan = run_plan(pipeline.base, "--corpus", corpus)
    assert code == 1 and plan is None
    assert sentence in " ".join(said.split()) and "sample" not in said


RATES = Rates(
    **{f.name: 1e-3 for f in dataclasses.fields(Rates)}
    | {"width": 64, "vocabulary": 1000, "used": 500, "sample_tokens": 10_000}
    | {"rows_per_token": 1.0, "entries": 10.0, "imbalance": 1.0, "memory_parameters": 1000}
    | {"process_bytes": 0, "embed_bytes": 0, "train_bytes": 0, "threads": 1}
    | dict.fromkeys(("codes", "merge", "launch", "reduce", "hash", "write", "read"), 0.0)
)


def job(tokens, budget=1024 * MB, workers=1, rates=RATES, **changes):
    return CostModel(rates, parse_settings(changes), tokens, None, budget, workers)


def test_memory_is_bounded_by_the_budget():
    small, large = (job(n, budget=64 * MB) for n in (10**6, 10**9))
    assert large.parts > 100 * small.parts
    # Centroids and labels follow the corpus, not the budget; so does the sample of a training.
    trained = trained_bytes(large.shape, RATES.width)
    training = training_bytes(large.shape, RATES.width)
    assert large.index().peak_ram < max(64 * MB + trained, training) + MB
    # Neighbours of a shard wait for the last part, whatever the budget.
    k, probes = TargetSettings().neighbours, IndexSettings().probes
    shard = 1.01 * large.shard_rows * (4 * RATES.width + 12 * (k + 1 + probes))
    bound = 64 * MB + trained + 4 * large.rows + shard
    assert bound - 64 * MB < large.targets().peak_ram < bound
    assert job(10**9).index().peak_ram > large.index().peak_ram


def test_memory_of_targets_counts_what_a_search_holds_beside_the_parts():
    """Tables of product codes, and in every thread one of tokens that rows are summed in."""
    model = job(10**8, rates=QWEN)
    assert "IVF16384,PQ64" in model.shape.kind
    tables, parts = table_bytes(16384, 64, QWEN.width), trained_bytes(model.shape, QWEN.width)
    assert tables == 1024 * MB
    threads = dataclasses.replace(QWEN, threads=9)
    sums = job(10**8, rates=threads).targets().peak_ram - model.targets().peak_ram
    assert sums == pytest.approx(8 * 192 * 4 * model.used) and model.used > 45_000
    held = model.targets().peak_ram - parts - 4 * model.rows - sums / 8
    assert held > tables + 512 * MB  # half the budget is for parts
    assert on_h100s(10**8).targets().peak_ram < tables + parts + 4 * model.rows + 4096 * MB


def test_workers_read_one_disk():
    """Parts that do not stay open: four workers do not read faster than one."""
    slow = dataclasses.replace(RATES, read=1e-9)
    alone, four = (dataclasses.replace(job(10**8, 64 * MB, n, slow), host_ram=1e9) for n in (1, 4))
    assert alone.parts_read > 10
    assert four.parts_read == pytest.approx(alone.parts_read, rel=0.01)


def test_keys_that_are_not_kept_cost_time_and_no_disk():
    kept, computed = job(10**6), job(10**6, datastore={"keep_keys": False})
    assert computed.datastore().disk < kept.datastore().disk / 20
    assert computed.targets().seconds > kept.targets().seconds + 900  # a ms a key


def test_workers_divide_what_can_be_divided():
    alone, four = job(10**6), job(10**6, workers=4)
    for name in ("datastore", "targets", "memory"):
        one, part = (getattr(j, name)().seconds for j in (alone, four))
        assert part == pytest.approx(one / 4, rel=0.05), name


def test_steps_of_the_training():
    epochs = [job(10**6, memory={"epochs": n}).memory().seconds for n in (1, 2)]
    assert epochs[1] == pytest.approx(2 * epochs[0], rel=0.01)


def test_a_gpu_from_its_figures():
    gpu = on_gpu(RATES, GPUS["a100"], base_parameters=10**9, key_bytes=72, layers=24)
    assert gpu.key == pytest.approx(2e9 / (312e12 * UTILISATION))
    assert gpu.step == pytest.approx(6 * 1000 / (312e12 * UTILISATION))
    assert gpu.scan == pytest.approx(72 / (2.04e12 * UTILISATION))
    assert gpu.compare == pytest.approx(2 * 64 / (19.5e12 * UTILISATION))  # faiss: in float32
    assert gpu.tokenise == RATES.tokenise


# Qwen2.5-1.5B and a memory of 0.5B. What a GPU does not do was measured on two cores, of which a
# worker is taken to have eight: benchmarks/results/targets.csv and, of one core, faiss's merging.
QWEN = dataclasses.replace(
    RATES,
    width=1536,
    memory_parameters=494_000_000,
    entries=65.0,
    vocabulary=151_936,
    imbalance=1.3,
    aggregate=1 / 33_800 / 1024 / 4,
    merge=4.5e-6 / 257 / 8,
    hash=1 / 1.08e9,
    write=1e-9,
    read=1e-9,
)


def on_h100s(tokens, gpus=8, budget=4096 * MB, **changes):
    model = job(tokens, budget, gpus, QWEN, **changes)
    figures = GPUS["h100"]
    rates = on_gpu(QWEN, figures, 1_544_000_000, model.key_bytes, 24)
    return dataclasses.replace(model, rates=rates, gpu_memory=figures.memory, host_ram=1e12)


def test_targets_of_a_billion_tokens_in_two_hours():
    """By arithmetic, on 8 H100: nothing of it ran."""
    model = on_h100s(10**9)
    assert model.shape.kind == "OPQ64,IVF65536_HNSW32,PQ64" and model.key_bytes == 72
    stage = model.targets()
    assert stage.seconds < 2 * 3600
    assert on_h100s(10**9, budget=4 * 4096 * MB).targets().seconds < stage.seconds
    # Four times as long by the lists of a budget, 2,912, or where all parts are read for a shard.
    assert (
        on_h100s(10**9, index={"probes": 32 * 65536 // 2912}).targets().seconds > 4 * stage.seconds
    )


def test_small_steps_of_a_training_wait_for_launches():
    """8 blocks a step on 8 GPUs: each has one, whose arithmetic is done before it is launched."""
    small, large = (on_h100s(10**9, memory={"batch_blocks": n}).memory() for n in (8, 1024))
    assert small.of["steps"] > 0.8 * small.seconds
    assert large.of["steps"] < 0.3 * large.seconds and large.seconds < small.seconds / 4


def test_hashing_merging_and_reading_are_in_the_plan():
    stages = [stage for n in TABLE for stage in on_h100s(n).stages()]
    for name in OVERHEADS:
        assert any(stage.of.get(name, 0) > 0 for stage in stages), name
        assert all(stage.of.get(name, 0) <= stage.seconds for stage in stages), name
    free = dataclasses.replace(QWEN, hash=0.0, write=0.0)
    with_them, without = (job(10**6, rates=rates).datastore() for rates in (QWEN, free))
    size = 10**6 * 0.95 * (4 + 2 * 1536)
    assert with_them.seconds - without.seconds == pytest.approx(size * (QWEN.hash + QWEN.write))


@pytest.mark.parametrize("kind", ["Flat", "IVF9,SQ8"])
def test_a_timed_search_counts_what_it_visits(kind):
    keys = np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float16)
    own = np.arange(0, 4000, 40)
    timed = time_search(keys, own, kind, 5, 8)
    assert (timed.ids[:, 0] == own).mean() > 0.9 and timed.ids.shape == (100, 5)
    assert timed.lists == (1 if kind == "Flat" else 63)
    if kind == "Flat":
        assert timed.visited == 100 * 4000 and timed.compare == timed.kmeans == 0
    else:
        assert 0.5 < timed.visited / (100 * 8 * 4000 / 63) < 3 and timed.compare > 0
    assert timed.search > 0 and timed.merge > 0 and timed.add > 0


def test_the_table_names_the_longest_stage(pipeline, run_plan):
    code, said, plan = run_plan(pipeline.base, "--tokens", 5_000_000, "--gpu", "h100", "--gpus", 8)
    assert code == 0, said
    assert plan["tokens"] == 5_000_000 and plan["workers"] == plan["gpus"] == 8
    assert "GPU-hours" in said and "not measured" in said
    for word in ("longest stage", "memory, ", "of the time", *OVERHEADS):
        assert word in said
    for stages in plan["sizes"].values():
        assert all(set(stage["of"]) <= set(OVERHEADS) for stage in stages)
