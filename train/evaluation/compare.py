"""`memdec evaluate` and `memdec alpha`: a memory beside a base, on any text.

Both models read the text as the export stage reads validation text (windows.py): each document by
itself, which gives a text's perplexity, and documents one after another, for long contexts too.
"""

import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vllm_memdec.checkpoint import (
    MemoryBlock,
    check_alpha,
    read_block,
    tokenizer_fingerprint,
)
from vllm_memdec.errors import MemdecError
from vllm_memdec.gate import Gate, check_gate, gate_path, read_gate
from vllm_memdec.train.data.blocks import bos_of, tokenise
from vllm_memdec.train.data.documents import documents
from vllm_memdec.train.data.hub import served
from vllm_memdec.train.data.readers import TEXT, Fields
from vllm_memdec.train.model.huggingface import (
    load_config,
    load_model,
    load_tokenizer,
    text_config,
)
from vllm_memdec.train.model.scoring import mix, perplexity
from vllm_memdec.train.model.windows import (
    Windows,
    alpha_at,
    by_context,
    readings,
    window_logprobs,
    window_tokens,
)
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.stages.export import number, tune
from vllm_memdec.train.trust import code_allowed

READ_TOKENS = 2**22  # tokens read of each text: the rest is never scored
MAX_TOKENS = 2**17  # tokens scored of each text in either reading, spread evenly
CHUNK_TOKENS = 2**14  # tokens scored at once: the features of a gate are kept for so many


class Pair:
    """A base and a memory that it serves, with the memory's weights."""

    def __init__(
        self,
        base: str,
        memory: str,
        progress: Progress,
        alpha: float | None = None,
        gated: bool = True,
    ):
        """alpha: in place of the memory's own; gated: whether its gate is read."""
        self.tokenizer, section = matching_tokenizer(base, memory), read_block(memory)
        self.section = section
        if alpha is not None:
            check_alpha(alpha, "--alpha")
        self.alpha = alpha if alpha is not None or section is None else section.alpha
        self.table = None if alpha is not None or section is None else section.alpha_by_context
        self.base, self.memory = open_model(base), open_model(memory)
        self.gate, path = None, gate_path(memory) if gated else None
        if path is not None:
            arrays = read_gate(path, self.memory.config.hidden_size)
            if warning := check_gate(path, arrays):
                progress.say(warning)
            self.gate = Gate(arrays)

    @property
    def configs(self) -> list[Any]:
        return [text_config(model.config) for model in (self.base, self.memory)]

    def weights(self, position_N: np.ndarray) -> np.ndarray | None:
        """Return the weights [N] without a gate, as they are served; None if there are none."""
        if self.table is not None:
            return alpha_at(self.table, position_N)
        return None if self.alpha is None else np.full(len(position_N), float(self.alpha))

    def read(self, text: Windows, name: str, progress: Progress) -> dict[str, np.ndarray]:
        """Return log-probabilities [N] of "base" and "memory", and weights [N] of the "gate"."""
        outputs: dict[str, list[np.ndarray]] = {"base": [], "memory": []}
        each = max(1, CHUNK_TOKENS // (text.tokens.shape[1] - 1))
        with progress.task(f"scoring {name}", len(text), "windows") as advance:
            for start in range(0, len(text), each):
                part, features_NF = text[start : start + each], None
                outputs["base"].append(window_logprobs(self.base, part))
                if self.gate is not None:
                    features_NF = torch.empty(
                        len(part.position_N), self.memory.config.hidden_size + 3
                    )
                memory_N = window_logprobs(self.memory, part, features_NF=features_NF)
                outputs["memory"].append(memory_N)
                if self.gate is not None and features_NF is not None:
                    with torch.inference_mode():
                        weights_N = self.gate(features_NF).double().numpy()
                    outputs.setdefault("gate", []).append(weights_N)
                advance(len(part))
        return {name: np.concatenate(parts) for name, parts in outputs.items()}


def matching_tokenizer(base: str, memory: str) -> Any:
    """Return the tokenizer of a base, or raise MemdecError if the memory has another one."""
    tokenizer, section = load_tokenizer(base), read_block(memory)
    if section is not None:
        theirs = section.tokenizer_fingerprint
    else:
        theirs = tokenizer_fingerprint(load_tokenizer(memory))
    if theirs != tokenizer_fingerprint(tokenizer):
        raise MemdecError(
            f"the memory {memory} has another tokenizer than the base {base}: give a base that "
            "it serves."
        )
    return tokenizer


def as_learnt(fields: Fields, section: MemoryBlock | None) -> Fields:
    """Return fields of which that is predicted which the memory learnt, of chats."""
    settings = {} if section is None else section.provenance.get("settings", {})
    return replace(fields, loss_on=settings.get("corpus", {}).get("loss_on", "all"))


def open_model(folder: str) -> Any:
    """Return the causal LM of a folder in the dtype of its own config."""
    config = load_config(folder)
    given = (getattr(part, "dtype", None) for part in (config, text_config(config)))
    dtype = next(filter(None, given), torch.float32)
    return load_model(folder, str(dtype).removeprefix("torch."))


def read_ids(
    tokenizer: Any, path: Path, max_tokens: int = READ_TOKENS, fields: Fields = TEXT
) -> Iterator[np.ndarray]:
    """Yield the documents of a text, tokenised, until there are so many tokens."""
    count = 0
    for ids in tokenise(tokenizer, documents(path, fields)):
        yield ids
        count += len(ids)
        if count >= max_tokens:
            return


def read_readings(
    pair: Pair, path: Path, context: int | None, fields: Fields
) -> tuple[Windows, Windows, int]:
    """Return a text in both readings, and how many tokens their windows have."""
    ids = list(read_ids(pair.tokenizer, path, fields=as_learnt(fields, pair.section)))
    if sum(map(len, ids)) < 2:
        raise MemdecError(f"{path} has no text that could be predicted: give a longer one.")
    width = window_tokens(context, sum(map(len, ids)), pair.configs)
    ends = pair.tokenizer.eos_token_id, MAX_TOKENS, bos_of(pair.tokenizer)
    return *readings(ids, width, *ends), width


def evaluate(
    memory: str,
    base: str,
    texts: list[Path],
    progress: Progress,
    alpha: float | None = None,
    context: int | None = None,
    fields: Fields = TEXT,
) -> dict[str, Any]:
    """Return what base, memory, mixture and gate give to texts, and by length of context.

    alpha: a weight in place of the memory's own; context: tokens of the longest contexts.
    """
    pair = Pair(base, memory, progress, alpha)
    scores: dict[str, Any] = {"alpha": pair.alpha, "alpha_by_context": pair.table, "texts": {}}
    for path in texts:
        alone, joined, width = read_readings(pair, path, context, fields)
        parts = [pair.read(t, f"{path.name}, {how}", progress) for t, how in
                 ((alone, "documents"), (joined, "long contexts")) if len(t)]  # fmt: skip
        read = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        position_N = np.concatenate([alone.position_N, joined.position_N])
        mixed = {}
        if (weights_N := pair.weights(position_N)) is not None:
            mixed["mixture"] = mix(read["base"], read["memory"], weights_N)
            if pair.table is not None and pair.alpha is not None:  # one weight for all contexts
                mixed["fixed"] = mix(read["base"], read["memory"], float(pair.alpha))
        if "gate" in read:
            mixed["gate"] = mix(read["base"], read["memory"], read["gate"])
        rows = len(alone.position_N)
        systems = {"base": read["base"], "memory": read["memory"], **mixed}
        whole = {name: number(perplexity(logp_N[:rows])) for name, logp_N in systems.items()}
        scores["texts"][str(path)] = {
            "tokens": rows,
            "context_tokens": width,
            **whole,
            "by_context": [
                {name: number(value) for name, value in row.items()}
                for row in by_context(position_N, read["base"], read["memory"], mixed)
            ],
        }
    return scores


def best_weights(
    memory: str,
    base: str,
    texts: list[Path],
    progress: Progress,
    context: int | None = None,
    fields: Fields = TEXT,
) -> dict[str, Any]:
    """Return the best weights of a memory beside a base, over all texts, and how to serve them."""
    pair = Pair(base, memory, progress, gated=False)
    scored: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
    for path in texts:
        alone, joined, _ = read_readings(pair, path, context, fields)
        scored += [
            (text.position_N, pair.read(text, f"{path.name}, {how}", progress))
            for text, how in ((alone, "documents"), (joined, "long contexts"))
            if len(text)
        ]
    position_N = np.concatenate([position for position, _ in scored])
    base_N, memory_N = (
        np.concatenate([read[name] for _, read in scored]) for name in ("base", "memory")
    )
    tuned = tune(position_N, base_N, memory_N, None)
    settings = {"model": str(memory), "alpha_by_context": tuned["alpha_by_context"]}
    return tuned | {
        "tokens": len(position_N),
        "serve": serve_command(base, settings),
    }


def serve_command(base: str, settings: dict[str, Any]) -> str:
    """Return the command that serves a base with the memory of these settings."""
    words = ["vllm", "serve", *served(base), "--model-impl", "memdec"]
    words += ["--trust-remote-code"] if code_allowed() else []
    return shlex.join([*words, "--additional-config", json.dumps({"memdec": settings})])


def show(scores: dict[str, Any], console: Console) -> None:
    """Print the report of evaluate()."""
    for path, text in scores["texts"].items():
        rows = [("documents by themselves", text), *text_rows(text["by_context"])]
        print_rows(path, rows, console)


def text_rows(by_length: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return rows of by_context() under their names."""
    return [(f"{row['from']}-{row['to']} tokens of context", row) for row in by_length]


def print_rows(title: str, rows: list[tuple[str, dict[str, Any]]], console: Console) -> None:
    """Print perplexities, each beside its change from the base's."""
    names = [n for n in ("base", "memory", "mixture", "fixed", "gate") if n in rows[-1][1]]
    table = Table("perplexity", "tokens", *names, "best alpha", title=title)
    for name, row in rows:
        base = row["base"] or math.inf
        cells = [f"{row['tokens']:,}"]
        for system in names:
            value = row.get(system) or math.inf
            change = "" if system in ("base", "memory") else f" ({value / base - 1:+.1%})"
            cells.append(f"{value:.2f}{change}")
        best = f"{row['best_alpha']:.2f}" if "best_alpha" in row else ""
        table.add_row(name, *cells, best)
    console.print(table)


def show_weights(weights: dict[str, Any], console: Console) -> None:
    """Print the report of best_weights()."""
    print_rows("all texts", text_rows(weights["by_context"]), console)
    best = f"alpha {weights['alpha']:g}"
    console.print(f"{best} is the best for all contexts together (column fixed)")
    console.print("serve with a weight for each length of context:")
    console.print(weights["serve"], soft_wrap=True, markup=False, highlight=False)
