"""How long a domain takes with each system, from the speed of the models on this machine.

What is read counts at the tokens/s of a forward pass, measured with a few hundred tokens; what is
trained at the same FLOP/s, its activations computed twice where RAM is tight.
"""

import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.corpora import domains
from benchmarks.quality.domain import Domain
from benchmarks.systems.finetune import FineTuned, Lora
from benchmarks.systems.gated import Gated
from benchmarks.systems.knn_lm import KnnLm
from benchmarks.systems.memory import Memory
from benchmarks.systems.rag import CHOOSING_BLOCKS, PASSAGE, RagSystem
from benchmarks.systems.system import System
from benchmarks.systems.trained import Trained, parameters, trial_share
from vllm_memdec.train.model.decoder import memory_config
from vllm_memdec.train.model.huggingface import load_config, load_model

MEASURED = 512  # tokens
FACT = 25  # tokens of a fact, its question included


@lru_cache
@torch.inference_mode()
def rate(folder: str) -> float:
    """Return the tokens/s of a forward pass with the head, measured anew in every process."""
    model, times = load_model(folder, "bfloat16"), []
    ids = torch.arange(MEASURED, device=model.device)[None] + 100
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        model(input_ids=ids, use_cache=False).logits[0, -1, 0].item()
        times.append(time.perf_counter() - started)
    print(f"{Path(folder).name}: {MEASURED / min(times):,.0f} tokens/s forward", flush=True)
    return MEASURED / min(times)


def seconds(
    domain: Domain, kinds: Sequence[type[System]], shares: Sequence[float] = ()
) -> dict[str, float]:
    """Return about how many seconds each system takes, all of it done for the first time.

    shares: those of a training that recall_curve.py trains; what it trains is tuned and asked only.
    """
    sizes, pair, settings = domain.sizes, domain.pair, domain.settings.memory
    base = rate(domain.base)
    key = rate(pair.key_model)
    weights = sum(parameters(load_config(domain.base)))
    config = memory_config(settings, domain.base)
    small = sum(parameters(config))
    own = base * weights / small
    if pair.small and pair.key_model == pair.small:
        own = key * sum(parameters(load_config(pair.small))) / small
    scored = sizes.test + len(domains.GENERAL) * sizes.general
    texts = scored + sizes.validation
    asked = 2 * FACT * sizes.facts * bool(domain.name in domains.FACTS)
    runs, read_by_each = (shares, sizes.validation) if shares else ((1.0,), texts)
    keys, memory_token = costs_before(domain, config)
    flops = budget_before(domain, config)
    block = domain.settings.corpus.block_tokens
    batch = settings.batch(sizes.train // block) * block  # tokens of a step
    found = {}
    for kind in kinds:
        if issubclass(kind, RagSystem):
            chunks = scored / sizes.interval
            tried = min(CHOOSING_BLOCKS * block, sizes.validation) / sizes.interval
            each = chunks * max(kind.passages) + tried * sum(kind.passages) * (
                len(kind.passages) > 1
            )
            read = each * PASSAGE + scored * block / 2 / sizes.interval
            spent = (read + asked / FACT * max(kind.passages) * PASSAGE) / base
        elif issubclass(kind, Trained):
            again = 4 / 3 if getattr(kind(domain), "tight", False) else 1.0
            per_second, reads = 2 * weights * base, base
            token, left = (4 if kind is Lora else 6) * weights, flops
            if not issubclass(kind, FineTuned):
                per_second, reads, token = 2 * small * own, own, memory_token
            if kind is Memory:
                left -= keys
            rates = len(kind(domain).rates)
            trial = trial_share(sizes.trial, left / token / batch)
            trainings = sum(runs) + trial * rates
            if trial == 1 and 1 in runs:
                trainings -= 1  # the trial of the rate that is chosen
            spent = left * trainings / per_second * again
            read = len(runs) * (read_by_each + asked) + rates * sizes.validation
            spent += read / reads
            if kind is Memory:
                spent += sizes.train / key
        elif kind is Gated:
            gates = 2 * (sizes.gate * len(domains.GENERAL) + 2 * sizes.validation + sizes.learnt)
            spent = gates * (1 / base + 1 / own) + scored / own
        elif kind is KnnLm:
            spent = (texts + asked) / key
        else:
            spent = (texts + asked) / base
        found[kind.title] = spent
    return found


def costs_before(domain: Domain, config: Any) -> tuple[float, float]:
    """Return memory_cost() before the corpus is there, whose tokens in use are guessed."""
    tokens = domain.sizes.train
    layers, head = parameters(config)
    sampled = domain.settings.memory.sampled_negatives
    if sampled:
        head = min(head, (sampled + tokens // 4) * config.hidden_size)
    return 2 * parameters(load_config(domain.pair.key_model))[0] * tokens, 6 * (layers + head)


def budget_before(domain: Domain, config: Any) -> float:
    """Return budget() before the corpus is there."""
    tokens = domain.sizes.train
    if domain.pair.budget == "paper":
        return 6 * sum(parameters(load_config(domain.base))) * tokens
    keys, token = costs_before(domain, config)
    return keys + token * (domain.sizes.epochs or domain.settings.memory.epochs) * tokens


def show(domain: Domain, kinds: Sequence[type[System]], shares: Sequence[float] = ()) -> float:
    """Print the hours of each system; return their sum."""
    found = seconds(domain, kinds, shares)
    total = sum(found.values()) / 3600
    parts = ", ".join(f"{title} {value / 3600:.2f}" for title, value in found.items())
    print(f"{domain.name}: about {total:.2f} hours ({parts})", flush=True)
    return total
