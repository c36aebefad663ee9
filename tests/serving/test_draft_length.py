"""How many tokens are drafted: the best of all lengths, by formulas on a machine that is known."""

import random

import pytest
import torch

from benchmarks.speed import speculation
from benchmarks.speed.speculation import PLAIN, Measurement, Question, drafting
from vllm_memdec.batch import Draft
from vllm_memdec.draft_length import EXPLORED, WARM_UP, DraftLength

BASE, TOKEN, PASS = 30e-3, 2e-3, 8e-3  # seconds of a step, of each token in it, of a draft pass


def best(beta, requests, max_drafts):
    """Return the length of most tokens a second, by the geometric series of limits."""

    def speed(k):
        tokens = sum(beta**j for j in range(k + 1))
        return requests * tokens / (BASE + TOKEN * requests * (k + 1) + k * PASS)

    return max(range(max_drafts + 1), key=speed), speed


def run(length, beta, names, steps, rng):
    """Let a server draft for so many steps; return the lengths it chose."""
    chosen = []
    for _ in range(steps):
        k = length.choose(names)
        chosen.append(k)
        for _ in range(k):
            length.passes.add(len(names), PASS * rng.uniform(0.9, 1.1))
        for name in names:
            accepted = 0
            while accepted < k and rng.random() < beta:
                accepted += 1
            if k:
                length.observe(name, k, accepted)
        tokens = len(names) * (k + 1)
        length.step.add(tokens, (BASE + TOKEN * tokens) * rng.uniform(0.9, 1.1))
    return chosen


@pytest.mark.parametrize("requests", [1, 8, 64])
@pytest.mark.parametrize("beta", [0.05, 0.5, 0.8, 0.97])
def test_the_fastest_length_is_found(beta, requests):
    rng = random.Random(1)
    length = DraftLength(6)
    chosen = run(length, beta, [str(n) for n in range(requests)], 400, rng)[-100:]
    wanted, speed = best(beta, requests, 6)
    # Those tried to keep what is known fresh are among them.
    reached = sum(map(speed, chosen)) / len(chosen)
    assert reached > 0.95 * speed(wanted), (wanted, chosen)


@pytest.mark.parametrize("beta", [0.05, 0.5, 0.97])
def test_other_lengths_are_tried_too(beta):
    length = DraftLength(6)
    chosen = run(length, beta, ["a"], WARM_UP + 8 * EXPLORED, random.Random(4))[WARM_UP:]
    usual = max(set(chosen), key=chosen.count)
    others = [k for k in chosen if k != usual]
    assert others and all(abs(k - usual) <= 2 for k in others)
    assert chosen.count(0) == 0 or 1 in others  # or an acceptance that has grown was never seen


def test_it_follows_the_text():
    rng = random.Random(2)
    length = DraftLength(6)
    assert min(run(length, 0.95, ["a"], 200, rng)[-EXPLORED:]) >= 4
    assert max(run(length, 0.02, ["b"], 200, rng)[-40:]) <= 1
    assert min(run(length, 0.95, ["c"], 200, rng)[-EXPLORED:]) >= 4


def test_a_request_has_its_own_acceptance():
    length = DraftLength(6)
    for _ in range(50):
        length.observe("good", 3, 3)
        length.observe("bad", 3, 0)
    assert length.acceptance("good") > 0.9 and length.acceptance("bad") < 0.1
    assert 0.3 < length.acceptance("new") < 0.8
    length.keep(["bad"])
    assert length.acceptance("good") == length.acceptance("new")


def test_requests_without_memory_make_drafting_dearer():
    """They wait for the passes of a memory that gives them nothing."""
    rng = random.Random(3)
    length = DraftLength(6)
    run(length, 0.6, ["a"], 200, rng)
    length.steps = WARM_UP  # no trial next
    alone = length.choose(["a"])
    length.steps = WARM_UP
    assert length.choose(["a"], others=60) < alone


def test_the_benchmark_predicts_by_the_formulas(monkeypatch):
    """One overlap, times and counts that are given: the row they must make."""
    monkeypatch.setattr(speculation, "overlap", lambda *_: 0.5)
    steps = {1: 10.0, 2: 11.0, 4: 12.0, 6: 14.0}  # of the base, by tokens
    found = {}
    for question in speculation.questions():
        for engine in (speculation.BASE, PLAIN, *map(drafting, (1, 3, 5)), speculation.AUTO):
            wide = steps.get(question.batch, 20.0)
            seconds = {speculation.BASE: wide, PLAIN: wide + 3}.get(engine, 8.0)
            counts = [100.0, 80.0, 56.0, 42.0]
            found[question, engine] = Measurement([seconds] * 3, counts, [], [3.0] * 3)
    rows = speculation.table(found, "base", "memory")
    [row] = [r for r in rows if (r["alpha"], r["system"]) == (0.6, drafting(3))]
    beta = 0.6 + 0.4 * 0.5
    assert row["bound"] == pytest.approx(beta)
    assert row["acceptance"] == pytest.approx((80 + 56 + 42) / (100 + 80 + 56), abs=1e-4)
    assert row["tokens_a_step"] == pytest.approx(1 + 1.78)
    assert (row["c"], row["v"], row["m"]) == pytest.approx((0.3, 1.2, 1.5))
    assert row["ratio"] == pytest.approx(0.8) and row["to_mixture"] == pytest.approx(
        8 / 13, abs=1e-4
    )
    predicted = (3 * 0.3 + 1.5) / (1 + beta + beta**2 + beta**3)
    assert row["predicted"] == pytest.approx(predicted, abs=1e-4)
    greedy = [r for r in rows if r["temperature"] == 0]
    assert len(greedy) == 4 * 5 and all(r["predicted"] == "" for r in greedy)
    assert Question("general", 0.0, 8) in speculation.questions()


def test_a_draft_knows_which_tokens_it_read():
    """All tokens but the last, if they are those that it read, at their place."""
    rows = torch.zeros(6, 1)
    draft = Draft({"a": 0, "b": 1}, [7, 30], [[5, 6, 7, 8], [9, 6, 7, 8]], rows, rows)
    assert draft.reusable_rows("a", 7, [5, 6, 7, 8]) == range(3) and draft.reusable_rows(
        "b", 30, [9, 6]
    ) == range(3, 4)
    assert not draft.reusable_rows("a", 7, [5])  # the last runs in any case
    assert not draft.reusable_rows("a", 8, [6, 7]) and not draft.reusable_rows("c", 7, [5, 6])
    assert not draft.reusable_rows("a", 7, [5, 6, 8]) and not draft.reusable_rows(
        "a", 7, [5, 6, 7, 8, 9]
    )


def test_nothing_known_yet_is_no_reason_to_stop():
    """On a server whose every step reads prompts no step's time is known."""
    length = DraftLength(6)
    for _ in range(100):
        assert 1 <= length.choose(["a"]) <= 6
        length.passes.add(1, PASS)
