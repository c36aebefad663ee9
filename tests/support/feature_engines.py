"""The engines of the feature matrix, how its tests ask them, and how they check the answers."""

import pytest
from support import bases, oracle
from support.choices import PLAIN, PROMPT, mixture
from vllm import SamplingParams

COMPACT = {"disable_any_whitespace": True}
# By schedule: of 12 blocks and chunks of 32 tokens, or none that matters here.
ENGINES = {
    "usual": {"block_size": 32, "structured_outputs_config": {"backend": "xgrammar"} | COMPACT},
    "tight": {
        "block_size": 32,
        "num_gpu_blocks_override": 12,
        "enable_prefix_caching": False,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "scheduling_policy": "priority",
        "structured_outputs_config": {"backend": "guidance"} | COMPACT,
    },
}


# What structured output is asked for, and the pattern that its text has.
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
STRUCTURED = {
    "choice": ({"choice": WORDS}, "|".join(WORDS)),
    "regex": ({"regex": "[a-f]{3,6}-[0-9]{2}"}, "[a-f]{3,6}-[0-9]{2}"),
    "json": ({"json": SCHEMA}, JSON),
}
# One of each kind that vLLM treats in its own way, beside the dense one, and its groups of KV cache
# beside two memories. On a CPU nothing drafts beside a hybrid: that is refused.
OTHER_BASES = {"LFM2": 7, "Qwen3-MoE": 1, "Gemma 3, multimodal": 7}


def options_of(name, base):
    """Return the options of an engine of ENGINES with one of OTHER_BASES; None: with the dense."""
    options = dict(ENGINES[name], disable_log_stats=False)
    if base is not None:
        options |= bases.CASES.get(base, bases.Case()).options
        if "num_gpu_blocks_override" in options:
            options["num_gpu_blocks_override"] *= OTHER_BASES[base]
    return options


def engines(*names):
    """Parametrise a test over engines of these names: without drafts and with them, other bases."""
    params = [pytest.param((name, 0, None), id=name) for name in names]
    params += [
        pytest.param((name, tokens, None), id=f"{name}, {tokens} drafts", marks=pytest.mark.drafts)
        for name in names
        for tokens in (3, "auto")
    ]
    params += [
        pytest.param((name, 0, base), id=f"{name}, {base}")
        for name in names
        for base in OTHER_BASES
    ]
    return pytest.mark.parametrize("llm", params, indirect=True)


def generate(llm, prompts, choices, **options):
    """Return vLLM's outputs; greedy, without end and log-probabilities unless asked otherwise."""
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


def count(llm, name):
    """Return one of vLLM's counters; 0 where nothing was counted yet."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")
