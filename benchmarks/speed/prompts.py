"""Prompts of the demo's domain that no system has seen, whose answers last as long as is timed."""

import argparse
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.demo.texts import texts_of

CANDIDATES = 32  # prompts asked at once whether their answers last


def check_build(parser: argparse.ArgumentParser, build: str) -> None:
    """End with a sentence if the demo has not been built."""
    if not (Path(build) / "export/config.json").exists():
        parser.error(f"{build} is no finished demo: run `make demo` first, or give its --build.")


def demo_documents(build: str, name: str) -> list[str]:
    """Return the documents of one of the texts that a demo's build was made of."""
    from vllm_memdec.train.data.documents import documents

    return list(documents(texts_of(Path(build)) / f"{name}.jsonl"))


def held_out(build: str, tokenizer: Any) -> list[int]:
    """Return the ids of the demo's held-out pages, one after the other."""
    return [i for page in demo_documents(build, "pages") for i in tokenizer(page)["input_ids"]]


def lasting(llm: Any, tokens: int, prompts: list[list[int]]) -> list[bool]:
    """Return which prompts have a greedy answer of so many tokens; the engine forgets them."""
    from vllm import SamplingParams

    if not tokens:
        return [True] * len(prompts)
    params = SamplingParams(max_tokens=tokens, temperature=0, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    llm.reset_prefix_cache()
    return [output.outputs[0].finish_reason == "length" for output in outputs]


def lasting_prompts(
    ids: list[int],
    length: int,
    count: int,
    ask: Callable[[list[list[int]]], list[bool]],
    seed: str,
) -> Iterator[list[int]]:
    """Yield so many prompts, cut at random from a text, that `ask` finds to last."""
    rng = random.Random(seed)
    while count > 0:
        starts = [rng.randrange(len(ids) - length) for _ in range(CANDIDATES)]
        prompts = [ids[start : start + length] for start in starts]
        kept = [prompt for prompt, lasts in zip(prompts, ask(prompts), strict=True) if lasts]
        assert kept, "no answer lasts so many tokens"
        yield from kept[:count]
        count -= len(kept)
