"""Bases that see images: the base sees the image, the memory the token ids, placeholders included.

Real engines with tiny random models; a real `vllm serve` with the real openai client. The answer
key is support/multimodal.py's: Hugging Face's own multimodal models in float64.
"""

from dataclasses import dataclass, replace

import httpx
import openai
import pytest
import torch
from support import base_rows, multimodal, oracle, soak_client, v2_process, variants
from support.bases import CASES, Case
from support.feature_engines import count
from support.multimodal import image, url_of
from support.tiny_models import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from vllm_memdec import check as checking
from vllm_memdec.compat.attention import NarrowBuilder

feature = pytest.mark.feature(
    "multimodal base, with images", note="the base sees the image, the memory the token ids"
)
GEMMA, QWEN, HYBRID = "gemma3", "qwen2_5_vl", "qwen3_5"
# In vllm_memdec/bases.csv.
ROWS = {GEMMA: "Gemma 3, multimodal", QWEN: "Qwen2.5-VL", HYBRID: "Qwen3.5, multimodal"}
PICTURES = [image(0), image(1, 56, 56), image(2, 112, 84), image(3)]
WORDS = "bagi duto mela kipo " * 12  # more than a block of 32 tokens
NO_MEDIA = {"image": 0, "video": 0}
STEPS = [[0, 0.9], [8, 0.2], [20, 0.0], [30, 0.6]]  # of a memory, in place of one weight
GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 7}
# Prompt's text, numbers of its pictures among PICTURES, and weight.
ASKED = [
    ("bagi duto MARK mela", [0], 0.5),
    ("kipo bagi", [], 0.5),
    ("MARK lavi MARK tote duto", [1, 2], 0.9),
    ("MARK mela", [2], 0.0),
    (f"{WORDS} MARK {WORDS}", [0], 0.5),
    ("MARK tote", [1], 1.0),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return the bases by name."""
    made = {}
    for name, save in multimodal.SAVE.items():
        torch.manual_seed(0)
        made[name] = save(tmp_path_factory.mktemp(name))
    return made


@pytest.fixture(scope="module")
def memories(bases, tmp_path_factory):
    """Return a memory's folder for each base: none has a row for the tokens of images."""
    made = {}
    for name, base in bases.items():
        folder = made[name] = tmp_path_factory.mktemp("memory")
        torch.manual_seed(1)
        # Beside a base in bfloat16 not so wide that its rounding would be seen.
        spread = 0.05 if name == HYBRID else 0.3
        rows = AutoConfig.from_pretrained(base.folder).get_text_config().vocab_size
        config = tiny_config("llama", rows if name == GEMMA else 1000, 96, 2, 256, spread)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(base.folder).save_pretrained(folder)
    return {name: str(folder) for name, folder in made.items()}


def prompt_of(base, text, pictures):
    """Return what vLLM's LLM takes."""
    given = {"prompt": text.replace("MARK", base.mark)}
    if pictures:
        given["multi_modal_data"] = {"image": [PICTURES[number] for number in pictures]}
    return given


def generate(llm, base, asked, memory="on", lora=None, **options):
    named = {"memdec_memory": memory} if memory else {}
    params = [
        SamplingParams(**GREEDY | options, extra_args=named | {"memdec_alpha": alpha})
        for *_, alpha in asked
    ]
    prompts = [prompt_of(base, text, pictures) for text, pictures, _ in asked]
    return llm.generate(prompts, params, use_tqdm=False, lora_request=lora)


def rows_of(rows):
    return [{token: e.logprob for token, e in (row or {}).items()} for row in rows or []]


def key(prompt, sampled, base, memory, alpha, pictures, dtype=torch.float64):
    """Return the mixture's log-probabilities [T, V] after each token."""
    pictures = [PICTURES[number] for number in pictures]
    return multimodal.mixture(base, memory, alpha, [*prompt, *sampled], pictures, dtype)


def gap(found, *asked):
    """Return the largest error of log-probabilities; found: prompt, sampled and rows of both."""
    prompt, sampled, prompt_rows, sampled_rows = found
    key_TV = key(prompt, sampled, *asked)
    return oracle.worst_row(prompt, sampled, prompt_rows, sampled_rows, key_TV)


def gaps(outputs, base, memory, asked):
    return [
        gap(
            (
                output.prompt_token_ids,
                output.outputs[0].token_ids,
                rows_of(output.prompt_logprobs),
                rows_of(output.outputs[0].logprobs),
            ),
            base,
            memory,
            alpha,
            pictures,
        )
        for output, (_, pictures, alpha) in zip(outputs, asked, strict=True)
    ]


@dataclass
class Running:
    """An engine on the V1 runner, and what it serves."""

    llm: LLM
    kind: str
    base: multimodal.Base
    memory: str
    drafts: int

    def gaps(self, asked, memory="on", **options):
        """Return the errors of answers, one for each that was asked for."""
        outputs = generate(self.llm, self.base, asked, memory, logprobs=3, **options)
        return gaps(outputs, self.base, self.memory, asked)


def settings(memory, drafts=0):
    """Return the memdec block of a memory under three names."""
    ways = {"on": {"alpha": 0.5}, "off": {"alpha": 0.5, "with_images": False}}
    ways["steps"] = {"alpha_by_context": STEPS}
    memories = {name: {"model": memory} | way for name, way in ways.items()}
    return {"memories": memories, "default": "off", "speculative_tokens": drafts}


RUNNING = [(GEMMA, 0), (QWEN, 0), pytest.param((QWEN, 3), marks=pytest.mark.drafts)]


@pytest.fixture(scope="module", params=RUNNING, ids=str)
def running(request, engine, bases, memories):
    kind, drafts = request.param
    block = settings(memories[kind], drafts)
    options = {"block_size": 32, "max_num_batched_tokens": 64, "limit_mm_per_prompt": {"image": 2}}
    options["disable_log_stats"] = False
    with engine(bases[kind].folder, block, **options) as llm:
        yield Running(llm, kind, bases[kind], memories[kind], drafts)


@feature
def test_mixture(running, base_row):
    """Texts and images, of all weights, in one batch; prompts read in chunks, too."""
    # vLLM itself fails where a token beyond the vocabulary is to have a log-probability.
    rows = None if running.kind == GEMMA else 2
    error = max(running.gaps(ASKED, prompt_logprobs=rows))
    assert error < oracle.TOLERANCE
    accepted = count(running.llm, "spec_decode_num_accepted_tokens")
    assert bool(accepted) == bool(running.drafts)
    if running.drafts:
        base_row(ROWS[running.kind], drafts="works")
    else:
        note_row(base_row, running.kind, running.llm, "float32", error)


def note_row(base_row, kind, llm, dtype, error):
    model = llm.llm_engine.model_config
    said = {"architecture": model.architecture, "kind": base_rows.kind_of(model)}
    needs = CASES.get(ROWS[kind], Case()).needs
    base_row(
        ROWS[kind], **said, dtype=dtype, error=f"{error:.0e}", note="with images", on_cpu=needs
    )


def test_weights_by_context(running):
    """By a token's place in the request, also where the parts of images have other positions."""
    asked = [(text, pictures, "auto") for text, pictures, _ in ASKED]
    outputs = generate(running.llm, running.base, asked, "steps", logprobs=3)
    starts, alphas = (torch.tensor(column) for column in zip(*STEPS, strict=True))
    for output, (text, pictures, _) in zip(outputs, asked, strict=True):
        length = len(output.prompt_token_ids) + GREEDY["max_tokens"]
        places_T = torch.arange(length)
        alpha_T1 = alphas[torch.bucketize(places_T, starts[1:], right=True)][:, None].double()
        [error] = gaps([output], running.base, running.memory, [(text, pictures, alpha_T1)])
        assert error < oracle.TOLERANCE
        [error] = gaps([output], running.base, running.memory, [(text, pictures, 0.4)])
        assert error > 0.01, "no weight would be seen"


def test_prefix_caching(running):
    """Requests share blocks with those of the same memory, text and images, and with no others."""
    text = f"lavi {WORDS} {WORDS} MARK mela duto {WORDS[:60]}"

    def cached(pictures, memory):
        asked = [(text, pictures, 0.5 if memory == "on" else 0.0)]
        outputs = generate(running.llm, running.base, asked, memory, logprobs=3)
        assert max(gaps(outputs, running.base, running.memory, asked)) < oracle.TOLERANCE
        return outputs[0].num_cached_tokens, len(outputs[0].prompt_token_ids)

    first, length = cached([0], "on")
    again, _ = cached([0], "on")
    other, _ = cached([1], "on")
    alone, _ = cached([0], "none")
    assert first == alone == 0
    assert other < again < length
    # Of a window vLLM keeps the blocks at the end of a prompt alone.
    assert bool(other) == (running.kind != GEMMA)


def test_a_default_that_is_off_for_images(running):
    """Such a request is one without a memory: its blocks, too, and nothing is drafted for it."""
    text = f"kipo {WORDS} MARK mela"
    alone = [(text, [0], 0.0)]
    generate(running.llm, running.base, alone, "none")

    def asked(pictures, alpha):
        drafted = count(running.llm, "spec_decode_num_draft_tokens")
        prompt = prompt_of(running.base, text if pictures else f"kipo {WORDS}", pictures)
        outputs = running.llm.generate(
            [prompt], SamplingParams(**GREEDY, logprobs=3), use_tqdm=False
        )
        wanted = [(text, pictures, alpha)]
        assert max(gaps(outputs, running.base, running.memory, wanted)) < oracle.TOLERANCE
        drafted = count(running.llm, "spec_decode_num_draft_tokens") - drafted
        return outputs[0].num_cached_tokens, bool(drafted)

    cached, drafted = asked([0], 0.0)
    assert cached and not drafted
    assert asked([], 0.5) == (0, bool(running.drafts))


def test_a_memory_reads_from_left_to_right(engine, bases, memories, monkeypatch):
    """Where a base's image tokens see those after them: the memory's are ids like all others."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

    seen = {True: [], False: []}
    build = CPUAttentionMetadataBuilder.build

    def watched(self, common_prefix_len, common, *args, **kwargs):
        seen[isinstance(self, NarrowBuilder)].append(common.mm_req_doc_ranges)
        return build(self, common_prefix_len, common, *args, **kwargs)

    monkeypatch.setattr(CPUAttentionMetadataBuilder, "build", watched)
    with engine(bases[GEMMA].folder, memories[GEMMA], 0.5) as llm:
        generate(llm, bases[GEMMA], ASKED[:1], memory=None)
    assert any(seen[False]) and seen[True] and not any(seen[True])


@pytest.mark.parametrize(
    ("kind", "way"),
    [(GEMMA, {"language_model_only": True}), (QWEN, {"limit_mm_per_prompt": NO_MEDIA})],
    ids=str,
)
def test_texts_alone(kind, way, engine, bases, memories):
    """A server that takes no images, and has no room for them, is one of a text base."""
    with engine(bases[kind].folder, memories[kind], 0.5, **way) as llm:
        texts = [asked for asked in ASKED if not asked[1]]
        outputs = generate(llm, bases[kind], texts, memory=None, logprobs=3, prompt_logprobs=2)
        assert max(gaps(outputs, bases[kind], memories[kind], texts)) < oracle.TOLERANCE
        with pytest.raises(ValueError, match="for text-only models"):
            generate(llm, bases[kind], ASKED[:1], memory=None)


@feature
def test_a_hybrid(engine, bases, memories, base_row):
    """Qwen3.5: a state besides, and M-RoPE. In bfloat16, so beside what that dtype itself costs."""
    base, memory = bases[HYBRID], memories[HYBRID]
    options = {"block_size": 32, "max_num_batched_tokens": 64, "limit_mm_per_prompt": {"image": 2}}
    with engine(base.folder, settings(memory), dtype="bfloat16", **options) as llm:
        outputs = generate(llm, base, ASKED, logprobs=3)
    errors, roundings, unseen, single = [], [], [], []
    for output, (_, pictures, alpha) in zip(outputs, ASKED, strict=True):
        prompt, sampled = output.prompt_token_ids, output.outputs[0].token_ids
        rows = rows_of(output.outputs[0].logprobs)
        asked = (base, memory, alpha, pictures)
        rounded_TV = key(prompt, sampled, *asked, torch.bfloat16)
        rounded = [
            {token: rounded_TV[position, token].item() for token in row}
            for position, row in enumerate(rows, start=len(prompt) - 1)
        ]
        errors.append(gap((prompt, sampled, [], rows), *asked))
        single += oracle.errors(prompt, sampled, [], rows, key(prompt, sampled, *asked))
        roundings.append(gap((prompt, sampled, [], rounded), *asked))
        if pictures and alpha < 1:
            unseen.append(gap((prompt, sampled, [], rows), base, memory, alpha, []))
    assert max(errors) < 2 * max(roundings) < max(unseen) / 4
    note_row(base_row, HYBRID, llm, "bfloat16", sum(single) / len(single))
    drafts = checking.check(base.folder, memory).drafts
    base_row(ROWS[HYBRID], drafts=base_rows.drafts_of(drafts))


@pytest.mark.feature("LoRA on the base")
def test_an_adapter_beside_images(engine, bases, memories, tmp_path):
    """It is on the base's language model; neither the encoder of images nor the memory has one."""
    base, memory = bases[GEMMA], memories[GEMMA]
    adapter = variants.adapter(base.folder, tmp_path / "adapter")
    adapted = replace(base, folder=variants.merged(base.folder, adapter, tmp_path / "merged"))
    options = {"enable_lora": True, "limit_mm_per_prompt": {"image": 2}}
    with engine(base.folder, memory, 0.5, **options) as llm:
        asked = {"memory": None, "lora": LoRARequest("a", 1, adapter), "logprobs": 3}
        outputs = generate(llm, base, ASKED, **asked)
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        managed = runner.model_runner.lora_manager._adapter_manager.modules
    assert managed and all(name.startswith("base.language_model.") for name in managed)
    assert max(gaps(outputs, adapted, memory, ASKED)) < oracle.TOLERANCE
    assert max(gaps(outputs, base, memory, ASKED)) > 0.1, "no adapter would be seen"


# -- The V2 runner --------------------------------------------------------------------------------

V2_ASKED = [*ASKED, ("MARK kipo", [0], None)]  # None: the default, which is off for images
RUNS = [(GEMMA, None, 0), (GEMMA, "full", 2), (QWEN, "piecewise", 2), (QWEN, "full", 0)]


@pytest.fixture(scope="module")
def v2_results(bases, memories, subprocess_env):
    """Return the results of engines on the V2 runner: base, graphs, drafts."""
    options = {"max_model_len": 256, "limit_mm_per_prompt": {"image": 2}}
    jobs = {}
    for kind, graphs, drafts in RUNS:
        batches = []
        for some in (V2_ASKED[:3], V2_ASKED[3:]):
            batch = []
            for text, pictures, alpha in some:
                asked = {} if alpha is None else {"memdec_memory": "on", "memdec_alpha": alpha}
                urls = [url_of(PICTURES[number]) for number in pictures]
                text = text.replace("MARK", bases[kind].mark)
                params = GREEDY | {"logprobs": 3, "extra_args": asked}
                batch.append([{"text": text, "images": urls}, params])
            batches.append(batch)
        block = settings(memories[kind], drafts)
        jobs[kind, graphs, drafts] = v2_process.job(
            bases[kind].folder, block, batches, graphs, **options
        )
    return v2_process.run(jobs, subprocess_env)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_v2(run, v2_results, bases, memories, base_row):
    kind, _, drafts = run
    result = v2_process.answered(v2_results, run)
    for found, (_, pictures, alpha) in zip(result["requests"], V2_ASKED, strict=True):
        assert gap(found, bases[kind], memories[kind], alpha or 0.0, pictures) < oracle.TOLERANCE
    v2_process.check_steps(result, drafts)
    assert bool(result["accepted"]) == bool(drafts)
    if drafts:
        base_row(ROWS[kind], drafts="works")


# -- Over HTTP ------------------------------------------------------------------------------------

SHOWN = [(), (0,), (1, 2)]  # pictures of a message


def messages(shown):
    """Return a chat with pictures, as a client sends it."""
    parts = [{"type": "text", "text": "bagi duto"}]
    for number in shown:
        parts.append({"type": "image_url", "image_url": {"url": url_of(PICTURES[number])}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "mela"}]}]


@pytest.fixture(scope="module")
def plain(engine, bases):
    """Return plain vLLM's answers, by the pictures that it is shown."""
    with engine(bases[GEMMA].folder, limit_mm_per_prompt={"image": 2}) as llm:
        params = SamplingParams(**GREEDY, logprobs=0)
        return {
            shown: llm.chat(messages(shown), params, use_tqdm=False)[0].outputs[0]
            for shown in SHOWN
        }


@pytest.fixture(scope="module")
def server(bases, memories, forked, tmp_path_factory, plain):
    """Yield a server with a memory that is on for requests with images, and one that is off."""
    log = tmp_path_factory.mktemp("server") / "log"
    server = soak_client.Server(
        {"base": bases[GEMMA].folder},
        forked,
        log,
        block=settings(memories[GEMMA]),
        options=["--limit-mm-per-prompt", '{"image": 2}', "--num-gpu-blocks-override", "400"],
    )
    try:
        yield server.wait()
    finally:
        server.stop()


def ask(server, shown, xargs=None, model=None):
    """Return the answer of the openai client: prompt and sampled ids, log-probabilities."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    body = {"return_token_ids": True, "ignore_eos": True, "vllm_xargs": xargs or {}}
    answer = client.chat.completions.create(
        model=model or server.model,
        messages=messages(shown),
        max_tokens=GREEDY["max_tokens"],
        temperature=0,
        logprobs=True,
        extra_body=body,
    ).model_dump()
    [found] = answer["choices"]
    rows = [entry["logprob"] for entry in found["logprobs"]["content"]]
    return answer["prompt_token_ids"], found["token_ids"], rows


def check(server, shown, base, memory, alpha, xargs=None):
    """The answer is the mixture's, on the ids that the server says it read."""
    prompt, sampled, values = ask(server, shown, xargs)
    rows = [{token: value} for token, value in zip(sampled, values, strict=True)]
    assert gap((prompt, sampled, [], rows), base, memory, alpha, shown) < oracle.TOLERANCE
    assert prompt.count(base.placeholder) == 4 * len(shown)


@feature
@pytest.mark.parametrize("shown", SHOWN, ids=str)
def test_http(shown, server, plain, bases, memories):
    """At weight 0 the answer is plain vLLM's; elsewhere the mixture's."""
    _, sampled, values = ask(server, shown, {"memdec_alpha": 0})
    assert sampled == list(plain[shown].token_ids)
    wanted = [row[token].logprob for row, token in zip(plain[shown].logprobs, sampled, strict=True)]
    assert values == pytest.approx(wanted, abs=1e-6)
    for alpha in (None, 0, 0.3, 1.0):
        xargs = {"memdec_memory": "on"} | ({} if alpha is None else {"memdec_alpha": alpha})
        weight = 0.5 if alpha is None else alpha
        check(server, shown, bases[GEMMA], memories[GEMMA], weight, xargs)


@pytest.mark.parametrize("shown", SHOWN, ids=str)
def test_a_memory_that_is_off_for_images(shown, server, bases, memories):
    """By the setting; a request that asks for it with an image is refused, not served without."""
    off, base, memory = {"memdec_memory": "off"}, bases[GEMMA], memories[GEMMA]
    check(server, shown, base, memory, 0.0 if shown else 0.5)  # the default
    if not shown:
        return check(server, shown, base, memory, 0.5, off)
    for xargs in (off, off | {"memdec_alpha": 1.0}):
        with pytest.raises(openai.BadRequestError, match="The memory 'off' is off for requests"):
            ask(server, shown, xargs)
    check(server, shown, base, memory, 0.0, off | {"memdec_alpha": 0})
    with pytest.raises(openai.BadRequestError, match="name asks for it, name the base's model"):
        ask(server, shown, model="off")
    card, *_ = httpx.get(f"{server.url}/v1/models").json()["data"]
    settings = card["memdec"]["memories"]
    assert [settings[name].get("with_images", True) for name in ("on", "off")] == [True, False]


def test_a_picture_of_a_refused_request(server, bases, memories):
    """It was never sent to the engine: with the next request it has to be."""
    for _ in range(2):
        with pytest.raises(openai.BadRequestError):
            ask(server, (3,), {"memdec_memory": "off"})
    check(server, (3,), bases[GEMMA], memories[GEMMA], 0.5, {"memdec_memory": "on"})
