"""benchmarks/quality/plug_and_play.py: vLLM beside two bases, compared with transformers."""

import pytest
from support.tiny_domain import tiny_domain

from benchmarks.quality import plug_and_play
from benchmarks.quality.pair import Pair
from vllm_memdec.kernels import interpolate


@pytest.fixture
def domain(tiny_model, monkeypatch, tmp_path):
    options = {"positions": 1024, "spread": 0.15}
    models = tiny_model("llama", **options), tiny_model("llama", 5, hidden=32, **options)
    pair = Pair("tiny", *models, keys="small", rates={"memory": (3e-3,)})
    return tiny_domain(pair, monkeypatch, tmp_path, trial=0.01, epochs=1)


def test_one_memory_is_served_beside_both_bases(domain, monkeypatch):
    monkeypatch.setattr(interpolate, "INTERPRETED", False)  # the interpreter would take minutes
    answers, serve = [], plug_and_play.served
    monkeypatch.setattr(
        plug_and_play, "served", lambda *args: answers.append(serve(*args)) or answers[-1]
    )
    small, base = plug_and_play.gaps(domain)
    assert small["base"] != base["base"]
    for row in (small, base):
        assert row["gap"] < plug_and_play.TOLERANCE
        assert row["base_gap"] > 3 * row["gap"]  # it could fail: the base alone is not the mixture
    monkeypatch.setattr(plug_and_play, "served", lambda *args: [row + 0.1 for row in answers[0]])
    with pytest.raises(RuntimeError, match="vLLM is off by 0.1"):
        next(plug_and_play.gaps(domain))
