"""The metrics endpoint: what the memories of a server did, by memory."""

from collections import OrderedDict
from functools import cache
from typing import Any

from prometheus_client import Counter
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_memdec.compat import server
from vllm_memdec.config import NONE, MemDecConfig, memdec_block
from vllm_memdec.tally import MEMORY, MIXING, ROWS, WEIGHT, Figures

RECENT = 100_000  # requests whose memory is known: by age, because aborted ones do not finish
DRAFTED, ACCEPTED = "draft_tokens", "accepted_draft_tokens"
FINISHED = {
    "requests": "Finished requests: their number, by memory; of several, with each of them.",
    "prompt_tokens": "Finished requests: tokens of their prompts, by memory, likewise.",
    "generation_tokens": "Finished requests: tokens of their answers, by memory, likewise.",
}
DRAFTS = {
    DRAFTED: (
        "Tokens that the memory drafted (of several the heaviest) and that were verified, less "
        "those that a grammar refused before."
    ),
    ACCEPTED: "Drafted tokens that were accepted.",
}
MIXED = {
    ROWS: (
        "Rows of next-token probabilities that were mixed for requests with this memory: each "
        "token sampled, each draft verified, each piece of a prompt read, each position of a "
        "prompt whose log-probabilities were asked for."
    ),
    WEIGHT: (
        "Sum of the memory's weights in these rows, as they were mixed: given, by context or by a "
        "gate; of several memories each one's share. By memdec:mixed_rows_total it is the mean "
        "weight given."
    ),
}
SECONDS = {
    MEMORY: (
        "Seconds of the first worker within the memory's layers and output head, drafts included, "
        "by the wall clock; on a CPU only."
    ),
    MIXING: (
        "Seconds of the first worker within the memory's gate and in mixing its probabilities with "
        "the base's, by the wall clock; on a CPU only."
    ),
}

_recent: OrderedDict[str, list[str]] = OrderedDict()


def note_memories(request_id: str, memories: list[str]) -> None:
    """Keep the memories of a request for the moment it finishes; none of them is "none"."""
    _recent[request_id] = memories or [NONE]
    if len(_recent) > RECENT:
        _recent.popitem(last=False)


@cache
def counter(name: str) -> Counter:
    """Return a counter by memory, once in a process."""
    texts = FINISHED | DRAFTS | MIXED | SECONDS
    return Counter(f"memdec:{name}", texts[name], ["memory"])


def count(figures: Figures) -> None:
    """Add to the counters what an engine tells of one step."""
    for name, by_memory in figures.items():
        for memory, value in by_memory.items():
            counter(name).labels(memory).inc(value)


class MemoryMetrics(StatLoggerBase):
    """Entry point of the group `vllm.stat_logger_plugins`: counts tokens by memory."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0):
        self.serving = memdec_block(vllm_config.additional_config) is not None
        if not self.serving:
            return
        server.install()
        config = MemDecConfig.from_vllm(vllm_config)
        names = [memory.name for memory in config.memories]
        shown = dict.fromkeys(FINISHED, [*names, NONE]) | dict.fromkeys(MIXED, names)
        if config.speculative_tokens:
            shown |= dict.fromkeys(DRAFTS, names)
        if vllm_config.device_config.device_type == "cpu":
            shown |= dict.fromkeys(SECONDS, names)
        for name, memories in shown.items():
            for memory in memories:
                counter(name).labels(memory)  # shown from the start, as 0

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Count the requests that finished in this iteration; see compat/figures.py for others."""
        if not self.serving or iteration_stats is None:
            return
        for done in iteration_stats.finished_requests:
            for memory in _recent.get(done.request_id, ()):
                counter("requests").labels(memory).inc()
                counter("prompt_tokens").labels(memory).inc(done.num_prompt_tokens)
                counter("generation_tokens").labels(memory).inc(done.num_generation_tokens)

    def log_engine_initialized(self) -> None:
        """Log nothing: the worker logs what it loaded."""
