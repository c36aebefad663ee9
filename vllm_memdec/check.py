"""What a start with a base and a memory would come to, told from configs, without weights.

    memdec check BASE [MEMORY]

Nothing is decided here. vLLM makes of the two what it makes of them when it starts, so that the
checks of startup.py run, and a refusal is the sentence that `vllm serve` would end with. Which
architectures tests cover is in bases.csv, where those tests wrote it.
"""

import contextlib
import csv
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError

from vllm_memdec import memory_checks, plugin
from vllm_memdec.checkpoint import MemoryBlock, write_block
from vllm_memdec.config import MODEL_IMPL, SPECULATIVE
from vllm_memdec.engine_config import memory_lengths
from vllm_memdec.errors import MemdecError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SUPPORTED, UNKNOWN, REFUSED = "supported", "unknown", "refused"
TESTED = Path(__file__).with_name("bases.csv")
DRAFTS = 3
# As vLLM and the libraries that it reads a model with refuse one.
REFUSALS = (ValueError, OSError, RuntimeError, ImportError)
# What they end with where they take for granted what a config does not have.
MALFORMED = (
    AssertionError,
    LookupError,
    AttributeError,
    TypeError,
    ArithmeticError,
    StrictDataclassError,
)
# A memory as good as any, where none is given.
PLAIN = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1 << 20,
}


@dataclass(frozen=True)
class Answer:
    """What a start would come to, and why; drafts: the same of drafts by the memory."""

    status: str
    reason: str
    drafts: str = ""


def check(base: str, memory: str | None = None, trust_remote_code: bool = False) -> Answer:
    """Return what a start with the folders of a base and a memory would come to.

    Raises MemdecError without vLLM, and where it has no device to serve on.
    """
    for folder in (base, memory):
        if folder is not None and not os.path.isdir(folder):
            raise MemdecError(f"{folder} is not a folder: check the path.")
    with quiet(), contextlib.ExitStack() as stack:
        need_vllm()
        from vllm_memdec.compat import class_look

        stack.enter_context(class_look.in_this_process())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="memdec-check-"))
        try:
            beside = memory or plain_memory(base, trust_remote_code, folder)
            config = start(base, beside, trust_remote_code)
            [length] = memory_lengths(config)
        except (*REFUSALS, *MALFORMED) as error:
            return Answer(REFUSED, sentence_of(error))
        try:
            start(base, beside, trust_remote_code, DRAFTS)
            drafts = "work"
        except (*REFUSALS, *MALFORMED) as error:
            drafts = f"refused: {sentence_of(error)}"
    architecture = config.model_config.architecture
    row = tested().get(architecture)
    if row is None:
        reason = f"{architecture}: vLLM has it and no check refuses it, but no test covers it."
        return Answer(UNKNOWN, reason, drafts)
    parts = [f"{architecture} ({row['name']})", row["kind"], row["note"]]
    positions = config.model_config.max_model_len
    if memory is not None and length < positions:
        parts.append(f"the memory for {length} of {positions} positions")
    if row["on_cpu"] and on_cpu():
        parts.append(f"on a CPU with {row['on_cpu']}")
    return Answer(SUPPORTED, ", ".join(filter(None, parts)), drafts)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what vLLM logs to itself: the answer is what it raises."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def need_vllm() -> None:
    """Import vLLM, with this plugin in it, or raise MemdecError."""
    try:
        plugin.register()
    except RuntimeError as error:
        raise MemdecError(str(error)) from error
    from vllm.platforms import current_platform

    if not current_platform.device_type:
        raise MemdecError(
            "vLLM finds no device here that it serves on: check where it is to serve, or "
            "pip install 'vllm-memdec[cpu]'."
        )


def on_cpu() -> bool:
    """Return whether vLLM serves on a CPU here."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def plain_memory(base: str, trust_remote_code: bool, folder: str) -> str:
    """Write the config of a plain memory for a base into a folder, and return that."""
    from vllm import EngineArgs

    from vllm_memdec.checkpoint import read_tokenizer

    # As a start does: what is wrong with a config is not to be said of the tokenizer.
    EngineArgs(base, trust_remote_code=trust_remote_code).create_model_config()
    fingerprint = memory_checks.fingerprint(base, None, trust_remote_code)
    rows = len(read_tokenizer(base, None, trust_remote_code))
    Path(folder, "config.json").write_text(json.dumps(PLAIN | {"vocab_size": rows}))
    write_block(folder, MemoryBlock(0.5, fingerprint, base, 1.0))
    return folder


def start(base: str, memory: str, trust_remote_code: bool, drafts: int = 0) -> "VllmConfig":
    """Configure vLLM as for a start, and return its configuration."""
    from vllm import EngineArgs

    block = {"model": memory, "alpha": 0.5, SPECULATIVE: drafts}
    args = EngineArgs(
        base,
        model_impl=MODEL_IMPL,
        additional_config={"memdec": block},
        trust_remote_code=trust_remote_code,
    )
    return args.create_engine_config()


def sentence_of(error: Exception) -> str:
    """Return the first sentence of an error of vLLM's or ours, which is one."""
    if isinstance(error, MALFORMED):
        name, said = type(error).__name__, " ".join(str(error).split())
        return f"vLLM ends with {name} ({said}), as with a malformed config: check config.json."
    text = re.split(r"(?<=\.)\s", memory_checks.reason_of(error).strip())[0]
    told = "--trust-remote-code" in text
    if not told and ("custom code" in text or "trust_remote_code" in text):
        text = f"{text.rstrip('.')}: read its .py files, then give --trust-remote-code."
    return text


def tested() -> dict[str, dict[str, str]]:
    """Return the rows of the bases that tests cover, by architecture."""
    with TESTED.open(newline="") as file:
        return {row["architecture"]: row for row in csv.DictReader(file)}
