"""Engines for the serving tests: real ones, small, in this process, one at a time."""

import contextlib
import gc
import os
import sys

import pytest

ENGINE_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # vLLM compiles a helper of the sampler even when eager
}
os.environ.update(ENGINE_ENV)  # before vllm is imported


@pytest.fixture
def engine(monkeypatch):
    """Return a context manager that yields an LLM and frees it: engine(base, memory, alpha)."""
    # Users without a GPU run the PyTorch path; the interpreter would take minutes here.
    from vllm_memdec.kernels import interpolate

    monkeypatch.setattr(interpolate, "INTERPRETED", False)

    @contextlib.contextmanager
    def start(base, memory=None, alpha=0.6, **options):
        from vllm import LLM

        if memory is not None:
            options["model_impl"] = "memdec"
            options["additional_config"] = {"memdec": {"model": memory, "alpha": alpha}}
        defaults = {"dtype": "float32", "max_num_seqs": 16, "max_logprobs": -1, "seed": 0}
        llm = LLM(base, enforce_eager=True, disable_log_stats=True, **defaults | options)
        try:
            yield llm
        finally:
            # The process groups stay: vLLM reuses them for the next engine of a process.
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()

    return start


@pytest.fixture(scope="session")
def subprocess_env():
    """Return the environment of a user's shell: no interpreter, plugin from this checkout."""
    env = {**os.environ, **ENGINE_ENV, "VLLM_LOGGING_LEVEL": "INFO"}
    for name in (
        "TRITON_INTERPRET",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_USE_V2_MODEL_RUNNER",
    ):
        del env[name]
    env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + env["PATH"]
    return env
