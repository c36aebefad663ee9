"""Checkpoints: written beside the training, two are kept, a stop or a full disk loses nothing."""

import errno
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file

from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import MemorySettings
from vllm_memdec.train.stages import training as trainer
from vllm_memdec.train.training.checkpoints import (
    CHECKPOINT,
    PREVIOUS,
    Checkpoints,
    newest,
    saved_step,
)
from vllm_memdec.train.training.metrics import read_metrics
from vllm_memdec.train.training.parallel import Spread, restore, state_of

SETTINGS = MemorySettings(
    layers=1, epochs=0.6, batch_blocks=4, dtype="float32", checkpoint_seconds=0, learning_rate=1e-2
)


def train(pipeline, work):
    """Train here; return what was said."""
    out = pipeline.output
    work.mkdir(exist_ok=True)
    progress = Progress()
    progress.say = (lines := []).append
    args = SETTINGS, pipeline.base, out / "corpus", out / "targets", work, Context(progress)
    trainer.train_memory(*args)
    return lines


def step_of(path):
    return torch.load(path, weights_only=True)["step"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """What is written is what there was, whatever became of the weights since."""
    module = Spread(torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)

    def step():
        module(lambda memory: memory(torch.ones(1, 3)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    before = module.memory.weight.detach().clone()
    may_write, save = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *a: may_write.wait(60) and save(*a))
    writer = Checkpoints(tmp_path)
    writer.save(state_of(module, optimizer) | {"step": 1})
    step()
    writer.check()
    assert newest(tmp_path) is None and not torch.equal(module.memory.weight, before)
    may_write.set()
    writer.wait()
    after = module.memory.weight.detach().clone()
    restore(module, optimizer, torch.load(tmp_path / CHECKPOINT, weights_only=True))
    assert torch.equal(module.memory.weight, before)
    step()
    assert torch.equal(module.memory.weight, after)  # the averages were put back, too


def test_two_are_kept_and_the_newest_is_gone_on_with(tmp_path):
    writer = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        writer.save({"step": step})
    writer.wait()
    assert {p.name for p in tmp_path.iterdir()} == {CHECKPOINT, PREVIOUS}
    assert (step_of(tmp_path / CHECKPOINT), step_of(tmp_path / PREVIOUS)) == (3, 2)
    assert saved_step(tmp_path) == 3
    (tmp_path / CHECKPOINT).rename(tmp_path / "elsewhere")  # killed between two renames
    assert saved_step(tmp_path) == 2


def test_a_full_disk_ends_the_training_and_keeps_the_checkpoint(pipeline, tmp_path, monkeypatch):
    save, written = torch.save, []

    def fill(state, path):
        written.append(state)
        if len(written) == 3:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill)
        with pytest.raises(OSError, match="No space left") as failed:
            train(pipeline, tmp_path / "full")
    assert failed.value.errno == errno.ENOSPC  # of which the command makes its sentence
    assert saved_step(tmp_path / "full") == 2
    assert not list((tmp_path / "full").glob("*.tmp"))
    lines = train(pipeline, tmp_path / "full")
    assert any("resuming at step 2" in line for line in lines)
    train(pipeline, tmp_path / "whole")
    assert_equal(tmp_path / "full", tmp_path / "whole")


def test_sigterm_ends_with_a_checkpoint(pipeline, tmp_path, monkeypatch):
    """In the middle of a step: it is finished, written, and what follows is as if undisturbed."""
    step, before = trainer.Training.step, signal.getsignal(signal.SIGTERM)

    def stopped(self, module, optimizer, batches, number, world):
        if number == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(self, module, optimizer, batches, number, world)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Training, "step", stopped)
        with pytest.raises(SystemExit) as ended:
            train(pipeline, tmp_path / "stopped")
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert saved_step(tmp_path / "stopped") == 3
    assert len(read_metrics(tmp_path / "stopped/logs/metrics.jsonl")) == 3
    train(pipeline, tmp_path / "stopped")
    train(pipeline, tmp_path / "whole")
    assert_equal(tmp_path / "stopped", tmp_path / "whole")


def assert_equal(one, other):
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
