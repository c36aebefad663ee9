"""Scalings of rope: base and memory each have their own, and keep it beyond their native length."""

import pytest
from support import oracle
from support.bases import TINY
from support.tiny_models import save_tokenizer

ALPHAS = (0.0, 0.4, 1.0)
NATIVE, POSITIONS = 64, 256  # tokens that a scaling starts from, and that it stretches to
FREQUENCIES = 16  # of rope: half of a head's 32 numbers
THETA = {"rope_theta": 10000.0}
SCALED = THETA | {"factor": 4.0, "original_max_position_embeddings": NATIVE}
YARN = SCALED | {"rope_type": "yarn"}
LLAMA3 = SCALED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = SCALED | {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.02 * i for i in range(FREQUENCIES)],
    "long_factor": [1.0 + 0.5 * i for i in range(FREQUENCIES)],
}
DYNAMIC = THETA | {"rope_type": "dynamic", "factor": 4.0}
PLAIN = THETA | {"rope_type": "default"}
# name -> (class of the config, its own settings)
MODELS = {
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "yarn": ("Qwen3Config", {"rope_parameters": YARN}),
    # vLLM multiplies the positions of this one by the factor.
    "linear": (
        "LlamaConfig",
        {
            "max_position_embeddings": NATIVE,
            "rope_parameters": THETA | {"rope_type": "linear", "factor": 4.0},
        },
    ),
    "dynamic": ("LlamaConfig", {"max_position_embeddings": NATIVE, "rope_parameters": DYNAMIC}),
    # Its long factors hold from a length on, Hugging Face's of the text, vLLM's of max_model_len.
    "longrope": (
        "Phi3Config",
        {"original_max_position_embeddings": NATIVE, "rope_parameters": LONGROPE},
    ),
    "by layer type": (
        "Gemma3TextConfig",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 32,
            "rope_parameters": {
                "sliding_attention": PLAIN,
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    ),
    "plain": ("LlamaConfig", {"rope_parameters": PLAIN}),
    "short": ("LlamaConfig", {"max_position_embeddings": NATIVE, "rope_parameters": PLAIN}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a factory of random model folders: model(name of MODELS, seed, other settings)."""
    import torch
    import transformers

    made = {}

    def make(name, seed=0, **changed):
        key = (name, seed, str(changed))
        if key not in made:
            kind, own = MODELS[name]
            # The spread: see tiny_config().
            settings = TINY | {"max_position_embeddings": POSITIONS, "initializer_range": 0.15}
            config = getattr(transformers, kind)(**settings | own | changed)
            folder = tmp_path_factory.mktemp("rope")
            torch.manual_seed(seed)
            made_model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            made_model.save_pretrained(folder)
            save_tokenizer(folder)
            made[key] = str(folder)
        return made[key]

    return make


def ask(llm):
    """Return the answers to one text for all weights: as long as the context, prompt included."""
    from vllm import SamplingParams

    asked = {"temperature": 0, "max_tokens": 1, "ignore_eos": True, "detokenize": False}
    [prompt] = oracle.prompts(1, POSITIONS - 1, POSITIONS - 1, 1000)
    params = [
        SamplingParams(logprobs=5, prompt_logprobs=5, extra_args={"memdec_alpha": alpha}, **asked)
        for alpha in ALPHAS
    ]
    return llm.generate([{"prompt_token_ids": prompt}] * len(ALPHAS), params, use_tqdm=False)


def error(outputs, base, memory, *length):
    """Return the largest error of all weights' answers; length: as oracle.mixture() takes it."""
    asked = zip(outputs, ALPHAS, strict=True)
    return max(oracle.gap(output, base, memory, alpha, *length) for output, alpha in asked)


@pytest.mark.parametrize(
    ("base", "memory"),
    [
        ("llama3", "plain"),
        ("linear", "plain"),
        ("longrope", "plain"),
        ("by layer type", "yarn"),
        ("plain", "longrope"),
        ("yarn", "llama3"),
    ],
)
def test_each_has_its_own_rope(base, memory, model, engine):
    base, memory = model(base), model(memory, seed=1)
    with engine(base, memory, max_model_len=POSITIONS) as llm:
        assert error(ask(llm), base, memory) < oracle.TOLERANCE


def test_a_longrope_s_short_range(model, engine):
    """Where no --max-model-len is given, it is all that the memory has, by its short factors."""
    base, memory = model("plain"), model("longrope", seed=1)
    with engine(base, memory) as llm:
        assert error(ask(llm), base, memory, NATIVE) < oracle.TOLERANCE


def test_dynamic_rope(model, engine):
    """vLLM's is from the first token on what Hugging Face's becomes at the end of the context.

    That is, where the config tells the length of the table; without it vLLM reads past its end.
    """
    base, memory = model("dynamic"), model("plain", seed=1)
    table = {
        "max_position_embeddings": POSITIONS,
        "rope_parameters": DYNAMIC | {"max_trained_positions": NATIVE},
    }
    with engine(base, memory, max_model_len=POSITIONS, hf_overrides=table) as llm:
        assert error(ask(llm), base, memory) < oracle.TOLERANCE


def test_overrides_are_the_bases_alone(model, engine):
    yarn = {"rope_parameters": YARN, "max_position_embeddings": POSITIONS}
    base, memory = model("short"), model("plain", seed=1)
    stretched, leaked = model("short", **yarn), model("plain", seed=1, rope_parameters=YARN)
    with engine(base, memory, hf_overrides=yarn) as llm:
        assert llm.llm_engine.model_config.max_model_len == POSITIONS
        outputs = ask(llm)
    assert error(outputs, stretched, memory) < oracle.TOLERANCE
    assert error(outputs, stretched, leaked) > 0.1 and error(outputs, base, memory) > 0.1


@pytest.mark.parametrize(
    ("memory", "derived", "given"),
    [
        ("plain", POSITIONS, POSITIONS),
        ("linear", POSITIONS, POSITIONS),
        ("longrope", NATIVE, POSITIONS),  # vLLM derives the short range, and takes the long one
        ("dynamic", NATIVE, NATIVE),  # vLLM derives four times as many as it can count
    ],
)
def test_positions_of_a_memory(memory, derived, given, model):
    """By themselves, and where --max-model-len asks for more of them than there are."""
    from vllm import EngineArgs

    from vllm_memdec.engine_config import memory_lengths

    block = {"memdec": {"model": model(memory), "alpha": 0.5}}
    options = {"model_impl": "memdec", "additional_config": block, "dtype": "float32"}
    base = model("plain", max_position_embeddings=8 * POSITIONS)

    def start(**asked):
        config = EngineArgs(base, **options, **asked).create_engine_config()
        return config.model_config.max_model_len, *memory_lengths(config)

    assert start() == (8 * POSITIONS, derived)
    assert start(max_model_len=given + 1) == (given + 1, given)
    assert start(max_model_len=48) == (48, 48)


def test_128k(model, engine):
    """An answer 40,000 tokens from the start.

    There angles of rope in float32 are off by 1e-3, which moves answers by 5e-5: vLLM and Hugging
    Face round alike. A plain rope in place of the YaRN moves them by 1.
    """
    import torch
    from vllm import SamplingParams

    native = 1 << 15
    long = {
        "max_position_embeddings": 4 * native,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "hidden_size": 32,
    }
    yarn = YARN | {"original_max_position_embeddings": native}
    base = model("yarn", rope_parameters=yarn, **long)
    memory = model("plain", seed=1, **long)
    [prompt] = oracle.prompts(1, 40_000, 40_000, 1000)
    asked = {"temperature": 0, "max_tokens": 3, "ignore_eos": True, "detokenize": False}
    with engine(base, memory, kv_cache_memory_bytes=1 << 27) as llm:
        assert llm.llm_engine.model_config.max_model_len == 4 * native
        [output] = llm.generate(
            [{"prompt_token_ids": prompt}], SamplingParams(logprobs=5, **asked), use_tqdm=False
        )
    answer = output.outputs[0]
    ids = torch.tensor([[*prompt, *answer.token_ids]])
    with torch.no_grad():  # of the last rows alone: all would take gigabytes
        parts = [oracle.load(model)(ids, logits_to_keep=4).logits[0] for model in (base, memory)]
    base_NV, memory_NV = (logits_NV.softmax(-1) for logits_NV in parts)
    key_NV = (0.4 * base_NV + 0.6 * memory_NV).log()
    for key_V, row in zip(key_NV, answer.logprobs, strict=False):
        for token, entry in row.items():
            assert entry.logprob == pytest.approx(key_V[token].item(), abs=oracle.TOLERANCE)
