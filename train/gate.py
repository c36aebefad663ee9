"""`memdec calibrate`: train a memory's gate on what base and memory gave to every token of a text.

The gate (vllm_memdec/gate.py) maximises the mixture's likelihood, log(alpha_t p_memory + (1 -
alpha_t) p_base), on several kinds of text. Text of the domain that the memory has not learnt says
what it may be trusted with; of what it has learnt it is surer, and right, so the corpus itself
comes in with a smaller weight, or facts that it knows by heart would be doubted. General text
weighs the most: there the base is to be left alone. And passages of the domain and of general text
in turn teach it to tell them apart within one context. Models read the text once; the training
takes seconds. A fifth of the blocks is kept for the report; a document may lie in kept ones and in
others.
"""

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from vllm_memdec.checkpoint import read_block, tokenizer_fingerprint
from vllm_memdec.errors import MemdecError
from vllm_memdec.gate import FILE, Gate, write_gate
from vllm_memdec.kernels.interpolate import LARGEST
from vllm_memdec.train.corpus import load_config, load_tokenizer, pack, tokenise, valid_rows
from vllm_memdec.train.datastore import load_model
from vllm_memdec.train.evaluate import ALPHAS, best_alpha, label_logprobs, mix, perplexity
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.text import documents

BLOCK_TOKENS = (32, 512)  # fewest and most: a short text is cut into more blocks
MOST_TOKENS = 2**18  # read of each kind of text
HIDDEN, CERTAINTY = 256, 16  # units for the hidden state, and for how sure the memory is
STEPS, BATCH, RATE, DROPOUT = 600, 2048, 3e-3, 0.8
# Unlearnt text is scarce and a wide memory overfits to it; a narrow one would never be trusted.
# The units of certainty, which see two numbers, are not decayed.
DECAY, DECAY_WIDTH = 3.0, 576  # from that width on; of a narrower memory in proportion
KEPT = 5  # one block in so many is not trained on
FEWEST = KEPT * (BLOCK_TOKENS[0] + 1)  # tokens of a text
# Of each kind of text, all its tokens.
WEIGHTS = {"domain": 1.0, "corpus": 0.75, "general": 6.0, "in turn": 2.0}
# All that a gate depends on beside the texts: what its cached copies are known by.
SETTINGS = {
    "units": (HIDDEN, CERTAINTY),
    "training": (STEPS, BATCH, RATE, DROPOUT, DECAY, DECAY_WIDTH),
    "weights": WEIGHTS,
}
PASSAGE, SWITCHES = (16, 128), 4  # tokens of a passage; passages of a document that has both
CLASSES = ("word", "inside a word", "number", "punctuation", "line break")


@dataclass(frozen=True)
class Scored:
    """What both models gave to the tokens of one kind of text."""

    base_N: np.ndarray  # log-probabilities
    memory_N: np.ndarray
    features_NF: torch.Tensor  # of the memory, before each token
    classes_N: np.ndarray  # each token's place in CLASSES
    kept_N: np.ndarray  # bool: not to be trained on

    def part(self, kept: bool) -> "Scored":
        """Return the rows that are kept for the report, or the others."""
        rows = self.kept_N == kept
        return Scored(
            self.base_N[rows],
            self.memory_N[rows],
            self.features_NF[torch.from_numpy(rows)],
            self.classes_N[rows],
            self.kept_N[rows],
        )


def token_class(text: str) -> int:
    """Return the place in CLASSES of a token's text."""
    if "\n" in text:
        return 4
    if any(c.isdigit() for c in text):
        return 2
    if not any(c.isalpha() for c in text):
        return 3
    return 0 if text[0].isspace() else 1


def passages(texts: list[list[int]], fewest: int, most: int, seed: int = 0) -> list[list[int]]:
    """Return texts cut into passages of a random number of tokens."""
    rng = random.Random(seed)
    found = []
    for ids in texts:
        start = 0
        while len(ids) - start >= fewest:
            length = rng.randint(fewest, most)
            found.append(ids[start : start + length])
            start += length
    return found


def in_turn(first: list[list[int]], second: list[list[int]], seed: int = 0) -> list[list[int]]:
    """Return documents of SWITCHES passages, of two kinds in turn, each passage used once."""
    rng = random.Random(seed)
    first, second = (rng.sample(kind, len(kind)) for kind in (first, second))
    turns = [ids for pair in zip(first, second, strict=False) for ids in pair]
    whole = range(0, len(turns) - SWITCHES + 1, SWITCHES)
    return [[i for ids in turns[n : n + SWITCHES] for i in ids] for n in whole]


def score(
    base: Any, memory: Any, tokenizer: Any, ids: list[list[int]], kind: str, progress: Progress
) -> Scored:
    """Read texts with both models."""
    count, (fewest, most) = sum(map(len, ids)), BLOCK_TOKENS
    if count < FEWEST:
        raise MemdecError(
            f"the {kind} text has {count} tokens: give more of it, some thousands if you can."
        )
    for model in (base, memory):
        most = min(most, getattr(model.config, "max_position_embeddings", None) or most)
    width = min(most, max(fewest, count // (4 * KEPT)))
    tokens, positions = pack(ids, width, tokenizer.eos_token_id)
    # Spread evenly: of several texts the first must not be all that is read.
    most_blocks = min(len(tokens), MOST_TOKENS // width)
    chosen = np.linspace(0, len(tokens) - 1, most_blocks).astype(int)
    tokens, positions = tokens[chosen], positions[chosen]
    base_N = label_logprobs(base, tokens, positions, 4, progress, f"the base, {kind}")
    return read_blocks(base_N, memory, tokenizer, tokens, positions, kind, progress)


def read_blocks(
    base_N: np.ndarray,
    memory: Any,
    tokenizer: Any,
    tokens: np.ndarray,
    positions: np.ndarray,
    kind: str,
    progress: Progress,
) -> Scored:
    """Read blocks [B, T+1] with the memory; the base has given its log-probabilities."""
    features: list[torch.Tensor] = []
    name = f"the memory, {kind}"
    memory_N = label_logprobs(memory, tokens, positions, 4, progress, name, features)
    valid = valid_rows(positions)
    labels_N = tokens[:, 1:][valid]
    ids, inverse = np.unique(labels_N, return_inverse=True)
    classes = np.array([token_class(tokenizer.decode([int(i)])) for i in ids])
    block_N = np.broadcast_to(np.arange(len(tokens))[:, None], valid.shape)[valid]
    kept_N = block_N % KEPT == KEPT - 1
    return Scored(base_N, memory_N, torch.cat(features), classes[inverse], kept_N)


class Net(nn.Module):
    """The gate's network, on normalised features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.seen = nn.Sequential(
            nn.Linear(width, HIDDEN), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, 1)
        )
        self.sure = nn.Sequential(
            nn.Linear(2, CERTAINTY), nn.GELU(), nn.Linear(CERTAINTY, 1, bias=False)
        )

    def forward(self, x_NF: torch.Tensor) -> torch.Tensor:
        return LARGEST * (self.seen(x_NF[:, :-2]) + self.sure(x_NF[:, -2:]))[:, 0].sigmoid()


def fit_gate(scored: dict[str, Scored], seed: int = 0) -> dict[str, np.ndarray]:
    """Return the arrays of a gate trained on texts by their kind, see WEIGHTS."""
    parts = scored.values()
    x_NF = torch.cat([part.features_NF for part in parts])
    logp_N2 = torch.from_numpy(
        np.concatenate([np.stack([p.base_N, p.memory_N], 1) for p in parts])
    ).float()
    weight_N = torch.cat(
        [torch.full((len(p.base_N),), WEIGHTS[k] / len(p.base_N)) for k, p in scored.items()]
    )
    weight_N *= len(weight_N) / weight_N.sum()
    mean_F, scale_F = x_NF.mean(0), x_NF.std(0) + 1e-6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        D = x_NF.shape[1] - 2
        net = Net(D)
        parameters = [
            {"params": net.seen.parameters(), "weight_decay": DECAY * min(1, D / DECAY_WIDTH)},
            {"params": net.sure.parameters(), "weight_decay": 0.0},
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
    w1, b1 = without_scale(net.seen[0], mean_F[:-2], scale_F[:-2])
    sure, bias_K = without_scale(net.sure[0], mean_F[-2:], scale_F[-2:])
    return {
        "w1": w1.numpy(),
        "b1": b1.numpy(),
        "w2": net.seen[3].weight[0].numpy(),
        "b2": net.seen[3].bias[0].numpy(),
        "certainty": torch.stack([*sure.T, bias_K, net.sure[2].weight[0]]).numpy(),
    }


def without_scale(
    layer: nn.Linear, mean_F: torch.Tensor, scale_F: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights and biases that do to features what a layer does to normalised ones."""
    weight_HF = layer.weight / scale_F
    return weight_HF, layer.bias - weight_HF @ mean_F


def mix_gated(base_N: np.ndarray, memory_N: np.ndarray, alpha_N: np.ndarray) -> np.ndarray:
    """Return log((1-alpha) p_base + alpha p_memory) [N], a weight for each row."""
    with np.errstate(divide="ignore"):
        return np.logaddexp(base_N + np.log1p(-alpha_N), memory_N + np.log(alpha_N))


@torch.inference_mode()
def weights(arrays: dict[str, np.ndarray], part: Scored) -> np.ndarray:
    """Return the gate's weights [N] float64."""
    return Gate(arrays)(part.features_NF).double().numpy()


def calibrate_gate(
    memory: str, base: str, texts: dict[str, list[Path]], progress: Progress
) -> dict[str, Any]:
    """Train the gate of a memory, write it into its folder, and return the report.

    texts: files by kind: domain, general, and corpus if there is one.
    """
    folder = Path(memory)
    if not folder.is_dir():
        raise MemdecError(f"{memory} is not a folder: give the memory's, the gate is put there.")
    with tempfile.TemporaryFile(dir=folder):  # fails before minutes are spent, not after
        pass
    tokenizer, block = load_tokenizer(base), read_block(memory)
    theirs = block.tokenizer_fingerprint if block else tokenizer_fingerprint(load_tokenizer(memory))
    if theirs != tokenizer_fingerprint(tokenizer):
        raise MemdecError(
            f"the memory {memory} has another tokenizer than the base {base}: give a base that "
            "it serves."
        )
    models = []
    for name in (base, memory):
        dtype = getattr(load_config(name), "dtype", None) or torch.float32
        models.append(load_model(name, str(dtype).removeprefix("torch.")))
    ids = {
        kind: list(tokenise(tokenizer, (t for path in paths for t in documents(path))))
        for kind, paths in texts.items()
        if paths
    }
    both = in_turn(*(passages(ids[kind], *PASSAGE) for kind in ("domain", "general")))
    if sum(map(len, both)) >= FEWEST:  # less is no reason to refuse what is enough of each
        ids["in turn"] = both
    scored = {kind: score(*models, tokenizer, found, kind, progress) for kind, found in ids.items()}
    arrays = fit_gate({kind: found.part(kept=False) for kind, found in scored.items()})
    found = report(arrays, {kind: s.part(kept=True) for kind, s in scored.items()})
    write_gate(folder, arrays)
    draw(found, (folder / FILE).with_suffix(".png"))
    return found


def report(arrays: dict[str, np.ndarray], scored: dict[str, Scored]) -> dict[str, Any]:
    """Return perplexities of base, fixed weights and gate, and the gate's mean weights."""
    domain = scored["domain"]
    fixed = best_alpha(domain.base_N, domain.memory_N)
    found: dict[str, Any] = {"fixed_alpha": fixed, "texts": {}}
    for kind, part in scored.items():
        alpha_N = weights(arrays, part)
        curve = [perplexity(mix(part.base_N, part.memory_N, a)) for a in ALPHAS]
        by_class = {
            name: float(alpha_N[part.classes_N == n].mean())
            for n, name in enumerate(CLASSES)
            if (part.classes_N == n).any()
        }
        found["texts"][kind] = {
            "tokens": len(alpha_N),
            "base": curve[0],
            "fixed": perplexity(mix(part.base_N, part.memory_N, fixed)),
            "gate": perplexity(mix_gated(part.base_N, part.memory_N, alpha_N)),
            "mean_alpha": float(alpha_N.mean()),
            "alpha_by_class": by_class,
            "curve": curve,
        }
    return found


def show(found: dict[str, Any], console: Console) -> None:
    """Print the report."""
    fixed = found["fixed_alpha"]
    table = Table("text", "tokens", "base", f"alpha {fixed:g}", "gate", "mean alpha")
    for kind, row in found["texts"].items():
        cells = [f"{row['tokens']:,}", f"{row['base']:.2f}"]
        cells += [f"{row[n]:.2f} ({row[n] / row['base'] - 1:+.1%})" for n in ("fixed", "gate")]
        table.add_row(kind, *cells, f"{row['mean_alpha']:.2f}")
    console.print(table)
    console.print("Perplexity on text that the gate was not trained on.")


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw perplexity over fixed weights beside the gate's, and the gate's weights by class."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    width = 0.4
    for n, (kind, row) in enumerate(found["texts"].items()):
        colour = f"C{n}"
        left.plot(
            ALPHAS[:-1],
            [value / row["base"] for value in row["curve"][:-1]],
            color=colour,
            label=f"{kind}, fixed alpha",
        )
        left.axhline(row["gate"] / row["base"], color=colour, ls="--", label=f"{kind}, gate")
        names = list(row["alpha_by_class"])
        places = [CLASSES.index(name) + (n - 0.5) * width for name in names]
        right.bar(places, row["alpha_by_class"].values(), width, color=colour, label=kind)
    left.set(xlabel="alpha", ylabel="perplexity / base's", ylim=(0, 2))
    right.set(ylabel="mean alpha of the gate", ylim=(0, 1))
    right.set_xticks(range(len(CLASSES)), CLASSES)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
