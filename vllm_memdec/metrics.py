"""The metrics endpoint: finished requests and their tokens, by memory."""

from collections import OrderedDict
from functools import cache
from typing import Any

from prometheus_client import Counter
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_memdec.compat import server
from vllm_memdec.config import NONE, MemDecConfig, memdec_block

RECENT = 100_000  # requests whose memory is known: by age, because aborted ones do not finish

_recent: OrderedDict[str, str] = OrderedDict()


def note_memory(request_id: str, memory: str) -> None:
    """Keep the memory of a request for the moment it finishes."""
    _recent[request_id] = memory
    if len(_recent) > RECENT:
        _recent.popitem(last=False)


@cache
def counters() -> tuple[Counter, Counter, Counter]:
    """Return the counters of finished requests, once in a process."""

    def counter(what: str, text: str) -> Counter:
        return Counter(f"memdec:{what}", f"Finished requests: {text}, by memory.", ["memory"])

    return (
        counter("requests", "their number"),
        counter("prompt_tokens", "tokens of their prompts"),
        counter("generation_tokens", "tokens of their answers"),
    )


class MemoryMetrics(StatLoggerBase):
    """Entry point of the group `vllm.stat_logger_plugins`: counts tokens by memory."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0):
        self.serving = memdec_block(vllm_config.additional_config) is not None
        if self.serving:
            server.install()
            names = [memory.name for memory in MemDecConfig.from_vllm(vllm_config).memories]
            for counter in counters():
                for name in (*names, NONE):
                    counter.labels(name)  # shown from the start, as 0

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Count the requests that finished in this iteration."""
        if not self.serving or iteration_stats is None:
            return
        for done in iteration_stats.finished_requests:
            if (name := _recent.get(done.request_id)) is not None:
                requests, prompt, generation = (counter.labels(name) for counter in counters())
                requests.inc()
                prompt.inc(done.num_prompt_tokens)
                generation.inc(done.num_generation_tokens)

    def log_engine_initialized(self) -> None:
        """Log nothing: the worker logs what it loaded."""
