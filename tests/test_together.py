"""benchmarks/quality/together.py on tiny models: whose figures stand in a row, and what is kept."""

import csv
import json

import numpy as np
import pytest
from support.tiny_domain import tiny_domain
from support.tiny_models import tiny_text

from benchmarks.corpora import domains
from benchmarks.quality import together
from benchmarks.quality.domain import Domain
from benchmarks.quality.pair import Pair
from benchmarks.systems.gated import Gated
from vllm_memdec.train.model.scoring import perplexity

OTHER = [tiny_text(1000 + seed % 40, 60) for seed in range(60)]


@pytest.fixture(scope="module")
def two(tiny_model, tmp_path_factory):
    """Return two domains of which the memories are made once."""
    base, work = tiny_model("llama", positions=1024, spread=0.15), tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        first = tiny_domain(Pair("tiny", base), patch, work)
        patch.setitem(domains.DOMAINS, "other", lambda: OTHER)
        rest = first.pair, first.sizes, first.settings, first.progress
        yield [first, Domain("other", *rest)]


def test_rows_of_two_memories(two, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(together, "WORK", tmp_path)
    monkeypatch.setattr(together, "domains_of", lambda options: two)
    monkeypatch.setattr("sys.argv", ["together", "--quick", "--domains", "factbook", "law"])
    with pytest.raises(SystemExit) as ended:
        together.main()
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    with (tmp_path / "quick-together.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == ["tiny", "other", *domains.GENERAL]
    assert [row["text"] for row in told["results"]] == [row["text"] for row in rows]
    for row, domain in zip(rows, two, strict=False):
        gated = domain.system(Gated)  # the oracle is the system of quality.py
        assert float(row["oracle"]) == pytest.approx(perplexity(gated.logprobs("test")), rel=1e-3)
        assert float(row["base"]) == pytest.approx(
            perplexity(gated.base.logprobs("test")), rel=1e-3
        )
    for row in rows:
        assert row["memories"] == "tiny other" and int(row["tokens"]) > 100
        gap = float(row["together"]) / float(row["oracle"]) - 1
        assert float(row["gap"]) == pytest.approx(gap, abs=1e-3)
    for row in rows[2:]:
        assert row["oracle"] == row["base"]

    def again(*args, **kwargs):
        raise AssertionError("what is there is read again")

    monkeypatch.setattr(together, "load_model", again)
    same = together.Together(two).rows()
    assert [row["together"] for row in told["results"]] == pytest.approx(
        [row["together"] for row in same], abs=1e-4
    )


def test_offsets_are_the_best(two):
    """No other number added to either gate gives its training text a higher likelihood."""
    ours = together.Together(two)
    olds = [domain.system(Gated).arrays for domain in two]
    kinds = together.joint.kinds_of(ours.members, ours.trained[0])

    def likelihood(gates):
        total = 0.0
        for kind, weight in kinds.items():
            parts = [of[kind] for of in ours.trained]
            rows = together.joint.together(gates, parts)
            total += weight * float(together.even(parts[0].position_N).double().numpy() @ rows)
        return total

    moved = together.with_offsets(olds, ours.trained, kinds)
    best = likelihood(moved)
    assert best >= likelihood(olds)
    for step in (-0.05, 0.05):
        for n in range(2):
            other = [dict(arrays) for arrays in moved]
            other[n]["b2"] = np.array(other[n]["b2"] + step)
            assert likelihood(other) < best + 1e-6


@pytest.mark.parametrize(("gaps", "right"), [((0.02, 0.01), True), ((0.021, 0), False),
                                             ((0, 0.011), False)])  # fmt: skip
def test_what_is_accepted(gaps, right):
    rows = [{"text": "law", "gap": gaps[0]}, {"text": "wiki", "gap": np.float64(gaps[1])}]
    assert together.accepted(rows) is right
