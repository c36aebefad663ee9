"""Memories draft wherever the base reads, and for whom they do: lengths, seeds, no memory.

test_v2.py asks the same of the V2 runner.
"""

import shutil

import pytest
from support import long_base, oracle
from support.long_base import BESIDE, LONG, NEAR, OPTIONS, SEEDED, YARN, request
from vllm import EngineArgs, SamplingParams

from vllm_memdec.engine_config import memory_lengths


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    return long_base.make(tiny_model, tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="module")
def llm(engine, folders):
    with engine(folders["base"], long_base.block(folders), **OPTIONS) as llm:
        yield llm


def ask(llm, requests):
    return llm.generate(
        [{"prompt_token_ids": ids} for ids, _ in requests],
        [SamplingParams(**params) for _, params in requests],
        use_tqdm=False,
    )


def texts(llm, requests):
    return [list(sample.token_ids) for output in ask(llm, requests) for sample in output.outputs]


def drafts(output):
    """Return how many tokens were drafted for a request, and how many of them it took."""
    metrics = output.outputs[0].spec_decode_metrics
    return metrics.num_draft_tokens, sum(n * count for n, count in enumerate(metrics.histogram))


def drafted(llm):
    found = {metric.name: metric for metric in llm.get_metrics()}
    return found["vllm:spec_decode_num_draft_tokens"].value


def test_acceptance_is_the_same_at_every_length(llm, folders):
    """All that a memory drafts which is the base, of 64 positions that an override stretches."""
    for requests in ([LONG[0]], [LONG[1]], LONG):
        for output in ask(llm, requests):
            assert drafts(output) == (6, 6)
    config = llm.llm_engine.vllm_config
    draft_config = config.speculative_config.draft_model_config
    assert draft_config.max_model_len == config.model_config.max_model_len == 256
    assert draft_config.hf_config.rope_parameters["rope_type"] == "yarn"


def test_one_request_at_its_end_takes_no_drafts_from_others(llm, folders):
    """Greedy tokens and log-probabilities are the mixture's, to the last position."""
    asked = [
        (ids, params | {"logprobs": 5, "prompt_logprobs": 2, "max_tokens": 25})
        for ids, params in BESIDE
    ]
    before, alone = drafted(llm), ask(llm, asked[3:])
    outputs = ask(llm, asked)
    for output, (_, params) in zip(outputs, asked, strict=True):
        name = params["extra_args"]["memdec_memory"]
        memory, alpha = (folders[name], 0.4) if name != "none" else (folders["same"], 0.0)
        assert oracle.gap(output, folders["same"], memory, alpha) < oracle.TOLERANCE
        [sample] = output.outputs
        assert all(max(row.values(), key=lambda e: e.logprob).rank == 1 for row in sample.logprobs)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [25, 6, 6, 25]
    # A step without drafts at the end of each of the first two: nothing was left to draft.
    assert [drafts(output) for output in outputs[:3]] == [(18, 18), (3, 3), (0, 0)]
    assert drafts(outputs[3]) == drafts(alone[0])
    assert drafted(llm) - before == sum(drafts(output)[0] for output in [*outputs, *alone])

    # No draft beyond its end was written into its first block, which the prefix cache keeps.
    [again] = ask(llm, [request(NEAR, logprobs=5)])
    assert again.num_cached_tokens >= NEAR - 2 * OPTIONS["block_size"]
    assert oracle.gap(again, folders["same"], folders["same"], 0.4) < oracle.TOLERANCE


@pytest.mark.parametrize("memory", ["law", "none"])
def test_a_seed_repeats_an_answer(llm, memory):
    """Alone, in batches, where its prompt is cached and joins running ones, and as one of n."""
    mine = request(33, memory, **SEEDED)  # a block and one token
    [answer] = texts(llm, [mine])
    others = [request(20), request(20, "law", temperature=1.0), request(20, "none")]
    assert texts(llm, [mine]) == texts(llm, [*others, mine])[3:] == [answer]
    assert texts(llm, [mine, request(33, memory, **SEEDED | {"seed": 8}), *others])[0] == answer
    two = [request(33, memory, **SEEDED | {"seed": seed}) for seed in (7, 8)]
    several = request(33, memory, **SEEDED, n=2)
    assert texts(llm, [others[1], several])[1:] == texts(llm, two) and texts(llm, two)[0] == answer

    ids, params = request(20, max_tokens=30)
    llm.llm_engine.add_request("first", {"prompt_token_ids": ids}, SamplingParams(**params))
    for _ in range(3):
        llm.llm_engine.step()
    llm.llm_engine.add_request("second", {"prompt_token_ids": mine[0]}, SamplingParams(**mine[1]))
    found = {}
    while llm.llm_engine.has_unfinished_requests():
        found |= {o.request_id: o for o in llm.llm_engine.step() if o.finished}
    assert list(found["second"].outputs[0].token_ids) == answer
    assert drafts(found["second"]) == (0, 0) != drafts(found["first"])


def test_a_seed_is_nothing_to_greedy_requests(llm):
    """Clients that always send one keep their drafts."""
    [output] = ask(llm, [request(20, seed=7)])
    assert drafts(output) == (6, 6)


def test_the_draft_configuration_is_the_base_s(folders, tmp_path):
    """With overrides, revision and length: vLLM would refuse a drafter of another vocabulary.

    Of "eagle-" in a drafter's path vLLM makes another method.
    """
    folder = shutil.copytree(folders["base"], tmp_path / "beagle-1")
    made = EngineArgs(
        str(folder),
        revision="v1",
        model_impl="memdec",
        hf_overrides=YARN | {"vocab_size": 1024},
        additional_config={"memdec": long_base.block(folders)},
    ).create_engine_config()
    base, draft = made.model_config, made.speculative_config.draft_model_config
    assert made.speculative_config.method == "draft_model"
    assert draft is not base and draft.hf_config is base.hf_config
    assert (draft.revision, draft.max_model_len) == ("v1", 256)
    assert (base.revision, base.max_model_len, base.get_vocab_size()) == ("v1", 256, 1024)


def test_overrides_are_not_a_memory_s(folders):
    """It has its own positions."""
    config = EngineArgs(
        folders["base"],
        model_impl="memdec",
        hf_overrides=YARN,
        additional_config={"memdec": {"model": folders["base"], "alpha": 0.4}},
    ).create_engine_config()
    assert config.model_config.max_model_len == 256 and memory_lengths(config) == [64]


def test_what_limits_a_sample_in_bfloat16(engine, folders):
    """logit_bias and min_p in the rows that verify drafts."""
    with engine(folders["base"], long_base.block(folders), dtype="bfloat16", **OPTIONS) as llm:
        before = drafted(llm)
        biased, likeliest = ask(
            llm,
            [
                request(20, "law", logit_bias={7: 100.0}),
                request(20, "law", temperature=1.0, min_p=1.0, logprobs=1),
            ],
        )
        assert drafted(llm) > before
    assert list(biased.outputs[0].token_ids) == [7] * 9
    [sample] = likeliest.outputs
    rows = zip(sample.token_ids, sample.logprobs, strict=True)
    assert all(row[token].rank == 1 for token, row in rows)
