"""The contract between training and serving: the `memdec` block of a memory's config.json.

A memory is a plain Hugging Face causal-LM folder. `memdec build` adds one JSON object under the
key `memdec` of its config.json; serving reads it. Beside it the two halves share only a memory's
gate, see gate.py.
The module needs only the standard library and, for tokenizers, transformers.
"""

import hashlib
import json
import math
import reprlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_memdec.errors import MemdecError

FORMAT_VERSION = 1
TEKKEN = "tekken.json"  # the tokenizer in Mistral's own format


@dataclass(frozen=True)
class MemoryBlock:
    """What a memory says of itself in config.json."""

    alpha: float  # weight of the memory in the mixture, calibrated on validation text
    tokenizer_fingerprint: str  # of the tokenizer it was compiled with, see tokenizer_fingerprint()
    base: str  # name of the model it was compiled from
    temperature: float  # of the kNN distribution it was trained to reproduce
    provenance: dict[str, Any] = field(default_factory=dict)  # versions, settings, artifact hashes
    # [position, alpha], each from its position on: a base gains more from context than a memory.
    alpha_by_context: list[list[float]] | None = None
    format_version: int = FORMAT_VERSION


def brief(value: Any) -> str:
    """Return repr(value), shortened: an error must not repeat a megabyte of a request."""
    short = reprlib.Repr()
    short.maxstring = 100
    return short.repr(value)


def check_alpha(alpha: Any, name: str = "alpha") -> float:
    """Return alpha as a float, or raise MemdecError unless it is a number between 0 and 1."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise MemdecError(f"{name} must be a number between 0 and 1, got {brief(alpha)}.")
    return float(alpha)


def check_table(table: Any, name: str) -> None:
    """Raise MemdecError unless a table is None or [position, alpha] pairs, ascending from 0."""
    if table is None:
        return
    whole = isinstance(table, list) and all(isinstance(p, list) and len(p) == 2 for p in table)
    starts = [pair[0] for pair in table] if whole else []
    numbers = all(type(start) is int and start < 1 << 63 for start in starts)
    if not numbers or starts[:1] != [0] or starts != sorted(set(starts)):
        raise MemdecError(
            f"{name} must be [position, alpha] pairs that ascend from position 0, such as "
            f"[[0, 0.5], [256, 0.2]], got {brief(table)}."
        )
    for _, alpha in table:
        check_alpha(alpha, name)


def read_block(model: str | Path, revision: str | None = None) -> MemoryBlock | None:
    """Return the memdec block of a model folder or hub id, or None if its config.json has none.

    Raises MemdecError if the folder or its config.json is missing, or the block is unusable.
    """
    try:
        path = model_file(model, "config.json", revision) or Path(model) / "config.json"
        config = json.loads(path.read_text())
    except OSError:
        from huggingface_hub import constants

        at = f" at revision {revision}" if revision else ""
        offline = " while HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        raise MemdecError(
            f"{model} is not a model folder: it has no config.json that can be read, and no "
            f"repository of that name{at} can be had from the Hugging Face hub{offline}: give the "
            "`export` folder of a `memdec build` or another causal LM's, or run "
            f"`hf download {model}` where the hub can be reached."
        ) from None
    except ValueError as error:
        raise MemdecError(
            f"{model}: config.json is not valid JSON ({error}): copy the memory again."
        ) from None
    if not isinstance(config, dict):
        raise MemdecError(f"{path} is not a JSON object: copy the memory again.")
    return parse_block(config.get("memdec"), str(path))


def model_file(model: str | Path, name: str, revision: str | None = None) -> Path | None:
    """Return the local path of a file of a model folder or hub id; None if it cannot be had."""
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    try:
        cached = cached_file(str(model), name, revision=revision)
    except (OSError, ValueError):
        return None
    return Path(cached) if cached else None


def parse_block(block: Any, where: str) -> MemoryBlock | None:
    """Return the block found under `memdec` in a config, checked; None stays None."""
    if block is None:
        return None
    version = block.get("format_version") if isinstance(block, dict) else None
    if version != FORMAT_VERSION:
        raise MemdecError(
            f"{where}: memdec format version {version!r} is not supported "
            f"(this release reads {FORMAT_VERSION}): build the memory again."
        )
    try:
        result = MemoryBlock(**block)
    except TypeError as error:
        raise MemdecError(f"{where}: broken memdec block ({error}): build it again.") from None
    check_alpha(result.alpha, f"{where}: memdec.alpha")
    check_table(result.alpha_by_context, f"{where}: memdec.alpha_by_context")
    if not (isinstance(result.temperature, (int, float)) and math.isfinite(result.temperature)):
        raise MemdecError(f"{where}: memdec.temperature is not a number: build the memory again.")
    return result


def write_block(folder: str | Path, block: MemoryBlock) -> None:
    """Put the block into the config.json of a Hugging Face model folder."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config["memdec"] = asdict(block)
    path.write_text(json_text(config))


def json_text(value: Any) -> str:
    """Return JSON for people; null for infinity and nan, which JSON has no word for."""
    return json.dumps(_finite(value), indent=2, sort_keys=True, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_tokenizer(
    model: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Return the Hugging Face tokenizer of a model folder or hub id; what it raises is theirs.

    One that has only Mistral's tekken.json is converted: ids and pieces stay the same.
    """
    from transformers import AutoTokenizer

    tekken = model_file(model, TEKKEN, revision)
    if tekken is not None and model_file(model, "tokenizer.json", revision) is None:
        return _convert_tekken(tekken)
    # By itself transformers would prefer tekken.json and return mistral_common's tokenizer, which
    # does not tell its added tokens.
    return AutoTokenizer.from_pretrained(
        model, revision=revision, trust_remote_code=trust_remote_code, mistral_format=False
    )


def _convert_tekken(path: Path) -> Any:
    """Return the tokenizer of a tekken.json; like Mistral's own, it begins a text with BOS."""
    from tokenizers.processors import TemplateProcessing
    from transformers.integrations.mistral import convert_tekken_tokenizer

    tokenizer = convert_tekken_tokenizer(str(path))
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B", special_tokens=[bos]
    )
    tokenizer.name_or_path = str(path.parent)
    return tokenizer


def tokenizer_vocabulary(tokenizer: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Return (learned tokens, added tokens) of a Hugging Face tokenizer, each token -> id."""
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    learned = {t: i for t, i in tokenizer.get_vocab().items() if t not in added}
    return learned, added


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's learned vocabulary (token -> id).

    A mixture adds probabilities of equal ids, so what must agree is which text an id stands for.
    Added tokens stay out: models of one family (Qwen2 and Qwen2.5) differ in nothing else.
    """
    learned, _ = tokenizer_vocabulary(tokenizer)
    items = sorted(learned.items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(items, ensure_ascii=True).encode()).hexdigest()
