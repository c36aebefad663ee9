"""Requests that mix several memories, against float64 mixtures; test_v2.py asks V2 the same."""

from collections import Counter

import pytest
from support import counters, oracle, several
from support.several import ASKED, block, extra_args
from vllm import SamplingParams

BLOCK = 32  # tokens that the prefix cache keeps or not; each prompt has one of them and more
PROMPTS = oracle.prompts(2, 34, 38, 1000)  # and an answer passes the end of a memory
OPTIONS = {"max_num_batched_tokens": 64, "block_size": BLOCK, "enable_prefix_caching": True}
feature = pytest.mark.feature("several memories in one request")


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    return several.make(tiny_model, tmp_path_factory.mktemp("several"))


def generate(llm, asked, **options):
    """Return outputs, by default greedy with log-probabilities; asked: (prompt, what it asks)."""
    given = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 4} | options
    params = [SamplingParams(extra_args=extra_args(each), **given) for _, each in asked]
    return llm.generate([{"prompt_token_ids": p} for p, _ in asked], params, use_tqdm=False)


def rows(found):
    return [{t: entry.logprob for t, entry in (row or {}).items()} for row in found or []]


def check(models, outputs, asked):
    for output, (prompt, each) in zip(outputs, asked, strict=True):
        answer = output.outputs[0]
        error = several.worst(
            models, each, prompt, answer.token_ids, rows(output.prompt_logprobs),
            rows(answer.logprobs),
        )  # fmt: skip
        assert error < oracle.TOLERANCE, each


@pytest.fixture(scope="module")
def llm(engine, models):
    with engine(models["base"], block(models), **OPTIONS, disable_log_stats=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def answers(llm):
    """Return the text of every kind, from an engine that does not draft."""
    asked = [(p, each) for p in PROMPTS for each in ASKED]
    return [output.outputs[0].token_ids for output in generate(llm, asked, max_tokens=12)]


@feature
def test_mixtures(llm, models, answers):
    """All kinds in one batch, in chunks; again from the cache, which every set has for itself."""
    asked = [(p, each) for p in PROMPTS for each in ASKED]
    outputs = generate(llm, asked, prompt_logprobs=4)
    again = generate(llm, asked)  # asked for log-probabilities of prompts, vLLM reads no cache
    assert all(output.num_cached_tokens == BLOCK for output in again)
    check(models, [*outputs, *again], [*asked, *asked])
    for found in (outputs, again):
        assert [output.outputs[0].token_ids for output in found] == [ids[:8] for ids in answers]


def test_each_alone(llm, models):
    """Batches whose requests all mix the same, or one of whose sets is another's part."""
    for batch in ([0, 0], [3], [9, 9], [7, 5], [2, 0, 9]):
        asked = [(PROMPTS[n % 2], ASKED[each]) for n, each in enumerate(batch)]
        check(models, generate(llm, asked, max_tokens=3), asked)


def test_where_heads_run_on_all_rows(llm, models, monkeypatch):
    """As on a GPU, three rows at a time: memories come and go in slices."""
    from vllm_memdec import model

    core = llm.llm_engine.engine_core.engine_core
    composite = core.model_executor.driver_worker.worker.model_runner.get_model()
    monkeypatch.setattr(composite.memories, "selects_rows", False)
    monkeypatch.setattr(model, "SLICE_BYTES", 3 * 4 * 2000)
    asked = [(p, each) for p in PROMPTS for each in ASKED]
    check(models, generate(llm, asked, max_tokens=3, prompt_logprobs=4), asked)


def test_each_set_has_its_own_prefixes(llm):
    """Those of the same memories share them, whatever their weights and their order."""
    [prompt] = oracle.prompts(1, 70, 70, 1000, seed=5)
    cached = []
    for each in ({"law": 0.3, "bio": 0.3}, "law", "bio", {"bio": 0.6, "law": 0.1}, {"law": 1.0},
                 {"law": 0.3, "bio": 0.3, "plain": 0.3}, several.AUTO):  # fmt: skip
        [output] = generate(llm, [(prompt, each)], max_tokens=1)
        cached.append(output.num_cached_tokens)
    assert cached == [0, 0, 0, 64, 64, 0, 64]


def test_counters(llm, models):
    """Each memory of a set counts the request's rows, with its share of the mixture."""
    asked = [(p, each) for p in PROMPTS for each in ASKED]
    generate(llm, asked, max_tokens=1)
    before = counters.read()
    # What is not cached of so few prompts is read in one piece.
    outputs = [o for n in range(0, len(asked), 9) for o in generate(llm, asked[n : n + 9])]
    wanted, weights = Counter(), Counter()
    for (prompt, each), output in zip(asked, outputs, strict=True):
        ids = [*prompt, *output.outputs[0].token_ids]
        found = several.shares(models, each, ids)
        for name, share_T1 in found.items():
            # A row past its end counts until the next step finds that it is past it.
            last = several.ENDS.get(name, len(ids) - 1)
            share_T = share_T1[len(prompt) - 1 : min(last, len(ids) - 1), 0]
            weights[name] += share_T.sum().item()
            wanted[name] += len(share_T)
    grown = counters.grown(before)
    assert grown["mixed_weight"] == pytest.approx(weights, abs=1e-4)
    assert grown["mixed_rows"] == wanted


# Last: where they end, engines take vLLM's groups of processes of the module's with them.


def test_a_memory_that_is_the_base(engine, models):
    """Whatever their weights, greedy answers are the base's, with drafts and without."""
    same = {"model": models["base"], "alpha": 0.5}
    settings = {"memories": {"one": same, "two": same}, "default": "one", "at_once": 2}
    asked = [(PROMPTS[0], e) for e in ("none", {"one": 0.3, "two": 0.7}, {"two": 0.2, "one": 0.4})]
    for drafts in (0, 3):
        with engine(models["base"], settings | {"speculative_tokens": drafts}) as llm:
            outputs = generate(llm, asked, max_tokens=16)
        texts = [output.outputs[0].token_ids for output in outputs]
        assert texts[0] == texts[1] == texts[2]


@pytest.mark.drafts
@feature
@pytest.mark.parametrize("tokens", [3, "auto"])
def test_drafting_changes_no_answer(engine, answers, models, tokens):
    """The heaviest drafts; what is verified is the mixture of all."""
    asked = [(p, each) for p in PROMPTS for each in ASKED]
    counted = {"disable_log_stats": False, "per_request_spec_decode_metrics": "summary"}
    before = counters.read()
    settings = block(models, speculative_tokens=tokens)
    with engine(models["base"], settings, **OPTIONS, **counted) as drafting:
        outputs = generate(drafting, asked, max_tokens=12, prompt_logprobs=4)
        check(models, outputs, asked)
        # One request by itself, whose drafts would be reused if it had one memory.
        alone = [generate(drafting, [one], max_tokens=12)[0] for one in asked[:3]]
    assert [o.outputs[0].token_ids for o in outputs] == answers
    assert [o.outputs[0].token_ids for o in alone] == answers[:3]
    made = Counter()
    for output, (_, each) in zip([*outputs, *alone], [*asked, *asked[:3]], strict=True):
        by_word = {"none": None, "None": "law", several.AUTO: "law", "plain": "plain"}
        name = by_word.get(str(each), "bio")
        if isinstance(each, dict):  # of equals the first one of the server's
            name = max((name for name in several.ALPHAS if name in each), key=each.get)
        drafted = counters.drafts(output.outputs[0])[0]
        assert bool(drafted) <= (name is not None)
        made[name] += drafted
    drafted = counters.grown(before)["draft_tokens"]
    assert drafted == {name: n for name, n in made.items() if n}
