"""The scheduler, in whichever process it is: which requests are not drafted for.

Those without a memory or past the end of theirs, and samples with a seed.
AsyncScheduler._update_after_schedule and Scheduler.update_draft_token_ids plan the drafts of each
request; plans for these are dropped.
Scheduler.__init__ reads how long the memories are, while the engine starts.
Scheduler._update_after_schedule closes a step, which has placeholders of drafts for a request that
joins with one token to compute; they are taken out of it. vLLM drafts for all requests alike.

May go when vLLM lets a request go without drafts.
Relies on the scheduler's table of requests and their planned drafts.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_memdec.compat.hooks import wrap
from vllm_memdec.engine_config import memory_lengths
from vllm_memdec.request import choices_of

SIGNATURES = {
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule": (
        "self scheduler_output"
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.__init__": (
        "self vllm_config kv_cache_config structured_output_manager block_size hash_block_size "
        "mm_registry include_finished_set log_stats"
    ),
    "vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule": "self scheduler_output",
    "vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids": "self draft_token_ids",
}
ATTRIBUTES = {
    "vllm.v1.core.sched.scheduler:Scheduler": "requests vllm_config",
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "num_scheduled_tokens scheduled_spec_decode_tokens total_num_scheduled_tokens"
    ),
    "vllm.v1.request:Request": ("mm_features num_computed_tokens sampling_params spec_token_ids"),
    "vllm.sampling_params:SamplingParams": "extra_args sampling_type",
}


def install() -> None:
    """Hook what plans the drafts."""
    wrap(Scheduler, "__init__", _with_lengths)
    wrap(Scheduler, "_update_after_schedule", _without_placeholders)
    wrap(AsyncScheduler, "_update_after_schedule", _planned_drafts)
    wrap(Scheduler, "update_draft_token_ids", _taken_drafts)


def _with_lengths(original: Callable) -> Callable:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if (choices := choices_of(self)) is not None and choices.drafts:
            self.memdec_lengths = memory_lengths(self.vllm_config)

    return __init__


def _without_placeholders(original: Callable) -> Callable:
    def _update_after_schedule(self: Any, scheduler_output: Any) -> None:
        drafts, lengths = (
            scheduler_output.scheduled_spec_decode_tokens,
            scheduler_output.num_scheduled_tokens,
        )
        starts = {
            name: self.requests[name].num_computed_tokens + lengths[name] - len(tokens)
            for name, tokens in drafts.items()
        }
        for name, limit in _limits(self, starts):
            surplus = len(drafts[name]) - limit
            if surplus <= 0:
                continue
            drafts[name] = drafts[name][:limit]
            if not limit:
                del drafts[name]
            lengths[name] -= surplus
            scheduler_output.total_num_scheduled_tokens -= surplus
        original(self, scheduler_output)

    return _update_after_schedule


def _planned_drafts(original: Callable) -> Callable:
    def _update_after_schedule(self: Any, scheduler_output: Any) -> None:
        original(self, scheduler_output)
        _drop_drafts(self, scheduler_output.num_scheduled_tokens)

    return _update_after_schedule


def _taken_drafts(original: Callable) -> Callable:
    def update_draft_token_ids(self: Any, draft_token_ids: Any) -> None:
        original(self, draft_token_ids)
        _drop_drafts(self, draft_token_ids.req_ids)

    return update_draft_token_ids


def _drop_drafts(scheduler: Any, names: Iterable[str]) -> None:
    """Plan no drafts for requests that are not drafted for, nor beyond their memory's end."""
    requests = {name: scheduler.requests[name] for name in names if name in scheduler.requests}
    # The newest token is the first that is not computed.
    starts = {name: request.num_computed_tokens + 1 for name, request in requests.items()}
    for name, limit in _limits(scheduler, starts):
        if len(requests[name].spec_token_ids) > limit:
            requests[name].spec_token_ids = requests[name].spec_token_ids[:limit]


def _limits(scheduler: Any, starts: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Yield requests and how many tokens the memories that draft may draft for each.

    starts: by request, the position of the first of them.
    """
    if (choices := choices_of(scheduler)) is None or not choices.drafts:
        return
    for name, start in starts.items():
        request = scheduler.requests[name]
        if (params := request.sampling_params) is None:
            continue
        if not choices.drafted(params, request.mm_features):
            yield name, 0
            continue
        number, _ = choices.resolve(params.extra_args, request.mm_features)[0]
        # A token is drafted at the position before its own.
        yield name, max(0, scheduler.memdec_lengths[number] + 1 - start)
