"""Bases with a state beside attention: exactness, a cache that is too small, and what is refused.

test_bases.py asks every hybrid for its mixtures; here three of them are compared with plain vLLM.
"""

import functools
import random

import pytest
import torch
from support import bases, oracle
from support.choices import CHOICES, Choice, make_models, memdec_block
from support.feature_engines import count
from vllm import EngineArgs, SamplingParams
from vllm.distributed.parallel_state import destroy_model_parallel

from vllm_memdec.startup import kept_state

# Mamba 2 beside attention in a layer, short convolutions, a gated delta net: only in bfloat16.
EXACT = ["Falcon-H1", "LFM2", "Qwen3.5"]
SHORT = {"block_size": 32, "max_model_len": 256, "max_num_batched_tokens": 64}


@pytest.fixture(autouse=True)
def new_groups():
    """vLLM keeps the process groups of a base without experts for one with: they lack its own."""
    destroy_model_parallel()


@pytest.fixture(scope="module")
def models(tiny_model):
    """Return two memories; the deeper one's weights are as wide as float32 bears for all tokens."""
    law = tiny_model("llama", seed=1, hidden=96, layers=3, spread=0.15)
    return make_models(tiny_model) | {"law": law}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function that saves a base once: its folder, and the options it is run with."""
    folders = {}

    def save(name):
        if name not in folders:
            folders[name] = str(tmp_path_factory.mktemp("hybrid"))
            bases.save(name, folders[name])
        how = bases.CASES.get(name, bases.Case())
        return folders[name], {"dtype": how.dtype} | SHORT | how.options

    return save


# -- Exactness ------------------------------------------------------------------------------------

# Weight 0 and no memory are the base, weight 1 is the memory, and 0.3 lies between the two.
ENDS = [Choice("law", 0.0), Choice("law", 1.0), Choice("none"), Choice("law", 0.3)]
PROMPTS = oracle.prompts(len(ENDS), 20, 90, 990)  # in chunks of up to 64 tokens of a batch


def everything(llm, choices=None):
    """Return tokens and the log-probabilities [T - 1, V] of prompt and answer, for each prompt."""
    asked = {"temperature": 0, "ignore_eos": True, "detokenize": False, "max_tokens": 6}
    asked |= {"logprobs": -1, "prompt_logprobs": -1}
    extras = [choice.extra_args for choice in choices or []] or [None] * len(PROMPTS)
    params = [SamplingParams(extra_args=extra, **asked) for extra in extras]
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    found = []
    for output in outputs:
        rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        table = [[row[token].logprob for token in range(bases.VOCAB)] for row in rows]
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        found.append((tokens, torch.tensor(table, dtype=torch.float64)))
    return found


@pytest.fixture(scope="module")
def memory_alone(models, engine):
    """Return a function that asks plain vLLM with the memory in a dtype, once."""

    @functools.cache
    def ask(dtype):
        with engine(models["law"], dtype=dtype, **SHORT) as llm:
            return everything(llm)

    return ask


def prompt_rows(tables, number):
    """Return the log-probabilities [T, V] of a prompt's rows, which all models were asked for."""
    return tables[number][1][: len(PROMPTS[number]) - 1]


@pytest.mark.parametrize("name", EXACT)
def test_a_mixture_is_that_of_what_plain_vllm_gives(name, saved, models, engine, memory_alone):
    """Without a memory's weight plain vLLM of the base bit for bit, at 1 the memory alone."""
    base, options = saved(name)
    with engine(base, **options) as llm:
        plain, size = everything(llm), llm.llm_engine.vllm_config.cache_config.block_size
    memory = memory_alone(options["dtype"])
    with engine(base, memdec_block(models), **options) as llm:
        config = llm.llm_engine.vllm_config
        assert config.cache_config.block_size == size, "prompts would be read in other chunks"
        layers = config.compilation_config.static_forward_context.values()
        shapes = [layer.get_state_shape() for layer in layers if hasattr(layer, "mamba_type")]
        # Elsewhere than on a CPU memories draft beside them.
        assert shapes and {*map(kept_state, shapes)} == {None}
        mixed = everything(llm, ENDS)
    for number, choice in enumerate(ENDS):
        tokens, rows_TV = mixed[number]
        if choice.alpha == 1:
            assert tokens == memory[number][0]
            assert (rows_TV - memory[number][1]).abs().max() < oracle.TOLERANCE
            if options["dtype"] == "float32":
                key_TV = oracle.log_probs(models["law"], tokens)[:-1]
                assert (rows_TV - key_TV).abs().max() < oracle.TOLERANCE
        elif choice.alpha:
            own_TV, base_TV = prompt_rows(memory, number), prompt_rows(plain, number)
            share = torch.tensor(choice.alpha, dtype=torch.float64)
            key_TV = torch.logaddexp(own_TV + share.log(), base_TV + (1 - share).log())
            error = (prompt_rows(mixed, number) - key_TV).abs().max()
            assert error < oracle.TOLERANCE
        else:
            assert tokens == plain[number][0]
            assert torch.equal(rows_TV, plain[number][1]), choice


# -- A cache that is too small --------------------------------------------------------------------

SEEDED, OTHERS = 30, 170
# name -> tokens of a step, and blocks of KV cache: some of its requests need more while they run.
# With more tokens vLLM on a CPU ends with an IndexError where it keeps a state of Mamba 2 that lies
# within what a step reads.
TIGHT = {"LFM2": (256, 100), "Nemotron-H": (64, 30)}


def seeded_requests():
    """Return what mixed_requests() does, sampled; 16 prompts fit into one step.

    vLLM on a CPU dies where it cuts the prompt of a request with a seed.
    """
    made = []
    for n, prompt in enumerate(oracle.prompts(SEEDED, 1, 4, 990)):
        extra = CHOICES[n % len(CHOICES)].extra_args
        made.append((prompt, SamplingParams(seed=n, max_tokens=8, extra_args=extra), None))
    return made


def mixed_requests():
    """Return prompts, parameters, and after how many tokens a client hangs up, if it does."""
    rng = random.Random(0)
    prefixes = oracle.prompts(5, 66, 100, 990, seed=1)
    others = [
        {"temperature": 1.0},
        {"presence_penalty": 0.5, "repetition_penalty": 1.2},
        {"logprobs": 5},
        {"logprobs": 2, "prompt_logprobs": 2},
    ]
    made = []
    for n, prompt in enumerate(oracle.prompts(OTHERS, 1, 60, 990, seed=2)):
        if rng.random() < 0.6:
            prompt = [*prefixes[n * 5 // OTHERS], *prompt]
        if rng.random() < 0.5:  # full blocks but for two tokens: they soon need one more of each
            prompt = [*prompt, *reversed(prompt), *prompt][: 64 * (len(prompt) // 64 + 1) - 2]
        asked = {"temperature": 0, "ignore_eos": True, "max_tokens": rng.randint(4, 16)}
        asked |= rng.choice([{}] * 4 + others)
        params = SamplingParams(**asked, extra_args=rng.choice(CHOICES).extra_args)
        made.append((prompt, params, rng.randint(1, 3) if rng.random() < 0.1 else None))
    return made


def answered(llm, requests):
    """Return the finished answers by number; all requests wait from the start."""
    for n, (prompt, params, _) in enumerate(requests):
        llm.llm_engine.add_request(str(n), {"prompt_token_ids": prompt}, params)
    found = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            [sample] = output.outputs
            hangs_up = requests[int(output.request_id)][2]
            if output.finished:
                found[int(output.request_id)] = sample.token_ids
            elif hangs_up and len(sample.token_ids) >= hangs_up:
                llm.llm_engine.abort_request([output.request_id])
    return found


@pytest.mark.parametrize("name", TIGHT)
def test_soak(name, saved, models, engine):
    """200 mixed requests, preempted and hung up on: each greedy answer is its lone run's."""
    base, options = saved(name)
    requests = mixed_requests()
    tokens, blocks = TIGHT[name]
    options |= {"max_num_batched_tokens": tokens, "num_gpu_blocks_override": blocks}
    with engine(base, memdec_block(models), **options, disable_log_stats=False) as llm:
        assert llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
        assert len(answered(llm, seeded_requests())) == SEEDED
        found = answered(llm, requests)
        preempted, cached = count(llm, "num_preemptions"), count(llm, "prefix_cache_hits")
        greedy = [n for n in found if requests[n][1].temperature == 0]
        for n in greedy:
            assert llm.reset_prefix_cache()  # nothing of what the soak wrote
            prompt, params, _ = requests[n]
            [alone] = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
            assert found[n] == alone.outputs[0].token_ids, requests[n]
        assert count(llm, "num_preemptions") == preempted
    hung_up = OTHERS - len(found)
    assert preempted > 10 and cached > 500 and hung_up > 10 and len(greedy) > 120


# -- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "options"),
    [
        ({"speculative_tokens": 3}, {}),
        ({"speculative_tokens": "auto"}, {}),
        ({}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}),
    ],
    ids=["three", "auto", "ngram"],
)
def test_drafts_on_a_cpu_are_refused(block, options, saved, models):
    args = EngineArgs(
        saved("Falcon-H1")[0],
        model_impl="memdec",
        additional_config={"memdec": memdec_block(models) | block},
        **options,
    )
    with pytest.raises(ValueError, match="keeps a state, which vLLM on a CPU does not take back"):
        args.create_engine_config()
