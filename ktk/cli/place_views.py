"""What ``ktk place`` shows: tables, and experts by layers in the terminal or as a picture."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ktk.placement.masks.grid import ExpertGrid
from ktk.placement.masks.published import published

if TYPE_CHECKING:
    from rich.console import Console

    from ktk.placement.masks.simulate import Worth

ON_GPU, ON_CPU = "░▒▓█", ".:+*"  # by how much a column's experts are used
NARROWEST, LABEL = 20, 10  # columns
SAMPLES = 9


@dataclass(frozen=True)
class Row:
    """A strategy: experts on the GPU, in the layers with fewest and most, bytes, the share of uses
    that goes there, and the expected seconds of a step; None where that is not known.
    """

    strategy: str
    gpu_experts: int
    fewest: int
    most: int
    gpu_bytes: int
    covered: float | None
    step_seconds: float | None


def measured_bandwidth() -> float:
    """Bytes/s that this machine reads memory with, the median of some short samples. BackendError
    without the compiled extension.
    """
    from ktk.bench.roofline import READ, Roofline

    roofline = Roofline()
    return statistics.median(roofline.sample([READ])[READ] for _ in range(SAMPLES))


def heat_lines(
    grid: ExpertGrid, masks: np.ndarray, counts: np.ndarray | None, width: int
) -> list[tuple[str, str]]:
    """(label, row) of each layer with experts. A character is one expert, or several neighbours;
    it is one of ON_GPU where the GPU holds most of them, else of ON_CPU, the last where they are
    used most.
    """
    columns = max(1, min(grid.num_experts, max(NARROWEST, width - LABEL)))
    edges = np.linspace(0, grid.num_experts, columns + 1).round().astype(int)
    starts, sizes = edges[:-1], np.diff(edges)
    lines = []
    for layer in grid.moe_layers:
        held = np.add.reduceat(masks[layer].astype(float), starts) / sizes
        used = (
            np.ones(columns) if counts is None else np.add.reduceat(counts[layer], starts) / sizes
        )
        most = used.max() or 1.0
        level = np.clip(np.ceil(4 * np.sqrt(used / most)).astype(int) - 1, 0, 3)
        row = "".join(
            (ON_GPU if on_gpu else ON_CPU)[n] for on_gpu, n in zip(held >= 0.5, level, strict=True)
        )
        lines.append((f"layer {layer}", row))
    return lines


def print_heat(grid: ExpertGrid, masks: np.ndarray, counts: np.ndarray | None) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for label, row in heat_lines(grid, masks, counts, console.width):
        text = Text(f"{label:<{LABEL}}")
        for character in row:
            text.append(character, "bold yellow" if character in ON_GPU else "dim")
        console.print(text, no_wrap=True, overflow="crop")
    used = "" if counts is None else ", rarely to often used in its layer"
    console.print(f"{ON_GPU} on the GPU, {ON_CPU} on the CPU{used}")


def print_rows(
    grid: ExpertGrid, rows: list[Row], chosen: str, number: int, expert_bytes: int
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"{len(grid.moe_layers)} layers of {grid.num_experts} experts, {expert_bytes / 2**20:.2f} "
        f"MiB each; room for {number} of {grid.total} on the GPU"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("strategy", no_wrap=True)
    for heading in ("experts\non GPU", "of a layer", "GiB", "of uses", "ms a step"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.strategy} <" if row.strategy == chosen else row.strategy,
            str(row.gpu_experts),
            str(row.most) if row.fewest == row.most else f"{row.fewest}-{row.most}",
            f"{row.gpu_bytes / 2**30:.2f}",
            "-" if row.covered is None else f"{row.covered:.1%}",
            "-" if row.step_seconds is None else f"{1e3 * row.step_seconds:.4g}",
        )
    console.print(table)


def print_worths(worths: list[Worth]) -> None:
    """A row for each share of experts on the GPU, a column for each strategy."""
    from rich.console import Console

    def speed(worth: Worth) -> str:
        measured = published(worth.strategy, worth.ratio)
        return f"{worth.tokens_per_second:.1f}" + ("" if measured is None else f" ({measured:.1f})")

    console = Console(highlight=False)
    console.print("tokens/s of decode steps by the model (published)")
    _print_grid(console, worths, speed)
    console.print("hits: of pairs of token and expert in decode steps, those on the GPU")
    _print_grid(console, worths, lambda worth: f"{worth.hit_rate:.1%}")


def _print_grid(console: Console, worths: list[Worth], cell: Callable[[Worth], str]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("on GPU", justify="right")
    for name in dict.fromkeys(w.strategy for w in worths):
        table.add_column(name, justify="right", no_wrap=True)
    for ratio in dict.fromkeys(w.ratio for w in worths):
        table.add_row(f"{ratio:.0%}", *(cell(w) for w in worths if w.ratio == ratio))
    console.print(table)


def check_plot(plot: Path) -> None:
    """ValueError unless a picture can be written there."""
    if plot.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"--plot {plot}: must end in .png or .svg")
    if not os.access(plot.parent, os.W_OK):
        raise ValueError(f"--plot {plot}: {plot.parent} must be a directory that can be written")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'ktk[plot]'") from None


def draw(grid: ExpertGrid, masks: np.ndarray, counts: np.ndarray | None, path: Path) -> None:
    """Uses of each expert by colour, and a dot on each that the GPU holds; .png or .svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    of_moe = masks[grid.rows]
    shown = of_moe.astype(float) if counts is None else counts[grid.rows]
    shown = shown / np.maximum(shown.max(axis=1, keepdims=True), 1e-9)
    layers = len(grid.moe_layers)
    figure = Figure(figsize=(12, max(2.5, min(16.0, 0.18 * layers + 1.5))), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shown, aspect="auto", cmap="viridis", interpolation="nearest")
    if counts is not None:
        rows, columns = np.nonzero(of_moe)
        axes.scatter(columns, rows, s=2, c="red", marker="s", label="on the GPU")
        axes.legend(loc="upper right")
        figure.colorbar(image, label="uses, of the layer's most used")
    step = math.ceil(layers / 20)
    axes.set_yticks(range(0, layers, step), [str(n) for n in grid.moe_layers[::step]])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    figure.savefig(path)
