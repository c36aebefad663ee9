"""`memdec calibrate`: train a memory's gate on what base and memory gave to every token of a text.

The gate (vllm_memdec/gate.py) maximises the mixture's likelihood, log(alpha_t p_memory + (1 -
alpha_t) p_base), on several kinds of text. Text of the domain that the memory has not learnt says
what it may be trusted with; of what it has learnt it is surer, and right, so the corpus itself
comes in with a smaller weight, or memorised facts would be doubted. General text weighs the most:
there the base is to be left alone. And documents that mix passages of the domain and of general
text teach it to tell them apart within one context. All of it is read in short and in long contexts
(windows.py), each kind in the same lengths, or length itself would tell the kinds apart. Models
read the text once; the training takes seconds. A fifth of the documents is kept for the report, by
a digest of their text, before anything else is made of them.
"""

import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import gelu

from vllm_memdec.checkpoint import read_block
from vllm_memdec.errors import MemdecError
from vllm_memdec.gate import FILE, Gate, write_gate
from vllm_memdec.kernels.interpolate import LARGEST
from vllm_memdec.train.data.blocks import bos_of, tokenise, unmarked
from vllm_memdec.train.data.documents import documents
from vllm_memdec.train.data.readers import TEXT, Fields
from vllm_memdec.train.data.splits import digest
from vllm_memdec.train.evaluation.compare import as_learnt, matching_tokenizer, open_model
from vllm_memdec.train.evaluation.gate_report import draw, report, token_class
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

READ_TOKENS = 2**22  # tokens read of each file: the rest is never scored
MAX_TOKENS = 2**18  # tokens scored of each kind of text, fewer where FEATURE_BYTES says so
FEATURE_BYTES = 2**31  # bytes of the features of all kinds together, at most
HIDDEN, CERTAINTY = 256, 16  # units for the hidden state, and for the memory's confidence
# Steps, rows of a step, learning rate, share of units that dropout leaves out.
STEPS, BATCH, RATE, DROPOUT = 600, 2048, 3e-3, 0.8
# Unlearnt text is scarce and a wide memory overfits to it; a narrow one would never be trusted.
# Weights of the two numbers of certainty, and of the position, are not decayed.
DECAY, DECAY_WIDTH = 3.0, 576  # weight decay from that width on, in proportion below
KEPT = 5  # one document in so many is kept for the report
MIN_PIECE = 32  # tokens of a piece into which a text of few documents is divided, at least
MIN_TOKENS = KEPT * (MIN_PIECE + 1)  # tokens of a text, at least
# The weight of each kind of text in the loss; even() divides it among its tokens.
WEIGHTS = {"domain": 1.0, "corpus": 0.75, "general": 6.0, "in turn": 2.0}
# All that a gate depends on beside the texts: cached copies are named by a hash of it.
SETTINGS = {
    "units": (HIDDEN, CERTAINTY),
    "training": (STEPS, BATCH, RATE, DROPOUT, DECAY, DECAY_WIDTH),
    "weights": WEIGHTS,
    "context": "even",
}
# Documents that mix both kinds: tokens of a passage, from and to, and passages of a document.
PASSAGE, SWITCHES = (16, 128), 4


@dataclass(frozen=True)
class Scored:
    """What both models gave to the tokens of one kind of text."""

    base_N: np.ndarray  # log-probabilities
    memory_N: np.ndarray
    features_NF: torch.Tensor  # the gate's inputs, from the memory before each token
    classes_N: np.ndarray  # each token's place in CLASSES
    position_N: np.ndarray  # positions in the request of the last token read


def passages(texts: list[Any], min_length: int, max_length: int, seed: int = 0) -> list[Any]:
    """Return texts cut into passages of min_length to max_length tokens, drawn at random."""
    rng = random.Random(seed)
    cut = []
    for ids in texts:
        start = 0
        while len(ids) - start >= min_length:
            length = rng.randint(min_length, max_length)
            cut.append(ids[start : start + length])
            start += length
    return cut


def in_turn(first: list[Any], second: list[Any], seed: int = 0) -> list[np.ndarray]:
    """Return documents of SWITCHES passages, of two kinds in turn, each passage used once."""
    rng = random.Random(seed)
    first, second = (rng.sample(kind, len(kind)) for kind in (first, second))
    turns = [ids for pair in zip(first, second, strict=False) for ids in pair]
    whole = range(0, len(turns) - SWITCHES + 1, SWITCHES)
    return [np.concatenate(turns[n : n + SWITCHES]) for n in whole]


@dataclass(frozen=True)
class Document:
    """A tokenised text and the digest by which it is known in whatever text it turns up."""

    digest: int
    ids: np.ndarray


def read_texts(tokenizer: Any, path: Path, fields: Fields = TEXT) -> list[Document]:
    """Return the texts of a file tokenised; in pieces, where they are too few to be divided."""
    read, digests, count = [], [], 0

    def noted() -> Iterator[str]:
        for text in documents(path, fields):
            digests.append(digest(text))
            yield text

    for n, ids in enumerate(tokenise(tokenizer, noted(), keep_empty=True)):
        if len(ids):
            read.append(Document(digests[n], ids))
            count += len(ids)
            if count > READ_TOKENS:
                break
    if len(read) >= 4 * KEPT:
        return read
    length = max(MIN_PIECE, sum(len(d.ids) for d in read) // (8 * KEPT))
    return [
        Document(digest(part.tobytes().hex()), part)
        for document in read
        for part in np.split(document.ids, range(length, len(document.ids), length))
    ]


def divide(
    texts: dict[str, list[Document]], bos: int | None = None
) -> tuple[dict[str, list[np.ndarray]], dict[str, list[np.ndarray]]]:
    """Return the documents of each kind that the gate is trained on, and those that are kept.

    Of each kind those with the lowest digests are kept, until they are one token in KEPT; what one
    kind keeps no other kind trains on. Kinds in turn are made of the parts, each of its own side,
    without the BOS that documents begin with.
    """
    kept: set[int] = set()
    for of_kind in texts.values():
        left = sum(len(d.ids) for d in of_kind) / KEPT
        for document in sorted(of_kind, key=lambda d: d.digest):
            if left <= 0 and document.digest not in kept:
                break
            kept.add(document.digest)
            left -= len(document.ids)
    trained, reported = (
        {
            kind: [d.ids for d in of_kind if (d.digest in kept) == side]
            for kind, of_kind in texts.items()
        }
        for side in (False, True)
    )
    for kind, ids in trained.items():
        if not ids:
            raise MemdecError(
                f"all of the {kind} text is kept for the report: give more documents."
            )
    for side in (trained, reported):
        first, second = (
            passages([ids[int(unmarked(ids[:1])[0] == bos) :] for ids in side[kind]], *PASSAGE)
            for kind in ("domain", "general")
        )
        both = in_turn(first, second)
        if both:  # less is no reason to refuse what is enough of each
            side["in turn"] = both
    if "in turn" not in trained:
        reported.pop("in turn", None)
    return trained, reported


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
    """The gate's network, on normalised features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sees = nn.Linear(width, HIDDEN)
        self.context = nn.Linear(1, HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, 1)
        self.sure = nn.Linear(2, CERTAINTY)
        self.sure_out = nn.Linear(CERTAINTY, 1, bias=False)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x_NF: torch.Tensor) -> torch.Tensor:
        seen_NH = gelu(self.sees(x_NF[:, :-3]) + self.context(x_NF[:, -1:]))
        sure_N1 = self.sure_out(gelu(self.sure(x_NF[:, -3:-1])))
        return LARGEST * (self.out(self.dropout(seen_NH)) + sure_N1)[:, 0].sigmoid()


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


def fit_gate(scored: dict[str, Scored], seed: int = 0) -> dict[str, np.ndarray]:
    """Return the arrays of a gate trained on texts by their kind, see WEIGHTS."""
    parts = scored.values()
    x_NF = Rows([part.features_NF for part in parts])
    logp_N2 = torch.from_numpy(
        np.concatenate([np.stack([p.base_N, p.memory_N], 1) for p in parts])
    ).float()
    weight_N = torch.cat([WEIGHTS[k] * even(p.position_N) for k, p in scored.items()])
    weight_N *= len(weight_N) / weight_N.sum()
    mean_F, scale_F = x_NF.normal()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        D = len(mean_F) - 3
        net = Net(D)
        decay = DECAY * min(1, D / DECAY_WIDTH)
        parameters = [
            {"params": [*net.sees.parameters(), *net.out.parameters()], "weight_decay": decay},
            {
                "params": [
                    *net.sure.parameters(),
                    *net.sure_out.parameters(),
                    *net.context.parameters(),
                ],
                "weight_decay": 0.0,
            },
        ]
        optimizer = torch.optim.AdamW(parameters, lr=RATE)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            rows = torch.randint(len(x_NF), (BATCH,))
            alpha_N = net((x_NF[rows] - mean_F) / scale_F)
            base_N, memory_N = logp_N2[rows].unbind(1)
            # From 1e-6 on, as a log of 0 has no gradient.
            take_N, keep_N = (1e-6 + alpha_N).log(), (-alpha_N).log1p()
            mixed_N = torch.logaddexp(take_N + memory_N, keep_N + base_N)
            loss = -(weight_N[rows] * mixed_N).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
    net.requires_grad_(False)
    w1, b1 = without_scale(net.sees, mean_F[:-3], scale_F[:-3])
    sure, bias_K = without_scale(net.sure, mean_F[-3:-1], scale_F[-3:-1])
    context_H = net.context.weight[:, 0] / scale_F[-1]
    return {
        "w1": w1.numpy(),
        "b1": (b1 - context_H * mean_F[-1]).numpy(),
        "context": context_H.numpy(),
        "longest": np.array(max(int(part.position_N.max()) for part in parts)),
        "w2": net.out.weight[0].numpy(),
        "b2": net.out.bias[0].numpy(),
        "certainty": torch.stack([*sure.T, bias_K, net.sure_out.weight[0]]).numpy(),
    }


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
    folder = Path(memory)
    if not folder.is_dir():
        raise MemdecError(f"{memory} is not a folder: give the memory's, the gate is put there.")
    with tempfile.TemporaryFile(dir=folder):  # fails before minutes are spent, not after
        pass
    tokenizer, fields = matching_tokenizer(base, memory), as_learnt(fields, read_block(memory))
    models = tuple(open_model(name) for name in (base, memory))
    read = {
        kind: [text for path in paths for text in read_texts(tokenizer, path, fields)]
        for kind, paths in texts.items()
        if paths
    }
    counts = {kind: sum(len(d.ids) for d in texts) for kind, texts in read.items()}
    for kind, count in counts.items():
        if count < MIN_TOKENS:
            raise MemdecError(
                f"the {kind} text has {count} tokens: give more of it, some thousands if you can."
            )
    # One length for all: a gate must not tell general text by its longer contexts.
    width = window_tokens(context, min(counts.values()), [text_config(m.config) for m in models])
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
