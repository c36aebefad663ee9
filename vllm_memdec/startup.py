"""Every check that refuses to start rather than serve wrong.

The checks run in the front end, when vLLM turns its arguments into a ModelConfig: before any worker
exists, so that the sentence a user has to read is the last line on the screen. There the base's own
ModelConfig is built by vLLM as always, and only the class to load is exchanged for the composite.
"""

import copy
import importlib
from typing import TYPE_CHECKING, Any

from vllm_memdec.config import (
    ARCHITECTURE,
    AUTO,
    EXAMPLE,
    MODEL_IMPL,
    SPECULATIVE,
    MemDecConfig,
    MemoryConfig,
    memdec_block,
)
from vllm_memdec.engine_config import memory_model_config
from vllm_memdec.gate import check_gate, read_gate
from vllm_memdec.memory_checks import build_memory, check_tokenizers
from vllm_memdec.request import Choices

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm.config import ModelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

# What a class of vLLM's does that nothing here knows, by the name of its method.
OWN_HOOKS = {
    "get_model_state_cls": "keeps a state of its own for each request",
    "get_kv_cache_groups": "plans its KV cache itself",  # from 0.33 on
}
# A drafter outside this set reads the target's hidden states; ours are two models' side by side.
SPECULATION = (None, "draft_model", "ngram", "ngram_gpu", "suffix")
# Kinds of layers whose state vLLM does not take back where drafts are rejected, by the dimensions
# of their states. Its attention metadata tells other kinds, but not these, how many drafts were
# accepted: they go on from the state after all of them.
KEPT_STATES = {(2, 2): "MAMBA1", (3,): "LINEAR"}


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
    # A broken model shows here; the seams of the runner that vLLM has yet to choose, in a worker.
    importlib.import_module("vllm_memdec.model")
    config = MemDecConfig.parse(settings)
    check_arguments(args)
    names = args.served_model_name or args.model
    names = [names] if isinstance(names, str) else names
    Choices.of(config).check_served(names, "the base")
    base = build(args)
    check_model(base, "The base")
    check_state(base)
    for memory in config.built:
        check_kv_cache_dtype(memory)
        model = build_memory(memory, base)
        check_model(model, "The memory")
        check_cache_on_cpu(memory, model)
        if memory in config.slots:
            check_slot(model, config, engine_args)
        else:
            check_tokenizers(base, memory)
        if memory.gate_file is not None:
            gate = read_gate(memory.gate_file, model.get_hidden_size())
            if warning := check_gate(memory.gate_file, gate):
                warn(warning)
        check_heads(model, memory.tensor_parallel_size, args.tensor_parallel_size)
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

    vLLM wants the config of a draft model: compat/draft_config.py gives it the base's.
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


def check_slot(model: "ModelConfig", config: MemDecConfig, args: "EngineArgs") -> None:
    """Refuse slots that could not be filled while the server runs; let workers fill the others."""
    from vllm_memdec.compat.slots import WORKER

    if model.quantization is not None:
        raise ValueError(
            f"memdec 'slots' hold no quantised memories yet, and {model.model} is one "
            f"({model.quantization}): give a folder that is not, or name it in 'memories'."
        )
    if args.data_parallel_size > 1:
        raise ValueError("memdec 'slots' do not work with data parallelism yet: drop one.")
    if args.tensor_parallel_size > 1 and any(m.tensor_parallel_size == 1 for m in config.memories):
        raise ValueError(
            "memdec 'slots' do not work beside a memory with \"tensor_parallel_size\": 1 yet: "
            "drop one."
        )
    if args.enable_sleep_mode:  # it takes the weights away, and brings those of the start
        raise ValueError("memdec 'slots' do not work with --enable-sleep-mode: drop one.")
    if args.worker_extension_cls not in ("", WORKER):
        raise ValueError("memdec 'slots' need --worker-extension-cls themselves: leave it out.")
    args.worker_extension_cls = WORKER


def check_kv_cache_dtype(memory: MemoryConfig) -> None:
    """Refuse what vLLM's KV cache does not know: in a worker it would be a KeyError."""
    from typing import get_args

    from vllm.config.cache import CacheDType

    known = get_args(CacheDType)
    if memory.kv_cache_dtype not in (None, *known):
        raise ValueError(
            f"memdec kv_cache_dtype must be one of {[*known]}, got {memory.kv_cache_dtype!r}."
        )


def check_cache_on_cpu(memory: MemoryConfig, model: "ModelConfig") -> None:
    """Refuse a cache of 16 bits beside float32: vLLM's attention on a CPU takes it for float32."""
    import torch
    from vllm.platforms import current_platform

    if (
        current_platform.is_cpu()
        and model.dtype == torch.float32
        and memory.kv_cache_dtype in ("bfloat16", "float16")
    ):
        raise ValueError(
            f"memdec kv_cache_dtype {memory.kv_cache_dtype} beside float32 weights is read wrong "
            "by vLLM on a CPU: leave it out, or give the memory that dtype."
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
        "the encoder of images alone (mm_encoder_only)": args.mm_encoder_only,
        # Many a connector looks blocks up by their tokens alone: they may be another memory's.
        "an external KV cache (kv_transfer_config)": args.kv_transfer_config is not None,
        "KV offloading": args.kv_offloading_size is not None,
        "pooling": args.runner == "pooling" or args.convert not in ("auto", "none"),
        # The device's rows are then other requests' than those that the host counts.
        "adaptive verification": speculation.get("enable_adaptive_verification", False),
        f"speculation by {method!r}": method not in SPECULATION,
    }
    for feature, asked in refused.items():
        if asked:
            raise ValueError(f"vllm-memdec does not support {feature} yet: start without it.")


def check_model(model_config: "ModelConfig", role: str) -> None:
    """Refuse a base that is not a decoder with attention, a memory that has anything else."""
    is_memory = role == "The memory"
    refused = {
        # Compiled, their layers find their weights by counting calls: none may miss a step.
        "a mixture of experts": is_memory and model_config.is_moe,
        "multimodal": is_memory and model_config.is_multimodal_model,
        "an encoder-decoder": model_config.is_encoder_decoder,
        # Whose state vLLM keeps for all requests of a batch, not for a memory's share of it.
        "a state-space or hybrid model": is_memory
        and (model_config.is_hybrid or model_config.has_inner_state),
        "a model without attention": model_config.is_attention_free,
        "not a text-generation model": model_config.runner_type != "generate",
    }
    reason = "it is a text decoder with attention" if is_memory else "it mixes decoders"
    for what, is_so in refused.items():
        if is_so:
            raise ValueError(
                f"{role} {model_config.model} is {what}, which vllm-memdec does not support yet: "
                f"{reason}."
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
    if settings is None:
        return
    config = MemDecConfig.parse(settings)
    if config.slots and vllm_config.parallel_config._api_process_count > 1:
        raise ValueError(
            "Several API servers would not learn what is in memdec 'slots': leave "
            "--api-server-count out, or 'slots'."
        )
    if vllm_config.speculative_config is None:
        return
    base = vllm_config.model_config
    memories = [memory_model_config(m, base) for m in config.built]
    check_speculation(vllm_config, [base, *memories], config)


def check_speculation(
    vllm_config: "VllmConfig", models: "list[ModelConfig]", config: MemDecConfig
) -> None:
    """Refuse a drafter that reads hidden states, and one whose blocks vLLM would mix up.

    models: the base, and those whose windows count.
    """
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    speculation = vllm_config.speculative_config
    assert speculation is not None, "see check_engine()"
    if config.adapts and vllm_config.use_v2_model_runner:
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
    # make several groups. The memories read their own groups' tables.
    draft_model = speculation.method == "draft_model" and not config.speculative_tokens
    if draft_model and not vllm_config.use_v2_model_runner:
        models = [*models, speculation.draft_model_config]
        if any(model.get_sliding_window() for model in models):
            raise ValueError(
                "vLLM's V1 runner cannot draft with a model beside sliding windows: "
                "start without speculation."
            )
    base = vllm_config.model_config
    if not base.is_hybrid:
        return
    model_cls: Any
    model_cls, _ = ModelRegistry.resolve_model_cls(base.architecture, base)
    if kind := kept_state(model_cls.get_mamba_state_shape_from_config(vllm_config)):
        raise ValueError(
            f"The base {base.model} has layers of the kind {kind}, whose state vLLM does not take "
            f"back where drafts are rejected: leave {SPECULATIVE!r} and --speculative-config out."
        )
    # After a step that rejects drafts its state has to be that of the last accepted token: on a CPU
    # vLLM answers wrong (Mamba) or stops (gated delta net, where drafts differ in number).
    if current_platform.is_cpu():
        raise ValueError(
            f"The base {base.model} keeps a state, which vLLM on a CPU does not take back where "
            f"drafts are rejected: leave {SPECULATIVE!r} and --speculative-config out."
        )


def kept_state(shapes: "Sequence[Sequence[int]]") -> str | None:
    """Return the kind of KEPT_STATES that layers with states of these shapes are of, if any."""
    return KEPT_STATES.get(tuple(len(shape) for shape in shapes))


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
