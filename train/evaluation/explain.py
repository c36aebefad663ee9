"""`memdec explain`: each token of a text with what base, memory and mixture gave it.

The case study of the paper (arXiv 2508.09874: what the memory knows, what the base) for anybody's
text. Runs both models once over the text with Hugging Face, then lets the mixture go on greedily.

Shapes: T tokens, V vocabulary of the base, W of the memory.
"""

import html
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_memdec.checkpoint import check_alpha, json_text, read_block
from vllm_memdec.errors import MemdecError
from vllm_memdec.gate import Gate, check_gate, features, gate_path, read_gate
from vllm_memdec.kernels.interpolate import interpolate
from vllm_memdec.train.evaluation.compare import matching_tokenizer, open_model
from vllm_memdec.train.model.hidden_states import hidden_states, keeps_apart
from vllm_memdec.train.model.huggingface import load_text_config, text_config
from vllm_memdec.train.model.output_head import head
from vllm_memdec.train.model.windows import alpha_at

SAYS = ("base says", "memory says")
CHUNK = 128  # tokens read at once: the logits of a long text would not fit in RAM
BASE_RGB, MEMORY_RGB = (66, 133, 244), (255, 145, 0)


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

    @property
    def decided(self) -> str:
        return "memory" if self.share > 0.5 else "base"


@dataclass(frozen=True)
class Explanation:
    """A text, its first token (which has no context and so no probability) apart."""

    base: str
    memory: str
    alpha: float  # the memory's weight; where its gate chooses, the largest it may
    gated: bool
    first: str
    tokens: list[Token]
    alpha_by_context: list[list[float]] | None = None  # the weights, where they depend on position


class Reader:
    """A model that reads a text piece by piece."""

    def __init__(self, folder: str) -> None:
        self.model, self.cache = open_model(folder), None
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


def explain(
    base: str, memory: str, prompt: str, alpha: float | None = None, write: int = 16
) -> Explanation:
    """Return what both models thought of a prompt, and of `write` tokens after it."""
    section, path = read_block(memory), gate_path(memory)
    gate, table = None, None
    if path:
        arrays = read_gate(path, load_text_config(memory).hidden_size)
        check_gate(path, arrays)
        gate = Gate(arrays)
    if alpha is None and gate is not None:
        alpha = 1.0
    elif alpha is None:
        if section is None:
            raise MemdecError(f"{memory} has no memdec block, so no default weight: give --alpha.")
        alpha, table = section.alpha, section.alpha_by_context
    alpha = check_alpha(alpha, "--alpha")
    tokenizer = matching_tokenizer(base, memory)
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise MemdecError("the text is empty: give a few words to explain.")
    for folder in (base, memory):
        positions = getattr(load_text_config(folder), "max_position_embeddings", None)
        if positions is not None and len(ids) + write > positions:
            raise MemdecError(
                f"the text has {len(ids)} tokens and {write} are to be written, {folder} has "
                f"{positions} positions: give less text, or a smaller --tokens."
            )
    read = _read(tokenizer, base, memory, ids, alpha, gate, table, write)
    return Explanation(base, memory, alpha, gate is not None, *read, table)


def _read(
    tokenizer: Any,
    base: str,
    memory: str,
    ids: list[int],
    alpha: float,
    gate: Gate | None,
    table: list[list[float]] | None,
    write: int,
) -> tuple[str, list[Token]]:
    """Return the first token's text, and every other token."""
    base_reads, memory_reads, text_of = Reader(base), Reader(memory), TokenText(tokenizer)
    known, done = len(ids), 0
    tokens: list[Token] = []
    first = text_of(ids[0])
    while True:
        part = ids[done : done + CHUNK]
        _, base_TV = base_reads(part)
        h_TD, memory_TW = (x.to(base_TV.device) for x in memory_reads(part))
        memory_TW = memory_TW[:, : base_TV.shape[1]]  # what it gives to ids beyond does not count
        position_T = torch.arange(done, done + len(part))
        alpha_T = torch.full((len(part),), alpha, device=base_TV.device)
        if table is not None:
            by_position_T = torch.from_numpy(alpha_at(table, position_T.numpy())).float()
            alpha_T = by_position_T.to(base_TV.device)
        if gate is not None:
            seen_TF = features(h_TD, memory_TW, position_T)
            alpha_T = alpha_T.minimum(gate(seen_TF.cpu()).to(base_TV.device))
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
            parts = weight * p_memory, (1 - weight) * p_base
            base_says, memory_says = (
                tokenizer.decode([int(logp[row].argmax())]) for logp in (base_TV, memory_TW)
            )
            share = float(parts[0] / sum(parts)) if sum(parts) > 0 else weight
            numbers = float(p_base), float(p_memory), float(p_mixture)
            says = base_says, memory_says
            tokens.append(Token(text_of(token), weight, done >= known, *numbers, *says, share))


def report(explanation: Explanation) -> dict[str, Any]:
    """Return everything as JSON has it."""
    return asdict(explanation) | {
        "tokens": [asdict(token) | {"decided": token.decided} for token in explanation.tokens]
    }


def weight_of(explanation: Explanation) -> str:
    """Return in words where the weights come from."""
    if explanation.alpha_by_context is not None:
        return "by context"
    if not explanation.gated:
        return f"{explanation.alpha:g}"
    return "by the gate" + (f", at most {explanation.alpha:g}" if explanation.alpha < 1 else "")


def visible(text: str) -> str:
    """Return a token with its white space to be seen."""
    return text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")


def show(explanation: Explanation, console: Console) -> None:
    """Print a table, a token a line."""
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


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="memdec">
<title>memdec explain</title>
<style>
body {{ font: 16px/1.6 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; color: #222; }}
.text {{ font: 18px/2.1 ui-monospace, monospace; white-space: pre-wrap; }}
.text span {{ border-radius: 3px; padding: 2px 0; }}
.written {{ border-bottom: 2px solid #222; }}
.key {{ display: inline-block; width: 12rem; height: .8rem; border-radius: 3px;
  background: linear-gradient(90deg, rgb{base_rgb}, rgb{memory_rgb}); }}
table {{ border-collapse: collapse; margin-top: 1.5rem; }}
td, th {{ padding: .1rem .8rem; text-align: right; border-bottom: 1px solid #eee; }}
td:first-child, td:nth-child(n+6), th:first-child, th:nth-child(n+6) {{ text-align: left; }}
td:first-child, td:nth-child(n+7) {{ font-family: ui-monospace, monospace; }}
</style></head><body>
<h1>Who said that?</h1>
<p>base <b>{base}</b>, memory <b>{memory}</b>, alpha {alpha}. Colour: whose probability it was,
from the base <span class="key"></span> to the memory; the stronger, the surer the mixture.
Underlined tokens were written by the mixture. Point at a token for its numbers.</p>
<p class="text">{text}</p>
<table><tr><th>token</th><th>alpha</th><th>P(base)</th><th>P(memory)</th><th>P(mixture)</th><th>decided</th>
<th>base says</th><th>memory says</th></tr>
{rows}
</table>
<script type="application/json" id="figures">{figures}</script>
</body></html>
"""


def page(explanation: Explanation) -> str:
    """Return one self-contained HTML page: the text as a heat map, and the table."""
    spans, rows = [html.escape(explanation.first)], []
    for token in explanation.tokens:
        percents = [f"{p:.1%}" for p in (token.base, token.memory, token.mixture)]
        mixed = zip(BASE_RGB, MEMORY_RGB, strict=True)
        rgb = ", ".join(f"{a + (b - a) * token.share:.0f}" for a, b in mixed)
        title = f"base {percents[0]}, memory {percents[1]}, mixture {percents[2]}: {token.decided}"
        spans.append(
            f'<span class="{"written" if token.written else "given"}" title="{title}" '
            f'style="background: rgba({rgb}, {0.1 + 0.8 * token.mixture:.2f})">'
            f"{html.escape(token.text)}</span>"
        )
        cells = [visible(token.text), f"{token.alpha:.2f}", *percents, token.decided]
        cells += [visible(token.base_says), visible(token.memory_says)]
        rows.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    return PAGE.format(
        base=html.escape(Path(explanation.base).name),
        memory=html.escape(explanation.memory),
        alpha=weight_of(explanation),
        text="".join(spans),
        rows="\n".join(rows),
        figures=json_text(report(explanation)).replace("<", "\\u003c"),
        base_rgb=BASE_RGB,
        memory_rgb=MEMORY_RGB,
    )
