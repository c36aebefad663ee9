"""The composite on vLLM's CUDA path, on a stand-in device: it serves, and reads what is there.

Nothing is computed: no kernel runs, and every request is told that it sampled a token. What is real
is vLLM, torch.compile, Triton's compiler, PyTorch's allocator and the capture of CUDA graphs. So
these tests are about crashes, dtypes and addresses, not about probabilities. Each start is a
process of its own; two run at a time. `make test-cuda-path` makes the environment, of 8 GB.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BUILD = HERE.parent.parent / "build/cuda_path"  # the library, models, and what was compiled
TOKENS = 6  # of each answer
LONGEST = 64  # tokens of a step; a prompt in chunks would be given tokens too early
LIMIT = 900  # seconds of one start; ten took 7.5 minutes on two busy cores


@dataclass(frozen=True)
class Start:
    """One way to start the server."""

    mode: str  # "eager", "default" or "full": full graphs of decode steps, without torch.compile
    memories: int = 2
    drafts: int = 0
    runner: str = "V2"
    base: str = "base"  # "wide": of 1024 tokens, and not 1000 as its memory; "hybrid", "experts"
    overlap: bool = False  # memories on a stream of their own

    def __str__(self) -> str:
        drafts = ["drafts"] if self.drafts else []
        base = [self.base] if self.base != "base" else []
        overlap = ["overlap"] if self.overlap else []
        return "-".join([self.runner, self.mode, f"{self.memories}", *base, *drafts, *overlap])


STARTS = [
    Start("eager"),
    Start("eager", drafts=2),
    Start("default"),
    Start("default", drafts=2),
    Start("default", 1, base="wide"),
    Start("default", 1, base="wide", drafts=2),
    Start("default", 1, base="hybrid", drafts=2),
    Start("default", 1, base="experts", drafts=2),
    Start("full"),
    Start("full", 1, drafts=2),
    Start("full", overlap=True),
    Start("default", runner="V1"),
    Start("default", drafts=2, runner="V1"),
]
GRAPHS = [start for start in STARTS if start.mode != "eager"]


def llm_arguments(start: Start, models: dict[str, str]) -> dict:
    """Return the arguments of vLLM's LLM."""
    memories = {
        "law": {"model": models["law"], "alpha": 0.6},
        "bio": {"model": models["bio"], "alpha": 0.4},
    }
    block = {"memories": memories, "default": "law"} if start.memories == 2 else memories["law"]
    if start.drafts:
        block["speculative_tokens"] = start.drafts
    if start.overlap:
        block["overlap"] = True
    arguments = {
        "model": models[start.base],
        "model_impl": "memdec",
        "additional_config": {"memdec": block},
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": LONGEST,
        "kv_cache_memory_bytes": 1 << 28,  # given, or graphs are captured twice to measure them
    }
    if start.mode == "eager":
        return arguments | {"enforce_eager": True}
    arguments["cudagraph_capture_sizes"] = [1, 2, 4, 8, 16, 32]
    if start.mode == "full":
        arguments["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return arguments


def rounds(start: Start) -> dict[str, list]:
    """Return requests by round: a mixed batch, then one request of each kind alone."""

    def ask(temperature=0.0, length=4, **extra):
        params = {"max_tokens": TOKENS, "temperature": temperature, "ignore_eos": True}
        prompt = [*range(5, 5 + length)]
        return [prompt, params | {"detokenize": False, "extra_args": extra}]

    none, zero = ask(memdec_memory="none"), ask(memdec_alpha=0)
    mixed = [ask(), none, ask(0.8, memdec_alpha=0.3), zero]
    mixed += [ask(0.8, memdec_memory="bio")] if start.memories == 2 else [ask(0.8)]
    alone = {"memory": [ask()], "none": [none], "zero": [zero], "long": [ask(length=LONGEST - 2)]}
    return {"mixed": mixed} | alone | {"again": mixed}


@pytest.fixture(scope="session")
def models():
    """Make tiny models in the same folders every time: what was compiled for them is kept."""
    import torch
    from support import bases
    from support.tiny_models import save_tokenizer, tiny_config
    from transformers import AutoModelForCausalLM

    folders = {}
    for name, kind, vocab, hidden, layers in (
        ("base", "qwen2", 1000, 64, 2),
        ("wide", "qwen2", 1024, 64, 2),
        ("law", "llama", 1000, 96, 1),
        ("bio", "llama", 1000, 64, 1),
    ):
        folders[name] = str(BUILD / name)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(kind, vocab, hidden, layers, 256))
        model.to(torch.bfloat16).save_pretrained(folders[name])
        save_tokenizer(folders[name])
    for name, base in (("hybrid", "Falcon-H1"), ("experts", "Qwen3-MoE")):
        folders[name] = str(BUILD / name)
        bases.save(base, folders[name], "bfloat16")
    return folders


def serve(start: Start, models: dict[str, str]) -> dict:
    """Return what engine.py says, or {"error": the end of its log}."""
    env = os.environ | {
        "LD_PRELOAD": str(BUILD / "libcuda.so.1"),
        "LD_LIBRARY_PATH": str(BUILD),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)]),
        "VLLM_CACHE_ROOT": str(BUILD / "cache/vllm"),
        "TRITON_CACHE_DIR": str(BUILD / "cache/triton"),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it compiles for minutes with nvcc
        "VLLM_NO_USAGE_STATS": "1",
    }
    env.pop("TRITON_INTERPRET", None)  # conftest.py sets it where there is no GPU
    if start.runner == "V1":  # V2 is what vLLM takes by itself
        env["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    job = {"llm": llm_arguments(start, models), "rounds": rounds(start)}
    run = subprocess.run(
        [sys.executable, str(HERE / "engine.py"), json.dumps(job)],
        env=env,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    (BUILD / f"{start}.log").write_text(run.stdout + run.stderr)
    if run.returncode:
        return {"error": f"{run.stderr[-1000:]}\nThe whole log: {BUILD / f'{start}.log'}"}
    return json.loads(run.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def seen(request, models):
    """Return a function that waits for what was seen of a start. All starts asked for begin now."""
    import build

    build.build(BUILD)
    asked = {item.callspec.params["start"] for item in request.session.items}
    with ThreadPoolExecutor(2) as pool:
        futures = {s: pool.submit(serve, s, models) for s in STARTS if s in asked}

        def wait(start: Start) -> dict:
            found = futures[start].result()
            if "error" in found:
                pytest.fail(found["error"], pytrace=False)
            return found

        yield wait


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_every_request_is_answered(seen, start):
    found = seen(start)
    assert found["runner"] == start.runner
    for name, requests in rounds(start).items():
        assert found["rounds"][name]["tokens"] == [TOKENS] * len(requests)


@pytest.mark.parametrize("start", GRAPHS, ids=str)
def test_graphs_are_replayed(seen, start):
    """Or the tests below would look at nothing."""
    found = seen(start)
    mixed = found["rounds"]["again"]
    assert mixed["replays"] > 0 and mixed["kernels"] > 0
    if start.mode == "default":
        names = {"base"} | {f"memory{number}" for number in range(start.memories)}
        assert set(mixed["pieces"]) == names
        assert found["writes"] >= 6 * len(names)  # of six sizes


@pytest.mark.parametrize("start", GRAPHS, ids=str)
def test_nothing_is_read_that_another_model_overwrote(seen, start):
    assert seen(start)["overwritten"] == {}


@pytest.mark.parametrize("start", GRAPHS, ids=str)
def test_graphs_find_their_inputs_where_they_were(seen, start):
    assert seen(start)["moved"] == {}


@pytest.mark.parametrize("start", GRAPHS, ids=str)
def test_what_graphs_read_is_kept(seen, start):
    assert seen(start)["dangling"] == {}


@pytest.mark.parametrize("start", STARTS, ids=str)
@pytest.mark.parametrize("name", ["none", "zero"])
def test_no_memory_runs_for_requests_without_one(seen, start, name):
    """Python sees passes that are not in a full graph; of those, graphs hold fewer kernels."""
    found = seen(start)["rounds"]
    assert set(found[name]["passes"]) <= {"base"}
    if start.mode != "eager":
        assert 0 < found[name]["kernels"] < found["memory"]["kernels"]
