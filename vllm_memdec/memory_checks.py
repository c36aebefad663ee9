"""What a memory has to be beside its base, whenever it comes: at start, or into a slot later.

Only functions import vLLM here, so that a tokenizer can be checked without it.
"""

from typing import TYPE_CHECKING

from vllm_memdec.checkpoint import read_tokenizer, tokenizer_fingerprint
from vllm_memdec.config import MemoryConfig
from vllm_memdec.engine_config import memory_model_config

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def build_memory(memory: MemoryConfig, base: "ModelConfig") -> "ModelConfig":
    """Return vLLM's ModelConfig of a memory, or one sentence that says why it has none."""
    try:
        return memory_model_config(memory, base)
    except (ValueError, OSError) as error:
        raise ValueError(f"vLLM refuses the memory {memory.model}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Return what an error of vLLM's says, without what pydantic says around it."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    reason = first["msg"].removeprefix("Value error, ")
    if first["loc"]:  # one setting, not the whole
        reason = f"{first['loc'][0]}: {reason}, got {first['input']!r}."
    return reason


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
    try:
        tokenizer = read_tokenizer(name, revision, trust_remote_code)
    except Exception as error:  # tokenizers raises that very class
        hint = "copy the tokenizer files into it"
        if "trust_remote_code" in str(error):
            hint = "it is custom code: read its .py files, then give --trust-remote-code"
        raise ValueError(
            f"{name} has no readable tokenizer, so nothing shows that base and memory share one "
            f"({type(error).__name__}): {hint}."
        ) from error
    return tokenizer_fingerprint(tokenizer)
