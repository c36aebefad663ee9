"""A memory with fewer positions than the base: beyond them its weight is 0, before as always.

test_v2.py asks the same of the V2 runner.
"""

import pytest
from support import bases, ending, oracle
from support.ending import END, LENGTHS, PAST, POSITIONS
from support.tiny_models import save_tokenizer
from vllm import EngineArgs, SamplingParams

from vllm_memdec.config import MemDecConfig
from vllm_memdec.describe import describe
from vllm_memdec.engine_config import memory_vllm_config

SIZES = (PAST, END - 10, END, 5)  # and of prompts from which an answer goes on to the end or past
OPTIONS = {"block_size": 32, "enable_prefix_caching": True, "max_num_batched_tokens": 64}
SAID = (
    "memdec: the memory %r has %d positions, the server %d: beyond its own, its weight is 0 and "
    "the base answers alone."
)


CHOICES = [*((name, None) for name in LENGTHS), ("short", 1.0), ("gated", 0.3), ("short", 0.0)]


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    return ending.make(tiny_model, tmp_path_factory.mktemp("ending"))


def ask(llm, requests):
    return llm.generate(
        [{"prompt_token_ids": ids} for ids, _ in requests],
        [SamplingParams(**params) for _, params in requests],
        use_tqdm=False,
    )


def check(models, outputs, requests):
    """Compare with float64: the mixture at the memory's positions, the base beyond."""
    for output, (ids, params) in zip(outputs, requests, strict=True):
        mixed = ending.mixed(models, params, [*ids, *output.outputs[0].token_ids])
        assert oracle.gap(output, *mixed) < oracle.TOLERANCE, (len(ids), params)
        rows = output.outputs[0].logprobs
        assert all(max(row.values(), key=lambda e: e.logprob).rank == 1 for row in rows)


def rows(output, start):
    """Return the log-probabilities of an output from a position on, of those that predict it."""
    found = [*output.prompt_logprobs, *output.outputs[0].logprobs]
    return [{t: entry.logprob for t, entry in row.items()} for row in found[start:]]


@pytest.fixture(scope="module")
def told():
    """Return the lines that the composite logs, of which vLLM shows none here."""
    from vllm_memdec import model

    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.logger, "info", lambda line, *args: lines.append(line % args))
        yield lines


@pytest.fixture(scope="module")
def llm(engine, models, told):
    with engine(models["base"], ending.block(models), **OPTIONS) as llm:
        yield llm


def test_it_is_said_once(llm, models, told):
    """In the log and, as a number, in the memory's model card."""
    config = llm.llm_engine.vllm_config
    assert config.model_config.max_model_len == POSITIONS
    said = [line for line in told if "positions, the server" in line]
    ends = {name: length for name, length in LENGTHS.items() if length < POSITIONS}
    assert said == [SAID % (name, length, POSITIONS) for name, length in ends.items()]
    card = describe(config)["memories"]
    assert {name: entry["positions"] for name, entry in card.items()} == LENGTHS


def test_answers_before_and_beyond(llm, models):
    """Prompts in chunks and from the cache, in one batch of memories of several lengths."""
    asked = [ending.request(size, *choice) for size in SIZES for choice in CHOICES]
    reported = [[ids, params | {"prompt_logprobs": 2}] for ids, params in asked]
    check(models, ask(llm, reported), reported)
    # Asked for log-probabilities of prompts, vLLM reads no cache.
    outputs = ask(llm, asked)
    check(models, outputs, asked)
    cached = {len(output.prompt_token_ids): output.num_cached_tokens for output in outputs}
    assert cached[PAST] > LENGTHS["steps"] and cached[END] > LENGTHS["gated"]


def check_the_base_answers_beyond(llm):
    """At any weight, 1 too; one row before that it is mixed."""
    chosen = [("short", 0.0), ("short", None), ("short", 1.0), ("learned", None)]
    alone, *others = [
        ask(llm, [ending.request(PAST, *choice, prompt_logprobs=3)])[0] for choice in chosen
    ]
    for output in others:
        # The row of position p predicts token p + 1.
        assert rows(output, END + 1) == rows(alone, END + 1)
        own, base = rows(output, END)[0], rows(alone, END)[0]
        assert any(abs(own[token] - base[token]) > 0.1 for token in own.keys() & base)


def test_beyond_its_end_the_base_answers_bit_for_bit(llm):
    check_the_base_answers_beyond(llm)


def test_a_memory_does_not_run_beyond_its_end(llm):
    core = llm.llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.get_model()
    ran = []
    hook = model.memories[0].module.register_forward_hook(lambda *args: ran.append(len(args[1][0])))
    try:
        ask(llm, [ending.request(PAST, "short", 0.7, prompt_logprobs=1)])
    finally:
        hook.remove()
    assert ran == [64, 64]  # of 300 tokens in chunks, and of the answer none


def start(models, name, **options):
    memdec = {"model": models[name], "alpha": 0.5}
    args = EngineArgs(
        models["base"],
        model_impl="memdec",
        dtype="float32",
        additional_config={"memdec": memdec},
        **options,
    )
    return args.create_engine_config()


def test_max_model_len_is_the_base_s(models):
    for given in (96, 300):
        config = start(models, "short", max_model_len=given)
        assert config.model_config.max_model_len == given
        [card] = describe(config)["memories"].values()
        assert card["positions"] == min(given, END)
    with pytest.raises(ValueError, match="greater than the derived max_model_len"):
        start(models, "short", max_model_len=POSITIONS + 1)


def test_beside_a_hybrid_without_a_prefix_cache(tiny_model, tmp_path):
    """Where vLLM takes the block of its states to be as long as the model."""
    bases.lfm2().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    config = EngineArgs(
        str(tmp_path),
        model_impl="memdec",
        dtype="float32",
        enable_prefix_caching=False,
        additional_config={"memdec": {"model": tiny_model("llama", positions=64), "alpha": 0.5}},
    ).create_engine_config()
    assert config.cache_config.mamba_block_size == config.model_config.max_model_len > 64
    [memory] = MemDecConfig.from_vllm(config).memories
    assert memory_vllm_config(config, memory, 0).model_config.max_model_len == 64


def drafts(output):
    """Return how many tokens were drafted for a request, and how many of them it took."""
    metrics = output.outputs[0].spec_decode_metrics
    return metrics.num_draft_tokens, sum(n * count for n, count in enumerate(metrics.histogram))


@pytest.mark.drafts
@pytest.mark.parametrize("tokens", [3, "auto"])
def test_drafts_end_with_the_memory(engine, models, tokens):
    """Greedy text is the mixture's to the end of the context, and no draft is for nothing."""
    settings = ending.block(models, speculative_tokens=tokens)
    counted = {"disable_log_stats": False, "per_request_spec_decode_metrics": "summary"}
    asked = [ending.request(END - 10, name, max_tokens=30) for name in LENGTHS]
    asked.append(ending.request(60, "gated", 1.0, max_tokens=30))
    same = [
        ending.request(size, "same", max_tokens=60)
        for size in (END - 30, END - 2, END - 1, END, END + 1, PAST)
    ]
    with engine(models["base"], settings, **OPTIONS, **counted) as llm:
        outputs = ask(llm, asked)
        alone = [ask(llm, [request])[0] for request in same]
    check(models, [*outputs, *alone], [*asked, *same])
    counts = [drafts(output) for output in alone]
    # None is refused: all were drafted at positions of the memory, whose last one drafts one.
    assert all(drafted == accepted for drafted, accepted in counts), counts
    assert counts[0][0] > 10 and counts[3:] == [(0, 0)] * 3
    assert tokens == "auto" or counts[1:3] == [(2, 2), (1, 1)]


def test_bit_for_bit_in_bfloat16(engine, models):
    """Last: where it ends, an engine takes vLLM's groups of processes of the module's with it."""
    with engine(models["base"], ending.block(models), dtype="bfloat16", **OPTIONS) as llm:
        check_the_base_answers_beyond(llm)
