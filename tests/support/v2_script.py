"""Run requests on vLLM's V2 model runner without a GPU, in a process of its own.

V2 needs Triton, and the CPU wheel's Triton has no CPU back end. With an entry "cpu" among Triton's
back ends, whose driver is never active, vLLM takes V2 and Triton runs its kernels interpreted.
Stdin: JSON of a list of jobs, each an engine, one after the other:
    "llm": arguments of LLM
    "batches": lists of [prompt, SamplingParams arguments] that run one after the other; a prompt is
        ids, or {"text": ..., "images": URLs}. Between them {"unload": name, "load": arguments}
    "graphs": perhaps "full" or "piecewise", the graphs that recorded_graphs.py stands in for
    "no_wait": whether to raise where our code makes the host wait for the device
Last line of stdout: JSON of one object a job, with "requests": [prompt ids, sampled ids, prompt
rows, sampled rows] of each, "drafted" and "accepted" tokens, both "by_request" where the engine
counts them, "by_memory": the growth of our counters, "steps": what ran in each, and "kept": how
many logits of drafts are still referred to.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
import triton.language as tl
from support import interpreter
from triton.backends import Backend, backends
from triton.backends.driver import DriverBase
from triton.language.extra import libdevice
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


# Of CUDA's library the interpreter knows the names alone; samples of refused drafts need this one.
libdevice.log1p = lambda x: tl.log(1 + x)
InterpreterBuilder.create_masked_store = with_bool_mask(InterpreterBuilder.create_masked_store)
interpreter.install()

if __name__ == "__main__":
    from support.v2_engines import main  # imports vLLM, which now finds all of the above

    main(sys.stdin.read())
