"""Tensor parallelism: a memory that every rank has whole, beside a base that ranks share.

parallel_state._TP is exchanged for a group of one rank while such a memory is built or run. vLLM's
layers look up the one group of the process; there is no argument for another.

May go when vLLM builds a model for a group that it is given.
Relies on the private name _TP, and on init_model_parallel_group making another group beside it.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from vllm.distributed import parallel_state

SIGNATURES = {
    "vllm.distributed.parallel_state:init_model_parallel_group": (
        "group_ranks local_rank backend use_message_queue_broadcaster group_name "
        "use_device_communicator use_all2all"
    ),
}


@contextlib.contextmanager
def whole_on_each_rank() -> Iterator[None]:
    """Build or run layers as if there were no tensor parallelism: every rank has them whole."""
    group = parallel_state._TP
    parallel_state._TP = _group_of_one()
    try:
        yield
    finally:
        parallel_state._TP = group


@functools.cache
def _group_of_one() -> parallel_state.GroupCoordinator:
    world = parallel_state.get_world_group()
    return parallel_state.init_model_parallel_group(
        [[rank] for rank in range(world.world_size)],
        world.local_rank,
        torch.distributed.get_backend(world.device_group),
        group_name="memdec",
    )
