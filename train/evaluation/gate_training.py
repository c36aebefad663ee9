"""`memdec calibrate`: train a memory's gate on what base and memory gave to every token of a text.

The gate (vllm_memdec/gate.py) maximises the mixture's likelihood, log(alpha_t p_memory + (1 -
alpha_t) p_base), on several kinds of text. Text of the domain that the memory has not learnt says
what it may be trusted with; of what it has learnt it is surer, and right, so the corpus itself
comes in with a smaller weight, or memorised facts would be doubted. General text weighs the most:
there the base is to be left alone. And documents that mix passages of the domain and of general
text teach it to tell them apart within one context. All of it is read in short and in long contexts
(windows.py), each kind in the same lengths, or length itself would tell the kinds apart. Models
read the text once; the training takes seconds.
"""

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import gelu

from vllm_memdec.checkpoint import read_block
from vllm_memdec.errors import MemdecError
from vllm_memdec.gate import CONTEXT, FILE, NAMES, UNITS, Gate, write_gate
from vllm_memdec.kernels.interpolate import LARGEST
from vllm_memdec.train.data.blocks import bos_of
from vllm_memdec.train.data.readers import TEXT, Fields
from vllm_memdec.train.evaluation.compare import as_learnt, matching_tokenizer, open_model
from vllm_memdec.train.evaluation.gate_report import draw, report, token_class
from vllm_memdec.train.evaluation.gate_texts import KEPT, check_amounts, divide, read_texts
from vllm_memdec.train.model.huggingface import text_config
from vllm_memdec.train.model.windows import (
    MIN_ROWS,
    Windows,
    bucket_of,
    window_logprobs,
    window_tokens,
    windows,
)
from vllm_memdec.train.progress import Progress

MAX_TOKENS = 2**18  # tokens scored of each kind of text, fewer where FEATURE_BYTES says so
FEATURE_BYTES = 2**31  # bytes of the features of all kinds together, at most
HIDDEN = 256  # units for the hidden state; UNITS are for the memory's confidence
# Steps, rows of a step, learning rate, share of units that dropout leaves out.
STEPS, BATCH, RATE, DROPOUT = 600, 2048, 3e-3, 0.8
# Unlearnt text is scarce and a wide memory overfits to it; a narrow one would never be trusted.
# Weights of the two numbers of certainty, and of the position, are not decayed.
DECAY, DECAY_WIDTH = 3.0, 576  # weight decay from that width on, in proportion below
# The weight of each kind of text in the loss; even() divides it among its tokens.
WEIGHTS = {"domain": 1.0, "corpus": 0.75, "general": 6.0, "in turn": 2.0}
# All that a gate depends on beside the texts: cached copies are named by a hash of it.
SETTINGS = {
    "units": (HIDDEN, UNITS),
    "training": (STEPS, BATCH, RATE, DROPOUT, DECAY, DECAY_WIDTH),
    "weights": WEIGHTS,
    "context": "even",
}


@dataclass(frozen=True)
class Scored:
    """What both models gave to the tokens of one kind of text."""

    base_N: np.ndarray  # log-probabilities
    memory_N: np.ndarray
    features_NF: torch.Tensor  # the gate's inputs, from the memory before each token
    classes_N: np.ndarray  # each token's place in CLASSES
    position_N: np.ndarray  # positions in the request of the last token read


def score(
    models: tuple[Any, Any],
    tokenizer: Any,
    width: int,
    documents: list[np.ndarray],
    max_rows: int,
    kind: str,
    progress: Progress,
) -> Scored:
    """Read documents with base and memory, in windows of so many tokens, spread if too many."""
    text = windows(documents, width, tokenizer.eos_token_id, max_rows, bos_of(tokenizer))
    base, memory = models
    base_N = window_logprobs(base, text, progress, f"the base, {kind}")
    return read_windows(base_N, memory, tokenizer, text, kind, progress)


def read_windows(
    base_N: np.ndarray, memory: Any, tokenizer: Any, text: Windows, kind: str, progress: Progress
) -> Scored:
    """Read windows with the memory; the base has given its log-probabilities."""
    features_NF = torch.empty(len(base_N), memory.config.hidden_size + 3)
    memory_N = window_logprobs(memory, text, progress, f"the memory, {kind}", features_NF)
    labels_N = text.tokens[:, 1:][text.scored]
    ids, inverse = np.unique(labels_N, return_inverse=True)
    classes = np.array([token_class(tokenizer.decode([int(i)])) for i in ids])
    return Scored(base_N, memory_N, features_NF, classes[inverse], text.position_N)


class Net(nn.Module):
    """The gate's network, on normalised features; it returns scores [N]."""

    def __init__(self, width: int, hidden: int = HIDDEN, certainty: int = UNITS) -> None:
        super().__init__()
        self.sees = nn.Linear(width, hidden)
        self.context = nn.Linear(1, hidden, bias=False)
        self.out = nn.Linear(hidden, 1)
        self.sure = nn.Linear(2, certainty)
        self.sure_out = nn.Linear(certainty, 1, bias=False)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x_NF: torch.Tensor) -> torch.Tensor:
        seen_NH = gelu(self.sees(x_NF[:, :-3]) + self.context(x_NF[:, -1:]))
        sure_N1 = self.sure_out(gelu(self.sure(x_NF[:, -3:-1])))
        return (self.out(self.dropout(seen_NH)) + sure_N1)[:, 0]

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameters for an optimiser, each with its weight decay."""
        decayed = [*self.sees.parameters(), *self.out.parameters()]
        free = [part.parameters() for part in (self.sure, self.sure_out, self.context)]
        decay = DECAY * min(1, self.sees.in_features / DECAY_WIDTH)
        return [
            {"params": decayed, "weight_decay": decay},
            {"params": [*itertools.chain(*free)], "weight_decay": 0.0},
        ]

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray], normal: tuple[torch.Tensor, torch.Tensor]) -> "Net":
        """Return the network of a gate; normal: mean and deviation of the features."""
        w1, b1, w2, b2, certainty = (torch.from_numpy(arrays[n]).float() for n in NAMES)
        context_H = torch.zeros_like(b1)
        if CONTEXT[0] in arrays:
            context_H = torch.from_numpy(arrays[CONTEXT[0]]).float()
        (mean_F, scale_F), sure_K2 = normal, certainty[:2].T
        net = cls(w1.shape[1], len(b1), len(sure_K2))
        with torch.no_grad():
            net.sees.weight.copy_(w1 * scale_F[:-3])
            net.sees.bias.copy_(b1 + w1 @ mean_F[:-3] + context_H * mean_F[-1])
            net.context.weight.copy_((context_H * scale_F[-1])[:, None])
            net.out.weight.copy_(w2[None])
            net.out.bias.copy_(b2[None])
            net.sure.weight.copy_(sure_K2 * scale_F[-3:-1])
            net.sure.bias.copy_(certainty[2] + sure_K2 @ mean_F[-3:-1])
            net.sure_out.weight.copy_(certainty[3][None])
        return net

    def arrays(self, mean_F: torch.Tensor, scale_F: torch.Tensor) -> dict[str, np.ndarray]:
        """Return the gate that does to features what this does to normalised ones."""
        w1, b1 = without_scale(self.sees, mean_F[:-3], scale_F[:-3])
        sure, bias_K = without_scale(self.sure, mean_F[-3:-1], scale_F[-3:-1])
        context_H = self.context.weight[:, 0] / scale_F[-1]
        return {
            "w1": w1.numpy(),
            "b1": (b1 - context_H * mean_F[-1]).numpy(),
            "context": context_H.numpy(),
            "w2": self.out.weight[0].numpy(),
            "b2": self.out.bias[0].numpy(),
            "certainty": torch.stack([*sure.T, bias_K, self.sure_out.weight[0]]).numpy(),
        }


class Rows:
    """Rows of several texts as one, none of them copied."""

    def __init__(self, parts: list[torch.Tensor]) -> None:
        self.parts = parts
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of some numbers."""
        part_n = torch.bucketize(rows, self.ends, right=True)
        rows_F = self.parts[0].new_empty(len(rows), self.parts[0].shape[1])
        for n, part in enumerate(self.parts):
            here = part_n == n
            rows_F[here] = part[rows[here] - (self.ends[n] - len(part))]
        return rows_F

    def normal(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of each column."""
        share_P1 = torch.tensor([len(p) / len(self) for p in self.parts])[:, None]
        means_PF = torch.stack([part.mean(0) for part in self.parts])
        mean_F = (share_P1 * means_PF).sum(0)
        within_PF = torch.stack([part.var(0, correction=0) for part in self.parts])
        variance_F = (share_P1 * (within_PF + (means_PF - mean_F) ** 2)).sum(0)
        return mean_F, variance_F.sqrt() + 1e-6


def even(position_N: np.ndarray) -> torch.Tensor:
    """Return weights [N] of a text's rows, 1 in all, and as much for each length of context.

    Long contexts have most of the rows, short ones most of the requests. A length of few rows
    counts for less, or they would be learnt by heart.
    """
    bucket_N = bucket_of(position_N)
    rows = np.bincount(bucket_N)
    share = np.minimum(rows, MIN_ROWS) / np.maximum(rows, 1)
    weight_N = share[bucket_N]
    return torch.from_numpy(weight_N / weight_N.sum()).float()


def mixture(
    base_N: torch.Tensor,
    memories: Sequence[torch.Tensor],
    scores: Sequence[torch.Tensor],
    floor: float = 0.0,
) -> torch.Tensor:
    """Return log p [N] of the base and of memories that decide together, by their gates' scores.

    Each memory takes its share of what those before it left: a softmax over the base, whose score
    is 0, and the memories, but for LARGEST. floor: added to shares, as a log of 0 has no gradient.
    """
    mixed_N, left_N = base_N, torch.zeros_like(base_N)  # left: log of what is not given yet
    for memory_N, score_N in zip(memories, scores, strict=True):
        share_N = LARGEST * (score_N + left_N).sigmoid()
        take_N, keep_N = (floor + share_N).log(), (-share_N).log1p()
        mixed_N = torch.logaddexp(take_N + memory_N, keep_N + mixed_N)
        left_N = left_N + keep_N
    return mixed_N


def fit_gate(scored: dict[str, Scored], seed: int = 0) -> dict[str, np.ndarray]:
    """Return the arrays of a gate trained on texts by their kind, see WEIGHTS."""
    return fit_gates([scored], {kind: WEIGHTS[kind] for kind in scored}, seed=seed)[0]


def fit_gates(
    scored: Sequence[dict[str, Scored]],
    kinds: dict[str, float],
    starts: Sequence[dict[str, np.ndarray]] | None = None,
    seed: int = 0,
) -> list[dict[str, np.ndarray]]:
    """Return the arrays of gates that decide together, trained on the same texts.

    scored: of each memory the texts by kind; kinds: each one's weight in the loss; starts: gates
    that the training starts from, one for each memory.
    """
    texts = [[of_memory[kind] for kind in kinds] for of_memory in scored]
    rows_K = [Rows([part.features_NF for part in parts]) for parts in texts]
    columns = [np.concatenate([part.base_N for part in texts[0]])]
    columns += [np.concatenate([part.memory_N for part in parts]) for parts in texts]
    logp_NM = torch.from_numpy(np.stack(columns, 1)).float()
    weight_N = torch.cat([w * even(scored[0][kind].position_N) for kind, w in kinds.items()])
    weight_N *= len(weight_N) / weight_N.sum()
    normal_K = [rows.normal() for rows in rows_K]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        nets = [Net(len(mean_F) - 3) for mean_F, _ in normal_K]
        if starts is not None:
            nets = [Net.of(*of) for of in zip(starts, normal_K, strict=True)]
        optimizer = torch.optim.AdamW([g for net in nets for g in net.groups()], lr=RATE)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            rows = torch.randint(len(logp_NM), (BATCH,))
            scores = [
                net((x_NF[rows] - mean_F) / scale_F)
                for net, x_NF, (mean_F, scale_F) in zip(nets, rows_K, normal_K, strict=True)
            ]
            base_N, *memories = logp_NM[rows].unbind(1)
            mixed_N = mixture(base_N, memories, scores, floor=1e-6)
            loss = -(weight_N[rows] * mixed_N).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
    longest = np.array(max(int(part.position_N.max()) for part in texts[0]))
    return [
        net.requires_grad_(False).arrays(*normal) | {"longest": longest}
        for net, normal in zip(nets, normal_K, strict=True)
    ]


def without_scale(
    layer: nn.Linear, mean_F: torch.Tensor, scale_F: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights and biases that do to features what a layer does to normalised ones."""
    weight_HF = layer.weight / scale_F
    return weight_HF, layer.bias - weight_HF @ mean_F


@torch.inference_mode()
def weights(arrays: dict[str, np.ndarray], part: Scored) -> np.ndarray:
    """Return the gate's weights [N] float64."""
    return Gate(arrays)(part.features_NF).double().numpy()


def check_folder(memory: str) -> Path:
    """Return a memory's folder; an error where its gate cannot be written there."""
    folder = Path(memory)
    if not folder.is_dir():
        raise MemdecError(f"{memory} is not a folder: give the memory's, the gate is put there.")
    with tempfile.TemporaryFile(dir=folder):  # fails before minutes are spent, not after
        pass
    return folder


def calibrate_gate(
    memory: str,
    base: str,
    texts: dict[str, list[Path]],
    progress: Progress,
    context: int | None = None,
    fields: Fields = TEXT,
) -> dict[str, Any]:
    """Train the gate of a memory, write it into its folder, and return the report.

    texts: files by kind: domain, general, and corpus if there is one; context: tokens of the
    longest contexts that it is trained on, by default as many as the texts fill.
    """
    folder = check_folder(memory)
    tokenizer, fields = matching_tokenizer(base, memory), as_learnt(fields, read_block(memory))
    models = tuple(open_model(name) for name in (base, memory))
    read = {
        kind: [text for path in paths for text in read_texts(tokenizer, path, fields)]
        for kind, paths in texts.items()
        if paths
    }
    count = check_amounts(read)
    # One length for all: a gate must not tell general text by its longer contexts.
    width = window_tokens(context, count, [text_config(m.config) for m in models])
    trained, kept = divide(read, bos_of(tokenizer))
    row_bytes = 4 * (models[1].config.hidden_size + 3)
    max_rows = min(MAX_TOKENS, FEATURE_BYTES // (len(trained) + 1) // row_bytes)
    rest = models, tokenizer, width
    scored = {k: score(*rest, ids, max_rows, k, progress) for k, ids in trained.items()}
    arrays = fit_gate(scored)
    del scored
    scored = {k: score(*rest, ids, max_rows // KEPT, k, progress) for k, ids in kept.items() if ids}
    weighed = {kind: (part, weights(arrays, part)) for kind, part in scored.items()}
    told = report(weighed) | {"window": width}
    write_gate(folder, arrays)
    draw(told, (folder / FILE).with_suffix(".png"))
    return told
