"""Run requests on vLLM's V2 model runner without a GPU, in a process of its own.

V2 needs Triton, and the CPU wheel's Triton has no CPU back end. With an entry "cpu" among Triton's
back ends, whose driver is never active, vLLM takes V2 and Triton runs its kernels interpreted.
argv[1]: JSON of {"llm": LLM arguments, "requests": [[prompt ids, SamplingParams arguments], ...]}.
Last line of stdout: JSON list, one [prompt ids, sampled ids, prompt rows, sampled rows] a request.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from triton.backends import Backend, backends
from triton.backends.driver import DriverBase


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

from vllm import LLM, SamplingParams  # noqa: E402


def rows(found):
    return [{t: e.logprob for t, e in row.items()} if row else None for row in found or []]


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    llm = LLM(**job["llm"])
    assert llm.llm_engine.vllm_config.use_v2_model_runner
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids, _ in job["requests"]],
        [SamplingParams(**params) for _, params in job["requests"]],
        use_tqdm=False,
    )
    result = [
        [o.prompt_token_ids, list(s.token_ids), rows(o.prompt_logprobs), rows(s.logprobs)]
        for o in outputs
        for s in o.outputs
    ]
    print(json.dumps(result))
