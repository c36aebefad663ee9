"""What engines of the benchmarks share: environment, options, and clocks on their steps."""

import statistics
import time
from typing import Any

import torch

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}
# vLLM 0.32 cannot load what it compiled ahead of time with torch 2.13: each start would compile
# anew.
COMPILING = ENVIRONMENT | {"VLLM_USE_AOT_COMPILE": "0", "HF_HUB_OFFLINE": "1"}
ANYWHERE = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "HF_HUB_OFFLINE")
MAX_CONTEXT = 2048  # tokens, passages included


def on_this_device(environment: dict[str, str]) -> dict[str, str]:
    """Return what of an environment engines need: on CUDA vLLM starts as it does for its users."""
    cuda = torch.cuda.is_available()
    return {k: v for k, v in environment.items() if not cuda or k in ANYWHERE}


def side_by_side(kv_cache_bytes: int) -> dict[str, Any]:
    """Return vLLM's options for an engine on a GPU beside others: only what is free counts."""
    return {"kv_cache_memory_bytes": kv_cache_bytes, "gpu_memory_utilization": 0.05}


class Stopwatch:
    """An engine that notes when the requests of a batch got their first token and their last."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def start(self, requests: int) -> None:
        self.began = time.perf_counter()
        self.first: list[float | None] = [None] * requests
        self.last = [0.0] * requests
        self.steps: list[float] = []  # ends of the steps that gave a token

    def generate(self, inputs: list[dict], params: Any, use_tqdm: bool = False) -> list[Any]:
        """Return the outputs, as LLM.generate does; may be called again for the same batch."""
        engine = self.llm.llm_engine
        for number, prompt in enumerate(inputs):
            engine.add_request(str(number), prompt, params.clone())
        done = {}
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - self.began
            if outputs:
                self.steps.append(now)
            for output in outputs:
                number = int(output.request_id)
                self.first[number] = self.first[number] or now
                if output.finished:
                    done[number], self.last[number] = output, now
        return [done[number] for number in sorted(done)]

    def figures(self, tokens: int) -> dict[str, float]:
        """Return seconds to the first token, per further one, of the whole answers, and a step."""
        pairs = list(zip(self.first, self.last, strict=True))
        first = statistics.mean(first for first, _ in pairs)
        further = statistics.mean(last - first for first, last in pairs)
        step = (self.steps[-1] - self.steps[0]) / (len(self.steps) - 1)
        whole = max(self.last)
        return {"first": first, "token": further / (tokens - 1), "whole": whole, "step": step}
