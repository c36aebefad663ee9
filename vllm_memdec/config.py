"""The serving configuration, and every check that refuses to start rather than serve wrong.

The checks run in the front end, when vLLM turns its arguments into a ModelConfig: before any worker
exists, so that the sentence a user has to read is the last line on the screen. There the base's own
ModelConfig is built by vLLM as always, and only the class to load is exchanged for the composite.
"""

import copy
import importlib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vllm_memdec.checkpoint import MemoryBlock, check_alpha, read_block, tokenizer_fingerprint
from vllm_memdec.plugin import ARCHITECTURE

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.config import ModelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

MODEL_IMPL = "memdec"
EXAMPLE = '--additional-config \'{"memdec": {"model": "MEMORY"}}\''
# A drafter outside this set reads the target's hidden states; ours are two models' side by side.
SPECULATION = (None, "draft_model", "ngram", "ngram_gpu", "suffix")


@dataclass(frozen=True)
class MemDecConfig:
    """The `memdec` block of --additional-config, checked, with the default weight filled in."""

    model: str  # folder of the memory
    alpha: float  # weight of the memory for requests that do not give their own
    block: MemoryBlock | None  # what the memory says of itself; None for a plain causal LM

    @classmethod
    def parse(cls, settings: Any) -> "MemDecConfig":
        """Return the configuration for a `memdec` block, or raise ValueError."""
        known = {field.name for field in fields(cls)} - {"block"}
        if not isinstance(settings, dict) or not isinstance(settings.get("model"), str):
            raise ValueError(f"memdec needs the folder of a memory: {EXAMPLE}.")
        if unknown := sorted(set(settings) - known):
            raise ValueError(
                f"Unknown memdec setting {unknown[0]!r}: the settings are {sorted(known)}."
            )
        block = read_block(settings["model"])
        alpha = settings.get("alpha")
        if alpha is None:
            if block is None:
                raise ValueError(
                    f"{settings['model']} has no memdec block, so it has no default weight: "
                    'give one between 0 and 1, e.g. {"memdec": {"model": ..., "alpha": 0.5}}.'
                )
            alpha = block.alpha
        return cls(settings["model"], check_alpha(alpha, "memdec alpha"), block)

    @classmethod
    def from_vllm(cls, vllm_config: "VllmConfig") -> "MemDecConfig":
        """Return the configuration a worker was started with."""
        return cls.parse(memdec_block(vllm_config.additional_config))


def memdec_block(additional_config: Any) -> Any:
    """Return the memdec block of vLLM's additional_config, or None."""
    return additional_config.get("memdec") if isinstance(additional_config, dict) else None


def create_model_config(
    args: "EngineArgs", build: "Callable[[EngineArgs], ModelConfig]"
) -> "ModelConfig":
    """Build vLLM's ModelConfig; for a memdec start check everything and select the composite."""
    settings = memdec_block(args.additional_config)
    overrides = args.hf_overrides if isinstance(args.hf_overrides, dict) else {}
    by_name = overrides.get("architectures") == [ARCHITECTURE]  # the other way to ask for it
    if by_name:
        args = copy.copy(args)
        args.hf_overrides = {k: v for k, v in overrides.items() if k != "architectures"}
    if args.model_impl != MODEL_IMPL and not by_name:
        if settings is not None:
            raise ValueError(
                "--additional-config has a memdec block, but --model-impl is "
                f"{str(args.model_impl)!r}: add --model-impl {MODEL_IMPL}, or drop the block."
            )
        return build(args)
    if settings is None:
        raise ValueError(f"--model-impl {MODEL_IMPL} needs a memory: {EXAMPLE}.")
    importlib.import_module("vllm_memdec.model")  # what is broken shows here, not in a worker
    config = MemDecConfig.parse(settings)
    check_arguments(args)
    base = build(args)
    check_model(base, "The base")
    memory = memory_model_config(config.model, base)
    check_model(memory, "The memory")
    check_tokenizers(base, config)
    check_heads(memory, args.tensor_parallel_size)
    fit_positions(base, memory.max_model_len, given=args.max_model_len)
    # Classes are looked up by this name alone; everything else in `base` stays what vLLM derived
    # from the base, so its own special cases apply. Without the plugin the name is refused.
    base.hf_config.architectures = [ARCHITECTURE]
    return base


def memory_model_config(
    folder: str, base: "ModelConfig", max_model_len: int | None = None
) -> "ModelConfig":
    """Return vLLM's own ModelConfig of the memory, in the base's dtype."""
    from vllm.config import ModelConfig

    return ModelConfig(
        model=folder,
        tokenizer=base.tokenizer,
        trust_remote_code=base.trust_remote_code,
        dtype=base.dtype,
        seed=base.seed,
        max_model_len=max_model_len,
        enforce_eager=base.enforce_eager,
        runner="generate",
        model_impl="vllm",
    )


def check_arguments(args: "EngineArgs") -> None:
    """Refuse what the composite cannot serve yet."""
    speculation = args.speculative_config or {}
    method = speculation.get("method", args.spec_method)
    refused = {
        "pipeline parallelism": args.pipeline_parallel_size > 1,
        "prefill context parallelism": args.prefill_context_parallel_size > 1,
        "decode context parallelism": args.decode_context_parallel_size > 1,
        "dual-batch overlap": args.enable_dbo or args.ubatch_size > 1,
        "prompt embeddings": args.enable_prompt_embeds,
        "LoRA": args.enable_lora,
        "pooling": args.runner == "pooling" or args.convert not in ("auto", "none"),
        f"speculation by {method!r}": method not in SPECULATION,
    }
    for feature, asked in refused.items():
        if asked:
            raise ValueError(f"vllm-memdec does not support {feature} yet: start without it.")


def check_model(model_config: "ModelConfig", role: str) -> None:
    """Refuse a model that is not a text decoder with attention."""
    refused = {
        "multimodal": model_config.is_multimodal_model,
        "an encoder-decoder": model_config.is_encoder_decoder,
        "a state-space or hybrid model": model_config.is_hybrid
        or model_config.is_attention_free
        or model_config.has_inner_state,
        "not a text-generation model": model_config.runner_type != "generate",
    }
    for what, is_so in refused.items():
        if is_so:
            raise ValueError(
                f"{role} {model_config.model} is {what}, which vllm-memdec does not support yet: "
                "it mixes two text decoders."
            )


def check_heads(memory: "ModelConfig", tensor_parallel_size: int) -> None:
    """Refuse a split of the memory's attention heads that vLLM would refuse in every worker."""
    heads = memory.model_arch_config.total_num_attention_heads
    if heads % tensor_parallel_size:
        raise ValueError(
            f"--tensor-parallel-size {tensor_parallel_size} does not divide the memory's "
            f"{heads} attention heads: use a size that does."
        )


def check_tokenizers(base: "ModelConfig", config: MemDecConfig) -> None:
    """Refuse a memory whose token ids mean other text than the base's."""
    ours = fingerprint(base.tokenizer, base.tokenizer_revision, base.trust_remote_code)
    if config.block is not None:
        theirs = config.block.tokenizer_fingerprint
        hint = f"it was compiled for {config.block.base}; build a memory for this base"
    else:
        theirs = fingerprint(config.model, None, base.trust_remote_code)
        hint = "use two models of one family"
    if ours != theirs:
        raise ValueError(
            f"The memory {config.model} has another tokenizer than the base {base.model}: {hint}."
        )


def fingerprint(name: str, revision: str | None, trust_remote_code: bool) -> str:
    """Return the fingerprint of the tokenizer in a folder or hub repository."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{name} has no readable tokenizer, so nothing shows that base and memory share one "
            f"({type(error).__name__}): copy the tokenizer files into it."
        ) from error
    return tokenizer_fingerprint(tokenizer)


def fit_positions(base: "ModelConfig", longest: int, given: int | None) -> None:
    """Keep requests within the memory's positions: lower a derived limit, refuse a given one."""
    if base.max_model_len <= longest:
        return
    if given is not None and given > 0:
        raise ValueError(
            f"--max-model-len {given} is longer than the memory's {longest} positions: "
            f"use --max-model-len {longest}."
        )
    from vllm.logger import init_logger

    # vLLM configures handlers for its own namespace only.
    init_logger("vllm.plugins.memdec").info(
        "memdec: max_model_len lowered from the base's %d to the memory's %d.",
        base.max_model_len,
        longest,
    )
    base.max_model_len = longest
