"""The memory drafts, the mixture verifies: the answers stay those of the mixture alone."""

import functools
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from support import bases, oracle
from support.choices import CHOICES, PLAIN, PROMPT, Choice, make_models, memdec_block
from vllm import EngineArgs, SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError

from vllm_memdec.batch import Batch
from vllm_memdec.draft_length import WARM_UP

LENGTH = 12


@pytest.fixture(scope="module")
def models(tiny_model):
    return make_models(tiny_model)


def answers(llm, prompts, choices, **options):
    defaults = {"temperature": 0, "ignore_eos": True, "max_tokens": LENGTH}
    params = [SamplingParams(**{"extra_args": c.extra_args} | defaults | options) for c in choices]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def requests():
    """200 prompts that share prefixes by twenties, memories and weights mixed."""
    prompts = []
    for group in range(10):
        [prefix] = oracle.prompts(1, 40, 40, 1000, seed=100 + group)
        prompts += oracle.prompts(20, 1, 30, 1000, prefix, seed=group)
    return prompts, [CHOICES[n % len(CHOICES)] for n in range(len(prompts))]


WITHOUT = Choice("none"), Choice("bio", 0.0)
SEEDED = {"temperature": 1.0, "seed": 3}


@dataclass
class Plain:
    """What the same server does without drafting."""

    answers: list
    alike: list  # answers if all ask the same memory
    long: list  # answers of the base to PROMPT and its beginning
    nobody: list  # answers to requests without a memory
    seeded: list  # samples with a seed
    blocks: int  # of the KV cache


def runner(llm):
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


@pytest.fixture(scope="module")
def plain(engine, models, requests):
    with engine(models["base"], memdec_block(models)) as llm:
        return Plain(
            answers(llm, *requests),
            answers(llm, requests[0], [PLAIN] * 200),
            answers(llm, [PROMPT, PROMPT[:2]], WITHOUT, max_tokens=41),
            answers(llm, requests[0][:2], WITHOUT),
            answers(llm, [PROMPT] * len(CHOICES), CHOICES, **SEEDED),
            runner(llm).kv_cache_config.num_blocks,
        )


# Fewer blocks than sixteen requests need: some are preempted and computed again.
TIGHT = {"block_size": 32, "num_gpu_blocks_override": 12, "max_num_batched_tokens": 64}


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, "auto"])
def test_answers_do_not_change(engine, models, requests, plain, tokens):
    block = memdec_block(models) | {"speculative_tokens": tokens}
    options = TIGHT | {"disable_log_stats": False} if tokens in (1, 3, 5, "auto") else {}
    with engine(models["base"], block, **options) as llm:
        assert answers(llm, *requests) == plain.answers
        assert answers(llm, [PROMPT] * len(CHOICES), CHOICES, **SEEDED) == plain.seeded
        if tokens == "auto":
            length = runner(llm).drafter.length
            assert length.steps > WARM_UP and length.step.known and length.passes.known
            assert length.pool != [1, 1]
        if options:
            found = {metric.name: metric for metric in llm.get_metrics()}
            assert found["vllm:num_preemptions"].value > 0


def test_draft_results_are_reused(engine, models, requests, plain, monkeypatch):
    """Where one memory has the batch it runs on the last of a request's tokens only."""
    counts = {"tokens": 0, "run": 0, "heads": 0}

    def counted(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if args[3:] and self.reused is not None:
            [share] = self.shares.values()
            counts["tokens"] += int(args[2].sum())
            counts["run"] += len(share.tokens)
            assert len(self.reused[0]) + len(share.tokens) == args[2].sum()

    original = Batch.write
    monkeypatch.setattr(Batch, "write", counted)
    block = memdec_block(models) | {"speculative_tokens": 3}
    with engine(models["base"], block, **TIGHT, disable_log_stats=False) as llm:
        head = runner(llm).model.memories[0].module.compute_logits

        def counted_head(rows):
            counts["heads"] += len(rows)
            return head(rows)

        monkeypatch.setattr(runner(llm).model.memories[0].module, "compute_logits", counted_head)
        assert answers(llm, requests[0], [PLAIN] * 200) == plain.alike
        found = {metric.name: metric for metric in llm.get_metrics()}
        assert found["vllm:num_preemptions"].value > 0
        drafted = found["vllm:spec_decode_num_draft_tokens"].value
    assert counts["tokens"] - counts["run"] > 0.9 * drafted
    # Once for each draft, once for each token that was sampled without it.
    assert counts["heads"] < 1.5 * drafted + len(requests[0]) * LENGTH


def test_no_more_is_drafted_than_may_be_said(engine, models):
    block = {"model": models["base"], "alpha": 0.4, "speculative_tokens": 3}
    with engine(models["base"], block, disable_log_stats=False) as llm:
        for tokens, wanted in ((1, 0), (2, 0), (3, 1), (4, 2), (5, 3), (6, 3), (7, 4)):
            before = {m.name: m for m in llm.get_metrics()}["vllm:spec_decode_num_draft_tokens"]
            answers(llm, [PROMPT], [PLAIN], max_tokens=tokens)
            after = {m.name: m for m in llm.get_metrics()}["vllm:spec_decode_num_draft_tokens"]
            assert after.value - before.value == wanted, tokens


@pytest.mark.drafts
@pytest.mark.feature("speculation by the memory itself", note="both runners; not with TP yet")
def test_a_memory_that_agrees_is_accepted_whole(engine, models, plain):
    """memory = base: what it drafts is what the mixture says, so only the budget's end is left."""
    block = {"model": models["base"], "alpha": 0.4, "speculative_tokens": 3}
    with engine(models["base"], block, disable_log_stats=False) as llm:
        assert answers(llm, [PROMPT, PROMPT[:2]], [PLAIN] * 2, max_tokens=41) == plain.long
        found = {metric.name: metric for metric in llm.get_metrics()}
        drafted = found["vllm:spec_decode_num_draft_tokens"].value
        assert drafted == found["vllm:spec_decode_num_accepted_tokens"].value == 2 * 30


def test_weights_and_cache_exist_once(engine, models, requests, plain):
    """As many blocks fit as without drafting; the drafter has nothing of its own.

    Nor is anything drafted for requests without a memory.
    """
    block = memdec_block(models) | {"speculative_tokens": 3}
    prompts = requests[0]
    with engine(models["base"], block, disable_log_stats=False) as llm:
        mine = runner(llm)
        assert mine.kv_cache_config.num_blocks == plain.blocks
        layers = {n for g in mine.kv_cache_config.kv_cache_groups for n in g.layer_names}
        assert len(layers) == 7  # of base and memories: 2 + 3 + 2
        assert mine.drafter.model.memories is mine.model.memories
        assert set(mine.drafter._draft_attn_layer_names) < layers
        assert not [v for v in vars(mine.drafter).values() if isinstance(v, torch.nn.Module)]

        def drafted():
            found = {metric.name: metric for metric in llm.get_metrics()}
            return found["vllm:spec_decode_num_draft_tokens"].value

        assert answers(llm, prompts[:2], WITHOUT) == plain.nobody and drafted() == 0
        [alone] = answers(llm, prompts[2:3], [PLAIN])
        before = drafted()
        assert before > 0
        choices = [WITHOUT[0], PLAIN, WITHOUT[1]]
        [_, beside, _] = answers(llm, [prompts[0], prompts[2], prompts[1]], choices)
        assert beside == alone and drafted() == 2 * before


def test_a_draft_model_beside_it_stays_one(engine, models):
    """In a process where a memory has drafted, and its arguments may be used twice."""
    block = memdec_block(models) | {"speculative_tokens": 2}
    args = EngineArgs(models["base"], model_impl="memdec", additional_config={"memdec": block})
    assert args.create_engine_config().speculative_config.num_speculative_tokens == 2
    assert args.create_engine_config().speculative_config.num_speculative_tokens == 2
    with engine(models["base"], block):
        pass
    stock = {"method": "draft_model", "model": models["bio"], "num_speculative_tokens": 2}
    with engine(models["base"], memdec_block(models), speculative_config=stock) as llm:
        drafter = runner(llm).drafter
        assert type(drafter).__name__ == "DraftModelProposer"
        assert isinstance(drafter.model, torch.nn.Module)
        # What only the memory's own drafts are verified with.
        for options in ({"min_p": 0.1}, {"logit_bias": {5: 1.0}}):
            with pytest.raises(VLLMValidationError, match="not yet supported with speculative"):
                answers(llm, [PROMPT], [PLAIN], temperature=1, **options)


# -- Windows --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def windowed(tiny_model, tmp_path_factory):
    """Return models with windows of 32 tokens in all layers, in none, and in one of two."""
    half = str(tmp_path_factory.mktemp("half"))
    bases.save("Gemma 3", half, seed=2)
    return {"all": tiny_model("mistral"), "none": tiny_model("llama", seed=1), "half": half}


@pytest.mark.drafts
@pytest.mark.parametrize(
    ("base", "memory"),
    [("all", "none"), ("none", "all"), ("all", "half")],
    ids=["base", "memory", "half of a memory"],
)
def test_memories_draft_beside_windows(base, memory, windowed, engine):
    """Layers with windows and those without have block tables of their own."""
    base, memory = windowed[base], windowed[memory]
    alphas = [0.0, 0.5, 0.8, 1.0] * 2
    prompts = oracle.prompts(len(alphas), 40, 110, 990)  # longer than a window
    params = [
        SamplingParams(
            temperature=0, max_tokens=18, ignore_eos=True, extra_args={"memdec_alpha": alpha}
        )
        for alpha in alphas
    ]
    block = {"model": memory, "alpha": 0.5, "speculative_tokens": 3}
    options = TIGHT | {
        "num_gpu_blocks_override": None,
        "per_request_spec_decode_metrics": "summary",
    }
    with engine(base, block, **options, max_model_len=256, disable_log_stats=False) as llm:
        assert len(runner(llm).kv_cache_config.kv_cache_groups) > 1
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    for prompt, alpha, output in zip(prompts, alphas, outputs, strict=True):
        [sample] = output.outputs
        key_TV = oracle.mixture(base, memory, alpha, [*prompt, *sample.token_ids])
        assert key_TV[len(prompt) - 1 : -1].argmax(-1).tolist() == list(sample.token_ids)
        if alpha == 1:  # the mixture is the memory: it drafts what the mixture says
            metrics = sample.spec_decode_metrics
            accepted = sum(n * times for n, times in enumerate(metrics.histogram))
            assert metrics.num_draft_tokens == accepted > 9


# -- Sampling -------------------------------------------------------------------------------------

SMALL = 6  # tokens of the vocabulary
SAMPLES = 20_000


def expected(models, temperature, top_p, min_p=0.0, bias=0.0):
    """Return the probability of every answer of three tokens; bias: of token 4."""

    def following(ids):
        logits = mixed(models, ids).clone()
        logits[4] += bias
        p = (logits / temperature).softmax(-1)
        p[p < min_p * p.max()] = 0
        p = p / p.sum()
        order = p.argsort(descending=True)
        kept = p[order].cumsum(-1) - p[order] < top_p
        p[order[~kept]] = 0
        return p / p.sum()

    found = {}
    for answer in itertools.product(range(SMALL), repeat=3):
        rows = [following((*START, *answer[:n])) for n in range(3)]
        found[answer] = math.prod(row[t].item() for row, t in zip(rows, answer, strict=True))
    return found


@functools.cache
def mixed(models, ids):
    return oracle.mixture(*models, 0.5, list(ids))[-1]


START = [2, 3, 5, 1]


def chi_square(counts, probabilities):
    """Return how many deviations the statistic is off, and how many answers are impossible."""
    samples = sum(counts.values())
    rare = [a for a, p in probabilities.items() if p * samples < 5]
    cells = [(counts.get(a, 0), p) for a, p in probabilities.items() if a not in set(rare)]
    cells.append((sum(counts.get(a, 0) for a in rare), sum(probabilities[a] for a in rare)))
    cells = [(n, p * samples) for n, p in cells if p > 0]
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    freedom = len(cells) - 1
    impossible = sum(n for a, n in counts.items() if probabilities[a] == 0)
    return (statistic - freedom) / math.sqrt(2 * freedom), impossible


def drawn(llm, temperature, top_p, samples=SAMPLES, **options):
    """Return how often each answer of three tokens was drawn."""
    fixed = {"max_tokens": 3, "ignore_eos": True, "detokenize": False, "n": 500}
    params = SamplingParams(temperature=temperature, top_p=top_p, **fixed, **options)
    prompts = [{"prompt_token_ids": START}] * (samples // 500)
    counts = {}
    for output in llm.generate(prompts, params, use_tqdm=False):
        for sample in output.outputs:
            answer = tuple(sample.token_ids)
            counts[answer] = counts.get(answer, 0) + 1
    assert sum(counts.values()) == samples
    return counts


@pytest.mark.drafts
@pytest.mark.feature("min_p")
@pytest.mark.feature("logit_bias")
def test_samples_follow_the_mixture(engine, tiny_model, monkeypatch):
    from vllm.v1.sample import rejection_sampler

    models = tuple(tiny_model("llama", seed=s, vocab=SMALL, spread=0.6) for s in (3, 4))
    block = {"model": models[1], "alpha": 0.5, "speculative_tokens": 2}
    with engine(models[0], block, max_num_seqs=512, kv_cache_memory_bytes=1 << 28) as llm:
        for temperature, top_p in itertools.product((0.7, 1.0), (1.0, 0.8)):
            found = chi_square(drawn(llm, temperature, top_p), expected(models, temperature, top_p))
            assert found[0] < 4 and found[1] == 0, (temperature, top_p, found)
        # min_p before top_p, and a bias, which the drafts know nothing of.
        counts = drawn(llm, 0.7, 0.9, min_p=0.15, logit_bias={4: 1.0})
        found = chi_square(counts, expected(models, 0.7, 0.9, min_p=0.15, bias=1.0))
        assert found[0] < 4 and found[1] == 0, found
        # The same fails where the residual is another: the target without the draft, as if every
        # draft had been certain.
        original = rejection_sampler.sample_recovered_tokens

        def wrong_residual(*args):
            return original(*args[:4], None, *args[5:])

        monkeypatch.setattr(rejection_sampler, "sample_recovered_tokens", wrong_residual)
        broken = chi_square(drawn(llm, 1.0, 1.0, 5000), expected(models, 1.0, 1.0))
        assert broken[0] > 10, broken


def test_drafts_are_drawn_from_the_distributions_given():
    """One random number a row: frequencies, nothing of probability 0, the likeliest at 0."""
    from vllm_memdec.compat.v1_drafting import sample_rows

    torch.manual_seed(0)
    logits_V = torch.tensor([-torch.inf, 1.0, 0.0, -torch.inf, 2.0, -torch.inf])
    rows, temperatures = 30_000, (0.5, 1.0)
    for temperature in temperatures:
        tokens, p = sample_rows(logits_V.expand(rows, -1), torch.full((rows,), temperature))
        wanted = (logits_V.double() / temperature).softmax(-1)
        assert torch.allclose(p[0].double(), wanted, atol=1e-6)
        found = tokens.bincount(minlength=6) / rows
        assert (found - wanted).abs().max() < 4 * 0.5 / rows**0.5
        assert not found[[0, 3, 5]].any()
    tokens, p = sample_rows(logits_V.expand(3, -1), torch.tensor([0.0, 1.0, 0.0]))
    assert tokens[0] == tokens[2] == 4 and torch.allclose(p[0], p[1])


def test_a_temperature_reaches_every_draft():
    """What vLLM 0.32 leaves to chance on a CPU."""
    from vllm_memdec.compat.cpu_speculation import expand_batch_to_tokens

    expanded = expand_batch_to_tokens(
        torch.tensor([0.7, 0.0, 2.0]), torch.tensor([2, 3, 6]), 6, replace_from=0, replace_to=1
    )
    assert expanded.tolist() == torch.tensor([0.7, 0.7, 1, 2, 2, 2]).tolist()


@pytest.mark.parametrize("tokens", [-1, 17, 2.0, "3", "Auto", True, None])
def test_bad_number_of_tokens_is_refused(models, tokens):
    block = {"model": models["law"], "alpha": 0.5, "speculative_tokens": tokens}
    args = EngineArgs(models["base"], model_impl="memdec", additional_config={"memdec": block})
    with pytest.raises(ValueError, match="'speculative_tokens' must be an integer from 0 to 16"):
        args.create_engine_config()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "are two ways to speculate: drop one",
        ),
        ({"tensor_parallel_size": 2}, "does not draft under tensor parallelism yet"),
        ({"async_scheduling": True}, "'auto' decides after each step"),
    ],
)
def test_what_drafting_does_not_go_with_is_refused(models, options, sentence):
    block = {"model": models["bio"], "alpha": 0.5, "speculative_tokens": "auto"}
    args = EngineArgs(
        models["base"], model_impl="memdec", additional_config={"memdec": block}, **options
    )
    with pytest.raises(ValueError, match=sentence):
        args.create_engine_config()


def test_auto_is_for_the_v1_runner(models, monkeypatch):
    """Refused before an engine starts, by vLLM's own choice of the runner."""
    from vllm_memdec import startup

    block = {"model": models["bio"], "alpha": 0.5, "speculative_tokens": "auto"}
    args = EngineArgs(models["base"], model_impl="memdec", additional_config={"memdec": block})
    checked, check = [], startup.check_engine
    monkeypatch.setattr(startup, "check_engine", checked.append)
    made = args.create_engine_config()
    assert checked == [made]
    check(made)
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    with pytest.raises(ValueError, match="V2 runner drafts a fixed number of tokens"):
        check(made)
