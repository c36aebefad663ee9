"""Run requests on vLLM's V2 model runner without a GPU, in a process of its own.

V2 needs Triton, and the CPU wheel's Triton has no CPU back end. With an entry "cpu" among Triton's
back ends, whose driver is never active, vLLM takes V2 and Triton runs its kernels interpreted.
argv[1]: JSON of {"llm": LLM arguments, "requests": [[prompt ids, SamplingParams arguments], ...]}.
Last line of stdout: JSON list, one [prompt ids, sampled ids, prompt rows, sampled rows] a request;
with "metrics": true and speculation, then the numbers of drafted and of accepted tokens.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from triton.backends import Backend, backends
from triton.backends.driver import DriverBase
from triton.runtime.interpreter import InterpreterBuilder


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
    metrics = {metric.name: metric for metric in llm.get_metrics()} if job.get("metrics") else {}
    if "vllm:spec_decode_num_draft_tokens" in metrics:
        result += [
            metrics[f"vllm:spec_decode_num_{kind}_tokens"].value for kind in ("draft", "accepted")
        ]
    print(json.dumps(result))
