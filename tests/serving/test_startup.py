"""Every refusal at start, through the code `vllm serve` runs: EngineArgs.create_engine_config()."""

import json
import os

import pytest
from support import bases
from support.tiny_models import save_tokenizer

from vllm_memdec.checkpoint import MemoryBlock, tokenizer_fingerprint, write_block
from vllm_memdec.config import MemDecConfig


@pytest.fixture
def start():
    """Return create_engine_config for start(base, memdec block, **other arguments)."""
    from vllm import EngineArgs

    def create(base, block=None, **options):
        options.setdefault("model_impl", "memdec")
        if block is not None:
            options["additional_config"] = {"memdec": block}
        return EngineArgs(base, dtype="float32", **options).create_engine_config()

    return create


@pytest.fixture(scope="module")
def pair(tiny_model):
    return tiny_model("llama"), tiny_model("llama", seed=1, hidden=96, layers=3)


def test_accepted(start, pair):
    base, memory = pair
    config = start(base, {"model": memory, "alpha": 0.6})
    assert config.model_config.hf_config.architectures == ["MemDecForCausalLM"]
    assert config.model_config.architectures == ["LlamaForCausalLM"]
    assert MemDecConfig.from_vllm(config).memories[0].alpha == 0.6


def test_the_other_way_in(start, pair):
    """The architecture's name, which vLLM itself refuses where the plugin is missing."""
    base, memory = pair
    overrides = {"architectures": ["MemDecForCausalLM"]}
    block = {"model": memory, "alpha": 0.6}
    for _ in range(2):
        config = start(base, block, model_impl="auto", hf_overrides=overrides)
        assert config.model_config.hf_config.architectures == ["MemDecForCausalLM"]


@pytest.mark.parametrize("alpha", [1.5, -0.1, "x", float("nan"), True, [0.5]])
def test_bad_alpha(alpha, start, pair):
    with pytest.raises(ValueError, match="^memdec alpha must be a number between 0 and 1"):
        start(pair[0], {"model": pair[1], "alpha": alpha})


@pytest.mark.parametrize(
    ("block", "options", "sentence"),
    [
        ({}, {}, "memdec needs the folder of a memory"),
        ({"model": 3}, {}, "memdec needs the folder of a memory"),
        ("MEMORY", {}, "memdec needs the folder of a memory"),
        ({"model": "/nowhere", "alpha": 0.5}, {}, "/nowhere is not a model folder"),
        ({"model": "MEMORY"}, {}, "has no memdec block, so it has no default weight"),
        ({"model": "MEMORY", "alpa": 0.5}, {}, "Unknown memdec setting 'alpa'"),
        ({"model": "MEMORY", "alpha": 0.5, "dtype": 16}, {}, "'dtype' must be of type str, got 16"),
        ({"model": "MEMORY", "alpha": 0.5, "tensor_parallel_size": 2}, {}, "must be 1 or the"),
        ({"model": "MEMORY", "alpha": 0.5, "dtype": "int7"}, {}, "vLLM refuses the memory .*int7"),
        ({"model": "MEMORY", "alpha": 0.5, "quantization": "x"}, {}, "vLLM refuses the memory"),
        (
            {"model": "MEMORY", "alpha": 0.5, "kv_cache_dtype": "x"},
            {},
            "kv_cache_dtype must be one",
        ),
        (
            {"model": "MEMORY", "alpha": 0.5, "dtype": "float32", "kv_cache_dtype": "bfloat16"},
            {},
            "bfloat16 beside float32 weights is read wrong by vLLM on a CPU",
        ),
        ({"model": "MEMORY/config.json", "alpha": 0.5}, {}, "is not a model folder"),
        ({"model": ""}, {}, "memdec needs the folder of a memory"),
        (
            {"model": "some/one", "revision": "v9", "alpha": 0.5},
            {},
            "at revision v9 can be had .* while HF_HUB_OFFLINE is set: .*`hf download some/one`",
        ),
        ({"memories": {"law": {"model": 3}}}, {}, "needs the folder of a memory of 'law'"),
        ({"memories": {f"m{i}": {} for i in range(257)}}, {}, "at most 256 memories, got 257"),
        ({"memories": {}}, {}, "at least one named memory"),
        ({"memories": [1]}, {}, "at least one named memory"),
        ({"memories": {"law": 3}}, {}, "memdec needs the folder of a memory"),
        ({"memories": {"none": {"model": "MEMORY"}}}, {}, "cannot be called 'none'"),
        ({"memories": {"a b": {"model": "MEMORY"}}}, {}, "cannot be called 'a b'"),
        ({"memories": {"law": {"model": "MEMORY"}}, "alpha": 1}, {}, "'alpha' beside 'memories'"),
        (
            {"memories": {"law": {"model": "MEMORY"}, "bio": {"model": "MEMORY"}}},
            {},
            r"\"default\" must be one of \['law', 'bio', 'none'\], got None",
        ),
        (None, {}, "--model-impl memdec needs a memory"),
        ({"model": "MEMORY", "alpha": 0.5}, {"model_impl": "auto"}, "add --model-impl memdec"),
        pytest.param(
            {"model": "MEMORY", "alpha": 0.5},
            {"pipeline_parallel_size": 2},
            "pipeline parallelism",
            marks=pytest.mark.feature(
                "pipeline parallelism", refused="base and memory are not split into stages yet"
            ),
        ),
        ({"model": "MEMORY", "alpha": 0.5}, {"tensor_parallel_size": 2}, "3 attention heads"),
        pytest.param(
            {"model": "MEMORY", "alpha": 0.5},
            {"enable_prompt_embeds": True},
            "prompt embeddings",
            marks=pytest.mark.feature(
                "prompt embeddings", refused="base and memory share token ids, not embeddings"
            ),
        ),
        pytest.param(
            {"model": "MEMORY", "alpha": 0.5},
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"shared_storage_path": "/nowhere"},
                }
            },
            r"an external KV cache \(kv_transfer_config\) yet: start without it",
            marks=pytest.mark.feature(
                "external KV cache", refused="a connector may know no cache salt"
            ),
        ),
        pytest.param(
            {"model": "MEMORY", "alpha": 0.5},
            {"kv_offloading_size": 1.0},
            "KV offloading",
            marks=pytest.mark.feature(
                "external KV cache", refused="a connector may know no cache salt"
            ),
        ),
        pytest.param(
            {"model": "MEMORY", "alpha": 0.5},
            {"runner": "pooling"},
            "pooling",
            marks=pytest.mark.feature("pooling", refused="only next-token probabilities are mixed"),
        ),
        pytest.param(
            {"model": "MEMORY", "alpha": 0.5},
            {"convert": "embed"},
            "pooling",
            marks=pytest.mark.feature("pooling", refused="only next-token probabilities are mixed"),
        ),
        ({"model": "MEMORY", "alpha": 0.5}, {"enable_dbo": True}, "dual-batch overlap"),
        ({"model": "MEMORY", "alpha": 0.5}, {"mm_encoder_only": True}, "encoder of images alone"),
        ({"model": "MEMORY", "alpha": 0.5, "with_images": 1}, {}, "'with_images' must be of type"),
        (
            {"model": "MEMORY", "alpha": 0.5},
            {"speculative_config": {"method": "eagle", "model": "x"}},
            "speculation by 'eagle'",
        ),
        (
            {"model": "MEMORY", "alpha": 0.5},
            {
                "speculative_config": {
                    "method": "draft_model",
                    "model": "MEMORY",
                    "num_speculative_tokens": 2,
                    "enable_adaptive_verification": True,
                }
            },
            "adaptive verification",
        ),
        ({"model": "MEMORY", "alpha": 0.5, "overlap": 1}, {}, "'overlap' must be true or false"),
        ({"model": "MEMORY", "alpha": 0.5}, {"max_model_len": 300}, "max_model_len"),
        ({"model": "MEMORY", "alpha": 0.5, "served_as": 3}, {}, "'served_as' must be a name, or"),
        ({"model": "MEMORY", "alpha": 0.5, "served_as": {}}, {}, "'served_as' must be a name, or"),
        ({"model": "MEMORY", "alpha": 0.5, "served_as": ""}, {}, "'served_as' must be a name, or"),
        (
            {"model": "MEMORY", "alpha": 0.5, "served_as": {"law": 2}},
            {},
            "'served_as': the weight of 'law' must be a number between 0 and 1, got 2",
        ),
        (
            {"model": "MEMORY", "alpha": 0.5, "served_as": {"law": "auto"}},
            {},
            "'served_as': the weight of 'law' is 'auto', which needs a gate",
        ),
        ({"model": "MEMORY", "alpha": 0.5, "base_served_as": 3}, {}, "'base_served_as' must be a"),
    ],
)
def test_refused(block, options, sentence, start, pair):
    text = json.loads(json.dumps(block).replace("MEMORY", pair[1]))
    with pytest.raises(ValueError, match=sentence):
        start(pair[0], text, **options)


LAW, BIO = {"model": "MEMORY", "alpha": 0.5}, {"model": "MEMORY", "alpha": 0.5}
GIVE = "give one of them another name, a memory by 'served_as', the base alone by 'base_served_as'"


@pytest.mark.parametrize(
    ("more", "options", "what"),
    [
        ({"memories": {"law": LAW | {"served_as": "bio"}}}, {}, None),
        ({"served_as": "bio"}, {}, "'bio' would be both the memory 'bio' and the memory 'law'"),
        ({"served_as": {"law": None, "none": 0}}, {}, "both the base alone and the memory 'law'"),
        ({"base_served_as": "bio"}, {}, "'bio' would be both the memory 'bio' and the base alone"),
        ({}, {"served_model_name": "law"}, "both the base and the memory 'law'"),
        ({}, {"served_model_name": ["tiny", "none"]}, "both the base and the base alone"),
        ({"default": "none"}, {"served_model_name": ["tiny", "none"]}, None),
        ({"base_served_as": "bare"}, {"served_model_name": ["tiny", "none"]}, "the base alone"),
        ({"served_as": "x"}, {"served_model_name": "law"}, "both the base and the memory 'law'"),
        ({"served_as": {"law": "alone"}}, {}, None),
        ({"base_served_as": "tiny"}, {"served_model_name": "tiny"}, "both the base and the base"),
        ({"served_as": "BASE"}, {}, "both the base and the memory 'law'"),
    ],
)
def test_a_name_means_one_model(more, options, what, start, pair):
    """Of the base, of memories, and of the base alone; the base alone needs none of its own.

    That is where no memory is the default.
    """
    block = {"memories": {"law": LAW, "bio": BIO}, "default": "law"}
    if "served_as" in more:
        block["memories"] = {"law": LAW | more, "bio": BIO}
        more = {}
    text = json.dumps(block | more).replace("MEMORY", pair[1]).replace("BASE", pair[0])
    if what is None:
        return start(pair[0], json.loads(text), **options)
    with pytest.raises(ValueError, match=f"{what}.*{GIVE}"):
        start(pair[0], json.loads(text), **options)


def test_other_tokenizer(start, pair, tiny_model):
    other = tiny_model("llama", seed=1, tokenizer=7)
    with pytest.raises(ValueError, match="another tokenizer than the base .* of one family"):
        start(pair[0], {"model": other, "alpha": 0.5})


def test_no_tokenizer(start, pair, tmp_path):
    import shutil

    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"{pair[1]}/{name}", tmp_path)
    with pytest.raises(ValueError, match="has no readable tokenizer"):
        start(pair[0], {"model": str(tmp_path), "alpha": 0.5})


@pytest.fixture
def compiled(tiny_model, tmp_path):
    """Return a memory folder with a memdec block, as `memdec build` leaves it, and its block."""
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(tiny_model("llama", seed=1), tmp_path, dirs_exist_ok=True)
    block = {
        "alpha": 0.25,
        "tokenizer_fingerprint": tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)),
        "base": "some/base",
        "temperature": 16.0,
    }
    write_block(tmp_path, MemoryBlock(**block))
    return tmp_path, block


def test_block_gives_the_default(start, pair, compiled):
    config = start(pair[0], {"model": str(compiled[0])})
    assert MemDecConfig.from_vllm(config).memories[0].alpha == 0.25
    config = start(pair[0], {"model": str(compiled[0]), "alpha": 0.0})
    assert MemDecConfig.from_vllm(config).memories[0].alpha == 0.0


def test_block_of_another_tokenizer(start, pair, compiled):
    folder, block = compiled
    write_block(folder, MemoryBlock(**block | {"tokenizer_fingerprint": "0" * 64}))
    with pytest.raises(ValueError, match="another tokenizer .* compiled for some/base"):
        start(pair[0], {"model": str(folder)})


@pytest.mark.feature("base without attention", refused="only decoders with attention are mixed")
def test_models_of_other_kinds(start, pair, tmp_path):
    """Read from config.json alone, so a folder without weights is enough."""
    import shutil

    import transformers

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{pair[0]}/{name}", tmp_path)
    config = transformers.MambaConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2)
    config.architectures = ["MambaForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The base .* is a model without attention"):
        start(str(tmp_path), {"model": pair[1], "alpha": 0.5})
    with pytest.raises(ValueError, match="The memory .* is a state-space or hybrid model"):
        start(pair[0], {"model": str(tmp_path), "alpha": 0.5})
    config = transformers.PaliGemmaConfig()
    config.architectures = ["PaliGemmaForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The memory .* is multimodal, .* a text decoder"):
        start(pair[0], {"model": str(tmp_path), "alpha": 0.5})


@pytest.mark.feature("encoder-decoder base", refused="only decoders are mixed")
def test_encoder_decoder(start, pair, tmp_path):
    """Every encoder-decoder that vLLM has is multimodal too."""
    import shutil

    import transformers

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{pair[0]}/{name}", tmp_path)
    config = transformers.WhisperConfig(vocab_size=1000, d_model=64)
    config.architectures = ["WhisperForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The base .* is an encoder-decoder, .* mixes decoders"):
        start(str(tmp_path), {"model": pair[1], "alpha": 0.5})
    with pytest.raises(ValueError, match="The memory .* is multimodal"):
        start(pair[0], {"model": str(tmp_path), "alpha": 0.5})


@pytest.mark.feature("sleep and wake", refused="by vLLM itself on a CPU; not run on a GPU")
def test_sleep(start, pair):
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform."):
        start(pair[0], {"model": pair[1], "alpha": 0.5}, enable_sleep_mode=True)


@pytest.mark.parametrize(
    ("hook", "sentence"),
    [
        ("get_model_state_cls", "keeps a state of its own for each request"),
        ("get_kv_cache_groups", "plans its KV cache itself"),
    ],
)
def test_a_base_with_hooks_of_its_own(hook, sentence, start, pair, monkeypatch):
    """vLLM asks the composite, so what the base keeps by itself would silently be lost."""
    from vllm.model_executor.models.llama import LlamaForCausalLM

    start(pair[0], {"model": pair[1], "alpha": 0.5})
    monkeypatch.setattr(LlamaForCausalLM, hook, classmethod, raising=False)
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM\) {sentence}"):
        start(pair[0], {"model": pair[1], "alpha": 0.5})


def test_drafts_beside_mamba_1(start, pair, tmp_path):
    """On every device: vLLM does not take that state back where drafts are rejected."""
    base = str(tmp_path)
    bases.jamba().save_pretrained(base)
    save_tokenizer(base)
    block = {"model": pair[1], "alpha": 0.5}
    start(base, block)
    with pytest.raises(ValueError, match="has layers of the kind MAMBA1, whose state vLLM does"):
        start(base, block | {"speculative_tokens": 3})


def test_states_that_drafts_leave_behind():
    """By the shapes of a class's states, which vLLM asks for without weights."""
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator as Shapes

    from vllm_memdec.startup import kept_state

    assert kept_state(Shapes.mamba1_state_shape(1, 64, 16, 4)) == "MAMBA1"
    assert kept_state(Shapes.linear_attention_state_shape(4, 1, 16)) == "LINEAR"
    assert kept_state(Shapes.mamba2_state_shape(1, 64, 1, 4, 16, 16, 4)) is None
    assert kept_state(Shapes.short_conv_state_shape(1, 64, 3)) is None
    assert kept_state(Shapes.gated_delta_net_state_shape(1, 2, 2, 16, 16, 4)) is None


def test_positions_of_a_memory_that_names_none():
    """vLLM then gives a number of its own."""
    from types import SimpleNamespace

    from vllm_memdec.engine_config import positions_of

    memory = SimpleNamespace(
        hf_text_config=SimpleNamespace(rope_parameters={"rope_type": "dynamic"}),
        model_arch_config=SimpleNamespace(derived_max_model_len_and_key=(float("inf"), None)),
        max_model_len=2048,
    )
    assert positions_of(memory, is_given=False) == 2048


def test_a_memory_has_a_configuration_of_its_own(start, pair):
    """The base's is not written into, and no two memories share a key of compiled code."""
    from vllm_memdec.engine_config import memory_vllm_config

    config = start(pair[0], {"model": pair[1], "alpha": 0.5})
    config.parallel_config.is_moe_model = True  # as for a mixture of experts
    [memory] = MemDecConfig.from_vllm(config).memories
    made = [memory_vllm_config(config, memory, number) for number in range(2)]
    assert config.parallel_config.is_moe_model and not made[0].parallel_config.is_moe_model
    assert len({c.compute_hash() for c in (config, *made)}) == 3
    assert MemDecConfig.from_vllm(made[0]) == MemDecConfig.from_vllm(config)


def test_plain_vllm_is_left_alone(start, pair):
    config = start(pair[0], model_impl="auto", additional_config={"other": 1})
    assert config.model_config.hf_config.architectures == ["LlamaForCausalLM"]


def test_default_null_means_the_only_memory(start, pair):
    block = {"memories": {"law": {"model": pair[1], "alpha": 0.5}}, "default": None}
    assert MemDecConfig.from_vllm(start(pair[0], block)).default == "law"


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"], ids=["cut off", "a list", "not UTF-8"])
def test_broken_config_of_a_memory(text, start, pair, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"(not valid JSON|not a JSON object).*copy the memory"):
        start(pair[0], {"model": str(tmp_path), "alpha": 0.5})


def test_rust_front_end(start, pair, monkeypatch):
    """It would let requests through unchecked and unsalted."""
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="vLLM's Rust front end"):
        start(pair[0], {"model": pair[1], "alpha": 0.5})


def test_a_home_and_a_slash_at_the_end(start, pair, monkeypatch):
    """JSON is quoted: no shell has read the path."""
    monkeypatch.setenv("HOME", os.path.dirname(pair[1]))
    config = start(f"{pair[0]}/", {"model": f"~/{os.path.basename(pair[1])}/", "alpha": 0.5})
    assert MemDecConfig.from_vllm(config).memories[0].model == f"{pair[1]}/"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"allowed_token_ids": [*range(1000)] * 2}, "allowed_token_ids: .* at most 1024 tokens"),
        ({"min_tokens": 2, "stop_token_ids": [*range(129)]}, "stop_token_ids beside min_tokens: "),
    ],
)
def test_lists_beyond_those_of_the_v2_runner(asked, sentence, start, pair, monkeypatch):
    """Only its worker checks them, and ends; where vLLM takes them, so do we."""
    from vllm import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    base, memory = pair
    config = start(base, {"model": memory, "alpha": 0.5})
    processor = InputProcessor(config)
    prompt = {"type": "token", "prompt_token_ids": [1, 2, 3]}
    few = SamplingParams(max_tokens=9, min_tokens=2, stop_token_ids=[*range(100)])
    many = SamplingParams(max_tokens=9, **asked)
    for params in (few, many):
        processor.process_inputs("0", prompt, params, ("generate",))
    # vLLM lets nobody choose that runner without Triton, which this process has not.
    monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    processor.process_inputs("1", prompt, few, ("generate",))
    with pytest.raises(ValueError, match=sentence):
        processor.process_inputs("2", prompt, many, ("generate",))
