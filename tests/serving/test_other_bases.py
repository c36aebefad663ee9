"""Rows of the table of features that test_features.py has not, beside each of OTHER_BASES.

One server of a base answers for the rows over HTTP and for LoRA, one engine for those of what
models are stored as. What vLLM on a CPU has not for a base ends an engine with a memory as it ends
plain vLLM. test_bases.py and test_images.py have the V2 runner and drafts by the memory.
"""

import asyncio
import json
import math
import os
import shutil
from dataclasses import dataclass

import openai
import pytest
import torch
from support import bases, http_rows, oracle, variants
from support.choices import (
    CHOICES,
    PLAIN,
    PROMPT,
    Choice,
    greedy,
    make_models,
    memdec_block,
    mixture,
)
from support.feature_engines import OTHER_BASES, count, one
from support.gate_oracle import gate_weights, random_gate
from support.served import Served
from vllm import EngineArgs, SamplingParams
from vllm.benchmarks.serve import add_cli_args, main_async
from vllm.distributed.parallel_state import destroy_model_parallel
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_memdec.gate import write_gate

feature = pytest.mark.feature
each_base = pytest.mark.parametrize("base", OTHER_BASES, indirect=True)
# Parts of a base's layers: in int8, and with an adapter.
INT8 = {"Qwen3-MoE": ("q_proj", "k_proj", "v_proj", "o_proj"), "LFM2": ("proj", "w1", "w2", "w3")}
ADAPTED = {"LFM2": ("in_proj", "q_proj", "w2")}
# What vLLM on a CPU has not, and how it ends.
NO_LORA = {"Qwen3-MoE": (AttributeError, "'triton.language' has no attribute")}
NO_INT8 = {"Qwen3-MoE": (NotImplementedError, "No Int8 MoE backend supports the deployment")}
KEPT = "keeps a state, which vLLM on a CPU does not take back where drafts are rejected"
NO_DRAFT_MODEL = {
    "LFM2": KEPT,
    "Gemma 3, multimodal": "V1 runner cannot draft with a model beside sliding windows",
}
# Memories alone are run with the kernels that LFM2 needs: in 16 bits others are off by more.
SAME_KERNELS = bases.CASES["LFM2"].options
IN_INT8 = SAME_KERNELS | {"dtype": variants.INT8_DTYPE}
OWN_CACHE = {"kv_cache_dtype": "fp8"}
if not variants.FP8:
    # vLLM then keeps bfloat16's bits in a cache of float16: the setting is seen, but is no feature.
    OWN_CACHE = {"dtype": "bfloat16", "kv_cache_dtype": "float16"}
CONNECTOR = {
    "kv_connector": "ExampleConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"shared_storage_path": "/nowhere"},
}


REFUSED = {
    "pipeline parallelism yet": {"pipeline_parallel_size": 2},
    "prompt embeddings yet": {"enable_prompt_embeds": True},
    "an external KV cache": {"kv_transfer_config": CONNECTOR},
    "pooling yet": {"runner": "pooling"},
    "Sleep mode is not supported on current platform": {"enable_sleep_mode": True},
}


@dataclass
class Base:
    """One of OTHER_BASES."""

    name: str
    folder: str
    options: dict

    @property
    def words(self):
        """Its options as the command line has them."""
        return [
            word
            for name, value in self.options.items()
            for word in ("--" + name.replace("_", "-"), json.dumps(value))
        ]


@pytest.fixture(scope="module")
def base(request, tmp_path_factory):
    """Return a base of OTHER_BASES."""
    folder = str(tmp_path_factory.getbasetemp() / request.param)
    if not os.path.exists(folder):
        bases.save(request.param, folder, seed=5)
    return Base(request.param, folder, bases.CASES.get(request.param, bases.Case()).options)


@pytest.fixture(scope="module")
def models(base, tiny_model, tmp_path_factory):
    """Return the folders of a base and of its memories, one with a gate."""
    gated = tmp_path_factory.mktemp("gated") / "gated"
    shutil.copytree(tiny_model("llama", seed=3, spread=0.15), gated)
    write_gate(gated, random_gate(64, 3))
    return make_models(tiny_model) | {"base": base.folder, "gated": str(gated)}


@pytest.fixture(autouse=True)
def new_groups():
    """vLLM keeps the process groups of a base without experts for one with: they lack its own."""
    destroy_model_parallel()


# -- Over HTTP ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    """Return the folders of an adapter of the base, and of the base that it makes."""
    folder = tmp_path_factory.mktemp("lora")
    parts = ADAPTED.get(base.name, ("q_proj", "down_proj"))
    adapter = variants.adapter(base.folder, folder / "adapter", parts)
    return adapter, variants.merged(base.folder, adapter, folder / "merged")


@pytest.fixture(scope="module")
def served(base, models, lora):
    """Yield a server of the base with three memories, and an adapter where vLLM has them."""
    destroy_model_parallel()
    block = memdec_block(models)
    block["memories"]["gated"] = {"model": models["gated"]}
    options = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16", *base.words]
    if base.name not in NO_LORA:
        options += ["--enable-lora", "--lora-modules", f"adapted={lora[0]}"]
    server = Served(base.folder, block, options).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@feature("streaming")
@each_base
def test_streaming(client, models):
    http_rows.check_streaming(client, models)


@feature("chat completions")
@each_base
def test_chat_completions(client, models):
    http_rows.check_chat(client, models)


@feature("beam search")
@each_base
def test_beam_search(client, models):
    http_rows.check_beams(client, models)
    with pytest.raises(openai.BadRequestError, match="Beam search has the server's memory"):
        http_rows.search(client, models, vllm_xargs=Choice("bio", 1.0).extra_args)


@feature("a gate's weight for each token")
@each_base
def test_gate(client, models):
    [prompt] = oracle.prompts(1, 40, 40, 990)
    found = http_rows.complete(client, models, {"memdec_memory": "gated"}, prompt=prompt, echo=True)
    said = found.choices[0].logprobs
    ids = http_rows.token_ids(said.tokens)
    assert ids[:40] == prompt and len(ids) == 44
    alpha_T1 = gate_weights(models, "gated", 1.0, ids)
    assert alpha_T1.max() - alpha_T1.min() > 0.3, "the gate would not be seen"
    key_TV = oracle.mixture(models["base"], models["gated"], alpha_T1, ids)
    for position in range(1, 44):
        wanted = key_TV[position - 1, ids[position]].item()
        assert said.token_logprobs[position] == pytest.approx(wanted, abs=oracle.TOLERANCE)


@feature("vllm run-batch")
@each_base
def test_run_batch(served, models, tmp_path):
    asked, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    http_rows.write_batch(asked, models, [choice.extra_args for choice in CHOICES])
    served.batch(asked, answers)
    found = http_rows.read_batch(answers)
    for number, choice in enumerate(CHOICES):
        http_rows.check_line(found[str(number)], models, choice)


@feature("vllm bench serve")
@each_base
def test_bench_serve(served, models):
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    words = "--backend openai --dataset-name random --random-input-len 24 --random-output-len 8"
    words = [*words.split(), "--ignore-eos", "--num-prompts", "6", "--base-url", served.url]
    result = asyncio.run(main_async(parser.parse_args([*words, "--model", models["base"]])))
    assert (result["completed"], result["total_output_tokens"]) == (6, 48)


@feature("a memory by the model's name")
@each_base
def test_a_memory_is_a_model(client, models):
    for name in ("law", "bio", "none"):
        found = http_rows.complete(client, models, model=name, echo=True)
        said = found.choices[0].logprobs
        ids = http_rows.token_ids(said.tokens)
        key_TV = mixture(models, Choice(name), ids)
        assert found.model == name
        for position in range(1, len(ids)):
            wanted = key_TV[position - 1, ids[position]].item()
            assert said.token_logprobs[position] == pytest.approx(wanted, abs=oracle.TOLERANCE)


@feature("LoRA on the base")
@pytest.mark.parametrize(
    "base", [name for name in OTHER_BASES if name not in NO_LORA], indirect=True
)
def test_lora(client, models, lora):
    """The mixture of the adapted base and of the memory, which has no adapter."""
    merged = models | {"base": lora[1]}
    for alpha in (0, 0.3, 1):
        asked = {"memdec_alpha": alpha}
        found = http_rows.complete(client, models, asked, model="adapted", echo=True)
        said = found.choices[0].logprobs
        ids = http_rows.token_ids(said.tokens)
        key_TV = mixture(merged, Choice("law", alpha), ids)
        plain_TV = mixture(models, Choice("law", alpha), ids)
        assert (alpha < 1) == bool((key_TV - plain_TV).abs().max() > 0.1)
        for position in range(1, len(ids)):
            wanted = key_TV[position - 1, ids[position]].item()
            assert said.token_logprobs[position] == pytest.approx(wanted, abs=oracle.TOLERANCE)


# -- What models are stored as --------------------------------------------------------------------


def rows(llm, extra=None):
    """Return the log-probabilities of one prompt, every token of the vocabulary in each row."""
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, extra_args=extra)
    prompt = {"prompt_token_ids": list(range(5, 105))}
    [output] = llm.generate(prompt, params, use_tqdm=False)
    return [[row[t].logprob for t in range(990)] for row in output.prompt_logprobs[1:]]


def apart(ours, theirs):
    return max(
        abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.fixture(scope="module")
def memories(tiny_model, tmp_path_factory, engine):
    """Return memories by name, and what plain vLLM says with each alone."""
    law = tiny_model("llama", seed=1, hidden=96, layers=3)
    stored = {
        "int8": {"model": variants.quantised(law, tmp_path_factory.mktemp("int8") / "memory")},
        "cache": {"model": law} | OWN_CACHE,
    }
    alone = {}
    for name, settings in stored.items():
        own = {key: value for key, value in settings.items() if key != "model"}
        with engine(settings["model"], **IN_INT8 | own) as llm:
            alone[name] = rows(llm)
    assert apart(alone["int8"], alone["cache"]) > 0.1
    return {name: settings | {"alpha": 0.5} for name, settings in stored.items()}, alone


@feature("quantised base", note="of experts vLLM on a CPU has int8 only with AMX")
@feature("quantised memory")
@feature("memory with its own KV-cache dtype", here=variants.FP8)
@each_base
def test_stored_otherwise(base, memories, engine, tmp_path):
    """An int8 base and two memories: each is what it is in plain vLLM, alone."""
    int8 = variants.quantised(base.folder, tmp_path / "int8", INT8.get(base.name, ("proj",)))
    options = base.options | IN_INT8
    with engine(int8, **options) as llm:
        plain = rows(llm)
    assert apart(plain, oracle.log_probs(base.folder, range(5, 105))[:-1, :990].tolist()) > 0.1
    stored, alone = memories
    with engine(int8, {"memories": stored, "default": "cache"}, **options) as llm:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        kept = {layers[name].kv_cache.dtype for name in layers if name.startswith("memory1.")}
        assert kept and kept.isdisjoint({torch.float32, torch.bfloat16}), "its own dtype"
        assert rows(llm, {"memdec_alpha": 0}) == plain
        for name, wanted in alone.items():
            asked = {"memdec_memory": name}
            assert apart(rows(llm, asked | {"memdec_alpha": 1}), wanted) < oracle.TOLERANCE, name
            mixed = [
                [math.log(0.7 * math.exp(b) + 0.3 * math.exp(m)) for b, m in zip(x, y, strict=True)]
                for x, y in zip(plain, wanted, strict=True)
            ]
            assert apart(rows(llm, asked | {"memdec_alpha": 0.3}), mixed) < oracle.TOLERANCE, name


@feature("LoRA on the base")
@feature("quantised base")
@pytest.mark.parametrize("base", NO_LORA, indirect=True)
def test_what_vllm_has_not_for_experts(base, models, engine, tmp_path):
    """On a CPU: it ends with the errors of plain vLLM."""
    int8 = variants.quantised(base.folder, tmp_path / "int8")
    for folder, options, (kind, reason) in (
        (int8, {}, NO_INT8[base.name]),
        (base.folder, {"enable_lora": True}, NO_LORA[base.name]),
    ):
        if folder == int8 and variants.AMX:
            continue  # vLLM has them in int8 there
        started = engine(folder, memdec_block(models), **options)
        with pytest.raises(kind, match=reason), started as llm:
            rows(llm)


# -- Starts ---------------------------------------------------------------------------------------


@feature("speculation with a draft model")
@each_base
def test_draft_model(base, models, engine):
    """Verified against the mixture where vLLM can; elsewhere refused."""
    drafting = {"method": "draft_model", "model": models["law"], "num_speculative_tokens": 3}
    options = base.options | {"speculative_config": drafting, "disable_log_stats": False}
    if base.name in NO_DRAFT_MODEL:
        refused = pytest.raises(ValueError, match=NO_DRAFT_MODEL[base.name])
        with refused, engine(base.folder, memdec_block(models), **options):
            pass
        return
    with engine(base.folder, memdec_block(models), **options) as llm:
        for choice in (PLAIN, Choice("law", 1.0)):
            assert one(llm, choice, max_tokens=12).token_ids == greedy(models, choice, PROMPT, 12)
        assert count(llm, "spec_decode_num_accepted_tokens")


@pytest.mark.parametrize("sentence", REFUSED)
@each_base
def test_refused(sentence, base, models):
    block = {"memdec": memdec_block(models)}
    args = EngineArgs(
        base.folder,
        dtype="float32",
        model_impl="memdec",
        additional_config=block,
        **base.options,
        **REFUSED[sentence],
    )
    with pytest.raises(ValueError, match=sentence):
        args.create_engine_config()
