"""Metrics of training: a line of JSON a step, the same numbers for TensorBoard, a curve at the end.

What is recorded is a function of the steps done: a resumed run drops the lines of later steps,
which a killed run did after its last checkpoint.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_memdec.train.data.artifacts import write_atomic
from vllm_memdec.train.executor.ray_executor import World

METRICS, CURVE = "metrics.jsonl", "loss.png"  # files in logs/; the curve is drawn last
# An evaluation is judged by the perplexity of the mixture, which is what is served. While the best
# weight of a young memory is 0 the mixture stands still, so the memory's own decides ties.
JUDGED = ("validation_mixture", "validation_memory")


def judgement(row: dict[str, float]) -> tuple[float, ...] | None:
    """Return what a step's evaluation is judged by, the lower the better; None without one."""
    return tuple(row[name] for name in JUDGED) if JUDGED[0] in row else None


def read_metrics(path: Path, steps: int | None = None) -> list[dict[str, float]]:
    """Return the metrics of the first steps, or of all; a line that a kill cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # a whole line has its end
    return [json.loads(line) for line in lines[:steps]]


@contextlib.contextmanager
def metrics_file(
    logs: Path, step: int, world: World
) -> Iterator[tuple[Callable[[dict], None], list[tuple[float, ...]]]]:
    """Yield (a function that records a step's metrics, judgements so far), from `step` on.

    They go to metrics.jsonl, a line a step, and to TensorBoard.
    """
    rows = read_metrics(logs / METRICS, step)
    evaluations = [judged for row in rows if (judged := judgement(row))]
    if world.rank != 0:
        yield lambda row: None, evaluations
        return
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomic(logs / METRICS, lambda p: p.write_text(text))
    board = Board(logs / "tensorboard", step + 1)
    with open(logs / METRICS, "a", buffering=1) as file, contextlib.closing(board):

        def write(row: dict) -> None:
            file.write(json.dumps(row) + "\n")
            board.add(row)

        yield write, evaluations


class Board:
    """TensorBoard's file of a run, written at once: a thread would outlive a full disk."""

    def __init__(self, folder: Path, step: int) -> None:
        """step: from which on an earlier run's is forgotten."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(exist_ok=True)
        self.event, self.events = Event, EventsWriter(str(folder / "events"))
        self.write(step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, **what: Any) -> None:
        """Append an event."""
        self.events.write_event(self.event(wall_time=time.time(), step=step, **what))
        self.events.flush()

    def add(self, row: dict[str, float]) -> None:
        """Append a step's metrics."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=row[name])
            for name in sorted(row)
            if name != "step"
        ]
        self.write(int(row["step"]), summary=Summary(value=values))

    def close(self) -> None:
        self.events.close()


def stopped_early(evaluations: list[tuple[float, ...]], patience: int | None) -> bool:
    """Tell whether the last `patience` evaluations brought none better than those before."""
    if patience is None or len(evaluations) <= patience:
        return False
    return min(evaluations[-patience:]) >= min(evaluations[:-patience])


def plot_loss(metrics: list[dict[str, float]], beta: float, path: Path) -> None:
    """Draw the two losses over the steps and the perplexities of the evaluations, if any."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    evaluated = [row for row in metrics if judgement(row)]
    figure, panels = plt.subplots(
        1 + bool(evaluated), figsize=(7, 4 + 3 * bool(evaluated)), layout="constrained", sharex=True
    )
    axes = panels[0] if evaluated else panels
    steps = [row["step"] for row in metrics]
    axes.plot(steps, [row["kl"] for row in metrics], label="KL(kNN || memory)")
    axes.plot(steps, [row["ce"] for row in metrics], label="cross-entropy")
    axes.set(ylabel="nats per token", title=f"memory training, beta = {beta:g}")
    if evaluated:
        steps = [row["step"] for row in evaluated]
        for name in ("base", "mixture"):
            values = [row[f"validation_{name}"] for row in evaluated]
            panels[1].plot(steps, values, marker=".", label=f"{name}, validation")
        panels[1].set(ylabel="perplexity", yscale="log")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[-1].set(xlabel="step")
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)
