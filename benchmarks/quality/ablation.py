"""What a memory's start, objective and optimiser are worth, each arm at the same training FLOPs.

    python -m benchmarks.quality.ablation --domains biomedicine law            # days on two cores
    python -m benchmarks.quality.ablation --domains biomedicine --arms default muon --train 20000

Every arm trains one memory of a domain on the same text, with its own number of epochs: so many as
fit into the FLOPs of today's default (quality.py's), or half of them; the pass of the base that
makes the keys is counted, with the head where an arm needs the base's log p. What a healed start
has cost once, on general text that is not scored, is a column of its own.

Columns: perplexity of the memory alone, and of the mixture with alpha tuned on validation text, on
held-out text of the domain; `hard`, the mean probability that the mixture gives to training tokens
to which the base gives less than 0.1. One run each, seed 42; learning rates are the arm's, not
tuned. Trainings and scores are kept under build/ablation, and a row is written as soon as it is
there: so it can be run bit by bit. Writes results/ablation.csv; the last line is JSON.
"""

import argparse
import csv
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, provenance, rounded
from benchmarks.corpora import domains
from benchmarks.corpora.download import BUILD, smollm2
from benchmarks.corpora.jsonl import write_jsonl
from benchmarks.quality.domain import QUICK, SETTINGS, Domain, Sizes, made_in
from benchmarks.quality.pair import Pair
from benchmarks.systems.trained import budget, parameters
from vllm_memdec.train.data.artifacts import Artifact
from vllm_memdec.train.data.blocks import load_used
from vllm_memdec.train.data.completeness import model_files
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model.devices import products
from vllm_memdec.train.model.huggingface import load_config
from vllm_memdec.train.model.scoring import best_alpha, mix, perplexity
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import MemorySettings, Settings, load_settings
from vllm_memdec.train.stages.training import train_memory

TABLE = RESULTS / "ablation.csv"
WORK = BUILD / "ablation"
TEXTS = ("validation", "test", "train")
HARD = 0.1  # a training token to which the base gives less is hard
BUDGETS = (1.0, 0.5)  # shares of the default's training FLOPs
MIXTURE = {"objective": "mixture"}
MUON = {"optimizer": "muon"}
# What makes a row another one.
KEY = ("domain", "arm", "budget", "train_tokens", "dtype", "seed_layers", "seed_tokens")


@dataclass(frozen=True)
class Arm:
    """A way of training: settings beside the default's, and what the memory starts from."""

    title: str
    start: str = "base"  # the base's first layers; or its `copy`, whole; or a healed `seed`
    settings: dict[str, Any] = field(default_factory=dict)


ARMS = {
    "default": Arm("4 layers, KL + CE, AdamW (the default)"),
    "muon": Arm("Muon for matrices", settings=MUON),
    "mixture": Arm("mixture likelihood", settings=MIXTURE),
    "both": Arm("Muon and mixture likelihood", settings=MUON | MIXTURE),
    # Targets that hold their own row with a half are the same gradient: see test_sparse_kl.py.
    "own_share": Arm("own row half of its target (beta 0.25)", settings={"beta": 0.25}),
    "average": Arm("mean of the last fifth's weights", settings={"average_fraction": 0.2}),
    "copy": Arm("the whole base, lr 3e-4", "copy", {"learning_rate": 3e-4}),
    "copy_1e-4": Arm("the whole base, lr 1e-4", "copy", {"learning_rate": 1e-4}),
    "copy_mixture": Arm(
        "the whole base, mixture likelihood, lr 3e-4", "copy", MIXTURE | {"learning_rate": 3e-4}
    ),
    "seed": Arm("healed start, lr 3e-4", "seed", {"learning_rate": 3e-4}),
    "seed_1e-4": Arm("healed start, lr 1e-4", "seed", {"learning_rate": 1e-4}),
    "seed_both": Arm(
        "healed start, Muon and mixture likelihood",
        "seed",
        MUON | MIXTURE | {"learning_rate": 3e-4, "muon_learning_rate": 5e-3},
    ),
}


@dataclass(frozen=True)
class Healing:
    """A healed start: so many layers, distilled once on so many tokens of general text."""

    layers: int = 10
    tokens: int = 400_000  # of each kind of general text
    epochs: float = 1.0


class Ablation:
    """The arms on one domain; artifacts lie in a folder of the domain and its size."""

    def __init__(
        self, name: str, base: str, sizes: Sizes, settings: Settings, healing: Healing,
        progress: Progress, work: Path | None = None,
    ) -> None:  # fmt: skip
        work = work or WORK
        # The targets of all arms hold the base's log p: they are made once.
        settings = settings.changed({"memory": MIXTURE})
        self.domain = Domain(name, Pair("smollm2", base), sizes, settings, progress)
        self.domain.folder = work / f"{name}-{sizes.train}"
        self.default = settings.memory.changed(objective="cross_entropy")
        self.dtype = self.default.dtype
        self.healing, self.seeds = healing, work / "seeds"

    def row(self, name: str, share: float) -> dict[str, Any]:
        """Return what one arm gives at a share of the default's FLOPs."""
        domain, arm = self.domain, ARMS[name]
        model, epochs = self.trained(name, share)
        scores = domain.scores(f"{name}-{share:g}", str(model.path), TEXTS, self.dtype)
        base = self.base_scores
        alpha = best_alpha(base["validation"], scores["validation"])
        hard_N = base["train"] < np.log(HARD)
        mixture_N = mix(base["train"], scores["train"], alpha)
        before, token = self.cost(arm)
        return {
            "domain": domain.name,
            "arm": name,
            "title": arm.title,
            "budget": share,
            "base": perplexity(base["test"]),
            "memory": perplexity(scores["test"]),
            "mixture": perplexity(mix(base["test"], scores["test"], alpha)),
            "alpha": float(alpha),
            "hard": float(np.exp(mixture_N[hard_N]).mean()),
            "base_hard": float(np.exp(base["train"][hard_N]).mean()),
            "epochs": epochs,
            "tflop": (before + token * epochs * domain.corpus_tokens) / 1e12,
            "seed_layers": self.healing.layers if arm.start == "seed" else "",
            "seed_tokens": self.healing.tokens if arm.start == "seed" else "",
            "seed_tflop": self.seed_tflop if arm.start == "seed" else "",
            "dtype": products(self.dtype),
            "seconds": model.manifest["seconds"],
            "train_tokens": domain.corpus_tokens,
            "test_tokens": len(base["test"]),
        }

    @cached_property
    def base_scores(self) -> dict[str, np.ndarray]:
        return self.domain.scores("base", self.domain.base, TEXTS, self.dtype)

    def cost(self, arm: Arm) -> tuple[float, float]:
        """Return the FLOPs of an arm's training: before it begins, and a token; see memory_cost."""
        domain = self.domain
        config = load_config(domain.base)
        whole, head = parameters(config)
        layers = {"copy": config.num_hidden_layers, "seed": self.healing.layers}.get(
            arm.start, self.default.layers or 4
        )
        used = len(load_used(domain.corpus, "train"))
        sampled = self.default.sampled_negatives or config.vocab_size
        columns = min(config.vocab_size, used + sampled) * config.hidden_size
        small = whole * layers / config.num_hidden_layers
        scored = head if arm.settings.get("objective") == "mixture" else 0
        return 2 * (whole + scored) * domain.corpus_tokens, 6 * (small + columns)

    def trained(self, name: str, share: float) -> tuple[Artifact, float]:
        """Return an arm's memory and its number of epochs."""
        domain, arm = self.domain, ARMS[name]
        before, token = self.cost(arm)
        left = share * budget(domain) - before
        epochs = round(left / token / domain.corpus_tokens, 4)
        if epochs <= 0:
            raise SystemExit(f"{name}: {share:g} of the FLOPs are less than its keys take.")
        changes: dict[str, Any] = {"epochs": epochs} | arm.settings
        inputs = {"targets": domain.targets.hash, "base": domain.base_hash}
        if arm.start != "base":
            changes |= {"init": domain.base, "layers": None}
        if arm.start == "seed":
            changes["init"] = str(self.seed.path)
            inputs["seed"] = self.seed.hash
        settings: MemorySettings = self.default.changed(**changes)

        def make(work: Path) -> None:
            files = domain.base, domain.corpus, domain.targets.path, work
            train_memory(settings, *files, Context(domain.progress))

        plan = settings.recorded() | {"init": arm.start} | made_in(settings.dtype)
        return domain.artifact(f"{name}-{share:g}", plan, inputs, make, model_files), epochs

    @cached_property
    def seed(self) -> Artifact:
        """The healed start, of general text that is not scored; one for all domains."""
        from vllm_memdec.train.seeding import heal

        healing, domain = self.healing, self.domain
        folder = self.seeds / f"{healing.layers}-{healing.tokens}-{healing.epochs:g}"
        folder.mkdir(parents=True, exist_ok=True)
        text = folder / "general.jsonl"
        if not text.exists():
            wanted = {"scored": domain.sizes.general, "seed": healing.tokens}
            kinds = domains.GENERAL.values()
            parts = [domains.split(read(), domain.tokenizer, wanted)[0]["seed"] for read in kinds]
            write_jsonl(text, sum(parts, []))
        memory = {"epochs": healing.epochs, "layers": healing.layers}
        memory |= {"micro_batch_blocks": self.default.micro_batch_blocks}
        memory |= {"batch_blocks": self.default.batch_blocks, "dtype": self.default.dtype}
        corpus = {"block_tokens": domain.settings.corpus.block_tokens}
        given = {"memory": memory, "corpus": corpus, "datastore": {"dtype": self.dtype}}
        settings = Settings.model_validate(given)
        return heal(domain.base, text, folder / "seed", settings, Context(domain.progress))

    @cached_property
    def seed_tflop(self) -> float:
        return json.loads((self.seed.path / "seed.json").read_text())["tflop"]


def sized(train: int) -> Sizes:
    """Return the sizes of a domain: little text is scored where little is trained on."""
    full = Sizes()
    validation, test = min(full.validation, train // 4), min(full.test, train // 3)
    return replace(full, train=train, validation=validation, test=test)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in place of older ones that are the same by KEY."""
    kept: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = list(csv.DictReader(file))

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")) for name in KEY)

    new = {key(row) for row in rows}
    merged = [row for row in kept if key(row) not in new] + rows
    order = [*domains.DOMAINS]
    merged.sort(
        key=lambda row: (
            order.index(row["domain"]) if row["domain"] in order else len(order),
            int(row["train_tokens"]),
            -float(row["budget"]),
            [*ARMS].index(row["arm"]),
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domains", nargs="+", default=["biomedicine", "law", "finance-60k",
                        "factbook"], choices=list(domains.DOMAINS), metavar="NAME")  # fmt: skip
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--train", type=int, default=Sizes().train, help="tokens of a domain")
    parser.add_argument("--seed-layers", type=int, default=Healing().layers)
    parser.add_argument("--seed-tokens", type=int, default=Healing().tokens)
    help_dtype = "of all forward passes; CPUs without it are slow at bfloat16"
    dtypes = ("bfloat16", "float32")
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16", help=help_dtype)
    parser.add_argument("--quick", action="store_true", help="a fraction, to see that it works")
    options = parser.parse_args()
    sizes = QUICK if options.quick else sized(options.train)
    healing = Healing(options.seed_layers, options.seed_tokens)
    if options.quick:
        healing = replace(healing, tokens=2_000, epochs=0.5)
    table = WORK / "quick.csv" if options.quick else TABLE
    base, origin = str(smollm2()), provenance("torch")
    given = [f"{stage}.dtype={options.dtype}" for stage in ("datastore", "memory")]
    settings = load_settings(SETTINGS, given)
    rows = 0
    for name in options.domains:
        ablation = Ablation(name, base, sizes, settings, healing, Progress())
        for arm in options.arms:
            for share in options.budgets:
                row = rounded(ablation.row(arm, share)) | origin
                write_rows(table, [row])
                rows += 1
                print(
                    f"{name:<12} {arm:<14} {share:<4g} memory {row['memory']:>7.2f}  mixture "
                    f"{row['mixture']:>6.2f} ({row['alpha']:.2f})  hard {row['hard']:.3f}  "
                    f"{row['tflop']:.1f} TFLOP, {row['seconds']:.0f} s",
                    flush=True,
                )
    print(json.dumps({"rows": rows, "csv": str(table)}))


if __name__ == "__main__":
    main()
