"""What an update of a memory costs and is worth, beside building it afresh.

    python -m benchmarks.quality.update      # what is there is kept

Pages of the World Factbook, one document a country. A tenth of the documents is added to a build
that lacks it, and taken out of a build that has it, by `memdec build --update`; both ways stand
beside builds from scratch of the same documents. Told are work and seconds, the perplexity of the
mixture on pages that none has seen, and which facts of the tenth and of the other documents base,
memory and mixture recall: every token of a line after its "Country - field:". Only facts whose
value no other document has are asked for.

Rows go to results/update.csv, and `python -m benchmarks.tables --readme` puts the table into the
page.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, provenance, replace_rows, rounded
from benchmarks.corpora import domains
from benchmarks.corpora.download import BUILD, smollm2
from benchmarks.corpora.factbook import Fact
from benchmarks.corpora.jsonl import write_jsonl
from benchmarks.quality.domain import SETTINGS
from benchmarks.systems.trained import parameters
from vllm_memdec.checkpoint import read_block
from vllm_memdec.train.data.artifacts import LOGS
from vllm_memdec.train.data.blocks import bos_of, load_used, pack, tokenise, unmarked, valid_rows
from vllm_memdec.train.executor.context import Context
from vllm_memdec.train.model.decoder import own_config
from vllm_memdec.train.model.huggingface import load_config, load_model, load_tokenizer
from vllm_memdec.train.model.scoring import label_logprobs, mix, perplexity
from vllm_memdec.train.model.windows import alpha_at
from vllm_memdec.train.pipeline import STAGES, build
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import Settings, load_settings
from vllm_memdec.train.training.metrics import METRICS, read_metrics

TABLE = RESULTS / "update.csv"
MAX_VALUE = 60  # characters of a fact that is asked for
WHOLE, LESS = "built, all documents", "built, without a tenth of them"
ADDED, REMOVED = "updated, the tenth added", "updated, the tenth removed"


@dataclass(frozen=True)
class Sizes:
    """How much is built and asked."""

    documents: int = 40
    tokens: int = 90  # of a document, at most
    held_out: int = 8  # documents for alpha, and as many that are scored
    facts: int = 150  # of each kind that are asked for, at most
    epochs: float = 60
    layers: int = 4
    block_tokens: int = 128
    batch_blocks: int = 2  # many small steps: the memory must have learnt what it is to forget


QUICK = Sizes(documents=20, tokens=60, held_out=4, facts=5, epochs=1, layers=2, block_tokens=32)


@dataclass(frozen=True)
class Text:
    """Documents as lists of facts: the tenth that comes and goes, the rest, and those held out."""

    tenth: list[list[Fact]]
    rest: list[list[Fact]]
    validation: list[list[Fact]]
    test: list[list[Fact]]


def texts(documents: Sequence[Sequence[Fact]]) -> list[str]:
    """Return documents of facts as text, a fact a line."""
    return ["\n".join(fact.line for fact in facts) for facts in documents]


def draw(facts: Sequence[Fact], tokenizer: Any, sizes: Sizes) -> Text:
    """Return documents drawn at random, each the first facts of a country."""
    by_country: dict[str, list[Fact]] = {}
    for fact in facts:
        by_country.setdefault(fact.country, []).append(fact)
    pages = []
    for own in by_country.values():
        lengths = [len(tokenizer(f"{fact.line}\n")["input_ids"]) for fact in own]
        pages.append(own[: max(1, int(np.searchsorted(np.cumsum(lengths), sizes.tokens)))])
    random.Random(0).shuffle(pages)
    tenth, n, held_out = sizes.documents // 10, sizes.documents, sizes.held_out
    return Text(pages[:tenth], pages[tenth:n], pages[n : n + held_out],
                pages[n + held_out : n + 2 * held_out])  # fmt: skip


def askable(fact: Fact, values: Counter[str]) -> bool:
    """Return whether a fact's value is short, and in none of the other documents."""
    return len(fact.value) <= MAX_VALUE and values[fact.value] == 1


class Pair:
    """A base and the memory of a build beside it, at the weights that the build has tuned."""

    def __init__(self, base: str, export: Path) -> None:
        self.models = {"base": load_model(base, "float32")}
        self.models["memory"] = load_model(str(export), "float32")
        block = read_block(export)
        assert block is not None, "an export says what it is"
        self.weights = block.alpha_by_context or [[0, block.alpha]]

    def perplexities(self, tokens: np.ndarray, positions: np.ndarray) -> dict[str, float]:
        """Return the perplexities of blocks [B, T+1]: base, memory and mixture."""
        scores = {n: label_logprobs(m, tokens, positions, 4) for n, m in self.models.items()}
        place = unmarked(positions[:, :-1])[valid_rows(positions)]
        scores["mixture"] = mix(scores["base"], scores["memory"], alpha_at(self.weights, place))
        return {name: perplexity(logp_N) for name, logp_N in scores.items()}

    @torch.inference_mode()
    def recall(self, facts: Sequence[Fact], tokenizer: Any) -> dict[str, float]:
        """Return the share of facts that each recalls: all tokens of value and line end."""
        hits: dict[str, list[bool]] = {"base": [], "memory": [], "mixture": []}
        for fact in facts:
            prompt, line = (
                tokenizer(text)["input_ids"] for text in (fact.prompt, f"{fact.line}\n")
            )
            first = len(prompt) - 1
            p = {
                name: model(torch.tensor([line[:-1]])).logits[0, first:].float().softmax(-1)
                for name, model in self.models.items()
            }
            alpha = torch.from_numpy(alpha_at(self.weights, np.arange(first, len(line) - 1)))
            alpha = alpha.float()[:, None]
            p["mixture"] = alpha * p["memory"] + (1 - alpha) * p["base"]
            wanted = torch.tensor(line[first + 1 :])
            for name, p_TV in p.items():
                hits[name].append(bool((p_TV.argmax(-1) == wanted).all()))
        return {name: float(np.mean(of)) for name, of in hits.items()}


def work_of(output: Path, base: str, settings: Settings, embedded: int | None) -> dict[str, Any]:
    """Return what a build took: blocks, passes over blocks, TFLOP and seconds.

    Two FLOPs a weight and token forward, four backward; of the base forward alone.
    """
    facts = json.loads((output / "corpus/corpus.json").read_text())["train"]
    embedded = facts["blocks"] if embedded is None else embedded
    passes = read_metrics(output / "memory" / LOGS / METRICS)[-1]["epoch"] * facts["blocks"]
    large, _ = parameters(load_config(base))
    config = own_config(settings.memory, base)
    small, _ = parameters(config)
    columns = len(load_used(output / "corpus", "train")) + (settings.memory.sampled_negatives or 0)
    trained = small + min(config.vocab_size, columns) * config.hidden_size
    block = settings.corpus.block_tokens
    manifests = [json.loads((output / stage / "manifest.json").read_text()) for stage in STAGES]
    return {
        "blocks": facts["blocks"],
        "embedded": embedded,
        "trained": round(passes),
        "tflop": block * (2 * large * embedded + 6 * trained * passes) / 1e12,
        "seconds": sum(manifest["seconds"] for manifest in manifests),
    }


def measure(
    base: str, facts: Sequence[Fact], sizes: Sizes, settings: Settings, folder: Path
) -> list[dict[str, Any]]:
    """Build and update in a folder; return a row for each of the four builds."""
    tokenizer, progress = load_tokenizer(base), Progress()
    text = draw(facts, tokenizer, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"all": text.rest + text.tenth, "less": text.rest, "validation": text.validation}
    for name, documents in parts.items():
        write_jsonl(folder / f"{name}.jsonl", texts(documents))
    exact = {"dtype": "float32"}  # a CPU without bfloat16 is slow in it
    settings = settings.changed(
        {
            "corpus": {"block_tokens": sizes.block_tokens},
            "datastore": exact,
            "memory": {
                "epochs": sizes.epochs,
                "layers": sizes.layers,
                "batch_blocks": sizes.batch_blocks,
                "micro_batch_blocks": sizes.batch_blocks,
            }
            | exact,
            "export": exact,
        }
    )
    blocks = pack(
        tokenise(tokenizer, texts(text.test)),
        settings.corpus.block_tokens,
        tokenizer.eos_token_id,
        bos_of(tokenizer),
    )
    asked = {}
    pages = (page for part in vars(text).values() for page in part)
    every = Counter(fact.value for page in pages for fact in page)
    for name, documents in (("tenth", text.tenth), ("rest", text.rest)):
        # A value that other documents have too ("Africa") can be guessed, and is not forgotten.
        short = [fact for own in documents for fact in own if askable(fact, every)]
        asked[name] = random.Random(1).sample(short, min(sizes.facts, len(short)))
    rows: dict[str, dict[str, Any]] = {}
    for title, corpus, old in (
        (WHOLE, "all", None),
        (LESS, "less", None),
        (ADDED, "all", LESS),
        (REMOVED, "less", WHOLE),
    ):
        output = folder / title.replace(", ", "-").replace(" ", "-")
        update = old and folder / old.replace(", ", "-").replace(" ", "-")
        given = base, folder / f"{corpus}.jsonl", output, settings, folder / "validation.jsonl"
        build(*given, Context(progress), update=update)
        embedded = None
        if old:
            change = json.loads((output / "corpus/corpus.json").read_text())
            embedded = change["train"]["blocks"] - change["update"]["kept_blocks"]
        pair = Pair(base, output / "export")
        scores = pair.perplexities(*blocks)
        row = {"build": title, "documents": len(parts[corpus])}
        row |= work_of(output, base, settings, embedded)
        row |= {"base": scores["base"], "perplexity": scores["mixture"]}
        for name, some in asked.items():
            row |= {f"{name}_{who}": share for who, share in pair.recall(some, tokenizer).items()}
            row |= {f"{name}_facts": len(some)}
        rows[title] = rounded(row)
        print(json.dumps(rows[title]))
    return [*rows.values()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a fraction, to see that it works")
    options = parser.parse_args()
    sizes, folder = (QUICK, "quick") if options.quick else (Sizes(), "full")
    facts = domains.facts(domains.FACTS["factbook"])
    work = BUILD / "update" / folder
    rows = measure(str(smollm2()), facts, sizes, load_settings(SETTINGS), work)
    origin = provenance("torch", "transformers")
    table = work / "update.csv" if options.quick else TABLE
    replace_rows(table, [{"domain": "factbook"} | row | origin for row in rows])
    print(json.dumps({"rows": len(rows), "csv": str(table)}))


if __name__ == "__main__":
    main()
