"""A memory taken to another tokenizer, against a fresh one given the same few steps.

    python -m benchmarks.quality.cross_vocabulary           # 15 minutes on two cores; resumes
    python -m benchmarks.quality.cross_vocabulary --quick   # every step in a minute or two, no CSV

Source: a memory of Factbook facts compiled for SmolLM2 (byte-level BPE, 49,152 tokens). Target: the
tokenizer of Mistral 7B v0.1 (SentencePiece with byte fallback, 32,000 tokens), which
`mistral_common` ships. No package ships a small base of that tokenizer, so the base is made here:
SmolLM2-135M-Instruct with its rows exchanged in the same way and NOT trained after it. It is a
worse model than a real one, which weakens the kNN targets and the mixtures of all arms alike.

Arms, each with a tenth of the source's epochs, the same blocks, targets, steps and settings:
`adapted` is `memdec build --init SOURCE --adapt-tokenizer`; `fresh` has the same architecture and
random weights; `truncated` is the first layers of the base, what `memdec build` does by default.
`untrained` is the adapted memory before its first step. `source` and its base are scored with their
own tokenizer. The trunk of `adapted` alone has seen the facts in all of the source's epochs: that
is what adapting is for.

Perplexity is per byte, so that tokenizers compare: exp(-sum of log p / bytes of the scored tokens).
`held_out` are facts of other countries, `corpus` are the facts learned. Fidelity to the kNN targets
is measured on 1,024 rows of the corpus. Accepted if `adapted` beats `fresh` on held-out text, as
memory and as mixture; else the exit code is 1. Appends to results/cross_vocabulary.csv; the last
line is JSON. Shape suffixes: N rows, V vocabulary, D hidden.
"""

import argparse
import importlib.resources
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoTokenizer

from benchmarks.common import RESULTS, append_csv, provenance
from benchmarks.corpora.download import BUILD, made, smollm2
from benchmarks.corpora.jsonl import write_jsonl
from benchmarks.demo.texts import HELD_OUT, LEARNED, VALIDATION, facts_of
from benchmarks.server import environment
from vllm_memdec.checkpoint import read_block
from vllm_memdec.train.data import documents as text
from vllm_memdec.train.data.artifacts import write_json
from vllm_memdec.train.data.blocks import bos_of, pack, tokenise
from vllm_memdec.train.model.decoder import own_config
from vllm_memdec.train.model.huggingface import load_model, load_tokenizer
from vllm_memdec.train.model.output_head import head
from vllm_memdec.train.model.scoring import label_logprobs, mix
from vllm_memdec.train.model.vocabulary_transfer import exchange, texts
from vllm_memdec.train.progress import Progress
from vllm_memdec.train.settings import MemorySettings, parse_settings
from vllm_memdec.train.training.batches import Batches

SHARED = ("corpus", "datastore", "index", "targets")  # stages that the arms have in common
FRACTION = 0.1  # share of the source's epochs: the default of memory.transfer_fraction
FIDELITY_BLOCKS = 4  # blocks of 256 tokens


@dataclass(frozen=True)
class Size:
    """How much of everything a run takes."""

    out: Path
    epochs: float  # epochs of the source
    layers: int = 4
    learned: int | None = None  # facts; None: all
    validation: int | None = None
    held_out: int = 400


FULL = Size(BUILD / "cross-vocabulary", 20)
QUICK = Size(BUILD / "cross-vocabulary-quick", 10, 1, 120, 40, 40)


def settings_of(size: Size, epochs: float, **memory: Any) -> dict[str, Any]:
    """Return the settings of a build, as YAML has them."""
    shared = {"layers": size.layers, "batch_blocks": 4, "epochs": epochs}
    return {"corpus": {"block_tokens": 256}, "memory": shared | memory}


def save_mistral_tokenizer(folder: Path) -> None:
    """Write the tokenizer of Mistral 7B v0.1 (Apache-2.0) as a Hugging Face folder."""
    source = importlib.resources.files("mistral_common") / "data/tokenizer.model.v1"
    (folder / "tokenizer.model").write_bytes(source.read_bytes())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **names})
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def target_base(source: Path, folder: Path) -> Path:
    """Return SmolLM2 with the rows of Mistral's vocabulary, made once."""

    def make(work: Path) -> None:
        save_mistral_tokenizer(work)
        model, new = load_model(str(source)), load_tokenizer(str(work))
        exchange(model, load_tokenizer(str(source)), new, len(new))
        model.generation_config.eos_token_id = new.eos_token_id
        model.to(torch.bfloat16).save_pretrained(work)

    return made(folder, make)


def compile_memory(
    out: Path, base: Path, corpus: Path, validation: Path, settings: dict[str, Any], *options: str
) -> Path:
    """Run `memdec build` and return its output folder; what is up to date is skipped."""
    config = out.with_name(out.name + ".yaml")
    config.write_text(yaml.safe_dump(settings))
    words = {"base": base, "corpus": corpus, "validation": validation}
    words |= {"output": out, "config": config}
    command = [str(Path(sys.executable).with_name("memdec")), "build", *options]
    command += [str(w) for name, value in words.items() for w in (f"--{name}", value)]
    subprocess.run(command, check=True, env=environment())
    return out


def share(done: Path, out: Path) -> None:
    """Give an arm the stages before its memory: they are the same in every arm."""
    for stage in SHARED:
        if not (out / stage).exists():
            partial = out / f"{stage}.copy"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(done / stage, partial)
            partial.rename(out / stage)


def per_byte(logprobs_N: np.ndarray, n_bytes: int) -> float:
    """Return the perplexity per byte."""
    return float(np.exp(-logprobs_N.sum() / n_bytes))


class Scorer:
    """Scores models of one tokenizer on texts: log-probabilities, and the bytes they are of."""

    def __init__(self, folder: Path, paths: dict[str, Path], progress: Progress) -> None:
        self.tokenizer, self.progress = load_tokenizer(str(folder)), progress
        known = texts(self.tokenizer)
        self.blocks, self.bytes = {}, {}
        ends = self.tokenizer.eos_token_id, bos_of(self.tokenizer)
        for name, path in paths.items():
            documents = list(tokenise(self.tokenizer, text.documents(path)))
            self.blocks[name] = pack(documents, 256, *ends)
            # A document's first token is not predicted, and the end of a text has no bytes.
            scored = (i for document in documents for i in document[1:].tolist())
            self.bytes[name] = sum(len(known.get(i, b"")) for i in scored)

    def __call__(self, model: Any, name: str) -> np.ndarray:
        return label_logprobs(model, *self.blocks[name], 4, self.progress, name)


@torch.inference_mode()
def fidelity(model: Any, out: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Return agreement with the kNN targets: same top token, mean KL(kNN || memory), mean TV."""
    memory = parse_settings(settings).memory
    batches = Batches(memory, out / "corpus", out / "targets")
    chosen = np.linspace(0, len(batches.tokens) - 1, FIDELITY_BLOCKS).astype(int)
    tokens, positions, mask, labels, targets = batches.load(chosen, model.device)
    trunk = model.base_model(input_ids=tokens, position_ids=positions, use_cache=False)
    log_p_NV = head(model, trunk.last_hidden_state[mask]).float().log_softmax(-1)
    row, token, p = targets.entries()
    log_p = log_p_NV[row, token]
    knn_NV = torch.zeros_like(log_p_NV)
    knn_NV[row, token] = p
    kl = (p * (p.log() - log_p)).sum()
    overlap = torch.minimum(p, log_p.exp()).sum()
    rows = len(labels)
    return {
        "knn_top1": float((knn_NV.argmax(-1) == log_p_NV.argmax(-1)).float().mean()),
        "knn_kl": float(kl / rows),
        "knn_tv": float(1 - overlap / rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fraction of everything, no CSV")
    quick = parser.parse_args().quick
    size, progress = (QUICK if quick else FULL), Progress()
    origin = provenance("torch", "transformers", "mistral_common")

    facts = {
        "corpus": facts_of(LEARNED, size.learned),
        "validation": facts_of(VALIDATION, size.validation),
        "held_out": facts_of(HELD_OUT, size.held_out),
    }
    paths = {
        name: write_jsonl(size.out / "text" / f"{name}.jsonl", (f.line for f in chosen))
        for name, chosen in facts.items()
    }
    built_from = (paths["corpus"], paths["validation"])
    source_base = smollm2()
    base = target_base(source_base, size.out / "base")
    outs = {arm: size.out / arm for arm in ("source", "adapted", "fresh", "truncated")}
    # Sampled columns of the head are enough for a long training, but not for a few steps.
    compile_memory(
        outs["source"],
        source_base,
        *built_from,
        settings_of(size, size.epochs, sampled_negatives=2048),
    )
    init = str(outs["source"] / "export")
    adapting = ("--init", init, "--adapt-tokenizer")
    whole = settings_of(size, size.epochs, layers=None)
    compile_memory(outs["adapted"], base, *built_from, whole, *adapting)
    truncated = own_config(MemorySettings(layers=size.layers), str(base))
    truncated.save_pretrained(size.out / "architecture")
    for arm, layers, options in (
        ("fresh", None, ("--init", str(size.out / "architecture"))),
        ("truncated", size.layers, ()),
    ):
        few = settings_of(size, size.epochs * FRACTION, layers=layers)
        share(outs["adapted"], outs[arm])
        compile_memory(outs[arm], base, *built_from, few, *options)

    paths = {name: paths[name] for name in ("held_out", "corpus")}
    theirs, ours = Scorer(source_base, paths, progress), Scorer(base, paths, progress)
    results: list[dict[str, Any]] = []

    def add(arm: str, model: Any, score: Scorer, beside: dict[str, np.ndarray]) -> None:
        out = outs.get(arm, outs["adapted"])
        trained = arm in outs
        seconds = json.loads((out / "memory/manifest.json").read_text())["seconds"]
        steps = len((out / "memory/logs/metrics.jsonl").read_text().splitlines())
        alpha = read_block(out / "export").alpha if trained else 0.0
        logprobs = {name: score(model, name) for name in paths}
        result: dict[str, Any] = {
            "arm": arm,
            "steps": steps if trained else 0,
            "seconds": seconds if trained else 0.0,
            "alpha": alpha,
        }
        for name in paths:
            n = score.bytes[name]
            rows = {"base": beside[name], "memory": logprobs[name]}
            if trained:
                rows["mixture"] = mix(beside[name], logprobs[name], alpha)
            for who in ("base", "memory", "mixture"):
                value = round(per_byte(rows[who], n), 4) if who in rows else ""
                result[f"{name}_{who}"] = value
        close = fidelity(model, out, few)
        results.append(result | {name: round(value, 4) for name, value in close.items()})

    base_model = load_model(str(source_base))
    add("source", load_model(init), theirs, {name: theirs(base_model, name) for name in paths})
    base_model = load_model(str(base))
    beside = {name: ours(base_model, name) for name in paths}
    untrained = load_model(init)
    exchange(untrained, theirs.tokenizer, ours.tokenizer, len(ours.tokenizer))
    add("untrained", untrained, ours, beside)
    for arm in ("adapted", "fresh", "truncated"):
        add(arm, load_model(str(outs[arm] / "export")), ours, beside)

    by_arm = {result["arm"]: result for result in results}
    assert len({by_arm[arm]["steps"] for arm in ("adapted", "fresh", "truncated")}) == 1
    accepted = all(
        by_arm["adapted"][key] < by_arm["fresh"][key]
        for key in ("held_out_memory", "held_out_mixture")
    )
    for result in results:
        print(" ".join(f"{name}: {value}" for name, value in result.items()))
    if not quick:
        append_csv(RESULTS / "cross_vocabulary.csv", [origin | result for result in results])
    summary = {"benchmark": "cross_vocabulary", **origin, "results": results, "accepted": accepted}
    print(json.dumps(summary))
    sys.exit(0 if accepted else 1)


if __name__ == "__main__":
    main()
