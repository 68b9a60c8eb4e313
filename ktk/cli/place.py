"""``ktk place``: which experts a GPU should hold, and what that is worth."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ktk.cli import place_views as views
from ktk.cli.place_views import Row
from ktk.placement.masks.costs import Costs, Demand, step_seconds
from ktk.placement.masks.grid import ExpertGrid, num_gpu_experts
from ktk.placement.masks.published import agreement, published
from ktk.placement.masks.workload import Workload, served_trace
from ktk.placement.residency.capacity import parse_bytes
from ktk.placement.residency.trace import read_trace

EPILOG = """Examples:

  ktk place Qwen3-30B-A3B --stats stats.pt --gpu-memory 8GiB -o masks.pt

  ktk place Qwen3-30B-A3B --stats stats.pt --gpu-ratio 0.4 --strategy optimal
  --cpu-bandwidth 200 --gpu-bandwidth 900

  ktk place --simulate made-up
"""
MADE_UP = "made-up"


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model's directory or .gguf file.")
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(help="How often experts were used: a recorder's .pt file."),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="uniform, front-loading, random, frequency or optimal; default: frequency with "
            "--stats, else uniform."
        ),
    ] = None,
    gpu_experts: Annotated[
        int | None, typer.Option(help="Room for so many experts of each layer, on average.")
    ] = None,
    gpu_ratio: Annotated[
        float | None, typer.Option(help="Room for this share of all experts, 0 to 1.")
    ] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Room in bytes, as 8GiB.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The .pt file of masks to write.")
    ] = None,
    cpu_bandwidth: Annotated[
        float | None,
        typer.Option(help="GB/s that the CPU reads experts with; default: measured, if needed."),
    ] = None,
    gpu_bandwidth: Annotated[
        float | None, typer.Option(help="GB/s that the GPU reads experts with.")
    ] = None,
    transfer: Annotated[
        float, typer.Option(help="Microseconds a layer with experts on the CPU adds.")
    ] = 0.0,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a decode step.")] = 1,
    simulate: Annotated[
        str | None,
        typer.Option(
            metavar="TRACE",
            help='A trace of `ktk residency`, or "made-up": hit rate and tokens/s of every '
            "strategy on it, and of dynamic updates.",
        ),
    ] = None,
    threshold: Annotated[
        int, typer.Option(min=2, help="With --simulate: tokens of a call that is a prompt.")
    ] = 32,
    speeds: Annotated[
        tuple[float, float],
        typer.Option(
            help="With --simulate: tokens/s with no and with all experts on the GPU; default: of "
            "the published measurement."
        ),
    ] = (53.24, 112.8),
    seed: Annotated[int, typer.Option(min=0, help="Of the made-up trace.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(help="A .png or .svg to draw: experts by layers. Needs matplotlib."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.")
    ] = False,
) -> None:
    """Which experts of a model a GPU should hold: masks by a strategy, beside what the others would
    give; or, with --simulate, what each is worth on a trace.
    """
    if plot is not None:
        views.check_plot(plot)
    if simulate is not None:
        if model is not None:
            raise ValueError("--simulate takes a trace: leave out the model")
        _simulate(simulate, gpu_ratio, threshold, speeds, seed, as_json)
        return
    if model is None:
        raise ValueError("name a model, or a trace with --simulate")
    if [gpu_experts, gpu_ratio, gpu_memory].count(None) != 2:
        raise ValueError("say how much room there is by --gpu-experts, --gpu-ratio or --gpu-memory")
    from ktk.generate.describe import describe_model
    from ktk.placement.masks.files import read_statistics, write_masks
    from ktk.placement.masks.strategies import STRATEGIES, Known, place

    strategy = strategy or ("uniform" if stats is None else "frequency")
    if strategy not in STRATEGIES:
        raise ValueError(f"--strategy {strategy}: must be one of {', '.join(STRATEGIES)}")
    found = describe_model(model)
    grid = ExpertGrid(found.num_layers, found.num_experts, found.moe_layers)
    expert_bytes = max(1, found.expert_bytes // grid.total)
    number = num_gpu_experts(
        grid,
        per_layer=gpu_experts,
        ratio=gpu_ratio,
        memory=None if gpu_memory is None else parse_bytes(gpu_memory),
        expert_bytes=expert_bytes,
    )
    counts = None if stats is None else read_statistics(stats)
    if counts is not None:
        grid.check_counts(counts)
    top_k = found.num_experts_per_tok
    costs = None
    if gpu_bandwidth is not None:
        read = views.measured_bandwidth() if cpu_bandwidth is None else cpu_bandwidth * 1e9
        costs = Costs.of_bandwidths(expert_bytes, read, gpu_bandwidth * 1e9, transfer * 1e-6)
    elif strategy == "optimal":
        raise ValueError("optimal needs --gpu-bandwidth: what the GPU reads experts with, in GB/s")
    known = Known(counts, costs, top_k, tokens)
    rows, chosen = [], None
    for name in STRATEGIES:
        is_possible = counts is not None and (name != "optimal" or costs is not None)
        if name != strategy and not is_possible and name in ("frequency", "optimal"):
            continue
        masks = place(grid, name, number, known)
        chosen = masks if name == strategy else chosen
        rows.append(_row(grid, name, masks, known, expert_bytes))
    assert chosen is not None
    if output is not None:
        write_masks(output, chosen)
    if plot is not None:
        views.draw(grid, chosen, counts, plot)
    if as_json:
        own = next(row for row in rows if row.strategy == strategy)
        report = {
            "model": model,
            "num_layers": grid.num_layers,
            "num_experts": grid.num_experts,
            "moe_layers": list(grid.moe_layers),
            "expert_bytes": expert_bytes,
            "room": number,
            **asdict(own),
            "gpu_experts_of_layers": chosen[grid.rows].sum(axis=1).tolist(),
            "masks": None if output is None else str(output),
            "costs": None if costs is None else asdict(costs),
            "strategies": [asdict(row) for row in rows],
        }
        typer.echo(json.dumps(report, indent=2))
        return
    views.print_rows(grid, rows, strategy, number, expert_bytes)
    views.print_heat(grid, chosen, counts)
    if output is not None:
        typer.echo(f"masks: {output}")


def _row(grid: ExpertGrid, name: str, masks: np.ndarray, known: Any, expert_bytes: int) -> Row:
    of_moe = masks[grid.rows]
    covered = seconds = None
    if known.counts is not None and known.counts[grid.rows].sum() > 0:
        counts = known.counts[grid.rows]
        covered = float((counts * of_moe).sum() / counts.sum())
        if known.costs is not None:
            demand = Demand.of_counts(counts, known.top_k, known.num_tokens)
            seconds = step_seconds(demand, of_moe, known.costs)
    of_layer = of_moe.sum(axis=1)
    return Row(
        name,
        int(of_layer.sum()),
        int(of_layer.min()),
        int(of_layer.max()),
        int(of_layer.sum()) * expert_bytes,
        covered,
        seconds,
    )


def _simulate(
    trace: str,
    ratio: float | None,
    threshold: int,
    speeds: tuple[float, float],
    seed: int,
    as_json: bool,
) -> None:
    from ktk.placement.masks.simulate import Steps, fitted_costs, simulate

    found = served_trace(Workload(seed=seed)) if trace == MADE_UP else read_trace(Path(trace))
    steps = Steps.of(found)
    costs = fitted_costs(steps, *speeds, threshold=threshold)
    ratios = [n / 10 for n in range(11)] if ratio is None else [ratio]
    worths = simulate(steps, costs, ratios, threshold=threshold)
    speed = {(w.strategy, w.ratio): w.tokens_per_second for w in worths}
    same, pairs = agreement(speed)
    if as_json:
        report = {
            "trace": trace,
            "source": found.source,
            "costs": asdict(costs),
            "rows": [{**asdict(w), "published": published(w.strategy, w.ratio)} for w in worths],
            "pairs_ordered_as_published": same,
            "pairs_published": pairs,
        }
        typer.echo(json.dumps(report, indent=2))
        return
    views.print_worths(worths)
    decode = int((steps.num_tokens < threshold).sum())
    typer.echo(
        f"{len(steps.counts)} steps, {decode} of them decode, the first half only counted. Costs "
        f"are fitted to {speeds[0]:g} and {speeds[1]:g} tokens/s."
    )
    if pairs:
        typer.echo(f"{same} of {pairs} pairs of strategies are ordered as published.")
    if not math.isclose(speeds[0], 53.24):
        typer.echo("The published figures are of other speeds.")
