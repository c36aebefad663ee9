"""The model card of a memory: what it is, what it was made of and is worth, and how to serve it.

Everything in it is read from the export's folder, whose config.json holds what the build measured.
Nothing of it names a place on the disk.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_memdec.checkpoint import MemoryBlock, read_block
from vllm_memdec.errors import MemdecError
from vllm_memdec.gate import FILE as GATE
from vllm_memdec.train.data.ownership import CARD_MARK, read_object
from vllm_memdec.train.evaluation.compare import serve_command

# An adapter is what the hub calls a model that needs its base beside it.
HEAD: dict[str, Any] = {
    "base_model_relation": "adapter",
    "library_name": "vllm-memdec",
    "pipeline_tag": "text-generation",
}
TAGS = ["memory-decoder", "vllm-memdec"]
OF_HUB = re.compile(r"(?P<id>[^@]+)@(?P<commit>[0-9a-f]{40})")  # a base that came from the hub
# No name of an index: the package is in none, where anybody might put another of its name.
INSTALL = "pip install '.[cuda]'  # in a checkout of vllm-memdec"


@dataclass(frozen=True)
class Naming:
    """What a card names that no build knows."""

    repo: str  # ORG/NAME of the memory on the hub
    revision: str | None = None  # its branch, None for the main one
    base_model: str | None = None  # ORG/NAME of the base; None: what the build recorded
    license: str | None = None  # as the hub spells it, such as apache-2.0
    languages: tuple[str, ...] = ()  # ISO 639 codes


def base_on_hub(block: MemoryBlock, given: str | None) -> str:
    """Return the id of a memory's base on the hub: the one given, or else the one recorded.

    Raises MemdecError if the build read its base from a folder and none is given.
    """
    recorded = OF_HUB.fullmatch(block.base)
    if given is None and recorded is None:
        raise MemdecError(
            f"the base of this memory was read from a folder, {block.base!r}, and a card names it "
            "by its id on the Hugging Face hub: give --base-model ORG/NAME."
        )
    return given or (recorded["id"] if recorded else "")


def serve(naming: Naming, base: str) -> str:
    """Return the command that serves a base of the hub with the memory."""
    where = {"revision": naming.revision} if naming.revision else {}
    return serve_command(base, {"model": naming.repo, **where})


def write_card(export: Path, naming: Naming) -> str:
    """Return the model card of an export: a YAML head for the hub, then Markdown for people."""
    from huggingface_hub import ModelCardData

    block = read_block(export)
    if block is None:
        raise MemdecError(f"{export} has no memdec section in its config.json: build it again.")
    base = base_on_hub(block, naming.base_model)
    head = ModelCardData(
        base_model=base,
        license=naming.license,
        language=list(naming.languages) or None,
        tags=TAGS,
        **HEAD,
    )
    parts = [
        f"---\n{head.to_yaml()}\n---\n{CARD_MARK}\n",
        f"# {naming.repo.split('/')[-1]}\n",
        f"A memory for [{base}](https://huggingface.co/{base}): a small transformer that a corpus "
        "was compiled into (*Memory Decoder*, arXiv 2508.09874). vLLM serves both as one model, "
        "`p = alpha * p_memory + (1 - alpha) * p_base`, and leaves the base as it is. By itself "
        "the memory is no model to talk to.\n",
        f"## Serve\n\n```bash\n{INSTALL}\n{serve(naming, base)}\n```\n",
        "Any base that shares the memory's tokenizer may stand in place of this one. A request "
        'chooses its own weight with `"vllm_xargs": {"memdec_alpha": 0.3}`; 0 is the base.\n',
        "## What it is\n",
        table(("", ""), facts(export, block, base)),
        *perplexities(block),
        "## Limits\n",
        *limits(export, base, naming),
    ]
    return "\n".join(parts)


def facts(export: Path, block: MemoryBlock, base: str) -> Iterator[tuple[str, str]]:
    """Yield what is known of a memory, as rows of a table."""
    config, made = read_object(export / "config.json") or {}, block.provenance
    text = config.get("text_config") or config
    recorded = OF_HUB.fullmatch(block.base)
    commit = f", commit {recorded['commit']}" if recorded and recorded["id"] == base else ""
    yield "base", f"{base}{commit}"
    tokenizer = block.tokenizer_fingerprint[:16]
    yield "tokenizer", f"{text.get('vocab_size', 0):,} ids, fingerprint {tokenizer}..."
    layers, width = text.get("num_hidden_layers"), text.get("hidden_size")
    yield (
        "memory",
        (
            f"{', '.join(config.get('architectures') or ['?'])}, layers: {layers}, width: {width}, "
            f"{parameters(export):,} weights in {config.get('dtype')}"
        ),
    )
    yield "corpus", f"{made.get('training_tokens', 0):,} tokens of training text"
    trained = (made.get("settings") or {}).get("memory") or {}
    if "epochs" in trained:
        mixture = trained.get("objective") == "mixture"
        learnt = "the mixture's likelihood" if mixture else "kNN targets and labels"
        yield "training", f"{trained['epochs']:g} epochs on {learnt}"
    yield "alpha", alpha(block)
    gate = "yes: it weighs every token, unless a request asks for a weight"
    yield "gate", gate if (export / GATE).exists() else "none"
    versions = (f"{name} {number}" for name, number in (made.get("versions") or {}).items())
    yield "built with", ", ".join(versions) or "not recorded"


def alpha(block: MemoryBlock) -> str:
    """Return the weights of a memory in words."""
    steps = ", ".join(f"{a:g} from token {start}" for start, a in block.alpha_by_context or ())
    return f"{steps} of the context (one for all: {block.alpha:g})" if steps else f"{block.alpha:g}"


def parameters(export: Path) -> int:
    """Return the number of weights in a folder's safetensors files, of which only heads are read.

    Tied ones are counted once.
    """
    from safetensors import safe_open

    total = 0
    for path in export.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 -- no mapping
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


def perplexities(block: MemoryBlock) -> Iterator[str]:
    """Yield the perplexities on the build's validation text, by length of context."""
    rows = block.provenance.get("validation_by_context") or []
    if not rows:
        return
    tokens = sum(row["tokens"] for row in rows)
    yield (
        f"Perplexity on {tokens:,} tokens of the build's validation text, which the memory has not "
        "learnt. The mixture is what these weights give without a gate.\n"
    )
    cells = (
        (
            f"{row['from']}-{row['to']}",
            f"{row['tokens']:,}",
            *(value(row.get(system)) for system in ("base", "memory", "mixture")),
            f"{row['best_alpha']:.2f}",
        )
        for row in rows
    )
    heads = ("tokens of context", "tokens", "base", "memory", "mixture", "best alpha")
    yield table(heads, cells)


def value(number: float | None) -> str:
    """Return a perplexity in words; None, as JSON has no infinity, is one without bounds."""
    return "infinite" if number is None else f"{number:,.2f}"


def limits(export: Path, base: str, naming: Naming) -> Iterator[str]:
    """Yield what a memory is not good for, and what must be known before it is used."""
    yield (
        "- It helps on text like its corpus. On other text a fixed weight costs perplexity"
        + (", which its gate is there to avoid." if (export / GATE).exists() else ": ask for less.")
    )
    yield "- A memory can recite passages of its corpus, and it can be wrong about facts."
    yield "- It serves bases of its own tokenizer only, and reads text alone."
    config = read_object(export / "config.json") or {}
    positions = (config.get("text_config") or config).get("max_position_embeddings")
    if positions:
        yield f"- It has {positions:,} positions: beyond them the base answers alone."
    named = naming.license or "none is named"
    yield f"- Licence of the memory: {named}. The terms of {base} and of its corpus hold as well.\n"


def table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a table in Markdown."""
    names = list(heads)
    lines = [names, ["---"] * len(names), *(list(row) for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
