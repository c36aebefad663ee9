"""The feature matrix: what vLLM offers its users works on the mixture, on a real engine.

Each test is a row of the table in vllm_memdec/README.md, see the marker `feature`; some rows are
tests of other files, those over HTTP of test_http.py. The answer key is support/choices.py's.
"""

import pytest
import regex
import torch
from support import oracle
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

feature = pytest.mark.feature

ENGINES = {
    "usual": {
        "block_size": 32,
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    },
    # 12 blocks of 32 tokens, prompts in chunks of 32 tokens
    "tight": {
        "block_size": 32,
        "num_gpu_blocks_override": 12,
        "enable_prefix_caching": False,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "scheduling_policy": "priority",
        "disable_log_stats": False,
    },
}
usual = pytest.mark.parametrize("llm", ["usual"], indirect=True)
tight = pytest.mark.parametrize("llm", ["tight"], indirect=True)


@pytest.fixture(scope="module")
def models(tiny_model):
    return make_models(tiny_model)


@pytest.fixture(scope="module")
def llm(request, engine, models):
    """Yield one engine of ENGINES, shared by its tests."""
    with engine(models["base"], memdec_block(models), **ENGINES[request.param]) as running:
        yield running


def generate(llm, prompts, choices, **options):
    """Return vLLM's outputs; greedy, without end and log-probabilities unless asked otherwise."""
    from vllm import SamplingParams

    defaults = {"temperature": 0, "ignore_eos": True, "max_tokens": 8}
    params = [SamplingParams(extra_args=c.extra_args, **defaults | options) for c in choices]
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def one(llm, choice=PLAIN, prompt=PROMPT, **options):
    """Return vLLM's only output for one prompt."""
    [output] = generate(llm, [prompt], [choice], **options)
    return output.outputs[0]


def check_logprobs(models, choice, prompt, found):
    """Every reported log-probability is the mixture's."""
    key_TV = mixture(models, choice, [*prompt, *found.token_ids])
    for row_V, row in zip(key_TV[len(prompt) - 1 : -1], found.logprobs, strict=True):
        for token, entry in row.items():
            wanted = row_V[token].item()
            assert entry.logprob == pytest.approx(wanted, abs=oracle.TOLERANCE)


# -- Sampling -------------------------------------------------------------------------------------


@feature("greedy")
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
def test_samples_are_drawn_from_the_mixture(llm, models):
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
    """Each of n samples has the mixture's log-probabilities and the seed that vLLM gives it."""
    options = {"temperature": 1.0, "logprobs": 3}
    choice = Choice("bio", 0.7)
    [output] = generate(llm, [PROMPT], [choice], n=4, seed=11, **options)
    found = [sample.token_ids for sample in output.outputs]
    assert len({tuple(ids) for ids in found}) == 4
    for sample in output.outputs:
        check_logprobs(models, choice, PROMPT, sample)
    assert found == [one(llm, choice, seed=11 + i, **options).token_ids for i in range(4)]


@feature(
    "beam search", note="with the server's default memory and weight: a request's own is refused"
)
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
    asked = {"logprobs": -1, "prompt_logprobs": -1, "detokenize": False, "max_tokens": 3}
    for prompt, choice, output in zip(
        prompts, CHOICES, generate(llm, prompts, CHOICES, **asked), strict=True
    ):
        rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        assert len(rows) == len(prompt) - 1 + 3 and all(len(row) == 1000 for row in rows)
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
    for choice in CHOICES:
        free = greedy(models, choice, PROMPT, 8)
        banned = next(token for token in free if token in words)
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
        pytest.param({"min_p": 0.2}, marks=feature("min_p")),
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
        [output] = generate(
            llm, [PROMPT], [choice], n=24, temperature=1.0, seed=5, max_tokens=4, **options
        )
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
    tokenizer = llm.get_tokenizer()
    for choice in CHOICES:
        text = tokenizer.decode(greedy(models, choice, PROMPT, 16))
        stop = text[len(text) // 2 :][:3]
        end = text.index(stop)
        found = one(llm, choice, stop=[stop], max_tokens=16)
        assert (found.text, found.finish_reason, found.stop_reason) == (text[:end], "stop", stop)
        found = one(llm, choice, stop=[stop], max_tokens=16, include_stop_str_in_output=True)
        assert found.text == text[: end + len(stop)]


# -- Structured output ----------------------------------------------------------------------------

WORDS = ["bagi", "duto", "duto mela", "fani", "gelu", "hibe", "kelo", "lupa", "mira", "nodi", "zzz"]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["law", "bio"]},
        "name": {"type": "string", "pattern": "^[a-z]{3,5}$"},
        "ok": {"type": "boolean"},
    },
    "required": ["kind", "name", "ok"],
    "additionalProperties": False,
}
JSON = r'\{"kind":"(law|bio)","name":"[a-z]{3,5}","ok":(true|false)\}'


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        pytest.param(
            {"choice": WORDS}, "|".join(WORDS), marks=feature("structured output: choice")
        ),
        pytest.param(
            {"regex": "[a-f]{3,6}-[0-9]{2}"},
            "[a-f]{3,6}-[0-9]{2}",
            marks=feature("structured output: regex"),
        ),
        pytest.param({"json": SCHEMA}, JSON, marks=feature("structured output: JSON schema")),
    ],
    ids=["choice", "regex", "json"],
)
@usual
def test_structured_output(asked, pattern, llm, models):
    """The text obeys, and each of its tokens is the best of the mixture's among those allowed."""
    from vllm.sampling_params import StructuredOutputsParams

    choices = CHOICES * 3
    prompts = oracle.prompts(len(choices), 3, 12, 1000)
    outputs = generate(
        llm,
        prompts,
        choices,
        max_tokens=64,
        ignore_eos=False,
        structured_outputs=StructuredOutputsParams(**asked),
    )
    texts = [output.outputs[0].text for output in outputs]
    for text, output in zip(texts, outputs, strict=True):
        assert regex.fullmatch(pattern, text)
        assert output.outputs[0].finish_reason == "stop"
    assert texts == [
        constrained(models, choice, prompt, pattern, llm.get_tokenizer())
        for prompt, choice in zip(prompts, choices, strict=True)
    ]


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
    from vllm import SamplingParams

    core = llm.llm_engine
    prompts = oracle.prompts(len(CHOICES), 1, 30, 1000)
    for number, (prompt, choice) in enumerate(zip(prompts, CHOICES, strict=True)):
        params = SamplingParams(
            temperature=0, max_tokens=16, ignore_eos=True, extra_args=choice.extra_args
        )
        core.add_request(str(number), {"prompt_token_ids": prompt}, params)
    found = {}
    while core.has_unfinished_requests():
        for output in core.step():
            found[output.request_id] = list(output.outputs[0].token_ids)
            assert not (output.request_id == "0" and len(found["0"]) > 5)
        if len(found.get("0", ())) == 5:
            core.abort_request(["0"])
    assert len(found["0"]) == 5
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


def preemptions(llm):
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


@feature("preemption and recompute")
@tight
def test_preemption(llm, models):
    """Four requests that grow to 5 blocks each, of a cache of 12."""
    before = preemptions(llm)
    choices = CHOICES[:4]
    prompts = oracle.prompts(4, 60, 60, 1000)
    outputs = generate(llm, prompts, choices, max_tokens=80, logprobs=0)
    assert preemptions(llm) > before
    for prompt, choice, output in zip(prompts, choices, outputs, strict=True):
        found = output.outputs[0]
        key_TV = mixture(models, choice, [*prompt, *found.token_ids])[len(prompt) - 1 : -1]
        assert key_TV.argmax(-1).tolist() == found.token_ids, choice
        check_logprobs(models, choice, prompt, found)


@feature("priority scheduling")
@tight
def test_priority(llm, models):
    """Eight requests on four seats: the last four to come are the first to finish."""
    from vllm import SamplingParams

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
    finished = {}
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                finished[int(output.request_id)] = output.outputs[0].token_ids
    assert set(list(finished)[:4]) == {4, 5, 6, 7}
    for number, (prompt, choice) in enumerate(zip(prompts, choices, strict=True)):
        assert finished[number] == greedy(models, choice, prompt, 8), choice


# -- Refused --------------------------------------------------------------------------------------


@feature("sleep and wake", refused="by vLLM itself on a CPU; not run on a GPU")
def test_sleep(models):
    from vllm import EngineArgs

    block = {"memdec": memdec_block(models)}
    args = EngineArgs(
        models["base"], model_impl="memdec", additional_config=block, enable_sleep_mode=True
    )
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform."):
        args.create_engine_config()


@feature("encoder-decoder base", refused="only text decoders are mixed")
def test_encoder_decoder(models, tmp_path):
    """Read from config.json alone, so a folder without weights is enough."""
    import shutil

    import transformers
    from vllm import EngineArgs

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{models['base']}/{name}", tmp_path)
    config = transformers.WhisperConfig(vocab_size=1000, d_model=64)
    config.architectures = ["WhisperForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    for base, memory in ((str(tmp_path), models["law"]), (models["base"], str(tmp_path))):
        block = {"model": memory, "alpha": 0.5}
        args = EngineArgs(base, model_impl="memdec", additional_config={"memdec": block})
        # Every encoder-decoder that vLLM has is multimodal too, and that comes first.
        with pytest.raises(ValueError, match="is multimodal, .* it mixes two text decoders"):
            args.create_engine_config()
