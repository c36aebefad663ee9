"""Progress for people: a bar with speed and time left, and an estimate before a long stage."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

ESTIMATE_SHARE, ESTIMATE_SECONDS = 0.05, 30.0  # work an estimate is based on: what comes first
LONG = 20.0  # seconds of a task from which it needs an estimate
PLAIN_SECONDS = 30.0  # seconds between lines where no bar can be drawn


def human_seconds(seconds: float) -> str:
    """Return a duration as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours = seconds / 3600
    if hours < 1.5:
        return f"{seconds / 60:.0f} min"
    return f"{hours:.1f} h" if hours < 100 else f"{hours:,.0f} h"


class Progress:
    """Draws one bar a task on a terminal; prints a plain line now and then elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.seconds: dict[str, float] = {}  # per task of this run

    def say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False, emoji=False)

    @contextlib.contextmanager
    def task(self, name: str, total: float, unit: str) -> Iterator[Callable[..., None]]:
        """Yield advance(count, done_before=False); work done before a resume has no speed."""
        started = time.monotonic()
        bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        done = {"before": 0.0, "now": 0.0, "line": 0.0, "said": False}
        with bar:
            task_id = bar.add_task(name, total=total)

            def advance(count: float, done_before: bool = False) -> None:
                done["before" if done_before else "now"] += count
                bar.update(task_id, advance=count)
                elapsed = time.monotonic() - started
                finished = done["before"] + done["now"]
                if not self.console.is_terminal and elapsed - done["line"] > PLAIN_SECONDS:
                    done["line"] = elapsed
                    self.say(f"{name}: {finished / total:.0%} of {total:.6g} {unit}")
                enough = done["now"] >= ESTIMATE_SHARE * total or elapsed > ESTIMATE_SECONDS
                if not done["said"] and done["now"] and enough and elapsed > 1:
                    done["said"] = True
                    speed = done["now"] / elapsed
                    left = (total - finished) / speed
                    if left > LONG:
                        self.say(f"{name}: {speed:.3g} {unit}/s, about {human_seconds(left)} to go")

            yield advance
        self.seconds[name] = time.monotonic() - started
        self.say(f"{name}: {total:.6g} {unit} in {human_seconds(self.seconds[name])}")
