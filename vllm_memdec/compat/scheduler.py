"""The scheduler, in whichever process it is: which requests are not drafted for.

Those without a memory, and samples with a seed. AsyncScheduler._update_after_schedule and
Scheduler.update_draft_token_ids plan the drafts of each request; plans for these are dropped.
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
from vllm_memdec.request import choices_of

SIGNATURES = {
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule": (
        "self scheduler_output"
    ),
    "vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule": "self scheduler_output",
    "vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids": "self draft_token_ids",
}
ATTRIBUTES = {
    "vllm.v1.core.sched.scheduler:Scheduler": "requests vllm_config",
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "num_scheduled_tokens scheduled_spec_decode_tokens total_num_scheduled_tokens"
    ),
    "vllm.v1.request:Request": "mm_features sampling_params spec_token_ids",
    "vllm.sampling_params:SamplingParams": "extra_args sampling_type",
}


def install() -> None:
    """Hook what plans the drafts."""
    wrap(Scheduler, "_update_after_schedule", _without_placeholders)
    wrap(AsyncScheduler, "_update_after_schedule", _planned_drafts)
    wrap(Scheduler, "update_draft_token_ids", _taken_drafts)


def _without_placeholders(original: Callable) -> Callable:
    def _update_after_schedule(self: Any, scheduler_output: Any) -> None:
        drafts, lengths = (
            scheduler_output.scheduled_spec_decode_tokens,
            scheduler_output.num_scheduled_tokens,
        )
        for name in _not_drafted(self, [*drafts]):
            count = len(drafts.pop(name))
            lengths[name] -= count
            scheduler_output.total_num_scheduled_tokens -= count
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
    """Plan no drafts for requests that are not drafted for."""
    for name in _not_drafted(scheduler, names):
        if scheduler.requests[name].spec_token_ids:
            scheduler.requests[name].spec_token_ids = []


def _not_drafted(scheduler: Any, names: Iterable[str]) -> Iterator[str]:
    """Yield the requests, of those that are left, that memories which draft do not draft for."""
    if (choices := choices_of(scheduler)) is None or not choices.drafts:
        return
    for name in names:
        request = scheduler.requests.get(name)
        if request is None or request.sampling_params is None:
            continue
        if not choices.drafted(request.sampling_params, request.mm_features):
            yield name
