"""The weights of an export: what is tuned, what is said of it, and what is not done again."""

import json

import numpy as np
import pytest

from vllm_memdec.train.data.shards import shard_path
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.executor.executor import LocalExecutor
from vllm_memdec.train.model.windows import alone, window_logprobs
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.stages.export import SHARD_TOKENS, number, score, tell, tune


class Listening(Progress):
    def __init__(self):
        super().__init__()
        self.lines = []

    def say(self, line):
        self.lines.append(line)


class Counting(LocalExecutor):
    """Notes the shards that it was given."""

    def __init__(self):
        self.items = []

    def map(self, worker, items):
        self.items += list(items)
        yield from super().map(worker, items)


@pytest.mark.parametrize(
    ("better", "alpha", "sentence"),
    [("memory", 1, "the base is ignored"), ("base", 0, "the memory does not help")],
)
def test_a_weight_at_an_end_is_commented_on(better, alpha, sentence):
    good, bad = np.full(3000, np.log(0.5)), np.full(3000, -800.0)
    pair = (bad, good) if better == "memory" else (good, bad)
    tuned, progress = tune(np.arange(3000) % 512, *pair, None), Listening()
    assert tuned["alpha"] == alpha
    assert {a for _, a in tuned["alpha_by_context"]} == {alpha}
    tell(tuned, 512, progress)
    assert sum(sentence in line for line in progress.lines) == 1
    assert "Infinity" not in json.dumps(tuned, allow_nan=False)  # exp(800) is no number in JSON
    assert number(np.inf) is None and number(3) == 3 and number(1.23456) == 1.2346


def test_a_given_weight_is_that_of_all_contexts():
    rng = np.random.default_rng(0)
    pair = np.log(rng.uniform(0.01, 0.9, (2, 1000)))
    tuned = tune(np.arange(1000), *pair, 0.25)
    assert tuned["alpha"] == 0.25 and tuned["alpha_by_context"] is None
    assert tuned["perplexity"]["mixture"] == tuned["perplexity"]["fixed"]


def test_what_was_scored_is_not_scored_again(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("vllm_memdec.train.stages.export.SHARD_TOKENS", 64)
    assert SHARD_TOKENS > 64
    rng = np.random.default_rng(0)
    ids = [rng.integers(2, 1000, n).astype(np.int32) for n in (30, 50, 7, 90, 20)]
    text, folder = alone(ids, 32, 1), tiny_model("llama")
    run = {"base": folder}, "float32", text, tmp_path
    first, second = Counting(), Counting()
    scores = score(*run, Context(Listening(), first))
    assert len(first.items) == -(-len(text) // 2) > 2
    shard_path(tmp_path, "base", 1).unlink()
    again = score(*run, Context(Listening(), second))
    assert second.items == [1]
    from vllm_memdec.train.model.huggingface import load_model

    assert np.array_equal(scores["base"], again["base"])
    assert np.abs(scores["base"] - window_logprobs(load_model(folder), text)).max() < 1e-5
