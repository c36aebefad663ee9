"""Run requests on vLLM's V2 model runner without a GPU, in a process of its own.

V2 needs Triton, and the CPU wheel's Triton has no CPU back end. With an entry "cpu" among Triton's
back ends, whose driver is never active, vLLM takes V2 and Triton runs its kernels interpreted.
argv[1]: JSON of a list of jobs, each an engine, one after the other:
    "llm": arguments of LLM
    "batches": lists of [prompt ids, SamplingParams arguments] that run one after the other
    "graphs": perhaps "full" or "piecewise", the graphs that recorded_graphs.py stands in for
    "no_wait": whether to raise where our code makes the host wait for the device
Last line of stdout: JSON of one object a job, with "requests": [prompt ids, sampled ids, prompt
rows, sampled rows] of each, "drafted" and "accepted" tokens, "steps": what ran in each, and "kept":
how many logits of drafts are still referred to.
"""

import gc
import json
import os
import sys
import traceback
from contextlib import nullcontext

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import pytest
import torch
from triton.backends import Backend, backends
from triton.backends.driver import DriverBase
from triton.runtime.interpreter import InterpreterBuilder

# vLLM 0.32's AMX attention dies of SIGILL where one bfloat16 request decodes alone.
torch.cpu._is_amx_tile_supported = lambda: False


class NeverActive(DriverBase):
    @classmethod
    def is_active(cls):
        return False

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return None

    def get_active_torch_device(self):
        return None

    def get_benchmarker(self):
        return None


backends["cpu"] = Backend(compiler=None, driver=NeverActive)


def with_bool_mask(function):
    """Triton's interpreter makes an int32 of `mask & scalar`, which its own store then refuses."""

    def call(self, pointers, value, mask, *rest):
        mask.data = mask.data.astype(bool)
        return function(self, pointers, value, mask, *rest)

    return call


InterpreterBuilder.create_masked_store = with_bool_mask(InterpreterBuilder.create_masked_store)

import recorded_graphs  # noqa: E402
from emulation import Captured, Hostile, Log, no_wait, watch  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402


def rows(found):
    return [{t: e.logprob for t, e in row.items()} if row else None for row in found or []]


def run(job, log):
    """Return what a job asks for, or the error that ended its engine."""
    recorded_graphs.begin(job["graphs"])
    log.steps = []
    llm = None
    try:
        llm = LLM(**job["llm"])
        return generate(llm, job, log)
    except Exception:
        return {"error": traceback.format_exc()}
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def generate(llm, job, log):
    """Return the answers of a job and what was drafted, accepted and run for them."""
    assert llm.llm_engine.vllm_config.use_v2_model_runner
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    log.begin(runner)
    guard = no_wait(runner.model, runner.speculator) if job["no_wait"] else nullcontext()
    found = []
    with guard:
        for batch in job["batches"]:
            outputs = llm.generate(
                [{"prompt_token_ids": ids} for ids, _ in batch],
                [SamplingParams(**params) for _, params in batch],
                use_tqdm=False,
            )
            found += [
                [o.prompt_token_ids, list(s.token_ids), rows(o.prompt_logprobs), rows(s.logprobs)]
                for o in outputs
                for s in o.outputs
            ]
    counts = {metric.name: metric for metric in llm.get_metrics()}
    drafted, accepted = (
        counts[name].value if name in counts else 0
        for name in (f"vllm:spec_decode_num_{kind}_tokens" for kind in ("draft", "accepted"))
    )
    return {
        "requests": found,
        "drafted": drafted,
        "accepted": accepted,
        "steps": log.steps,
        "kept": len(runner.speculator.model.draft_logits) if runner.speculator else 0,
    }


if __name__ == "__main__":
    recorded_graphs.install()
    log = Log()
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, Hostile(), Captured(), log)
        print(json.dumps([run(job, log) for job in json.loads(sys.argv[1])]))
