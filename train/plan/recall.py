"""How often a memory must read facts until it completes them: what was measured, if anything was.

`python -m benchmarks.quality.recall_curve` measures it; benchmarks/results/recall.csv has the rows,
and a test compares the curve with them.
"""

import numpy as np

# (epochs, share of the corpus's facts that base + memory completes), the mean over domains.
CURVE: tuple[tuple[float, float], ...] = ()
RAG = 0.0  # the same share for the best retrieval of the same domains


def recalled(epochs: float) -> float:
    """Return the share of facts that stick after so many epochs, between those measured."""
    points = np.array([(0.0, 0.0), *CURVE])
    return float(np.interp(epochs, points[:, 0], points[:, 1]))


def epochs_until(share: float) -> float | None:
    """Return after how many epochs that share of facts sticks; None if that was not reached."""
    points = ((0.0, 0.0), *CURVE)
    for (before, low), (after, high) in zip(points, points[1:], strict=False):
        if high >= share:
            return before + (after - before) * max(0.0, share - low) / max(high - low, 1e-9)
    return None


def sentence(epochs: float) -> str:
    """Return in one sentence how much of a corpus's facts a build with so many epochs recalls.

    "" where nothing was measured.
    """
    if not CURVE:
        return ""
    now, until = recalled(min(epochs, CURVE[-1][0])), epochs_until(RAG)
    passes = "is not passed" if until is None else f"is passed after {until:.3g} epochs"
    return (
        f"facts: about {now:.0%} stick after {epochs:g} epochs (measured up to "
        f"{CURVE[-1][0]:g}); retrieval's {RAG:.0%} {passes}"
    )
