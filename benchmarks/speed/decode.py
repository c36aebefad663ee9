"""Engines whose decode steps are timed, whole or by what is called in them."""

import time
from collections import defaultdict
from typing import Any

import torch

from benchmarks.speed.engines import side_by_side

PROMPT, TOKENS = 64, 32


def engine(base: str, memory: str | None = None, eager: bool = True, dummy: bool = False) -> Any:
    """Return an engine of the base, with a memory beside it if one is given."""
    from vllm import LLM

    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "enforce_eager": eager,
        "max_num_seqs": 16,
        "seed": 0,
    }
    options["load_format"] = "dummy" if dummy else "auto"
    if torch.cuda.is_available():
        options |= side_by_side(1 << 30)
    if memory is not None:
        block = {"memdec": {"model": memory, "alpha": 0.5}}
        options |= {"model_impl": "memdec", "additional_config": block}
    return LLM(base, max_model_len=256, disable_log_stats=True, **options)


def decode_ms(llm: Any, size: int, extra: dict[str, Any] | None = None) -> float:
    """Return milliseconds per decode step of a batch: TOKENS tokens minus one, over their steps."""
    from vllm import SamplingParams

    def seconds(tokens: int) -> float:
        params = SamplingParams(
            max_tokens=tokens, temperature=0, ignore_eos=True, extra_args=extra, detokenize=False
        )
        # Other prompts each time: a cached prefix would shorten one of the two runs.
        seed = time.perf_counter_ns()
        known = llm.llm_engine.vllm_config.model_config.get_vocab_size()
        prompts = [
            [((seed >> i % 16) % 40000 + i * 7 + j) % known for j in range(PROMPT)]
            for i in range(size)
        ]
        started = time.perf_counter()
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return time.perf_counter() - started

    return (seconds(TOKENS + 1) - seconds(1)) / TOKENS * 1e3


class Clock:
    """Seconds spent in functions, by a key of each, and how often they were called."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)

    def time(self, owner: Any, name: str, key: str) -> None:
        """Replace a function of an object, module or class by one that is timed."""
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.spent[key] += time.perf_counter() - started
                self.calls[key] += 1

        setattr(owner, name, call)

    def reset(self) -> None:
        """Forget what was spent so far."""
        self.spent.clear()
        self.calls.clear()
