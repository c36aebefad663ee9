"""Figures of memories on their way to the metrics endpoint, in vLLM's own statistics of a step.

GPUModelRunner.sample_tokens  Of either runner: what the worker has counted (tally.py) goes along
    with the output of the step, in place of the statistics of a KV connector.
Scheduler.make_spec_decoding_stats  The scheduler counts drafts, by the memory of their request;
    vLLM counts them by engine.
Scheduler.make_stats  Its counts join the worker's. Nothing is passed on without statistics.
StatLoggerManager.record  The front end takes them out again and counts them in Prometheus, before
    vLLM's own loggers, which would look for the connector.

Statistics of a KV connector are the one dictionary that vLLM carries from a worker to the front end
as it is, and an external KV cache is refused beside a memory, so that its place is free.

May go when vLLM lets a plugin add statistics of its own.
Relies on that place in the output of a step and in its statistics, on outputs that are completed
later but have it from the start, and on one front end being given the statistics of a step.
"""

from collections.abc import Callable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from vllm_memdec import metrics
from vllm_memdec.compat.hooks import wrap
from vllm_memdec.config import NONE
from vllm_memdec.request import choices_of
from vllm_memdec.tally import Figures

KEY = "memdec"  # of our figures in that dictionary
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
SIGNATURES = {
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens": "self grammar_output",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens": "self grammar_output",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.get_model": "self",
    f"{SCHEDULER}.make_spec_decoding_stats": (
        "self spec_decoding_stats num_draft_tokens num_accepted_tokens num_invalid_spec_tokens "
        "request_id"
    ),
    f"{SCHEDULER}.make_stats": (
        "self spec_decoding_stats kv_connector_stats cudagraph_stats perf_stats ec_connector_stats"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorStats.to_dict": "self",
    "vllm.v1.metrics.loggers:StatLoggerManager.record": (
        "self scheduler_stats iteration_stats mm_cache_stats engine_idx"
    ),
}
ATTRIBUTES = {
    SCHEDULER: "log_stats requests",
    "vllm.v1.outputs:ModelRunnerOutput": "kv_connector_output req_ids",
    "vllm.v1.outputs:KVConnectorOutput": "kv_connector_stats",
    "vllm.v1.worker.gpu_model_runner:AsyncGPUModelRunnerOutput": "_model_runner_output",
    "vllm.v1.worker.gpu.async_utils:AsyncOutput": "model_runner_output",
    "vllm.v1.metrics.stats:SchedulerStats": "kv_connector_stats",
}


def install() -> None:
    """Hook scheduler and front end, in whichever processes they are."""
    wrap(Scheduler, "make_spec_decoding_stats", _counted_drafts)
    wrap(Scheduler, "make_stats", _joined)
    wrap(StatLoggerManager, "record", _taken_out)


def install_v1() -> None:
    """Hook the V1 runner; called by the composite, so only in a worker that serves it."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "sample_tokens", _with_figures)


def install_v2() -> None:
    """Hook the V2 runner, likewise."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    wrap(GPUModelRunner, "sample_tokens", _with_figures)


def add(figures: Figures, more: Figures) -> None:
    """Add figures to others."""
    for figure, by_memory in more.items():
        sums = figures.setdefault(figure, {})
        for name, value in by_memory.items():
            sums[name] = sums.get(name, 0.0) + value


def _with_figures(original: Callable) -> Callable:
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        output = original(self, grammar_output)
        tally = getattr(self.get_model(), "tally", None)
        complete = output
        for name in ("model_runner_output", "_model_runner_output"):  # of what comes later
            complete = getattr(complete, name, complete)
        # Without requests it may be the one that vLLM hands out for every empty step.
        if tally is None or not isinstance(complete, ModelRunnerOutput) or not complete.req_ids:
            return output
        if figures := tally.take():
            assert complete.kv_connector_output is None, "a KV connector is refused at start"
            stats = KVConnectorStats({KEY: figures})
            complete.kv_connector_output = KVConnectorOutput(kv_connector_stats=stats)
        return output

    return sample_tokens


def _counted_drafts(original: Callable) -> Callable:
    def make_spec_decoding_stats(
        self: Any,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> Any:
        choices = choices_of(self)
        if self.log_stats and choices is not None and choices.drafts:
            request = self.requests[request_id]
            names = choices.running(request.sampling_params.extra_args, request.mm_features)
            name = names[0] if names else NONE  # the first drafts
            # As vLLM counts: without those that a grammar refused before they were verified.
            made = num_draft_tokens - (num_invalid_spec_tokens or {}).get(request_id, 0)
            figures: Figures = {
                metrics.DRAFTED: {name: made},
                metrics.ACCEPTED: {name: num_accepted_tokens},
            }
            add(vars(self).setdefault("memdec_figures", {}), figures)
        return original(
            self,
            spec_decoding_stats,
            num_draft_tokens=num_draft_tokens,
            num_accepted_tokens=num_accepted_tokens,
            num_invalid_spec_tokens=num_invalid_spec_tokens,
            request_id=request_id,
        )

    return make_spec_decoding_stats


def _joined(original: Callable) -> Callable:
    def make_stats(self: Any, *args: Any, **kwargs: Any) -> Any:
        stats = original(self, *args, **kwargs)
        if stats is not None and (drafted := vars(self).pop("memdec_figures", None)):
            figures = (stats.kv_connector_stats or {}).get(KEY, {})
            add(figures, drafted)
            stats.kv_connector_stats = {KEY: figures}
        return stats

    return make_stats


def _taken_out(original: Callable) -> Callable:
    def record(self: Any, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        carried = getattr(scheduler_stats, "kv_connector_stats", None)
        if carried is not None and KEY in carried:
            scheduler_stats.kv_connector_stats = None
            metrics.count(carried[KEY])
        original(self, scheduler_stats, *args, **kwargs)

    return record
