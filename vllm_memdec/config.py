"""The serving configuration, and every check that refuses to start rather than serve wrong.

The checks run in the front end, when vLLM turns its arguments into a ModelConfig: before any worker
exists, so that the sentence a user has to read is the last line on the screen. There the base's own
ModelConfig is built by vLLM as always, and only the class to load is exchanged for the composite.
"""

import copy
import importlib
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_memdec import drafting
from vllm_memdec.checkpoint import (
    MemoryBlock,
    check_alpha,
    check_table,
    read_block,
    tokenizer_fingerprint,
)
from vllm_memdec.gate import check_gate, gate_path, read_gate
from vllm_memdec.plugin import ARCHITECTURE

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.config import ModelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

MODEL_IMPL = "memdec"
NONE = "none"  # the name by which a request asks for the base alone
ONLY = "memory"  # the name of a memory that was given without one
MOST = 256  # memories: bfloat16, which carries their numbers, is exact up to there
NOT_SETTINGS = ("name", "block", "gate_file")
SPECULATIVE, OVERLAP = "speculative_tokens", "overlap"
# Of a model's class, by vLLM's name.
OWN_HOOKS = {
    "get_model_state_cls": "keeps a state of its own for each request",
    "get_kv_cache_groups": "plans its KV cache itself",  # from 0.33 on
}
MOST_DRAFTED = 16  # tokens a step; even a memory that is always right gains little beyond
AUTO = "auto"  # in place of their number, or of a weight: what is best
EXAMPLE = '--additional-config \'{"memdec": {"model": "MEMORY"}}\''
# A drafter outside this set reads the target's hidden states; ours are two models' side by side.
SPECULATION = (None, "draft_model", "ngram", "ngram_gpu", "suffix")


@dataclass(frozen=True)
class MemoryConfig:
    """One memory of a server, checked, with its default weight filled in."""

    name: str
    model: str  # folder or hub id
    alpha: float | str  # weight for requests that do not give their own; "auto": the gate's
    revision: str | None = None  # of a hub id
    dtype: str | None = None  # the base's by default
    quantization: str | None = None  # what its config.json names by default
    kv_cache_dtype: str | None = None  # the base's by default
    tensor_parallel_size: int | None = None  # 1: a whole copy on each rank; the base's by default
    gate: bool = True  # False: a gate in the memory's folder is not used
    block: MemoryBlock | None = None  # what the memory says of itself; None for a plain causal LM
    # [position, alpha], each from its position on, in place of a gate: "auto" is these then.
    alpha_by_context: list[list[float]] | None = None
    gate_file: Path | None = None  # its gate; where there is one, weights are caps

    @property
    def weight(self) -> str:
        """Return in words what weight a request gets that does not ask for one."""
        if self.alpha != AUTO:
            return f"{self.alpha:g}"
        if not self.alpha_by_context:
            return AUTO
        pairs = self.alpha_by_context
        steps = ", ".join(f"{alpha:g} from position {start}" for start, alpha in pairs)
        return f"by context ({steps})"

    @classmethod
    def parse(cls, name: str, settings: Any) -> "MemoryConfig":
        """Return the configuration for one memory's settings, or raise ValueError."""
        known = {field.name for field in fields(cls)} - {*NOT_SETTINGS}
        which = "" if name == ONLY else f" of {name!r}"
        model = settings.get("model") if isinstance(settings, dict) else None
        if not isinstance(model, str) or not model:
            raise ValueError(f"memdec needs the folder of a memory{which}: {EXAMPLE}.")
        if unknown := sorted(set(settings) - known, key=str):
            raise ValueError(
                f"Unknown memdec setting {unknown[0]!r}{which}: the settings are {sorted(known)}."
            )
        for key, value in settings.items():
            kind = {"tensor_parallel_size": int, "gate": bool, "alpha_by_context": list}
            kind = kind.get(key, str)
            if key != "alpha" and value is not None and type(value) is not kind:
                raise ValueError(
                    f"memdec setting {key!r}{which} must be of type {kind.__name__}, got {value!r}."
                )
        block = read_block(settings["model"], settings.get("revision"))
        gate_file, table = None, settings.get("alpha_by_context")
        check_table(table, f"memdec alpha_by_context{which}")
        if table and settings.get("gate"):
            raise ValueError(
                f"memdec 'alpha_by_context'{which} takes the place of a gate: drop it or 'gate'."
            )
        if settings.get("gate") is not False and not table:
            gate_file = gate_path(settings["model"], settings.get("revision"))
        if gate_file is not None:
            check_gate(gate_file, read_gate(gate_file))
        elif settings.get("gate"):
            raise ValueError(f"{settings['model']} has no gate: run memdec calibrate.")
        alpha = settings.get("alpha")
        if table is None and gate_file is None and block is not None:
            table = block.alpha_by_context
        if alpha is None and (gate_file is not None or table):
            alpha = AUTO
        elif alpha is None:
            if block is None:
                raise ValueError(
                    f"{settings['model']} has no memdec block, so it has no default weight: "
                    'give one between 0 and 1, e.g. {"memdec": {"model": ..., "alpha": 0.5}}.'
                )
            alpha = block.alpha
        if alpha != AUTO:
            alpha = check_alpha(alpha, f"memdec alpha{which}")
        elif gate_file is None and not table:
            raise ValueError(
                f"memdec alpha{which} {AUTO!r} needs a gate or alpha_by_context, which "
                f"{settings['model']} has not: "
                "give a number between 0 and 1, or run memdec calibrate."
            )
        derived = {"name": name, "alpha": alpha, "block": block, "gate_file": gate_file}
        derived["alpha_by_context"] = table
        return cls(**settings | derived | {"gate": gate_file is not None})


@dataclass(frozen=True)
class MemDecConfig:
    """The `memdec` block of --additional-config, checked."""

    memories: tuple[MemoryConfig, ...]
    default: str  # name of the memory of requests that do not name one, or "none"
    speculative_tokens: int = 0  # that a memory drafts a step at most, for the mixture to verify
    adapts: bool = False  # whether fewer are drafted where that is faster
    overlap: bool = False  # whether memories run beside the base within a full CUDA graph

    @classmethod
    def parse(cls, settings: Any) -> "MemDecConfig":
        """Return the configuration for a `memdec` block, or raise ValueError.

        {"model": ..., ...} is one memory, named "memory"; {"memories": {NAME: {...}}, "default":
        NAME} are several. Beside either, "speculative_tokens" and "overlap".
        """
        tokens, overlap = 0, False
        if isinstance(settings, dict):
            settings = dict(settings)
            tokens = settings.pop(SPECULATIVE, 0)
            overlap = settings.pop(OVERLAP, False)
        adapts = tokens == AUTO
        if adapts:
            tokens = drafting.MOST
        if type(tokens) is not int or not 0 <= tokens <= MOST_DRAFTED:
            raise ValueError(
                f"memdec {SPECULATIVE!r} must be an integer from 0 to {MOST_DRAFTED} or {AUTO!r}, "
                f"got {tokens!r}."
            )
        if type(overlap) is not bool:
            raise ValueError(f"memdec {OVERLAP!r} must be true or false, got {overlap!r}.")
        if not isinstance(settings, dict) or "memories" not in settings:
            memory = MemoryConfig.parse(ONLY, settings)
            return cls((memory,), ONLY, tokens, adapts, overlap)
        if unknown := sorted(set(settings) - {"memories", "default"}, key=str):
            raise ValueError(
                f"Unknown memdec setting {unknown[0]!r} beside 'memories': "
                f"the settings there are {['default', 'memories', OVERLAP, SPECULATIVE]}."
            )
        names = [*settings["memories"]] if isinstance(settings["memories"], dict) else []
        if not names:
            raise ValueError('memdec "memories" must be an object of at least one named memory.')
        for name in names:
            if name == NONE or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", str(name)):
                raise ValueError(
                    f"A memory cannot be called {name!r}: use letters, digits, '_', '-' and '.', "
                    f"and not {NONE!r}, which means the base alone."
                )
        if len(names) > MOST:
            raise ValueError(f"memdec serves at most {MOST} memories, got {len(names)}.")
        default = settings.get("default")
        if default is None and len(names) == 1:
            default = names[0]
        if default not in (*names, NONE):
            raise ValueError(f'memdec "default" must be one of {[*names, NONE]}, got {default!r}.')
        memories = (MemoryConfig.parse(*item) for item in settings["memories"].items())
        return cls(tuple(memories), default, tokens, adapts, overlap)

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
    engine_args = args
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
    check_state(base)
    for memory in config.memories:
        check_kv_cache_dtype(memory)
        model = build_memory(memory, base)
        check_model(model, "The memory")
        check_tokenizers(base, memory)
        if memory.gate_file is not None:
            gate = read_gate(memory.gate_file, model.get_hidden_size())
            if warning := check_gate(memory.gate_file, gate):
                warn(warning)
        check_heads(model, memory.tensor_parallel_size, args.tensor_parallel_size)
        fit_positions(base, model.max_model_len, given=args.max_model_len)
    # Classes are looked up by this name alone; everything else in `base` stays what vLLM derived
    # from the base, so its own special cases apply. Without the plugin the name is refused.
    base.hf_config.architectures = [ARCHITECTURE]
    if config.speculative_tokens:
        draft_with_memory(engine_args, base.model, config.speculative_tokens, config.adapts)
    return base


def warn(sentence: str) -> None:
    """Log a warning where vLLM's log shows it."""
    from vllm.logger import init_logger

    init_logger("vllm.plugins.memdec").warning("memdec: %s", sentence)


def draft_with_memory(args: "EngineArgs", base: str, tokens: int, adapts: bool) -> None:
    """Ask vLLM for speculation with a draft model; the drafter's place is taken by the memory.

    vLLM wants the config of a draft model: the base's has the vocabulary that drafts have.
    """
    wanted = {
        "method": "draft_model",
        "model": base,
        "num_speculative_tokens": tokens,
        # With it a draft is accepted with probability alpha + (1 - alpha) * overlap, or more.
        "draft_sample_method": "probabilistic",
    }
    given = args.speculative_config or wanted  # where these arguments are used again it is ours
    if not wanted.items() <= given.items() or args.spec_method or args.spec_model:
        raise ValueError(
            f"memdec {SPECULATIVE!r} and --speculative-config are two ways to speculate: drop one."
        )
    if args.tensor_parallel_size > 1:
        raise ValueError(
            f"A memory does not draft under tensor parallelism yet: leave {SPECULATIVE!r} out."
        )
    if adapts:
        if args.async_scheduling:
            raise ValueError(
                f"{SPECULATIVE!r}: {AUTO!r} decides after each step, and --async-scheduling plans "
                "the next before that: drop one."
            )
        args.async_scheduling = False
    args.speculative_config = wanted


def build_memory(memory: MemoryConfig, base: "ModelConfig") -> "ModelConfig":
    """Return vLLM's ModelConfig of a memory, or one sentence that says why it has none."""
    from pydantic import ValidationError

    try:
        return memory_model_config(memory, base)
    except (ValueError, OSError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = first["msg"].removeprefix("Value error, ")
            if first["loc"]:  # one setting, not the whole
                reason = f"{first['loc'][0]}: {reason}, got {first['input']!r}."
        raise ValueError(f"vLLM refuses the memory {memory.model}: {reason}") from error


def check_kv_cache_dtype(memory: MemoryConfig) -> None:
    """Refuse what vLLM's KV cache does not know: in a worker it would be a KeyError."""
    from typing import get_args

    from vllm.config.cache import CacheDType

    known = get_args(CacheDType)
    if memory.kv_cache_dtype not in (None, *known):
        raise ValueError(
            f"memdec kv_cache_dtype must be one of {[*known]}, got {memory.kv_cache_dtype!r}."
        )


def memory_model_config(
    memory: MemoryConfig, base: "ModelConfig", max_model_len: int | None = None
) -> "ModelConfig":
    """Return vLLM's own ModelConfig of a memory, in the base's dtype unless it has its own."""
    from vllm.config import ModelConfig

    return ModelConfig(
        model=memory.model,
        revision=memory.revision,
        tokenizer=base.tokenizer,
        tokenizer_revision=base.tokenizer_revision,
        trust_remote_code=base.trust_remote_code,
        dtype=memory.dtype or base.dtype,
        quantization=memory.quantization,
        seed=base.seed,
        max_model_len=max_model_len,
        enforce_eager=base.enforce_eager,
        runner="generate",
        model_impl="vllm",
    )


def check_arguments(args: "EngineArgs") -> None:
    """Refuse what the composite cannot serve yet."""
    from vllm import envs

    speculation = args.speculative_config or {}
    method = speculation.get("method", args.spec_method)
    refused = {
        "vLLM's Rust front end": getattr(envs, "VLLM_USE_RUST_FRONTEND", False),  # has no hooks
        "fast prefill with shared KV": args.kv_sharing_fast_prefill,
        "pipeline parallelism": args.pipeline_parallel_size > 1,
        "prefill context parallelism": args.prefill_context_parallel_size > 1,
        "decode context parallelism": args.decode_context_parallel_size > 1,
        "dual-batch overlap": args.enable_dbo or args.ubatch_size > 1,
        "prompt embeddings": args.enable_prompt_embeds,
        "pooling": args.runner == "pooling" or args.convert not in ("auto", "none"),
        # The device's rows are then other requests' than those that the host counts.
        "adaptive verification": speculation.get("enable_adaptive_verification", False),
        f"speculation by {method!r}": method not in SPECULATION,
    }
    for feature, asked in refused.items():
        if asked:
            raise ValueError(f"vllm-memdec does not support {feature} yet: start without it.")


def check_model(model_config: "ModelConfig", role: str) -> None:
    """Refuse a model that is not a text decoder with attention."""
    # Compiled MoE layers find their weights by counting calls, so none may be left out of a step.
    refused = {
        "a mixture of experts": role == "The memory" and model_config.is_moe,
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


def check_state(base: "ModelConfig") -> None:
    """Refuse a base to which vLLM leaves what it asks the composite for: that would be lost."""
    from vllm import ModelRegistry

    model_cls, architecture = ModelRegistry.resolve_model_cls(base.architectures, base)
    for hook, what in OWN_HOOKS.items():
        if hasattr(model_cls, hook):
            raise ValueError(
                f"The base {base.model} ({architecture}) {what}, which vllm-memdec does not "
                "support yet: serve it without a memory."
            )


def check_engine(vllm_config: "VllmConfig") -> None:
    """Refuse what depends on the runner that vLLM has chosen for a memdec start."""
    settings = memdec_block(vllm_config.additional_config)
    if settings is None or vllm_config.speculative_config is None:
        return
    config = MemDecConfig.parse(settings)
    base = vllm_config.model_config
    memories = [memory_model_config(m, base, base.max_model_len) for m in config.memories]
    check_speculation(vllm_config, [base, *memories], config.adapts)


def check_speculation(vllm_config: "VllmConfig", models: "list[ModelConfig]", adapts: bool) -> None:
    """Refuse a drafter that reads hidden states, and one whose blocks vLLM would mix up."""
    speculation = vllm_config.speculative_config
    if adapts and vllm_config.use_v2_model_runner:
        raise ValueError(
            "vLLM's V2 runner drafts a fixed number of tokens: give speculative_tokens a number, "
            "or set VLLM_USE_V2_MODEL_RUNNER=0."
        )
    if speculation.method not in SPECULATION:
        raise ValueError(
            f"vllm-memdec does not support speculation by {speculation.method!r} yet: "
            "use the method draft_model."
        )
    # The V1 runner gives a draft model the block table of the first KV-cache group, and windows
    # make several groups.
    if speculation.method == "draft_model" and not vllm_config.use_v2_model_runner:
        models = [*models, speculation.draft_model_config]
        if any(model.get_sliding_window() for model in models):
            raise ValueError(
                "vLLM's V1 runner cannot draft with a model beside sliding windows: "
                "start without speculation."
            )


def check_heads(memory: "ModelConfig", own_size: int | None, base_size: int) -> None:
    """Refuse a split of the memory's attention heads that vLLM would refuse in every worker."""
    if own_size not in (None, 1, base_size):
        raise ValueError(
            f"The memory's tensor_parallel_size must be 1 or the base's {base_size}, "
            f"got {own_size}."
        )
    heads = memory.model_arch_config.total_num_attention_heads
    if heads % (own_size or base_size):
        raise ValueError(
            f"--tensor-parallel-size {base_size} does not divide the memory's {heads} attention "
            'heads: add "tensor_parallel_size": 1 to the memory, for a whole copy on each rank.'
        )


def check_tokenizers(base: "ModelConfig", memory: MemoryConfig) -> None:
    """Refuse a memory whose token ids mean other text than the base's."""
    ours = fingerprint(base.tokenizer, base.tokenizer_revision, base.trust_remote_code)
    if memory.block is not None:
        theirs = memory.block.tokenizer_fingerprint
        hint = f"it was compiled for {memory.block.base}; build a memory for this base"
    else:
        theirs = fingerprint(memory.model, memory.revision, base.trust_remote_code)
        hint = "use two models of one family"
    if ours != theirs:
        raise ValueError(
            f"The memory {memory.model} has another tokenizer than the base {base.model}: {hint}."
        )


def fingerprint(name: str, revision: str | None, trust_remote_code: bool) -> str:
    """Return the fingerprint of the tokenizer in a folder or hub repository."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers raises that very class
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
