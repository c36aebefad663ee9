"""Two memories on one base, every way a request may choose among them, and the answer key.

The key is computed without vLLM: float64 mixtures of plain Hugging Face models.
"""

from collections import Counter
from dataclasses import dataclass

import regex
import torch
from support import oracle

ALPHAS = {"law": 0.6, "bio": 0.4}
DEFAULT = "law"
EOS = 1
PROMPT = [5, 6, 7, 8, 9]


def make_models(tiny_model):
    """Return the folders by name; the memories differ from the base in shape and in weights."""
    return {
        "base": tiny_model("llama"),
        "law": tiny_model("llama", seed=1, hidden=96, layers=3),
        "bio": tiny_model("llama", seed=2),
    }


def memdec_block(models, **alphas):
    """Return what `--additional-config` says of the two memories, perhaps with other weights."""
    weights = ALPHAS | alphas
    memories = {name: {"model": models[name], "alpha": alpha} for name, alpha in weights.items()}
    return {"memories": memories, "default": DEFAULT}


@dataclass(frozen=True)
class Choice:
    """What a request asks for; None is the server's default."""

    memory: str | None = None
    alpha: float | None = None

    @property
    def extra_args(self):
        given = {"memdec_memory": self.memory, "memdec_alpha": self.alpha}
        return {key: value for key, value in given.items() if value is not None}

    @property
    def resolved(self):
        """Return (memory whose folder is read, weight)."""
        name = self.memory or DEFAULT
        if name == "none":
            return DEFAULT, 0.0
        return name, ALPHAS[name] if self.alpha is None else self.alpha


PLAIN = Choice()
CHOICES = [PLAIN, Choice("bio"), Choice("none"), Choice("law", 0.3), Choice("bio", 1.0)]


def mixture(models, choice, ids):
    """Return the log-probabilities [T, V] of what follows each token."""
    name, alpha = choice.resolved
    return oracle.mixture(models["base"], models[name], alpha, ids)


def logits(models, choice, ids):
    """Return the logits form [V] after the last token: with the base's logsumexp added back."""
    with torch.no_grad():
        base_V = oracle.load(models["base"])(torch.tensor([ids])).logits[0, -1]
    return mixture(models, choice, ids)[-1] + base_V.logsumexp(-1)


def greedy(models, choice, prompt, steps, adjust=None):
    """Return the chain of best tokens; adjust(logits [V], sampled so far) is applied to each."""
    sampled = []
    for _ in range(steps):
        row_V = logits(models, choice, [*prompt, *sampled])
        if adjust is not None:
            row_V = adjust(row_V, sampled)
        sampled.append(int(row_V.argmax()))
    return sampled


def beams(models, choice, prompt, width, steps):
    """Return the best (log-probability, tokens) of a beam search over the whole vocabulary."""
    found = [(0.0, [])]
    for _ in range(steps):
        longer = []
        for total, ids in found:
            row_V = mixture(models, choice, [*prompt, *ids])[-1]
            longer += [(total + p, [*ids, token]) for token, p in enumerate(row_V.tolist())]
        found = sorted(longer, reverse=True)[:width]
    return found


def constrained(models, choice, prompt, pattern, tokenizer):
    """Return the text of best tokens among those that can still lead to a full match."""
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    special = set(tokenizer.all_special_ids)
    done, sampled = "", []
    while True:
        allowed = [
            token
            for token, text in enumerate(texts)
            if token not in special and regex.fullmatch(pattern, done + text, partial=True)
        ]
        if regex.fullmatch(pattern, done):
            allowed.append(EOS)
        row_V = mixture(models, choice, [*prompt, *sampled])[-1]
        best = max(allowed, key=lambda token: row_V[token])
        if best == EOS:
            return done
        sampled.append(best)
        done += texts[best]


def penalised(prompt, presence=0.0, frequency=0.0, repetition=1.0):
    """Return vLLM's penalties as a function for greedy()."""

    def adjust(row_V, sampled):
        row_V = row_V.clone()
        for token in {*prompt, *sampled}:
            x = row_V[token]
            row_V[token] = x / repetition if x > 0 else x * repetition
        for token, count in Counter(sampled).items():
            row_V[token] -= frequency * count + presence
        return row_V

    return adjust


def kept(row_V, min_p=0.0, top_k=0, top_p=1.0):
    """Return the tokens a sampler may draw from log-probabilities [V]."""
    p_V, order_V = row_V.exp().sort(descending=True)
    mask_V = p_V >= min_p * p_V[0]
    mask_V[top_k or len(row_V) :] = False
    mask_V &= p_V.cumsum(-1) - p_V < top_p  # the token that passes top_p is the last one kept
    return set(order_V[mask_V].tolist())
