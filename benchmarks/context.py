"""How base, mixture and gate do by the length of the context, on text that none of them has seen.

    make demo && python benchmarks/context.py --domains biomedicine    # quality.py's memory is made

A base gains more from a long context than a small memory does. So the best weight falls with the
context, and one that was tuned on short documents does harm in long requests. Here the demo's
memory, and those of domains of quality.py, read held-out text of the domain and general text in
contexts of up to 1,024 tokens: with one weight for all contexts, with the weights by context of
`memdec build`, and with the gate of `memdec calibrate`. Weights are tuned on other documents than
those that are scored. Writes results/context.csv; the last line is JSON.
"""

import argparse
import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import data
import domains
import quality
from common import RESULTS, provenance
from transformers import AutoTokenizer

from vllm_memdec.checkpoint import MemoryBlock, tokenizer_fingerprint, write_block
from vllm_memdec.train import compare
from vllm_memdec.train import gate as gates
from vllm_memdec.train.artifacts import build_artifact
from vllm_memdec.train.config import load_settings
from vllm_memdec.train.pipeline import model_hash
from vllm_memdec.train.progress import Progress

TABLE = RESULTS / "context.csv"
CONTEXT = 1024  # tokens of the longest requests
SYSTEMS = ("base", "memory", "fixed", "mixture", "gate")
NAMES = ["domain", "text", "from", "to", "tokens", *SYSTEMS, "best_alpha", "best"]


def weighed(
    name: str, memory: Path, base: Path, texts: dict[str, list[Path]], progress: Progress
) -> Path:
    """Return a copy of a memory with weights by context and a gate, both made from `texts`."""

    def make(work: Path) -> None:
        shutil.copytree(
            memory,
            work,
            ignore=shutil.ignore_patterns("manifest.json", "memdec_gate*", "logs"),
            dirs_exist_ok=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.save_pretrained(work)
        mark = tokenizer_fingerprint(tokenizer)
        write_block(work, MemoryBlock(0.5, mark, base.name, 1.0))
        tuned = compare.best_weights(str(work), str(base), texts["domain"], progress, CONTEXT)
        chosen = {n: tuned[n] for n in ("alpha", "alpha_by_context")}
        write_block(work, replace(MemoryBlock(0.5, mark, base.name, 1.0), **chosen))
        gates.calibrate_gate(str(work), str(base), texts, progress, CONTEXT)

    inputs = {
        "base": model_hash(str(base), "the base"),
        "memory": model_hash(str(memory), "the memory"),
    }
    settings = {"gate": gates.SETTINGS, "context": CONTEXT}
    folder = data.BUILD / "context" / name
    return build_artifact(folder, "context", settings, inputs, make, progress.say).path


def general_text(folder: Path, base: Path, use: str) -> Path:
    """Return a file of general text for one use: of what a gate is trained on none is scored."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = sum(quality.general_texts(tokenizer, quality.Sizes(), use), [])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"general-{use}.jsonl"
    path.write_text(domains.as_jsonl(texts))
    return path


def of_demo(base: Path, progress: Progress) -> dict[str, Any]:
    """Return what the demo's memory gives to countries that it has not learnt."""
    folder, general = data.BUILD / "demo", data.BUILD / "context"
    text = folder / "text"
    texts = {
        "domain": [text / f"validation_{name}.jsonl" for name in ("pages", "facts")],
        "corpus": [text / "corpus.jsonl"],
        "general": [general_text(general, base, "gate")],
    }
    memory = weighed("demo", folder / "export", base, texts, progress)
    scored = {"domain": text / "pages.jsonl", "facts": text / "facts.jsonl"}
    scored["general"] = general_text(general, base, "scored")
    return evaluated(memory, base, scored, progress)


def of_domain(name: str, base: Path, progress: Progress) -> dict[str, Any]:
    """Return what a domain's memory gives to text that it has not learnt."""
    settings = load_settings(quality.HERE / "quality.yaml")
    sizes = quality.SIZES.get(name, quality.Sizes())
    domain = quality.Domain(name, str(base), sizes, settings, progress)
    rate = quality.TRAINED["memory"].rates[0]
    trained = domain.train("memory", rate).path
    text = domain.text.path
    learnt = data.BUILD / "context" / f"{name}-corpus.jsonl"
    learnt.parent.mkdir(parents=True, exist_ok=True)
    learnt.write_text(domains.as_jsonl(domain.gate_text("corpus")))
    texts = {
        "domain": [text / "validation.jsonl"],
        "corpus": [learnt],
        "general": [general_text(data.BUILD / "context", base, "gate")],
    }
    memory = weighed(name, trained, base, texts, progress)
    scored = {"domain": text / "test.jsonl"}
    scored["general"] = general_text(data.BUILD / "context", base, "scored")
    return evaluated(memory, base, scored, progress)


def evaluated(
    memory: Path, base: Path, texts: dict[str, Path], progress: Progress
) -> dict[str, Any]:
    """Return the report of `memdec evaluate` by the names of the texts."""
    files = [*texts.values()]
    found = compare.evaluate(str(memory), str(base), files, progress, context=CONTEXT)["texts"]
    return {name: found[str(path)] for name, path in texts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--no-demo", action="store_true", help="leave the demo's memory out")
    options = parser.parse_args()
    if wrong := set(options.domains) - set(domains.DOMAINS):
        parser.error(f"no such domain: {', '.join(wrong)}; known: {', '.join(domains.DOMAINS)}.")
    if not options.no_demo and not (data.BUILD / "demo/export/config.json").exists():
        parser.error("build/demo is no finished demo: run `make demo` first, or give --no-demo.")
    base, progress = data.smollm2(), Progress()
    where = provenance("torch", "transformers")
    found = {} if options.no_demo else {"demo": of_demo(base, progress)}
    found |= {name: of_domain(name, base, progress) for name in options.domains}
    rows = [
        {"domain": domain, "text": text, **{n: row.get(n, "") for n in NAMES[2:]}}
        for domain, texts in found.items()
        for text, told in texts.items()
        for row in told["by_context"]
    ]
    merged = [row | where for row in rows]
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            merged = [r for r in csv.DictReader(file) if r["domain"] not in found] + merged
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*NAMES, *where], lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged)
    print(json.dumps({"benchmark": "context", "results": rows}))


if __name__ == "__main__":
    main()
