"""`memdec explain`: each token of a text with what base, memory and mixture gave it.

The case study of the paper (arXiv 2508.09874: what the memory knows, what the base) for anybody's
text. Runs both models once over the text with Hugging Face, then lets the mixture go on greedily.

Shapes: T tokens, V vocabulary of the base, W of the memory.
"""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_memdec.checkpoint import check_alpha, read_block
from vllm_memdec.errors import MemdecError
from vllm_memdec.gate import Gate, check_gate, features, gate_path, read_gate
from vllm_memdec.kernels.interpolate import interpolate
from vllm_memdec.train.evaluation.compare import matching_tokenizer, open_model
from vllm_memdec.train.evaluation.deciding import decided_by, share_of_memory
from vllm_memdec.train.evaluation.token_page import visible
from vllm_memdec.train.model.hidden_states import hidden_states, keeps_apart
from vllm_memdec.train.model.huggingface import load_text_config, text_config
from vllm_memdec.train.model.output_head import head
from vllm_memdec.train.model.windows import alpha_at

SAYS = ("base says", "memory says")
CHUNK = 128  # tokens read at once: the logits of a long text would not fit in RAM


@dataclass(frozen=True)
class Span:
    """Some of a passage's text."""

    text: str
    shared: bool  # whether the explained text reads the same there
    said: bool = False  # whether it is the token that the key was kept with


@dataclass(frozen=True)
class Source:
    """A document of the corpus that a token may come from."""

    document: int  # its number in the training text, from 1
    name: str | None  # its file, and its line or row there; None: the build did not keep it
    weight: float  # share of the weight of all nearest keys that its own have
    agrees: bool  # whether they were kept with the token itself
    passage: list[Span]  # around the nearest of them
    begins: bool  # whether the document begins with it
    ends: bool

    @property
    def title(self) -> str:
        return self.name or f"document {self.document}"

    @property
    def percent(self) -> str:
        return f"{self.weight:.0%}" if self.weight >= 0.005 else "<1%"


@dataclass(frozen=True)
class Token:
    """One token after its context."""

    text: str
    alpha: float  # the memory's weight here
    written: bool  # whether the mixture wrote it, or the prompt has it
    base: float  # probabilities that the three give to this token
    memory: float
    mixture: float
    base_says: str  # the likeliest token of each model
    memory_says: str
    share: float  # share of the mixture's probability that came from the memory
    sources: list[Source] = field(default_factory=list)  # where sources.py looked for them

    @property
    def decided(self) -> str:
        return decided_by(self.share)


@dataclass(frozen=True)
class Explanation:
    """A text, its first token (which has no context and so no probability) apart."""

    base: str
    memory: str
    alpha: float  # the memory's weight; where its gate chooses, the largest it may
    gated: bool
    first: str
    tokens: list[Token]
    ids: list[int]  # of the first token and all others
    alpha_by_context: list[list[float]] | None = None  # the weights, where they depend on position
    build: str | None = None  # where the tokens' sources were looked for


class Reader:
    """A model that reads a text piece by piece."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, None
        self.read: list[int] = []

    @torch.inference_mode()
    def __call__(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden states [T, D] and float32 logits [T, V] after each of the next ids."""
        # An id that the memory has no embedding for, as in serving.
        last = text_config(self.model.config).vocab_size - 1
        self.read += [min(token, last) for token in ids]
        if keeps_apart(self.model):
            ids_1T = torch.tensor([self.read[-len(ids) :]], device=self.model.device)
            out = self.model.base_model(
                input_ids=ids_1T, past_key_values=self.cache, use_cache=True
            )
            self.cache = out.past_key_values
            h_TD = out.last_hidden_state[0]
        else:  # not every state of a recurrent layer goes on where several tokens follow
            ids_1T = torch.tensor([self.read], device=self.model.device)
            position_1T = torch.arange(len(self.read), device=self.model.device)[None]
            h_1TD = hidden_states(self.model, "final_hidden", ids_1T, position_1T)
            h_TD = h_1TD[0, -len(ids) :]
        return h_TD, head(self.model, h_TD).float()

    @cached_property
    def stops(self) -> set[int]:
        """Ids that end a text."""
        ids = self.model.generation_config.eos_token_id
        return {ids} if isinstance(ids, int) else set(ids or ())


class TokenText:
    """The text of ids, one by one; a character of several tokens stands at its last one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.pending: list[int] = []

    def __call__(self, token: int) -> str:
        self.pending.append(token)
        text = self.tokenizer.decode(self.pending)
        if text.endswith("\ufffd") and len(self.pending) < 4:  # UTF-8 has no longer characters
            return "…"
        self.pending = []
        return text


class Explainer:
    """A base and a memory that explain one text after the other."""

    def __init__(self, base: str, memory: str, alpha: float | None = None) -> None:
        """alpha: a weight in place of the memory's own."""
        self.base, self.memory = base, memory
        section, path = read_block(memory), gate_path(memory)
        self.gate, self.table = None, None
        if path:
            arrays = read_gate(path, load_text_config(memory).hidden_size)
            check_gate(path, arrays)
            self.gate = Gate(arrays)
        if alpha is None and self.gate is not None:
            alpha = 1.0
        elif alpha is None:
            if section is None:
                raise MemdecError(
                    f"{memory} has no memdec block, so no default weight: give --alpha."
                )
            alpha, self.table = section.alpha, section.alpha_by_context
        self.alpha = check_alpha(alpha, "--alpha")
        self.tokenizer = matching_tokenizer(base, memory)

    @cached_property
    def models(self) -> tuple[Any, Any]:
        """Return base and memory, opened once."""
        return open_model(self.base), open_model(self.memory)

    def __call__(self, prompt: str, write: int = 16) -> Explanation:
        """Return what both models thought of a prompt, and of `write` tokens after it."""
        ids = self.tokenizer(prompt)["input_ids"]
        if not ids:
            raise MemdecError("the text is empty: give a few words to explain.")
        for folder in (self.base, self.memory):
            positions = getattr(load_text_config(folder), "max_position_embeddings", None)
            if positions is not None and len(ids) + write > positions:
                raise MemdecError(
                    f"the text has {len(ids)} tokens and {write} are to be written, {folder} has "
                    f"{positions} positions: give less text, or a smaller --tokens."
                )
        first, tokens = self._read(ids, write)
        gated = self.gate is not None
        about = self.base, self.memory, self.alpha, gated, first, tokens, ids, self.table
        return Explanation(*about)

    def _read(self, ids: list[int], write: int) -> tuple[str, list[Token]]:
        """Return the first token's text, and every other token; what is written joins the ids."""
        tokenizer, text_of = self.tokenizer, TokenText(self.tokenizer)
        base_reads, memory_reads = map(Reader, self.models)
        known, done = len(ids), 0
        tokens: list[Token] = []
        first = text_of(ids[0])
        while True:
            part = ids[done : done + CHUNK]
            _, base_TV = base_reads(part)
            h_TD, memory_TW = (x.to(base_TV.device) for x in memory_reads(part))
            memory_TW = memory_TW[:, : base_TV.shape[1]]  # what it gives to ids beyond is nothing
            alpha_T = self._weights(h_TD, memory_TW, done)
            mixed_TV = interpolate(base_TV, memory_TW, alpha_T)
            base_TV, memory_TW = base_TV.log_softmax(-1), memory_TW.log_softmax(-1)
            for row in range(len(part)):
                done += 1
                if done == len(ids):  # here the text ends, and the mixture goes on
                    token = int(mixed_TV[row].argmax())
                    if len(ids) == known + write or token in base_reads.stops:
                        return first, tokens
                    ids.append(token)
                token = ids[done]
                has_row = token < memory_TW.shape[1]
                p_base, p_mixture = base_TV[row, token].exp(), mixed_TV[row, token].exp()
                p_memory = memory_TW[row, token].exp() if has_row else torch.tensor(0.0)
                weight = float(alpha_T[row])
                base_says, memory_says = (
                    tokenizer.decode([int(logp[row].argmax())]) for logp in (base_TV, memory_TW)
                )
                numbers = float(p_base), float(p_memory), float(p_mixture)
                share = share_of_memory(weight, *numbers[:2])
                said = text_of(token), weight, done >= known
                tokens.append(Token(*said, *numbers, base_says, memory_says, share))

    def _weights(self, h_TD: torch.Tensor, memory_TW: torch.Tensor, start: int) -> torch.Tensor:
        """Return the memory's weights [T] after some tokens, of which `start` stand before."""
        position_T = torch.arange(start, start + len(h_TD))
        alpha_T = torch.full((len(h_TD),), self.alpha)
        if self.table is not None:
            alpha_T = torch.from_numpy(alpha_at(self.table, position_T.numpy())).float()
        if self.gate is not None:
            seen_TF = features(h_TD, memory_TW, position_T)
            alpha_T = alpha_T.minimum(self.gate(seen_TF.cpu()))
        return alpha_T.to(h_TD.device)


def explain(
    base: str, memory: str, prompt: str, alpha: float | None = None, write: int = 16
) -> Explanation:
    """Return what both models thought of a prompt, and of `write` tokens after it."""
    return Explainer(base, memory, alpha)(prompt, write)


def report(explanation: Explanation) -> dict[str, Any]:
    """Return everything as JSON has it; sources only where they were looked for."""
    whole = asdict(explanation)
    for entry, token in zip(whole["tokens"], explanation.tokens, strict=True):
        entry["decided"] = token.decided
        if explanation.build is None:
            del entry["sources"]
    return whole


def weight_of(explanation: Explanation) -> str:
    """Return in words where the weights come from."""
    if explanation.alpha_by_context is not None:
        return "by context"
    if not explanation.gated:
        return f"{explanation.alpha:g}"
    return "by the gate" + (f", at most {explanation.alpha:g}" if explanation.alpha < 1 else "")


def show(explanation: Explanation, console: Console) -> None:
    """Print a table, a token a line, and the passages that the tokens' sources have."""
    models = f"base {explanation.base}, memory {explanation.memory}"
    console.print(f"alpha {weight_of(explanation)}, {models}", markup=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("token", "alpha", "P(base)", "P(memory)", "P(mixture)", "decided", *SAYS):
        is_text = name in ("token", *SAYS)
        table.add_column(name, no_wrap=not is_text, overflow="ellipsis" if is_text else "fold")
    table.add_row(escape(visible(explanation.first)))
    for token in explanation.tokens:
        colour = "orange1" if token.decided == "memory" else "dodger_blue1"
        name = escape(visible(token.text))
        says = (escape(visible(text)) for text in (token.base_says, token.memory_says))
        table.add_row(
            f"[bold]{name}[/]" if token.written else name,
            f"{token.alpha:.2f}",
            *(f"{p:.1%}" for p in (token.base, token.memory, token.mixture)),
            f"[{colour}]{token.decided}[/]",
            *says,
        )
    console.print(table)
    if any(token.written for token in explanation.tokens):
        console.print("Tokens in bold were written by the mixture.")
    if explanation.build is not None:
        show_sources(explanation, console)


def numbered(explanation: Explanation) -> dict[int, int]:
    """Return a number of its own, from 1, for each document that is a source."""
    found = (source.document for token in explanation.tokens for source in token.sources)
    return {document: n for n, document in enumerate(dict.fromkeys(found), 1)}


def share_of(documents: dict[int, int], source: Source) -> str:
    """Return a source's number and share; in brackets where its keys say another token."""
    said = f"{documents[source.document]}: {source.percent}"
    return said if source.agrees else f"({said})"


def show_sources(explanation: Explanation, console: Console) -> None:
    """Print the documents that are sources, each with the passage that has most of the text."""
    documents = numbered(explanation)
    if not documents:
        console.print("The memory decided no token, so there are no sources.")
        return
    best: dict[int, Source] = {}
    for source in (source for token in explanation.tokens for source in token.sources):
        held = best.setdefault(source.document, source)
        if common(source) > common(held):
            best[source.document] = source
    console.print(
        f"Sources in {explanation.build}, by the share that each has of the nearest keys' weight; "
        "in brackets where its keys say another token. Marked: what a passage has in common with "
        "the text.",
        markup=False, highlight=False,
    )  # fmt: skip
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("token", "comes from"):
        table.add_column(name)
    for token in (token for token in explanation.tokens if token.sources):
        shares = ", ".join(share_of(documents, source) for source in token.sources)
        table.add_row(escape(visible(token.text)), shares)
    console.print(table)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "document", "passage"):
        table.add_column(name, overflow="fold")
    for document, n in documents.items():
        source = best[document]
        spans = (
            f"[orange1]{escape(span.text)}[/]" if span.shared else escape(span.text)
            for span in source.passage
        )
        before, after = "" if source.begins else "… ", "" if source.ends else " …"
        table.add_row(str(n), escape(source.title), f"{before}{''.join(spans)}{after}")
    console.print(table)


def common(source: Source) -> int:
    """Return how many characters a passage has in common with the explained text."""
    return sum(len(span.text) for span in source.passage if span.shared)
