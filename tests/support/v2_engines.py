"""Engines on the V2 runner, one after the other, in the process that v2_script.py made ready."""

import json
import traceback
from contextlib import nullcontext

import pytest
from support import counters, quick_engines, recorded_graphs
from support.emulation import Captured, Hostile, Log, no_wait, watch
from vllm import LLM, SamplingParams
from vllm.multimodal.utils import fetch_image

from vllm_memdec import slots


def rows(found):
    return [{t: e.logprob for t, e in row.items()} if row else None for row in found or []]


def prompt(given):
    """Return vLLM's prompt of ids, or of a text with images, which are given as URLs."""
    if isinstance(given, list):
        return {"prompt_token_ids": given}
    pictures = [fetch_image(url) for url in given["images"]]
    return {"prompt": given["text"], "multi_modal_data": {"image": pictures}}


def sampling(params):
    """Return SamplingParams of arguments that were JSON, whose keys are strings."""
    if "logit_bias" in params:
        params = params | {"logit_bias": {int(t): b for t, b in params["logit_bias"].items()}}
    return SamplingParams(**params)


def run(job, log):
    """Return what a job asks for, or the error that ended its engine."""
    recorded_graphs.begin(job["graphs"])
    log.steps = []
    quick_engines.settle()
    llm = None
    try:
        llm = LLM(**quick_engines.KV_CACHE | job["llm"])
        return generate(llm, job, log)
    except Exception:
        return {"error": traceback.format_exc()}
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()


def change_memories(llm, unload=None, load=None):
    """Empty the slot of a memory; put another one, of arguments of load_memory(), into it."""
    if unload is not None:
        slots.unload_memory(llm, unload)
    if load is not None:
        slots.load_memory(llm, **load)


def generate(llm, job, log):
    """Return the answers of a job and what was drafted, accepted and run for them."""
    assert llm.llm_engine.vllm_config.use_v2_model_runner
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    log.begin(runner)
    guard = no_wait(runner.model, runner.speculator) if job["no_wait"] else nullcontext()
    found, by_request, before = [], [], counters.read()
    with guard:
        for batch in job["batches"]:
            if isinstance(batch, dict):
                change_memories(llm, **batch)
                continue
            outputs = llm.generate(
                [prompt(given) for given, _ in batch],
                [sampling(params) for _, params in batch],
                use_tqdm=False,
            )
            found += [
                [o.prompt_token_ids, list(s.token_ids), rows(o.prompt_logprobs), rows(s.logprobs)]
                for o in outputs
                for s in o.outputs
            ]
            by_request += [counters.drafts(s) for o in outputs for s in o.outputs]
    counts = {metric.name: metric for metric in llm.get_metrics()}
    drafted, accepted = (
        counts[name].value if name in counts else 0
        for name in (f"vllm:spec_decode_num_{kind}_tokens" for kind in ("draft", "accepted"))
    )
    return {
        "requests": found,
        "drafted": drafted,
        "accepted": accepted,
        "by_request": by_request,
        "by_memory": counters.grown(before),
        "steps": log.steps,
        "kept": len(runner.speculator.model.draft_logits) if runner.speculator else 0,
    }


def main(jobs):
    """Do the jobs of a JSON list, and print what v2_script.py promises."""
    recorded_graphs.install()
    log = Log()
    with pytest.MonkeyPatch.context() as patch:
        quick_engines.install(patch)
        watch(patch, Hostile(), Captured(), log)
        print(json.dumps([run(job, log) for job in json.loads(jobs)]))
