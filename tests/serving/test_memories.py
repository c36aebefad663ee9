"""Several memories in one server: mixed batches, what is not run, memories unlike the base."""

import math
import random

import pytest
import torch
from support import oracle, variants
from vllm.forward_context import set_forward_context

pytestmark = pytest.mark.usefixtures("hostile")
VOCAB = 1000
ALPHAS = {"law": 0.6, "bio": 0.4, "tax": 0.25, "sea": 0.5}


@pytest.fixture(scope="module")
def base(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def folders(tiny_model):
    """Four memories of different architecture, width, depth, vocabulary and window."""
    return {
        "law": tiny_model("llama", seed=1, hidden=96, layers=3),
        "bio": tiny_model("gpt2", seed=2, layers=1),
        "tax": tiny_model("qwen2", seed=3, hidden=128, vocab=1024),
        "sea": tiny_model("mistral", seed=4),
    }


def block(folders, default="law"):
    memories = {n: {"model": folders[n], "alpha": ALPHAS[n]} for n in folders}
    return {"memories": memories, "default": default}


def random_choice(rng):
    """Return extra_args and the (memory's name, weight) that they stand for."""
    name = rng.choice((None, *ALPHAS, "none"))
    alpha = rng.choice((None, 0, 0.3, 1.0))
    extra = {"memdec_memory": name, "memdec_alpha": alpha}
    extra = {key: value for key, value in extra.items() if value is not None}
    name = name or "law"
    if name == "none":
        return extra, ("law", 0.0)
    return extra, (name, ALPHAS[name] if alpha is None else alpha)


def params(extra, rng, **options):
    from vllm import SamplingParams

    defaults = {
        "temperature": rng.choice((0.0, 1.0)),
        "max_tokens": rng.randint(2, 6),
        "logprobs": 5,
        "prompt_logprobs": 5 if rng.random() < 0.5 else None,
        "ignore_eos": True,
    }
    return SamplingParams(**defaults | options, extra_args=extra)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), ("llama", {"max_num_batched_tokens": 32}), ("mistral", {})],
    ids=["whole", "chunked", "windows"],
)
def test_mixed_batches(kind, options, tiny_model, folders, engine):
    """Every request gets its own memory's mixture, whoever else is in the batch."""
    base = tiny_model(kind)
    rng = random.Random(1)
    with engine(base, block(folders), block_size=32, **options) as llm:
        for size in (1, 2, 16, 16):
            chosen = [random_choice(rng) for _ in range(size)]
            ids = oracle.prompts(size, 1, 60, VOCAB, seed=rng.random())
            outputs = llm.generate(
                [{"prompt_token_ids": p} for p in ids],
                [params(extra, rng) for extra, _ in chosen],
                use_tqdm=False,
            )
            for output, (extra, (name, alpha)) in zip(outputs, chosen, strict=True):
                error = oracle.gap(output, base, folders[name], alpha)
                assert error < oracle.TOLERANCE, f"{extra}: off by {error}"


def composite(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def test_what_nobody_chose_does_not_run(base, folders, engine, monkeypatch):
    """Each memory runs on its own requests' tokens, and the base alone costs no memory at all."""
    rows = {}

    def count(number, what, original):
        def counted(*args, **kwargs):
            rows.setdefault((number, what), []).append(len(args[0]))
            return original(*args, **kwargs)

        return counted

    with engine(base, block(folders), enable_prefix_caching=False) as llm:
        for number, memory in enumerate(m.module for m in composite(llm).memories):
            for what in ("forward", "compute_logits"):
                monkeypatch.setattr(memory, what, count(number, what, getattr(memory, what)))

        def run(*choices):
            rows.clear()
            prompts = [{"prompt_token_ids": [5] * (10 + i)} for i in range(len(choices))]
            options = {"temperature": 0, "max_tokens": 3, "prompt_logprobs": None}
            sampling = [params(c, random, **options) for c in choices]
            llm.generate(prompts, sampling, use_tqdm=False)
            return dict(rows)

        assert run({"memdec_memory": "none"}, {"memdec_alpha": 0}) == {}
        # Prompts of 10, 11, 12 and 13 tokens, then two steps of one token each.
        ran = run({"memdec_memory": "bio"}, {"memdec_alpha": 0}, {}, {"memdec_memory": "bio"})
        assert ran == {
            (0, "forward"): [12, 1, 1],
            (0, "compute_logits"): [1, 1, 1],
            (1, "forward"): [23, 2, 2],
            (1, "compute_logits"): [2, 2, 2],
        }


def test_logits_are_mixed_in_slices(base, folders, engine, monkeypatch):
    """As where each head runs on all rows; 5 rows at a time of up to 60 a prompt."""
    from vllm_memdec import model

    monkeypatch.setattr(model, "SLICE_BYTES", 5 * 4 * (1000 + 1024))
    rng = random.Random(3)
    with engine(base, block(folders), enable_prefix_caching=False) as llm:
        composite(llm).memories.selects_rows = False
        chosen = [random_choice(rng) for _ in range(12)]
        ids = oracle.prompts(12, 1, 60, VOCAB, seed=3)
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in ids],
            [params(extra, rng, prompt_logprobs=5) for extra, _ in chosen],
            use_tqdm=False,
        )
    for output, (extra, (name, alpha)) in zip(outputs, chosen, strict=True):
        assert oracle.gap(output, base, folders[name], alpha) < oracle.TOLERANCE, extra


def test_memory_profile_counts_drafts(base, folders, engine, monkeypatch):
    """A dummy step has one row a request; one that verifies drafts needs more at its peak."""
    made = []
    original = torch.Tensor.new_empty

    def new_empty(self, *shape, **options):
        made.append((shape, options.get("dtype")))
        return original(self, *shape, **options)

    memories = {name: folders[name] for name in ("law", "bio", "tax")}
    with engine(base, block(memories) | {"speculative_tokens": 3}) as llm:
        mine = composite(llm)
        mine.memories.selects_rows = False
        mine.batch.reset()
        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
        width = mine.split[1] + mine.batch.columns_TA.shape[1]
        with set_forward_context(None, llm.llm_engine.vllm_config):
            logits = mine.compute_logits(torch.zeros(7, width))
    assert logits.shape == (7, VOCAB) and ((7 * 4, VOCAB), torch.float32) in made


def test_many_groups_are_logged(tiny_model, engine, monkeypatch):
    """A base and a memory with windows have two groups of KV cache."""
    from vllm_memdec import model

    logged = []
    monkeypatch.setattr(model, "MAX_GROUPS", 1)
    monkeypatch.setattr(model.logger, "warning", lambda *args: logged.append(args))
    with engine(tiny_model("mistral"), tiny_model("llama", seed=1), block_size=32):
        pass
    assert any("groups" in text and number == 2 for text, number in logged), logged


def test_default_none(base, folders, engine):
    """A server may leave its memories to those who ask for them."""
    rng = random.Random(2)
    with engine(base, block(folders, default="none")) as llm:
        for extra, alpha in ((None, 0.0), ({"memdec_memory": "bio"}, ALPHAS["bio"])):
            [output] = llm.generate(
                {"prompt_token_ids": [5, 6, 7]},
                params(extra, rng, prompt_logprobs=5),
                use_tqdm=False,
            )
            assert oracle.gap(output, base, folders["bio"], alpha) < oracle.TOLERANCE


def test_bad_memory_in_python(base, folders, engine):
    prompt = {"prompt_token_ids": [5, 6, 7]}
    with engine(base, block(folders)) as llm:
        for name in ("wine", "", 3):
            with pytest.raises(ValueError, match="^memdec_memory must be one of"):
                llm.generate(prompt, params({"memdec_memory": name}, random))
        assert llm.generate(prompt, params({"memdec_memory": "tax"}, random), use_tqdm=False)


# -- memories unlike the base ---------------------------------------------------------------------


def check(llm, base, memory, alpha, tolerance, seed=0):
    """Compare a small mixed batch with the float64 mixture."""
    rng = random.Random(seed)
    alphas = [alpha, 0.0, 1.0, 0.3]
    ids = oracle.prompts(len(alphas), 5, 60, VOCAB, seed=seed)
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in ids],
        [params({"memdec_alpha": a}, rng, prompt_logprobs=5) for a in alphas],
        use_tqdm=False,
    )
    for output, a in zip(outputs, alphas, strict=True):
        error = oracle.gap(output, base, memory, a)
        assert error < tolerance, f"alpha {a}: off by {error}"


@pytest.mark.parametrize(("base_dtype", "memory_dtype"), [("bfloat16", "float32")])
def test_memory_of_another_dtype(base_dtype, memory_dtype, base, folders, engine):
    """Each model computes in its own dtype: a float32 memory is exact beside a bfloat16 base."""
    memory = {"model": folders["law"], "alpha": 1.0, "dtype": memory_dtype}
    with engine(base, memory, dtype=base_dtype) as llm:
        [output] = llm.generate(
            {"prompt_token_ids": list(range(5, 50))},
            params(None, random, prompt_logprobs=5),
            use_tqdm=False,
        )
    assert oracle.gap(output, base, folders["law"], 1.0) < oracle.TOLERANCE


def rows(output):
    """Return (token -> log-probability) of each prompt position."""
    return [{t: e.logprob for t, e in row.items()} for row in output.prompt_logprobs[1:]]


def apart(ours, theirs):
    """Return the largest difference between two lists of rows."""
    return max(
        abs(value - row[token])
        for mine, row in zip(ours, theirs, strict=True)
        for token, value in mine.items()
    )


def prompt_rows(llm, extra=None, lora=None):
    """Return the rows of one prompt, every token of the vocabulary in them."""
    from vllm import SamplingParams

    asked = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": -1, "detokenize": False}
    sampling = SamplingParams(**asked, extra_args=extra)
    prompt = {"prompt_token_ids": list(range(5, 105))}
    [output] = llm.generate(prompt, sampling, use_tqdm=False, lora_request=lora)
    return rows(output)


def caches(llm):
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return {str(layer.kv_cache.dtype) for layer in context.values()}


@pytest.mark.feature("memory with its own KV-cache dtype", here=variants.FP8)
@pytest.mark.skipif(not variants.FP8, reason="vLLM has no fp8 KV cache on a CPU without AVX-512")
def test_memory_with_its_own_kv_cache_dtype(base, folders, engine):
    """An fp8 KV cache for the memory alone: each is what it is by itself in plain vLLM."""
    with engine(base) as llm:
        base_alone = prompt_rows(llm)
    with engine(folders["law"], kv_cache_dtype="fp8") as llm:
        memory_alone = prompt_rows(llm)
        assert len(caches(llm)) == 1
    memory = {"model": folders["law"], "alpha": 0.5, "kv_cache_dtype": "fp8"}
    with engine(base, memory) as llm:
        assert len(caches(llm)) == 2
        assert apart(prompt_rows(llm, {"memdec_alpha": 0}), base_alone) == 0
        assert apart(prompt_rows(llm, {"memdec_alpha": 1}), memory_alone) < oracle.TOLERANCE
    assert apart(memory_alone, base_alone) > 1
    with engine(folders["law"]) as llm:
        assert apart(prompt_rows(llm), memory_alone) > oracle.TOLERANCE, "8 bits show"


@pytest.fixture(scope="module")
def int8(base, folders, tmp_path_factory):
    """Return the base and a memory with int8 weights."""
    folder = tmp_path_factory.mktemp("int8")
    models = {"base": base, "memory": folders["law"]}
    return tuple(variants.quantised(models[name], folder / name) for name in models)


def has_scales(model):
    return any(name.endswith("weight_scale") for name, _ in model.named_parameters())


@pytest.mark.feature("quantised base")
@pytest.mark.feature("quantised memory")
@pytest.mark.parametrize("which", ["base", "memory"])
def test_quantised(which, base, folders, int8, engine):
    """int8 weights (compressed-tensors W8A8) on one side do not touch the other."""
    chosen_base = base if which == "memory" else int8[0]
    chosen_memory = folders["law"] if which == "base" else int8[1]
    alone = {}
    for alpha, folder in ((0, chosen_base), (1, chosen_memory)):
        with engine(folder, dtype="bfloat16") as llm:
            alone[alpha] = prompt_rows(llm)
    with engine(chosen_base, chosen_memory, dtype="bfloat16") as llm:
        assert has_scales(composite(llm).base) == (which != "memory")
        assert has_scales(composite(llm).memory0) == (which != "base")
        assert apart(prompt_rows(llm, {"memdec_alpha": 0}), alone[0]) == 0
        assert apart(prompt_rows(llm, {"memdec_alpha": 1}), alone[1]) < oracle.TOLERANCE


def greedy_answers(llm, lora=None):
    """Return the answers to prompts with several weights, and how many drafts were accepted."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0, max_tokens=16, ignore_eos=True, extra_args={"memdec_alpha": alpha}
        )
        for alpha in (0, 0.3, 0.8, 1)
    ]
    prompts = [{"prompt_token_ids": ids} for ids in oracle.prompts(4, 20, 60, 1000)]
    outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=lora)
    name = "vllm:spec_decode_num_accepted_tokens"
    accepted = sum(metric.value for metric in llm.get_metrics() if metric.name == name)
    return [output.outputs[0].token_ids for output in outputs], accepted


@pytest.mark.drafts
@pytest.mark.feature("quantised base")
@pytest.mark.feature("quantised memory")
@pytest.mark.feature("memory with its own KV-cache dtype", here=variants.FP8)
def test_drafting_changes_no_quantised_answer(int8, engine):
    """int8 weights on both sides, and an fp8 KV cache for the memory where vLLM has one."""
    answers, kv_cache_dtype = [], "fp8" if variants.FP8 else "auto"
    for tokens in (0, 3, "auto"):
        memory = {"model": int8[1], "alpha": 0.5, "kv_cache_dtype": kv_cache_dtype}
        block = memory | {"speculative_tokens": tokens}
        dtype = variants.INT8_DTYPE
        with engine(int8[0], block, disable_log_stats=False, dtype=dtype) as llm:
            assert has_scales(composite(llm).base) and has_scales(composite(llm).memory0)
            found, accepted = greedy_answers(llm)
        answers.append(found)
        assert bool(accepted) == bool(tokens) or tokens == "auto"  # which goes by time
    assert answers[0] == answers[1] == answers[2]


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """Return the folder of a LoRA adapter of the base."""
    return variants.adapter(base, tmp_path_factory.mktemp("lora"))


@pytest.mark.feature(
    "LoRA on the base",
    note="adapters touch the base alone; vLLM on a CPU has none beside experts",
)
def test_lora_on_the_base(base, folders, adapter, engine):
    """alpha 0 is the base with its adapter, alpha 1 the memory without one."""
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("a", 1, adapter)
    options = {"enable_lora": True, "max_lora_rank": 8}
    with engine(base, **options) as llm:
        plain, adapted = prompt_rows(llm), prompt_rows(llm, lora=lora)
    assert apart(plain, adapted) > 0.1
    with engine(folders["law"]) as llm:
        memory_alone = prompt_rows(llm)
    with engine(base, block(folders), **options) as llm:
        assert apart(prompt_rows(llm, {"memdec_alpha": 0}), plain) < oracle.TOLERANCE
        for request, base_alone in ((None, plain), (lora, adapted)):
            found = prompt_rows(llm, {"memdec_alpha": 0.3}, request)
            want = [
                {t: math.log(0.7 * math.exp(b[t]) + 0.3 * math.exp(m[t])) for t in b}
                for b, m in zip(base_alone, memory_alone, strict=True)
            ]
            assert apart(found, want) < oracle.TOLERANCE
        assert apart(prompt_rows(llm, {"memdec_alpha": 1}, lora), memory_alone) < oracle.TOLERANCE


@pytest.mark.drafts
@pytest.mark.feature("LoRA on the base")
def test_drafting_changes_no_answer_of_lora(base, folders, adapter, engine):
    """Nor is the adapter lost: vLLM on a CPU gives it to all of a batch or to none."""
    from vllm.lora.request import LoRARequest

    answers = []
    for tokens in (0, 3, "auto"):
        options = {"enable_lora": True, "max_lora_rank": 8, "disable_log_stats": False}
        settings = {"model": folders["law"], "alpha": 0.5, "speculative_tokens": tokens}
        with engine(base, settings, **options) as llm:
            plain, _ = greedy_answers(llm)
            adapted, accepted = greedy_answers(llm, LoRARequest("a", 1, adapter))
        answers.append((plain, adapted))
        assert bool(accepted) == bool(tokens) or tokens == "auto"  # which goes by time
    assert answers[0] == answers[1] == answers[2]
    assert plain[:2] != adapted[:2]


def test_memory_from_the_hub_with_a_revision(base, folders, engine, tmp_path, monkeypatch):
    """A hub id and a revision, out of a local hub cache: nothing here goes to the network."""
    import shutil

    from huggingface_hub import constants

    cache, revision = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--someone--law"
    shutil.copytree(folders["law"], repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    memory = {"model": "someone/law", "revision": "v1", "alpha": 0.5}
    with engine(base, memory) as llm:
        check(llm, base, folders["law"], 0.5, oracle.TOLERANCE)
