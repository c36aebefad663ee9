"""Run requests on two data-parallel ranks, without a server: python data_parallel_script.py JOBS.

argv[1]: JSON of a list of jobs, each an engine of both ranks, one after the other:
    "llm": arguments of LLM
    "rounds": lists of two lists, a rank's requests: [prompt ids, SamplingParams arguments]
Each rank prints JSON of [rank, job, round, token ids of each request, drafted tokens so far].
A round that takes longer than PATIENCE ends the process with the stack of the rank that waits.

vLLM for CPUs lacks the two collectives by which ranks share experts (its CPU communicator raises
NotImplementedError in the first step of any mixture of experts): here they are, over gloo.
"""

import faulthandler
import json
import os
import socket
import sys

import torch
from vllm import LLM, SamplingParams
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.models import registry

START, PATIENCE = 300, 120  # seconds for two engines to start, for a round of requests


def all_gatherv(self, rows, dim=0, sizes=None):
    """Return the rows of all ranks, of which each has another number."""
    if isinstance(rows, list):
        return [self.all_gatherv(part, dim, sizes) for part in rows]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=self.cpu_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatterv(self, rows, dim=-1, sizes=None):
    """Return this rank's rows of the sum over all ranks."""
    total = rows.clone()
    torch.distributed.all_reduce(total, group=self.cpu_group)
    return total.split(sizes)[self.rank_in_group].clone()


def answers(llm, requests):
    """Return the token ids of all requests; a rank without any steps along with the other."""
    engine = llm.llm_engine
    for number, (prompt, sampling) in enumerate(requests):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, SamplingParams(**sampling))
    found = {}
    while engine.has_unfinished_requests():  # of any rank
        for output in engine.step():
            found[int(output.request_id)] = list(output.outputs[0].token_ids)
    return [found[number] for number in range(len(requests))]


def drafted(llm):
    """Return how many tokens were drafted since the engine started."""
    counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return counters.get("vllm:spec_decode_num_draft_tokens", 0)


def main(jobs):
    """Become two ranks, and run the jobs."""
    CpuCommunicator.all_gatherv, CpuCommunicator.reduce_scatterv = all_gatherv, reduce_scatterv
    registry._run_in_subprocess = lambda look: look()  # which would import vLLM once more
    ports = []
    for _ in jobs:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    other = os.fork()  # vLLM is imported once, and nothing of it has begun
    rank = 0 if other else 1
    for number, (job, port) in enumerate(zip(jobs, ports, strict=True)):
        faulthandler.dump_traceback_later(START, exit=True)
        os.environ |= {
            "VLLM_DP_RANK": str(rank),
            "VLLM_DP_SIZE": "2",
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": str(port),
        }
        llm = LLM(**job["llm"], distributed_executor_backend="uni")
        for place, requests in enumerate(job["rounds"]):
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            found = answers(llm, requests[rank])
            line = json.dumps([rank, number, place, found, drafted(llm)])
            os.write(1, f"{line}\n".encode())  # whole, whatever the other rank writes
        faulthandler.cancel_dump_traceback_later()
        llm.llm_engine.engine_core.shutdown()
        del llm
    if other:
        _, status = os.waitpid(other, 0)
        assert status == 0, f"the second rank ended with {status}"


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
