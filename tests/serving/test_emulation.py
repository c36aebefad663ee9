"""The V1 runner as CUDA's piecewise graphs run it: padded, on captured addresses, without waiting.

test_parity.py and test_memories.py pass with hostile models too, as conftest.py's fixture has them.
"""

import random

import pytest
import test_memories
import test_parity
import torch
from support import emulation, oracle
from support.choices import CHOICES, make_models, memdec_block
from test_memories import base, block, composite, folders, params  # noqa: F401
from test_speculation import answers
from vllm.forward_context import get_forward_context

from vllm_memdec.drafter import Drafter


@pytest.fixture
def rules(monkeypatch):
    """Return the rules that every engine of a test follows."""
    hostile, captured = emulation.Hostile(), emulation.Captured()
    emulation.watch(monkeypatch, hostile, captured)
    emulation.piecewise_v1(monkeypatch)
    yield hostile, captured
    assert hostile.spoiled and captured.replayed


def test_mixed_batches(rules, tiny_model, folders, engine):  # noqa: F811
    test_memories.test_mixed_batches(
        "llama", {"max_num_batched_tokens": 64}, tiny_model, folders, engine
    )


@pytest.mark.parametrize("pair", ["base padded", "memory padded"])
def test_mixture(pair, rules, tiny_model, engine):
    test_parity.test_mixture(pair, tiny_model, engine)


def test_drafts_use_no_graphs(rules, tiny_model, engine, monkeypatch):
    """The memories' graphs were captured on the runner's inputs, not on the drafter's."""
    models = make_models(tiny_model) | {"base": tiny_model("llama", vocab=1024)}
    prompts = oracle.prompts(len(CHOICES) * 3, 2, 40, 1000)
    choices = CHOICES * 3
    with engine(models["base"], memdec_block(models)) as llm:
        plain = answers(llm, prompts, choices)
    modes = set()

    def noted(self, *args, **kwargs):
        modes.add(get_forward_context().cudagraph_runtime_mode.name)
        return original(self, *args, **kwargs)

    original = Drafter.__call__
    monkeypatch.setattr(Drafter, "__call__", noted)
    with engine(models["base"], memdec_block(models) | {"speculative_tokens": 2}) as llm:
        assert answers(llm, prompts, choices) == plain
    assert modes == {"NONE"}


def test_nothing_waits(rules, base, folders, engine):  # noqa: F811
    with engine(base, block(folders)) as llm, emulation.no_wait(composite(llm)):
        names = ["law", "bio", "none", "tax", "sea", "law"]
        options = {"max_tokens": 3, "prompt_logprobs": None}
        sampling = [params({"memdec_memory": name}, random, **options) for name in names]
        prompts = oracle.prompts(len(names), 2, 40, 1000)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    assert len(outputs) == len(names)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x_N: x_N.cpu(),
        lambda x_N: x_N.to("cpu"),
        lambda x_N: x_N.tolist(),
        lambda x_N: x_N.numpy(),
        lambda x_N: x_N.nonzero(),
        lambda x_N: int(x_N[0]),
        lambda x_N: x_N[x_N > 0],
    ],
)
@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_the_guard_sees_who_waits(waits, inference):
    class Model(torch.nn.Module):
        base, memories = torch.nn.Identity(), ()

        def forward(self, x_N):
            return waits(x_N)

        def compute_logits(self, x_N):
            return x_N

    Model.base.compute_logits = None
    model = Model()
    waiting = pytest.raises(RuntimeError, match="wait for the device")
    with inference(), emulation.no_wait(model), waiting:
        model(torch.ones(3))
    model(torch.ones(3))
