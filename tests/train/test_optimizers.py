"""Muon for matrices, AdamW for all else, as one optimiser; and the mean of the last weights."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from vllm_memdec.errors import MemdecError
from vllm_memdec.train.data.artifacts import write_atomic
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.settings import MemorySettings
from vllm_memdec.train.stages import training as trainer
from vllm_memdec.train.training import checkpoints
from vllm_memdec.train.training.optimizers import Average, Pair, new_optimizer
from vllm_memdec.train.training.parallel import Spread

# Of an orthogonalised matrix: five steps of Newton-Schulz, in bfloat16, bring them near 1.
SINGULAR = (0.6, 1.3)
WAYS = {
    "muon": {"optimizer": "muon"},
    "average": {"average_fraction": 0.5},
    "both": {"optimizer": "muon", "average_fraction": 0.5},
}


def settings_of(**changes):
    return MemorySettings(
        **{"layers": 1, "epochs": 0.4, "batch_blocks": 4, "dtype": "float32"} | changes
    )


def train(pipeline, base, work, **changes):
    out = pipeline.output
    work.mkdir(exist_ok=True)
    args = settings_of(**changes), base, out / "corpus", out / "targets", work
    trainer.train_memory(*args, Context())
    return load_file(work / "model.safetensors")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # the second ties its embeddings
def test_matrices_of_layers_are_orthogonalised_and_the_rest_is_adamw_s(tiny_model, kind):
    ours, plain = (AutoModelForCausalLM.from_pretrained(tiny_model(kind)) for _ in range(2))
    settings = settings_of(optimizer="muon", weight_decay=0.1)
    pair = new_optimizer(Spread(ours), settings)
    adamw = new_optimizer(Spread(plain), settings_of(weight_decay=0.1))
    assert isinstance(pair, Pair) and isinstance(adamw, torch.optim.AdamW)
    ids = torch.arange(40)[None]
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for model, optimizer in ((ours, pair), (plain, adamw)):
        model.eval()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    named = dict(plain.named_parameters())
    matrices = 0
    for name, p in ours.named_parameters():
        if p.ndim == 2 and (".layers." in name or ".h." in name):
            step = (before[name] * (1 - 0.02 * 0.1) - p.detach()).double() / 0.02
            step /= max(1, p.shape[0] / p.shape[1]) ** 0.5  # Muon's own scale of tall matrices
            values = torch.linalg.svdvals(step)
            assert SINGULAR[0] < values.median() and values.max() < SINGULAR[1], name
            matrices += 1
        else:
            assert torch.equal(p, named[name]), name
    assert matrices >= 8


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_equals_an_undisturbed_one(pipeline, tiny_model, tmp_path, monkeypatch, way):
    changes = WAYS[way] | {"checkpoint_seconds": 0, "learning_rate": 1e-2}
    whole = train(pipeline, tiny_model("llama"), tmp_path / "whole", **changes)
    steps = len(trainer.read_metrics(tmp_path / "whole/logs/metrics.jsonl"))
    saved = []

    def save_some(path, write):
        write_atomic(path, write)
        saved.append(path)
        if len(saved) == steps - 1:  # in the midst of what is averaged
            raise InterruptedError

    monkeypatch.setattr(checkpoints, "write_atomic", save_some)
    with pytest.raises(InterruptedError):
        train(pipeline, tiny_model("llama"), tmp_path / "broken", **changes)
    assert checkpoints.saved_step(tmp_path / "broken") == steps - 1 > 3
    monkeypatch.setattr(checkpoints, "write_atomic", write_atomic)
    broken = train(pipeline, tiny_model("llama"), tmp_path / "broken", **changes)
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_what_is_exported_is_the_mean_of_the_last_weights(
    pipeline, tiny_model, tmp_path, monkeypatch
):
    seen = []

    class Watched(Average):
        def add(self, step):
            seen.append([p.detach().double() for p in self.parameters])
            super().add(step)

    monkeypatch.setattr(trainer, "Average", Watched)
    # gpt2 ties its embeddings: the mean is written once for both.
    got = train(pipeline, tiny_model("gpt2"), tmp_path / "mean", average_fraction=0.34)
    last = round(0.34 * len(seen))
    assert 1 < last < len(seen)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mean")
    for number, (name, p) in enumerate(model.named_parameters()):
        mean = torch.stack([weights[number] for weights in seen[-last:]]).mean(0)
        assert (p - mean).abs().max() < 1e-6, name  # float32, of weights of the order of one
        assert not torch.equal(p.double(), seen[-1][number]), name
    assert got


def test_a_share_of_less_than_a_step_is_one(tiny_model):
    module = torch.nn.Linear(2, 2)
    average = Average(module, 10, 0.01)
    for step in range(1, 11):
        torch.nn.init.constant_(module.weight, step)
        average.add(step)
    average.put()
    assert (module.weight == 10).all()
    assert Average(module, 10, 0.0).first == 10


def test_muon_without_a_torch_that_has_it(tiny_model, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    module = Spread(AutoModelForCausalLM.from_pretrained(tiny_model("llama")))
    with pytest.raises(
        MemdecError, match=r"needs PyTorch 2.9, this is .*: install it, or set adam"
    ):
        new_optimizer(module, settings_of(optimizer="muon"))
