"""A run's loss as a picture: a file by matplotlib, and lines of text for a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from ktk.train.run import Progress

_EIGHTHS = " ▁▂▃▄▅▆▇█"


def smoothed(losses: Sequence[float], weight: float = 0.8) -> list[float]:
    """A moving average, each earlier value counting ``weight`` times the next, from the first on
    without a bias to zero.
    """
    found, total, norm = [], 0.0, 0.0
    for loss in losses:
        total, norm = weight * total + loss, weight * norm + 1
        found.append(total / norm)
    return found


def chart(losses: Sequence[float], width: int = 60, height: int = 8) -> str:
    """Columns of text, each the mean of as many steps, over the range of all; "" without any."""
    if not losses:
        return ""
    width = min(width, len(losses))
    bounds = [at * len(losses) // width for at in range(width + 1)]
    columns = [sum(losses[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(columns), max(columns)
    span = high - low or 1.0
    levels = [1 + round((value - low) / span * (8 * height - 1)) for value in columns]
    rows = []
    for row in reversed(range(height)):
        said = {height - 1: f"{high:8.3f}", 0: f"{low:8.3f}"}.get(row, " " * 8)
        bars = "".join(_EIGHTHS[max(0, min(8, level - 8 * row))] for level in levels)
        rows.append(f"{said} {bars}".rstrip())
    return "\n".join(rows)


def draw(progress: Progress, path: Path) -> None:
    """Loss of each step, smoothed, and of the examples held out; .png or .svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    numbers = [step.number for step in progress.steps]
    losses = [step.loss for step in progress.steps]
    axes.plot(numbers, losses, color="tab:blue", alpha=0.3, linewidth=1, label="step")
    axes.plot(numbers, smoothed(losses), color="tab:blue", label="smoothed")
    before, after = progress.held_out_before, progress.held_out_after
    if numbers and before is not None and after is not None:
        axes.plot([0, numbers[-1]], [before, after], "o", color="tab:orange", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path)
