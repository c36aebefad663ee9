"""Start vLLM on the stand-in device, serve rounds of requests and say what was seen.

argv[1]: JSON of {"llm": LLM arguments, "rounds": {name: [[prompt ids, SamplingParams arguments]]}}.
Last line of stdout: JSON of {"runner": "V1" or "V2", "rounds": {name: {"tokens": of each request,
"passes": forward passes by inner model that Python saw, "pieces": those of them that replayed
piecewise graphs, "replays": graphs replayed, "kernels": kernels in these}}, "writes": of piecewise
graphs that are known, "overwritten", "moved" and "dangling": breaches, see watch.py}.
"""

import ctypes
import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # what is watched has to be in this process

import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.models import registry

import vllm_memdec

TOKEN = 5  # that every request samples


def pretend_v2() -> None:
    """Let every request sample one token a step on the V2 runner: no kernel wrote any."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    original = GPUModelRunner.sample

    def sample(*args, **kwargs):
        output, sampled, rejected = original(*args, **kwargs)
        ids = output.sampled_token_ids
        ids.copy_(torch.full(ids.shape, TOKEN))
        sampled.copy_(torch.ones(sampled.shape))
        return output, sampled, rejected

    GPUModelRunner.sample = sample


def pretend_v1() -> None:
    """Let every request sample one token a step on the V1 runner; -1 is a refused draft there."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._sample

    def _sample(*args, **kwargs):
        output = original(*args, **kwargs)
        ids = torch.full(output.sampled_token_ids.shape, -1)
        ids[:, 0] = TOKEN
        output.sampled_token_ids.copy_(ids)
        return output

    GPUModelRunner._sample = _sample


def main() -> None:
    """Do what the module says."""
    job = json.loads(sys.argv[1])
    registry._run_in_subprocess = lambda look: look()  # a process for each class takes 10 s
    vllm_memdec.register()
    from watch import Watch  # imports the composite, which needs all of vLLM

    watch = Watch()
    watch.install()
    pretend_v1()
    pretend_v2()
    device = ctypes.CDLL(None)  # the library that was preloaded
    counts = {"replays": device.standin_replays, "kernels": device.standin_replayed_kernels}
    llm = LLM(**job["llm"])
    watch.started()
    rounds = {}
    for name, requests in job["rounds"].items():
        watch.passes.clear()
        watch.pieces.clear()
        before = {key: count() for key, count in counts.items()}
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in requests],
            [SamplingParams(**params) for _, params in requests],
            use_tqdm=False,
        )
        rounds[name] = {
            "tokens": [len(output.outputs[0].token_ids) for output in outputs],
            "passes": watch.passes,
            "pieces": watch.pieces,
        } | {key: count() - before[key] for key, count in counts.items()}
        rounds[name] = json.loads(json.dumps(rounds[name]))  # the counters go on
    breaches = {rule: getattr(watch, rule) for rule in ("overwritten", "moved", "dangling")}
    is_v2 = llm.llm_engine.vllm_config.use_v2_model_runner
    found = {"runner": "V2" if is_v2 else "V1", "rounds": rounds, "writes": len(watch.writes)}
    print(json.dumps(found | breaches))


if __name__ == "__main__":
    main()
