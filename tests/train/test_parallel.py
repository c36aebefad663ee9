"""Training on two processes over gloo, replicated and sharded, against one process."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.executor.ray_executor import World
from vllm_memdec.train.executor.worker import Worker, join, leave
from vllm_memdec.train.model.huggingface import layers_of
from vllm_memdec.train.settings import MemorySettings
from vllm_memdec.train.stages import training as trainer
from vllm_memdec.train.training.checkpoints import STOP, saved_step
from vllm_memdec.train.training.metrics import read_metrics
from vllm_memdec.train.training.parallel import spread

SETTINGS = MemorySettings(
    layers=2, epochs=0.6, batch_blocks=3, micro_batch_blocks=1, dtype="float32", evaluate_steps=5
)
LOSS = 1e-4  # relative; float32 sums in another order, through all steps
# The same with Muon, which gives a matrix's smallest directions the weight of its largest, those of
# nothing but rounding too, and does so in bfloat16: small steps, and few of them.
MUON = {"optimizer": "muon", "muon_learning_rate": 1e-3}
MUON_LOSS, MUON_VALUES = 1e-3, 15  # the first five steps
# Adam moves a weight by the learning rate a step, whatever the size of its gradient: that of a
# bias of keys is nothing but rounding.
WEIGHT = 0.1 * SETTINGS.learning_rate


def on_two(rank, trainings, address):
    torch.set_num_threads(1)
    join(World(rank, 2), address, address[0])
    for training in trainings:
        training(World(rank, 2))
    leave()


def losses(work):
    return [
        value
        for row in read_metrics(work / "logs/metrics.jsonl")
        for name, value in row.items()
        if name in ("kl", "ce", "gradient_norm") or name.startswith("validation")
    ]


@pytest.fixture(scope="module")
def runs(pipeline, tiny_model, tmp_path_factory):
    """Return folders: `one` process, two that `replicate` and `shard`, and `stop` in the middle.

    A step has three blocks, so that of the second process's two passes one is empty.
    """
    folder, out = tmp_path_factory.mktemp("runs"), pipeline.output

    def training(name, **changes):
        work = folder / name
        (work / "logs").mkdir(parents=True, exist_ok=True)
        args = SETTINGS.changed(**changes), tiny_model("qwen2"), out / "corpus"
        return trainer.Training(*args, out / "targets", work)

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # see users_loss, which they lack
        two = [
            training("replicate"),
            training("shard", parallel="shard", gradient_checkpointing=True),
            training("stop", parallel="shard"),
            training("muon of two", **MUON),
        ]
        (folder / "stop" / STOP).touch()  # after the first step
        address = "127.0.0.1", Worker().free_port()
        torch.multiprocessing.spawn(on_two, (two, address), nprocs=2)
    training("one")(World())
    training("muon of one", **MUON)(World())
    return folder


@pytest.mark.parametrize("way", ["replicate", "shard"])
def test_two_processes_train_as_one(runs, way):
    """The same batches, divided: gradients summed, losses of all rows."""
    one, two = losses(runs / "one"), losses(runs / way)
    assert two == pytest.approx(one, rel=LOSS) and len(one) > 12
    a, b = (load_file(runs / name / "model.safetensors") for name in ("one", way))
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= WEIGHT, name
    assert any(not torch.equal(a[name], b[name]) for name in a)  # they did divide the work


def test_muon_trains_on_two_processes_as_on_one(runs):
    """Gradients are summed before a matrix is orthogonalised, so all processes do the same."""
    one, two = losses(runs / "muon of one"), losses(runs / "muon of two")
    first = slice(MUON_VALUES)
    assert two[first] == pytest.approx(one[first], rel=MUON_LOSS) and len(one) > MUON_VALUES
    assert one[first] != pytest.approx(losses(runs / "one")[first], rel=MUON_LOSS)


def test_what_several_processes_left_is_gone_on_with_by_one(runs, pipeline, tiny_model):
    """Sharded weights and averages are gathered into the checkpoint that one process writes."""
    work, out = runs / "stop", pipeline.output
    assert saved_step(work) == 1 and not (work / "model.safetensors").exists()
    args = SETTINGS, tiny_model("qwen2"), out / "corpus", out / "targets", work
    trainer.train_memory(*args, Context())
    assert losses(work) == pytest.approx(losses(runs / "one"), rel=LOSS)


LEAVING = """
from pathlib import Path
from vllm_memdec.train.executor.torchrun import Torchrun

def loop(world):
    import torch
    module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    module(torch.ones(1, 2)).sum().backward()

processes = Torchrun()
processes.follow() if processes.world.rank else processes.train(loop, Path())
processes.close()
names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
assert not [name for name in names if "gloo" in name], names
"""


def test_no_thread_of_the_group_is_left(tmp_path):
    """One that runs when Python ends may abort it: a build would be told as failed."""
    (tmp_path / "leaving.py").write_text(LEAVING)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *words, str(tmp_path / "leaving.py")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_torchrun_builds_with_all_its_processes(pipeline, quick, tmp_path):
    """Rank 0 makes the stages before and after; what it trains with the other equals one's."""
    output, config = tmp_path / "out", tmp_path / "settings.json"
    for stage in ("corpus", "datastore", "index", "targets"):
        shutil.copytree(pipeline.output / stage, output / stage)
    config.write_text(json.dumps(quick()))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    memdec = ["-m", "vllm_memdec.train.cli", "build", "--base", pipeline.base, "--config", config]
    memdec += ["--corpus", pipeline.corpus, "--output", output, "--ray-address", "none"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [str(word) for word in launch + memdec],
        env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("The memory is ") == 1  # said by rank 0 alone
    assert done.stderr.count("up to date") == 4
    ours, theirs = losses(output / "memory"), losses(pipeline.output / "memory")
    assert ours == pytest.approx(theirs, rel=LOSS) and len(ours) > 20
    weights = [load_file(o / "memory/model.safetensors") for o in (output, pipeline.output)]
    assert any(not torch.equal(weights[0][n], weights[1][n]) for n in weights[0])  # divided


def test_layers_are_compiled_where_asked(tiny_model):
    """By default on a GPU alone: a tiny model on a CPU takes half a minute to compile."""
    for settings, compiled in ((SETTINGS, False), (SETTINGS.changed(compile=True), True)):
        memory = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
        spread(memory, settings, World())
        layers = [layer._compiled_call_impl is not None for layer in layers_of(memory)]
        assert layers == [compiled or torch.cuda.is_available()] * len(layers)


def test_torchrun_wants_no_ray(pipeline, tmp_path, memdec_here, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    words = ["--base", pipeline.base, "--corpus", pipeline.corpus, "--output", tmp_path / "out"]
    code, _, err = memdec_here("build", *words)
    assert code == 1 and "add --ray-address none" in err
