"""The scheduler, in whichever process it is: requests without a memory are not drafted for.

AsyncScheduler._update_after_schedule and Scheduler.update_draft_token_ids plan the drafts of each
request; the plans of requests without a memory are dropped. vLLM drafts for all requests alike.

May go when vLLM lets a request go without drafts.
Relies on the scheduler's table of requests and their planned drafts.
"""

from collections.abc import Callable, Iterable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_memdec.compat.hooks import wrap
from vllm_memdec.request import NO_MEMORY, choices_of

SIGNATURES = {
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule": (
        "self scheduler_output"
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids": "self draft_token_ids",
}
ATTRIBUTES = {
    "vllm.v1.core.sched.scheduler:Scheduler": "requests vllm_config",
    "vllm.v1.request:Request": "sampling_params spec_token_ids",
}


def install() -> None:
    """Hook what plans the drafts."""
    wrap(AsyncScheduler, "_update_after_schedule", _planned_drafts)
    wrap(Scheduler, "update_draft_token_ids", _taken_drafts)


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
    """Plan no drafts for requests without a memory, where the memories draft."""
    if (choices := choices_of(scheduler)) is None or not choices.drafts:
        return
    for name in names:
        request = scheduler.requests.get(name)
        if request is None or request.sampling_params is None or not request.spec_token_ids:
            continue
        if choices.resolve(request.sampling_params.extra_args)[0] == NO_MEMORY:
            request.spec_token_ids = []
