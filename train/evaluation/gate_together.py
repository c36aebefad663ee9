"""`memdec calibrate` of several memories: their gates, trained to decide together.

A server with several memories can mix all of them into each token, each by its own gate, one after
the other (mixture() of gate_training.py). Gates that were trained alone have never read the other
memories' domains: there they err, and two that claim a token share it. So they are trained once
more, from where they are, on text of all domains, on general text and on passages of all in turn,
by the likelihood of what they give together. A memory without a gate gets one first, trained alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vllm_memdec.checkpoint import read_block
from vllm_memdec.errors import MemdecError
from vllm_memdec.gate import FILE, Gate, check_gate, read_gate, weights_fingerprint, write_gate
from vllm_memdec.kernels.weights import gate_scores
from vllm_memdec.train.data.blocks import bos_of
from vllm_memdec.train.data.readers import TEXT, Fields
from vllm_memdec.train.evaluation.compare import as_learnt, matching_tokenizer, open_model
from vllm_memdec.train.evaluation.gate_report import draw, report
from vllm_memdec.train.evaluation.gate_texts import KEPT, check_amounts, divide, read_texts
from vllm_memdec.train.evaluation.gate_training import (
    FEATURE_BYTES,
    MAX_TOKENS,
    WEIGHTS,
    Scored,
    check_folder,
    fit_gate,
    fit_gates,
    mixture,
    read_windows,
    weights,
)
from vllm_memdec.train.model.huggingface import load_config, text_config
from vllm_memdec.train.model.scoring import mix, perplexity
from vllm_memdec.train.model.windows import Windows, window_logprobs, window_tokens, windows
from vllm_memdec.train.progress import Progress

NEW = "memdec_gate.new.npz"  # a gate until those of all memories are written
SHARED = ("general", "in turn")  # kinds of text that are no memory's own


@dataclass(frozen=True)
class Member:
    """A memory of those that decide together."""

    name: str  # as it is told to people
    folder: Path

    def kind(self, of: str) -> str:
        """Return the name of a kind of its text, "domain" or "corpus"."""
        return f"{self.name}, {of}"

    def own(self, texts: dict[str, Scored]) -> dict[str, Scored]:
        """Return the texts that its gate alone is trained on, as fit_gate() names them."""
        names = {self.kind(of): of for of in ("domain", "corpus")} | {k: k for k in SHARED}
        return {of: texts[kind] for kind, of in names.items() if kind in texts}


def members_of(folders: Sequence[str]) -> list[Member]:
    """Return the memories, each with a name of its own: its folder's, or its build's."""
    paths = [Path(folder) for folder in folders]
    known: dict[Any, str] = {}
    for folder, path in zip(folders, paths, strict=True):
        check_folder(folder)
        for mark in (path.resolve(), weights_fingerprint(path)):
            if mark is not None and mark in known:
                raise MemdecError(f"{known[mark]} and {folder} are one memory: give each once.")
            known[mark] = folder
    names = [p.parent.name if p.name == "export" else p.name for p in map(Path.resolve, paths)]
    if len(set(names)) < len(names):
        names = list(folders)
    return [Member(name, path) for name, path in zip(names, paths, strict=True)]


def scores(arrays: dict[str, np.ndarray], part: Scored) -> torch.Tensor:
    """Return a gate's scores [N] float64."""
    gate, x_NF = Gate(arrays), part.features_NF
    score_N = gate.score(x_NF[:, :-3], x_NF[:, -1])
    return gate_scores(score_N, gate.certainty, x_NF[:, -3], x_NF[:, -2]).double()


@torch.inference_mode()
def together(gates: Sequence[dict[str, np.ndarray]], parts: Sequence[Scored]) -> np.ndarray:
    """Return log p [N] float64 of a text that the base and all memories have read."""
    base_N = torch.from_numpy(parts[0].base_N).double()
    memories = [torch.from_numpy(part.memory_N).double() for part in parts]
    each = [scores(arrays, part) for arrays, part in zip(gates, parts, strict=True)]
    return mixture(base_N, memories, each).numpy()


def alone(arrays: dict[str, np.ndarray], part: Scored) -> np.ndarray:
    """Return log p [N] of one memory, by its own gate."""
    return mix(part.base_N, part.memory_N, weights(arrays, part))


def kinds_of(members: Sequence[Member], scored: dict[str, Scored]) -> dict[str, float]:
    """Return the weight in the loss of each kind of text that has been read."""
    kinds = {m.kind(of): WEIGHTS[of] for m in members for of in ("domain", "corpus")}
    kinds |= {kind: WEIGHTS[kind] for kind in SHARED}
    return {kind: weight for kind, weight in kinds.items() if kind in scored}


def fit_together(
    members: Sequence[Member],
    scored: Sequence[dict[str, Scored]],
    starts: Sequence[dict[str, np.ndarray]],
) -> list[dict[str, np.ndarray]]:
    """Return the gates of memories trained together, from those that they have."""
    return fit_gates(scored, kinds_of(members, scored[0]), starts)


def calibrate_gates(
    memories: Sequence[str],
    base: str,
    texts: dict[str, list[Path]],
    progress: Progress,
    context: int | None = None,
    fields: Fields = TEXT,
) -> dict[str, Any]:
    """Train the gates of memories together, write them into their folders, return the report.

    As calibrate_gate(), but that domain and corpus are one for each memory, in their order.
    """
    members = members_of(memories)
    for kind in ("domain", "corpus"):
        if len(texts[kind]) != len(members) and (kind == "domain" or texts[kind]):
            raise MemdecError(
                f"{len(members)} memories and {len(texts[kind])} --{kind}: give one for each "
                "memory, in their order; a folder may hold several files."
            )
    for memory in memories:
        tokenizer = matching_tokenizer(base, memory)
    read = {}
    for kind in ("domain", "corpus"):
        for member, path in zip(members, texts[kind], strict=False):
            learnt = as_learnt(fields, read_block(str(member.folder)))
            read[member.kind(kind)] = read_texts(tokenizer, path, learnt)
    read["general"] = [t for path in texts["general"] for t in read_texts(tokenizer, path, fields)]
    count = check_amounts(read)
    configs = [text_config(load_config(folder)) for folder in (base, *memories)]
    width = window_tokens(context, count, configs)
    mixed = [*(member.kind("domain") for member in members), "general"]
    sides = divide(read, bos_of(tokenizer), mixed)
    row_bytes = 4 * sum(config.hidden_size + 3 for config in configs[1:])
    max_rows = min(MAX_TOKENS, FEATURE_BYTES // (len(sides[0]) + 1) // row_bytes)
    ends = tokenizer.eos_token_id, bos_of(tokenizer)
    parts = [
        {k: windows(ids, width, ends[0], rows, ends[1]) for k, ids in side.items() if ids}
        for side, rows in zip(sides, (max_rows, max_rows // KEPT), strict=True)
    ]
    trained, kept = read_all(members, base, tokenizer, parts, progress)
    olds = [
        old_gate(member, config.hidden_size, progress) or fit_gate(member.own(of))
        for member, config, of in zip(members, configs[1:], trained, strict=True)
    ]
    gates = fit_together(members, trained, olds)
    del trained
    told = {"window": width, **report_on(members, kept, olds, gates)}
    write_gates([member.folder for member in members], gates)
    for member, arrays, of in zip(members, gates, kept, strict=True):
        weighed = {kind: (part, weights(arrays, part)) for kind, part in member.own(of).items()}
        told["alone"][member.name] = report(weighed) | {"window": width}
        draw(told["alone"][member.name], (member.folder / FILE).with_suffix(".png"))
    return told


def read_all(
    members: Sequence[Member],
    base: str,
    tokenizer: Any,
    parts: Sequence[dict[str, Windows]],
    progress: Progress,
) -> tuple[list[dict[str, Scored]], ...]:
    """Return for each part what each memory and the base give to its texts; one model at a time."""
    model = open_model(base)
    base_N = [
        {
            kind: window_logprobs(model, text, progress, f"the base, {kind}")
            for kind, text in p.items()
        }
        for p in parts
    ]
    found: tuple[list[dict[str, Scored]], ...] = tuple([] for _ in parts)
    for member in members:
        model = open_model(str(member.folder))
        for part, logp, scored in zip(parts, base_N, found, strict=True):
            told = f"{member.name} on "
            scored.append(
                {
                    kind: read_windows(logp[kind], model, tokenizer, text, told + kind, progress)
                    for kind, text in part.items()
                }
            )
    return found


def old_gate(member: Member, width: int, progress: Progress) -> dict[str, np.ndarray] | None:
    """Return the gate that a memory has; None, and say why, if it has none that is its own."""
    path, why = member.folder / FILE, "has no gate"
    if path.exists():
        try:
            arrays = read_gate(path, width)
            check_gate(path, arrays)
            return arrays
        except MemdecError:
            why = "has a gate that is not whole or of other weights"
    progress.say(f"{member.name} {why}: one is trained for it alone first.")
    return None


def by_itself(
    members: Sequence[Member],
    gates: Sequence[dict[str, np.ndarray]],
    parts: Sequence[Scored],
) -> dict[str, float]:
    """Return the perplexity of a text that each memory gives alone, by its own gate."""
    rows = zip(members, gates, parts, strict=True)
    return {member.name: perplexity(alone(arrays, part)) for member, arrays, part in rows}


def report_on(
    members: Sequence[Member],
    scored: Sequence[dict[str, Scored]],
    olds: Sequence[dict[str, np.ndarray]],
    gates: Sequence[dict[str, np.ndarray]],
) -> dict[str, Any]:
    """Return perplexities of base, each old gate alone, the oracle, and all gates together.

    The oracle knows whose text it is: there the memory's old gate alone, the base on general text.
    """
    owner = {m.kind(of): m.name for m in members for of in ("domain", "corpus")}
    rows: dict[str, Any] = {}
    for kind, first in scored[0].items():
        parts = [of[kind] for of in scored]
        base = perplexity(first.base_N)
        each, new = (by_itself(members, of, parts) for of in (olds, gates))
        oracle = base if kind == "general" else each.get(owner.get(kind, ""))
        joint = perplexity(together(gates, parts))
        rows[kind] = {
            "tokens": len(first.base_N),
            "base": base,
            "old": each,
            "new": new,
            "oracle": oracle,
            "before": perplexity(together(olds, parts)),
            "together": joint,
            "gap": oracle and joint / oracle - 1,
        }
    return {"texts": rows, "alone": {}}


def show(figures: dict[str, Any], console: Console) -> None:
    """Print the report."""
    names = list(figures["alone"])
    table = Table("text", "tokens", "base", *names, "oracle", "untrained", "together", "gap")
    for kind, row in figures["texts"].items():
        cells = [f"{row['tokens']:,}", f"{row['base']:.2f}"]
        cells += [f"{row['old'][name]:.2f}" for name in names]
        cells += [f"{row['oracle']:.2f}" if row["oracle"] else ""]
        cells += [f"{row[name]:.2f}" for name in ("before", "together")]
        table.add_row(kind, *cells, f"{row['gap']:+.1%}" if row["oracle"] else "")
    console.print(table)
    console.print(
        "Perplexity on documents of which the training has seen nothing. A memory's column: its "
        "gate alone, as it was. Oracle: each text with its own memory's gate, general text with "
        "the base. Untrained: the old gates together."
    )
    table = Table("gate alone", "its domain", "general", title="Each gate by itself: before, after")
    for name in names:
        texts = (figures["texts"][kind] for kind in (f"{name}, domain", "general"))
        table.add_row(name, *(f"{r['old'][name]:.2f}, {r['new'][name]:.2f}" for r in texts))
    console.print(table)


def write_gates(folders: Sequence[Path], gates: Sequence[dict[str, np.ndarray]]) -> None:
    """Write each memory's gate, those of all memories or of none."""
    before = [(f / FILE).read_bytes() if (f / FILE).exists() else None for f in folders]
    written = []
    try:
        for folder, arrays in zip(folders, gates, strict=True):
            write_gate(folder, arrays, NEW)
        for folder, content in zip(folders, before, strict=True):
            (folder / NEW).replace(folder / FILE)
            written.append((folder, content))
    except BaseException:
        for folder, content in written:
            if content is None:
                (folder / FILE).unlink()
            else:
                (folder / NEW).write_bytes(content)
                (folder / NEW).replace(folder / FILE)
        raise
    finally:
        for folder in folders:
            for name in (NEW, Path(NEW).with_suffix(".tmp")):
                (folder / name).unlink(missing_ok=True)
