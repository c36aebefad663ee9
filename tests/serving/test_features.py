"""The feature matrix: what vLLM offers its users works on the mixture, on a real engine.

Each test is a row of the table in vllm_memdec/README.md, see the marker `feature`; some rows are
tests of other files, those over HTTP of test_http.py. Each runs without drafts, with three, and
with as many as "auto" chooses. The answer key is support/choices.py's.
"""

import functools
import os
import re

import pytest
import regex
import torch
from support import bases, oracle
from support.choices import (
    CHOICES,
    PLAIN,
    PROMPT,
    Choice,
    beams,
    constrained,
    greedy,
    kept,
    make_models,
    memdec_block,
    mixture,
    penalised,
)
from support.feature_engines import (
    STRUCTURED,
    check_logprobs,
    count,
    engines,
    generate,
    one,
    options_of,
)
from transformers import AutoTokenizer
from vllm import SamplingParams

feature = pytest.mark.feature
V1 = "drafts: the V1 runner's; on V2 vLLM's own code, not run sampled"
usual, tight, both = engines("usual"), engines("tight"), engines("usual", "tight")


@pytest.fixture(scope="module")
def llm(request, engine, tiny_model, tmp_path_factory):
    """Yield one engine of ENGINES, shared by its tests."""
    name, drafts, base = request.param
    models = make_models(tiny_model)
    if base is not None:
        models["base"] = str(tmp_path_factory.getbasetemp() / base)
        if not os.path.exists(models["base"]):
            bases.save(base, models["base"], seed=5)  # by which Gemma's words differ, too
    block = memdec_block(models) | {"speculative_tokens": drafts}
    with engine(models["base"], block, **options_of(name, base)) as running:
        running.models = models
        yield running


@pytest.fixture
def models(llm):
    """Return the folders of the models that an engine serves, by name."""
    return llm.models


@pytest.fixture(autouse=True)
def drafts_are_verified(request, llm):
    """A row of the column of drafts shows nothing if none was made."""
    before = count(llm, "spec_decode_num_draft_tokens")
    yield
    drafted = count(llm, "spec_decode_num_draft_tokens") - before
    if not request.node.get_closest_marker("drafts"):
        assert not drafted
    # A beam is of requests for one token each, a seed has no drafts, few obey a grammar, and "auto"
    # makes none where they cost time.
    elif not re.search("beam|seed|structured|auto", request.node.name):
        assert drafted


# -- Sampling -------------------------------------------------------------------------------------


@feature("greedy")
@feature("eager mode")
@feature("V1 model runner")
@feature("several memories in one batch")
@usual
def test_greedy(llm, models):
    """Three requests of each choice in one batch."""
    choices = CHOICES * 3
    prompts = oracle.prompts(len(choices), 1, 40, 1000)
    outputs = generate(llm, prompts, choices, max_tokens=12)
    for prompt, choice, output in zip(prompts, choices, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy(models, choice, prompt, 12), choice


@feature("seeded sampling", note="never drafted for")
@usual
def test_seeded_sampling(llm, models):
    options = {"temperature": 1.0, "logprobs": 0, "max_tokens": 12}
    runs = [[one(llm, c, seed=seed, **options).token_ids for c in CHOICES] for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    for choice, first, other in zip(CHOICES, runs[0], runs[2], strict=True):
        assert first != other, choice
    # The same among others in a batch, and its log-probabilities are the mixture's.
    outputs = generate(llm, [PROMPT] * len(CHOICES), CHOICES, seed=1, **options)
    for choice, ids, output in zip(CHOICES, runs[0], outputs, strict=True):
        assert output.outputs[0].token_ids == ids
        check_logprobs(models, choice, PROMPT, output.outputs[0])


@feature("seeded sampling")
@usual
def test_seeded_samples_are_drawn_from_the_mixture(llm, models):
    """Their mean surprise is the mixture's entropy, within five standard errors."""
    count = 600
    for choice in (PLAIN, Choice("bio", 0.9)):
        [output] = generate(llm, [PROMPT], [choice], n=count, temperature=1.0, seed=3, max_tokens=1)
        row_V = mixture(models, choice, PROMPT)[-1]
        surprise = -torch.stack([row_V[found.token_ids[0]] for found in output.outputs])
        p_V = row_V.exp()
        entropy = -(p_V * row_V).sum()
        deviation = ((p_V * row_V**2).sum() - entropy**2).sqrt()
        assert abs(surprise.mean() - entropy) < 5 * deviation / count**0.5
        # The base's samples would not pass.
        base_V = mixture(models, Choice("none"), PROMPT)[-1]
        assert abs(-(base_V.exp() * row_V).sum() - entropy) > 10 * deviation / count**0.5


@feature("n > 1")
@usual
def test_n(llm, models):
    """Each of n samples has the mixture's log-probabilities."""
    choice = Choice("bio", 0.7)
    [output] = generate(llm, [PROMPT], [choice], n=4, temperature=1.0, logprobs=3)
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 4
    for sample in output.outputs:
        check_logprobs(models, choice, PROMPT, sample)


@feature("seeded sampling")
@usual
def test_seeds_of_n(llm):
    """Each of n samples has the seed that vLLM gives it."""
    [output] = generate(llm, [PROMPT], [PLAIN], n=4, seed=11, temperature=1.0)
    found = [sample.token_ids for sample in output.outputs]
    assert found == [one(llm, PLAIN, seed=11 + i, temperature=1.0).token_ids for i in range(4)]


@feature("beam search", note="by the server's memory and weight: another is refused")
@usual
def test_beam_search(llm, models):
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=3, max_tokens=4, ignore_eos=True)
    assert not hasattr(params, "extra_args")  # if it has one day, the note above is out of date
    [output] = llm.beam_search([{"prompt_token_ids": PROMPT}], params)
    key = beams(models, PLAIN, PROMPT, 3, 4)
    assert [s.tokens[len(PROMPT) :] for s in output.sequences] == [ids for _, ids in key]
    for sequence, (total, _) in zip(output.sequences, key, strict=True):
        assert sequence.cum_logprob == pytest.approx(total, abs=4 * oracle.TOLERANCE)


@feature("log-probabilities")
@feature("prompt log-probabilities")
@usual
def test_logprobs(llm, models):
    """All 1000 of every position, prompt and sampled."""
    prompts = oracle.prompts(len(CHOICES), 2, 12, 1000)
    asked = {"logprobs": -1, "prompt_logprobs": -1, "detokenize": False, "max_tokens": 6}
    for prompt, choice, output in zip(
        prompts, CHOICES, generate(llm, prompts, CHOICES, **asked), strict=True
    ):
        rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        assert len(rows) == len(prompt) - 1 + 6 and all(len(row) == 1000 for row in rows)
        name, alpha = choice.resolved
        error = oracle.gap(output, models["base"], models[name], alpha)
        assert error < oracle.TOLERANCE, choice


@feature("presence, frequency and repetition penalties")
@usual
@pytest.mark.parametrize(
    "penalties",
    [{"presence": 2.0}, {"frequency": 1.0}, {"repetition": 1.5}],
    ids=lambda penalties: next(iter(penalties)),
)
def test_penalties(penalties, llm, models):
    options = {f"{name}_penalty": value for name, value in penalties.items()}
    prompts = [[*PROMPT, *PROMPT]] * len(CHOICES)
    outputs = generate(llm, prompts, CHOICES, max_tokens=24, **options)
    free = generate(llm, prompts, CHOICES, max_tokens=24)
    changed = 0
    for prompt, choice, output, unlike in zip(prompts, CHOICES, outputs, free, strict=True):
        wanted = greedy(models, choice, prompt, 24, penalised(prompt, **penalties))
        assert output.outputs[0].token_ids == wanted, choice
        changed += wanted != unlike.outputs[0].token_ids
    assert changed, "the penalties never mattered"


@feature("logit_bias")
@usual
def test_logit_bias(llm, models):
    for choice in CHOICES:
        first, second = mixture(models, choice, PROMPT)[-1].topk(2).indices.tolist()
        bias = {first: -3.0, 42: 2.0, second: 0.5}

        def adjust(row_V, sampled, bias=bias):
            row_V = row_V.clone()
            for token, value in bias.items():
                row_V[token] += value
            return row_V

        wanted = greedy(models, choice, PROMPT, 8, adjust)
        assert wanted != greedy(models, choice, PROMPT, 8)
        assert one(llm, choice, logit_bias=bias).token_ids == wanted


@feature("bad_words")
@usual
def test_bad_words(llm, models):
    tokenizer = llm.get_tokenizer()
    words = {
        token: tokenizer.decode([token])
        for token in range(2, 1000)
        if tokenizer.encode(tokenizer.decode([token])) == [token]
        and not tokenizer.decode([token])[0].isspace()
    }
    tried = 0
    for choice in CHOICES:
        free = greedy(models, choice, PROMPT, 8)
        banned = next((token for token in free if token in words), None)
        if banned is None:
            continue
        tried += 1
        # vLLM bans the word behind a space too, if that is a single token as well.
        spaced = tokenizer.encode(" " + words[banned])

        def adjust(row_V, sampled, banned=banned, spaced=spaced):
            row_V = row_V.clone()
            row_V[banned] = -torch.inf
            if len(spaced) == 1:
                row_V[spaced[0]] = -torch.inf
            return row_V

        found = one(llm, choice, bad_words=[words[banned]]).token_ids
        assert banned not in found
        assert found == greedy(models, choice, PROMPT, 8, adjust)
    assert tried > 2


@feature("allowed_token_ids")
@usual
def test_allowed_token_ids(llm, models):
    allowed = list(range(100, 1000, 9))

    def adjust(row_V, sampled):
        only_V = torch.full_like(row_V, -torch.inf)
        only_V[allowed] = row_V[allowed]
        return only_V

    for choice in CHOICES:
        found = one(llm, choice, allowed_token_ids=allowed).token_ids
        assert found == greedy(models, choice, PROMPT, 8, adjust)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"min_p": 0.2}, marks=feature("min_p", note=V1)),
        pytest.param({"top_k": 5}, marks=feature("top_k")),
        pytest.param({"top_p": 0.5}, marks=feature("top_p")),
    ],
    ids=lambda options: next(iter(options)),
)
@usual
def test_truncated_sampling(options, llm, models):
    """No sample leaves the mixture's set, samples differ, and they leave the base's set."""
    outside = 0
    for choice in (PLAIN, Choice("bio"), Choice("law", 0.3)):
        [output] = generate(llm, [PROMPT], [choice], n=24, temperature=1.0, max_tokens=5, **options)
        samples = [list(sample.token_ids) for sample in output.outputs]
        assert len(set(map(tuple, samples))) > 1
        for ids in samples:
            rows = mixture(models, choice, [*PROMPT, *ids])[len(PROMPT) - 1 : -1]
            base_rows = mixture(models, Choice("none"), [*PROMPT, *ids])[len(PROMPT) - 1 : -1]
            for token, row_V, base_V in zip(ids, rows, base_rows, strict=True):
                assert token in kept(row_V, **options)
                outside += token not in kept(base_V, **options)
    assert outside


@feature("stop strings")
@usual
def test_stop_strings(llm, models):
    """The one that the text has first ends it, and no token follows that which ends the string."""
    tokenizer = llm.get_tokenizer()
    for choice in CHOICES:
        ids = greedy(models, choice, PROMPT, 16)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        # A whole character in whichever way the text is cut.
        stop = next(s for s in regex.findall("[ -~]{3}", text[len(text) // 2 :]))
        end = text.index(stop)
        late = text[end + 1 :]
        texts = [tokenizer.decode(ids[:n], skip_special_tokens=True) for n in range(17)]
        kept = [text for text in texts if stop not in text]
        asked = {"stop": [late, stop], "max_tokens": 16, "logprobs": 0}
        found = one(llm, choice, **asked)
        assert (found.text, found.finish_reason, found.stop_reason) == (text[:end], "stop", stop)
        assert found.token_ids == ids[: len(kept)]
        check_logprobs(models, choice, PROMPT, found)
        found = one(llm, choice, include_stop_str_in_output=True, **asked)
        assert found.text == text[: end + len(stop)]


@feature("stop_token_ids")
@feature("min_tokens")
@usual
def test_stop_token_ids(llm, models):
    """A token ends an answer as soon as it has the tokens that it must have, drafted or not."""
    for choice in CHOICES:
        free = greedy(models, choice, PROMPT, 12)
        ends = [n for n in range(10) if free[n] not in free[:n]]
        for n, least in [(end, least) for end in ends[1:6] for least in (0, end)]:
            found = one(llm, choice, stop_token_ids=[free[n]], min_tokens=least, max_tokens=12)
            assert (found.token_ids, found.finish_reason) == (free[: n + 1], "stop"), (choice, n)
        end = ends[:3][-1]
        stop, least = free[end], end + 2

        def adjust(row_V, sampled, stop=stop, least=least):
            row_V = row_V.clone()
            row_V[stop] -= torch.inf if len(sampled) < least else 0
            return row_V

        wanted = greedy(models, choice, PROMPT, 12, adjust)
        found = one(llm, choice, stop_token_ids=[stop], min_tokens=least, max_tokens=12)
        assert found.token_ids == wanted[: wanted.index(stop) + 1 if stop in wanted else 12]


# -- Structured output ----------------------------------------------------------------------------

CONSTRAINED = oracle.prompts(15, 3, 12, 1000), CHOICES * 3


@functools.cache
def constrained_texts(pattern, **models):
    """Return the texts that the key has for a pattern."""
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    return [
        constrained(models, choice, prompt, pattern, tokenizer)
        for prompt, choice in zip(*CONSTRAINED, strict=True)
    ]


@pytest.fixture(scope="module")
def guided():
    """Return the texts by pattern that guidance gave first."""
    return {}


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        pytest.param(*STRUCTURED["choice"], marks=feature("structured output: choice")),
        pytest.param(*STRUCTURED["regex"], marks=feature("structured output: regex")),
        pytest.param(*STRUCTURED["json"], marks=feature("structured output: JSON schema")),
    ],
    ids=STRUCTURED,
)
@both
def test_structured_output(asked, pattern, llm, models, guided):
    """The text obeys, and each of its tokens is the best of the mixture's among those allowed."""
    from vllm.sampling_params import StructuredOutputsParams

    outputs = generate(
        llm,
        *CONSTRAINED,
        max_tokens=64,
        ignore_eos=False,
        structured_outputs=StructuredOutputsParams(**asked),
    )
    texts = [output.outputs[0].text for output in outputs]
    for text, output in zip(texts, outputs, strict=True):
        assert regex.fullmatch(pattern, text)
        assert output.outputs[0].finish_reason == "stop"
    if llm.llm_engine.vllm_config.structured_outputs_config.backend == "guidance":
        # It allows fewer tokens than the pattern does: the key is what it gives without drafts.
        assert texts == guided.setdefault((pattern, models["base"]), texts)
    else:
        assert texts == constrained_texts(pattern, **models)


# -- The scheduler --------------------------------------------------------------------------------


@feature("prefix caching")
@usual
def test_prefix_caching(llm, models):
    """A prefix is reused by requests of its memory, at any weight, and by nobody else's."""
    prefix = oracle.prompts(1, 70, 70, 1000, seed=9)[0]
    writers = [PLAIN, Choice("bio")]
    generate(llm, [[*prefix, 3]] * 2, writers)
    readers = [Choice("law", 0.3), Choice("bio", 1.0), PLAIN, Choice("none")]
    outputs = generate(llm, [[*prefix, 4 + i] for i in range(4)], readers, logprobs=5)
    assert [output.num_cached_tokens for output in outputs] == [64, 64, 64, 0]
    for choice, output in zip(readers, outputs, strict=True):
        prompt, found = output.prompt_token_ids, output.outputs[0]
        assert found.token_ids == greedy(models, choice, prompt, 8)
        check_logprobs(models, choice, prompt, found)


@feature("abort in mid-stream")
@usual
def test_abort(llm, models):
    """One request of a batch goes; the others' texts are what they are without it."""
    core = llm.llm_engine
    prompts = oracle.prompts(len(CHOICES), 1, 30, 1000)
    for number, (prompt, choice) in enumerate(zip(prompts, CHOICES, strict=True)):
        params = SamplingParams(
            temperature=0, max_tokens=16, ignore_eos=True, extra_args=choice.extra_args
        )
        core.add_request(str(number), {"prompt_token_ids": prompt}, params)
    found, gone = {}, False
    while core.has_unfinished_requests():
        for output in core.step():
            assert not (output.request_id == "0" and gone)
            found[output.request_id] = list(output.outputs[0].token_ids)
        if len(found.get("0", ())) >= 5 and not gone:
            core.abort_request(["0"])
            gone = True
    assert 5 <= len(found["0"]) < 9
    for number, (prompt, choice) in enumerate(zip(prompts, CHOICES, strict=True)):
        wanted = greedy(models, choice, prompt, len(found[str(number)]))
        assert found[str(number)] == wanted, choice
        assert number == 0 or len(wanted) == 16


@feature("chunked prefill")
@tight
def test_chunked_prefill(llm, models):
    """Prompts of several times the tokens that one step may hold."""
    limit = llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    prompts = oracle.prompts(len(CHOICES), 90, 120, 1000)
    assert all(len(prompt) > 2 * limit for prompt in prompts)
    asked = {"logprobs": 5, "prompt_logprobs": 5, "max_tokens": 4}
    for prompt, choice, output in zip(
        prompts, CHOICES, generate(llm, prompts, CHOICES, **asked), strict=True
    ):
        name, alpha = choice.resolved
        assert oracle.gap(output, models["base"], models[name], alpha) < oracle.TOLERANCE
        assert output.outputs[0].token_ids == greedy(models, choice, prompt, 4)


@feature("preemption and recompute")
@tight
def test_preemption(llm, models):
    """Four requests that grow to 5 blocks each, of a cache of 12."""
    before = count(llm, "num_preemptions")
    choices = CHOICES[:4]
    prompts = oracle.prompts(4, 60, 60, 1000)
    outputs = generate(llm, prompts, choices, max_tokens=80, logprobs=0)
    assert count(llm, "num_preemptions") > before
    for prompt, choice, output in zip(prompts, choices, outputs, strict=True):
        found = output.outputs[0]
        key_TV = mixture(models, choice, [*prompt, *found.token_ids])[len(prompt) - 1 : -1]
        assert key_TV.argmax(-1).tolist() == found.token_ids, choice
        check_logprobs(models, choice, prompt, found)


@feature("priority scheduling")
@tight
def test_priority(llm, models):
    """Eight requests on four seats: the last four to come begin first."""
    core = llm.llm_engine
    choices = [CHOICES[i % len(CHOICES)] for i in range(8)]
    prompts = oracle.prompts(8, 2, 10, 1000)
    for number, (prompt, choice) in enumerate(zip(prompts, choices, strict=True)):
        params = SamplingParams(
            temperature=0, max_tokens=8, ignore_eos=True, extra_args=choice.extra_args
        )
        core.add_request(
            str(number), {"prompt_token_ids": prompt}, params, priority=0 if number >= 4 else 1
        )
    begun, finished = [], {}
    while core.has_unfinished_requests():
        for output in core.step():
            number = int(output.request_id)
            if number not in begun:
                begun.append(number)
            if output.finished:
                finished[number] = output.outputs[0].token_ids
    assert set(begun[:4]) == {4, 5, 6, 7}
    for number, (prompt, choice) in enumerate(zip(prompts, choices, strict=True)):
        assert finished[number] == greedy(models, choice, prompt, 8), choice
