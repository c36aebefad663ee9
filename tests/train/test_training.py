"""Training: the gradient against plain autograd, batches, and a resumed run against a whole one."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from vllm_memdec.kernels.head_loss import Columns
from vllm_memdec.train.data.artifacts import write_atomic
from vllm_memdec.train.data.blocks import load_blocks, valid_rows
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.executor.executor import LocalExecutor
from vllm_memdec.train.executor.ray_executor import World
from vllm_memdec.train.model.output_head import ALL, Candidates
from vllm_memdec.train.model.scoring import label_logprobs
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import MemorySettings
from vllm_memdec.train.stages import training as trainer
from vllm_memdec.train.training import checkpoints
from vllm_memdec.train.training.batches import Batches
from vllm_memdec.train.training.metrics import metrics_file, stopped_early
from vllm_memdec.train.training.parallel import Spread

BETA = 0.3  # not a half: a swap of the two terms would show
GRADIENT = 1e-5  # float32, parameters and rows of the order of one


def batches_of(pipeline, **changes):
    settings = MemorySettings(dtype="float32", beta=BETA, **changes)
    out = pipeline.output
    return settings, Batches(settings, out / "corpus", out / "targets")


def dense_gradients(model, batches, blocks, rows):
    """Return gradients of the dense loss, each document of each block by itself."""
    out = batches.reader
    for b in blocks:
        tokens, positions = (
            torch.from_numpy(batches.tokens[b].astype(np.int64)),
            batches.positions[b],
        )
        labels = tokens[1:][torch.from_numpy(valid_rows(positions[None])[0])].numpy()
        lengths, ids, probs = out.read(int(b), labels)
        targets = np.zeros((len(labels), model.config.vocab_size))
        targets[np.repeat(np.arange(len(labels)), lengths), ids] = probs
        done, starts = 0, np.flatnonzero(positions == 0)
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            run = tokens[start:stop]
            if len(run) < 2:
                continue
            log_q = model(run[None, :-1]).logits[0].log_softmax(-1)
            p = torch.from_numpy(targets[done : done + len(run) - 1])
            done += len(run) - 1
            kl = (torch.xlogy(p, p) - p * log_q).sum()
            ce = -log_q[torch.arange(len(run) - 1), run[1:]].sum()
            ((BETA * kl + (1 - BETA) * ce) / rows).backward()
        assert done == len(labels)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])  # the last two tie their embeddings
def test_gradient_equals_plain_autograd_of_the_dense_loss(pipeline, tiny_model, kind, monkeypatch):
    monkeypatch.setattr("vllm_memdec.kernels.head_loss.LOGITS", 50_000)  # chunks of 50 rows
    settings, batches = batches_of(pipeline)
    # Two blocks with the start of a document in their middle, and the last, which has filler.
    packed = np.flatnonzero((batches.positions[:][:, 8:24] == 0).any(axis=1))[:2]
    blocks = np.array([*packed, len(batches.tokens) - 1])
    rows = int(batches.rows[blocks].sum())
    assert len(packed) == 2 and rows > 50
    ours, plain = (AutoModelForCausalLM.from_pretrained(tiny_model(kind)).eval() for _ in range(2))
    for part in (blocks[:2], blocks[2:]):  # two micro-batches
        trainer.add_gradients(Spread(ours), batches, part, 1 / rows, ALL, settings)
    dense_gradients(plain, batches, blocks, rows)
    if kind != "llama":
        assert ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < GRADIENT, name
        assert b.grad.abs().max() > 10 * GRADIENT, name


def test_gradient_over_all_candidates_is_the_full_one_where_it_is_passed_on(pipeline, tiny_model):
    """Columns of S exactly, every other token sampled: the same loss, in another order."""
    settings, batches = batches_of(pipeline)
    blocks, rows = np.arange(4), int(batches.rows[:4].sum())
    rest = np.setdiff1d(np.arange(1000), batches.used)
    rank = torch.full((1000,), -1)
    rank[batches.used] = torch.arange(len(batches.used))
    ids = torch.from_numpy(np.r_[batches.used, rest]).long()
    every = Candidates(Columns(ids, torch.zeros(1000), len(batches.used)), rank)
    assert len(rest) > 100
    full, part = (
        AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval() for _ in range(2)
    )
    sums = [
        trainer.add_gradients(Spread(model), batches, blocks, 1 / rows, candidates, settings)
        for model, candidates in ((full, ALL), (part, every))
    ]
    assert np.allclose(sums[0], sums[1], rtol=1e-5)
    for (name, a), b in zip(full.named_parameters(), part.parameters(), strict=True):
        kept = torch.from_numpy(batches.used).long() if name == "lm_head.weight" else slice(None)
        assert (a.grad[kept] - b.grad[kept]).abs().max() < GRADIENT, name


def test_an_epoch_sees_every_block_once(pipeline):
    settings, batches = batches_of(pipeline, batch_blocks=5)
    n, per_epoch = len(batches.tokens), batches.per_epoch
    epochs = [
        np.concatenate([batches.blocks(e * per_epoch + s) for s in range(per_epoch)])
        for e in (0, 1)
    ]
    for order in epochs:
        assert len(set(order.tolist())) == len(order) == n - n % 5
    assert not np.array_equal(*epochs)
    assert np.array_equal(batches.blocks(7), batches_of(pipeline, batch_blocks=5)[1].blocks(7))


def test_what_is_read_ahead_is_what_is_loaded(pipeline, monkeypatch):
    _, batches = batches_of(pipeline)
    first, second, third = np.arange(3), np.arange(3, 6), np.arange(6, 7)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    plain = batches.load(first, cpu)
    read, asked = batches.arrays, []
    monkeypatch.setattr(batches, "arrays", lambda blocks: asked.append(blocks[0]) or read(blocks))
    batches.expect([first, second], cpu)
    assert not asked  # a CPU has no core to spare
    batches.expect([first, second], cuda)
    *ahead, targets = batches.load(first, cpu)
    for a, b in zip(ahead, plain, strict=False):
        assert torch.equal(a, b)
    assert all(
        torch.equal(a, b) for a, b in zip(targets.entries(), plain[-1].entries(), strict=True)
    )
    batches.expect([second, third], cuda)
    same = batches_of(pipeline)[1]
    for blocks in (third, second):
        assert torch.equal(batches.load(blocks, cpu)[3], same.load(blocks, cpu)[3])
    assert sorted(asked) == [0, 3, 6]  # each once
    batches.expect([first], cuda)
    batches.expect([second], cuda)
    assert len(batches.ahead) == 1  # what nobody came for is let go


def test_a_micro_batch_is_followed_by_the_next_of_this_step_or_another(pipeline, tmp_path):
    settings, batches = batches_of(pipeline, batch_blocks=5, micro_batch_blocks=2)
    training = trainer.Training(settings, "", tmp_path, tmp_path, tmp_path)
    module = Spread(AutoModelForCausalLM.from_pretrained(pipeline.base))
    optimizer = trainer.new_optimizer(module, settings)
    loaded, expected = [], []
    load = batches.load
    batches.load = lambda blocks, where: loaded.append(blocks.tolist()) or load(blocks, where)
    batches.expect = lambda coming, where: expected.append([blocks.tolist() for blocks in coming])
    for step in (0, 1, batches.steps - 1):
        training.step(module, optimizer, batches, step, World())
    assert [len(blocks) for blocks in loaded] == 3 * [2, 2, 1]
    assert expected[0] == loaded[1:5]
    assert [coming[0] for coming in expected[:5]] == loaded[1:6]
    assert expected[6:] == [loaded[7:], loaded[8:], []]  # nothing follows the last


def test_processes_have_as_many_passes_and_all_blocks_between_them(pipeline, tmp_path):
    for size in (1, 2, 3, 5, 7):
        settings, batches = batches_of(pipeline, batch_blocks=5, micro_batch_blocks=1)
        training = trainer.Training(settings, "", tmp_path, tmp_path, tmp_path)
        passes = [training.micro_batches(batches, 0, World(rank, size)) for rank in range(size)]
        assert {len(p) for p in passes} == {-(-5 // size)}
        blocks = np.concatenate([micro for p in passes for micro in p])
        assert sorted(blocks) == sorted(batches.blocks(0))


def test_a_batch_grows_with_the_corpus_and_not_with_the_machine():
    sizes = [MemorySettings().batch(blocks) for blocks in (1, 15_999, 16_000, 195_000, 10**9)]
    assert sizes == [8, 8, 16, 128, 512]
    assert MemorySettings(batch_blocks=3).batch(10**9) == 3


def test_processes_that_get_no_block_are_told_of(pipeline, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(LocalExecutor, "workers", lambda self: 9)
    lines, _ = train(pipeline, tiny_model, tmp_path / "few", batch_blocks=8, epochs=0.2)
    assert any("gives work to 8 of 9 processes: raise memory.batch_blocks" in x for x in lines)
    lines, _ = train(pipeline, tiny_model, tmp_path / "all", batch_blocks=9, epochs=0.2)
    assert not any("gives work" in x for x in lines)


def test_learning_rate_warms_up_and_decays_to_a_tenth():
    rates = [trainer.learning_rate_factor(s, 100, 0.1) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_targets_of_another_corpus_are_refused(pipeline, tmp_path):
    """A shift by one row is the classical failure: labels are stored to see it."""
    shifted = shutil.copytree(pipeline.output / "targets", tmp_path / "targets")
    labels = np.load(shifted / "labels-00000.npy")
    np.save(shifted / "labels-00000.npy", np.roll(labels, 1))
    batches = Batches(MemorySettings(), pipeline.output / "corpus", shifted)
    with pytest.raises(ValueError, match="not aligned with block"):
        batches.load(np.array([0]), torch.device("cpu"))
    (shifted / "labels-00001.npy").unlink()
    with pytest.raises(ValueError, match="labels-00001.npy is damaged or missing: delete"):
        batches.load(np.array([20]), torch.device("cpu"))


def test_stored_targets_are_distributions(pipeline):
    """fp16 rounds what is stored; what training reads sums to one in float32."""
    _, batches = batches_of(pipeline)
    *_, targets = batches.load(np.arange(6), torch.device("cpu"))
    row, _, probability = targets.entries()
    mass = torch.zeros(int(batches.rows[:6].sum())).index_add_(0, row, probability)
    assert (mass - 1).abs().max() < 1e-6


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # gpt2 has dropout: random numbers in a step
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_equals_an_undisturbed_one(
    pipeline, tiny_model, tmp_path, monkeypatch, kind, dtype
):
    out = pipeline.output
    settings = MemorySettings(
        layers=1, epochs=0.4, batch_blocks=4, micro_batch_blocks=2, dtype=dtype,
        sampled_negatives=50, checkpoint_seconds=0, learning_rate=1e-2,
    )  # fmt: skip

    def train(work, save=write_atomic):
        monkeypatch.setattr(checkpoints, "write_atomic", save)
        work.mkdir(exist_ok=True)
        trainer.train_memory(
            settings,
            tiny_model(kind),
            out / "corpus",
            out / "targets",
            work,
            Context(),
        )

    train(tmp_path / "whole")
    saved = SimpleNamespace(count=0)

    def save_some(path, write):
        write_atomic(path, write)
        saved.count += 1
        if saved.count == 3:  # it is whole, and has no name yet
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "broken", save_some)
    assert checkpoints.saved_step(tmp_path / "broken") == 3  # the write before the kill
    torch.manual_seed(99)  # a new process starts with other random numbers
    train(tmp_path / "broken")
    whole, broken = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    curves = [
        [
            json.loads(line)
            for line in (tmp_path / n / "logs/metrics.jsonl").read_text().splitlines()
        ]
        for n in ("whole", "broken")
    ]
    assert [r["kl"] for r in curves[0]] == [r["kl"] for r in curves[1]]
    assert len(curves[0]) > 4
    left = {p.name for p in (tmp_path / "broken").iterdir()}
    assert left == {p.name for p in (tmp_path / "whole").iterdir()}
    assert not left & set(trainer.SCRATCH)


def test_finished_work_is_not_done_again(pipeline, tiny_model, tmp_path):
    """Killed after the last file, before the folder has its name: nothing is trained again."""
    out, settings = pipeline.output, MemorySettings(layers=1, epochs=0.1, checkpoint_seconds=0)
    args = (settings, tiny_model("llama"), out / "corpus", out / "targets", tmp_path)
    trainer.train_memory(*args, Context())
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    trainer.train_memory(*args, Context())
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before


def test_valid_rows_of_the_corpus_are_those_of_the_batches(pipeline):
    _, batches = batches_of(pipeline)
    _, positions = load_blocks(pipeline.output / "corpus", "train")
    assert np.array_equal(batches.rows, valid_rows(positions[:]).sum(axis=1))


def train(pipeline, tiny_model, work, **changes):
    """Train here; return what was said and the recorded metrics."""
    out = pipeline.output
    settings = MemorySettings(
        **{"layers": 1, "epochs": 1.0, "batch_blocks": 4, "dtype": "float32"} | changes
    )
    work.mkdir(exist_ok=True)
    progress = Progress()
    progress.say = (lines := []).append
    args = settings, tiny_model("llama"), out / "corpus", out / "targets", work, Context(progress)
    trainer.train_memory(*args)
    return lines, trainer.read_metrics(work / "logs/metrics.jsonl")


def validation(pipeline):
    return (a[:] for a in load_blocks(pipeline.output / "corpus", "validation"))


def test_evaluation_is_of_the_mixture_that_is_served(pipeline, tiny_model, tmp_path):
    _, rows = train(pipeline, tiny_model, tmp_path / "a", evaluate_steps=3)
    evaluated = {row["step"]: row for row in rows if "validation_mixture" in row}
    assert list(evaluated) == [row["step"] for row in rows if row["step"] % 3 == 0]
    last = len(rows) - len(rows) % 3
    # To the last evaluation and no further: the weights it was made with.
    blocks = len(
        Batches(MemorySettings(), pipeline.output / "corpus", pipeline.output / "targets").tokens
    )
    changes = {"epochs": last * 4 / blocks, "schedule": "constant"}
    train(pipeline, tiny_model, tmp_path / "b", **changes)
    train(pipeline, tiny_model, tmp_path / "c", **changes, evaluate_steps=last)
    tokens, positions = validation(pipeline)
    base_N, memory_N = (
        label_logprobs(AutoModelForCausalLM.from_pretrained(folder), tokens, positions, 2)
        for folder in (pipeline.base, tmp_path / "c")
    )
    row = trainer.read_metrics(tmp_path / "c/logs/metrics.jsonl")[-1]
    # Every weight in float64, without the code that is tested.
    mixtures = {
        a: np.exp(-np.log((1 - a) * np.exp(base_N) + a * np.exp(memory_N)).mean())
        for a in np.arange(101) / 100
    }
    best = min(mixtures, key=mixtures.get)
    assert row["validation_alpha"] == best
    assert row["validation_mixture"] == pytest.approx(mixtures[best], rel=1e-5)
    assert row["validation_base"] == pytest.approx(np.exp(-base_N.mean()), rel=1e-5)
    assert row["validation_memory"] == pytest.approx(np.exp(-memory_N.mean()), rel=1e-5)
    b, c = (load_file(tmp_path / n / "model.safetensors") for n in "bc")
    assert all(torch.equal(b[name], c[name]) for name in b)  # looking changes nothing
    assert not (tmp_path / "c" / trainer.BASE).exists()


def test_the_base_is_scored_once(pipeline, tiny_model, tmp_path, monkeypatch):
    """A resumed run reads what the run before it computed, and does not load the base."""
    training, save = trainer.Training, trainer.write_atomic
    monkeypatch.setattr(trainer, "validation_logprobs", lambda *_: pytest.fail("the base is known"))
    out = pipeline.output
    tokens, positions = validation(pipeline)
    model = AutoModelForCausalLM.from_pretrained(pipeline.base)
    known_N = label_logprobs(model, tokens, positions, 2) - 1  # another base than the folder's
    tmp_path.mkdir(exist_ok=True)
    save(tmp_path / trainer.BASE, lambda p: torch.save(torch.from_numpy(known_N), p))
    settings = MemorySettings(evaluate_steps=1)
    work = training(settings, pipeline.base, out / "corpus", out / "targets", tmp_path)
    assert np.array_equal(work.base_logprobs(32, World()), known_N)
    assert work.base_logprobs(32, World(1, 2)) is None  # rank 0 mixes for all


def test_every_step_records_what_it_was_taken_with(pipeline, tiny_model, tmp_path):
    _, rows = train(pipeline, tiny_model, tmp_path, gradient_clip=1e-6)
    steps = len(rows)
    for number, row in enumerate(rows):
        factor = trainer.learning_rate_factor(number, steps, 0.05)
        assert row["learning_rate"] == pytest.approx(1e-3 * factor)
        assert row["gradient_norm"] > 1e-6  # of before it was clipped
        assert row["tokens_per_second"] > 0
    assert rows[-1]["epoch"] == pytest.approx(1, abs=4 / 20)
    assert [row["epoch"] for row in rows] == sorted(row["epoch"] for row in rows)


def test_a_young_memory_is_judged_by_its_own_perplexity():
    """While the best weight is 0 the mixture stands still: that is no reason to stop."""
    flat = [(30.0, 900.0), (30.0, 500.0), (30.0, 300.0)]
    assert not stopped_early(flat, 2)
    assert stopped_early([(30.0, 300.0), (30.0, 500.0), (30.0, 300.0)], 2)
    # A memory that gets worse by itself may still serve better.
    assert not stopped_early([(29.0, 300.0), (28.0, 310.0), (27.0, 320.0)], 2)


def test_early_stop_keeps_the_weights_of_the_best_mixture(pipeline, tiny_model, tmp_path):
    """A rate far too high: validation gets worse, and what is kept is the best that was seen."""
    changes = {"evaluate_steps": 1, "early_stop": 2, "learning_rate": 0.5, "schedule": "constant"}
    lines, rows = train(pipeline, tiny_model, tmp_path, **changes)
    seen = [(row["validation_mixture"], row["validation_memory"]) for row in rows]
    best = seen.index(min(seen))
    assert len(seen) == best + 3  # two without a better one
    assert any("stopped early after step" in line for line in lines)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    memory = np.exp(-label_logprobs(model, *validation(pipeline), 2).mean())
    assert memory == pytest.approx(min(seen)[1], rel=1e-4)
    assert not (tmp_path / trainer.BEST).exists()


def test_schedules():
    for schedule, last in (("linear", 1 / 90), ("constant", 1.0)):
        rates = [trainer.learning_rate_factor(s, 100, 0.1, schedule) for s in range(100)]
        assert rates[9] == 1 and rates[10:] == sorted(rates[10:], reverse=True)
        assert rates[-1] == pytest.approx(last)


def test_tensorboard_gets_the_metrics(tmp_path):
    """The records of its file, read without its code: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (tmp_path / "logs").mkdir()
    with metrics_file(tmp_path / "logs", 0, World()) as (write, _):
        write({"step": 1, "kl": 0.5, "ce": 2.0})
    [path] = (tmp_path / "logs/tensorboard").iterdir()
    content, events = path.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].step, events[1].session_log.status) == (1, 1)
    assert {v.tag: v.simple_value for v in events[2].summary.value} == {"kl": 0.5, "ce": 2.0}
    assert events[2].step == 1
