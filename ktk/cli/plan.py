"""``ktk doctor MODEL --plan``: how to serve a model on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ktk.generate.plan import Way


def print_plan(
    model: str | None,
    context: int | None,
    method: str,
    linear: str,
    dtype: str | None,
    kv_dtype: str | None,
    as_json: bool,
) -> None:
    """Prints the ways to serve it, and the command of the best; exit code 1 if there is none.

    Arguments as ``ktk doctor`` has them.
    """
    if model is None:
        raise ValueError("--plan is for a model: ktk doctor MODEL --plan")
    from ktk.bench.roofline import READ, Roofline
    from ktk.generate.plan import best, ways

    rate = Roofline().sample([READ])[READ]
    found = ways(model, rate, context, method, linear, dtype, kv_dtype)
    chosen = best(found)
    if as_json:
        report = {
            "model": model,
            "read_bytes_per_second": round(rate),
            "ways": [way.to_json() for way in found],
            "command": None if chosen is None else chosen.command(),
        }
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_ways(found, chosen, rate)
    if chosen is None:
        raise typer.Exit(1)


def _print_ways(found: list[Way], chosen: Way | None, rate: float) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ktk.generate.describe import size

    console = Console(highlight=False, soft_wrap=True)
    first = found[0].description
    console.print(
        f"{escape(first.path)}: {escape(first.architecture)}, {size(first.available_bytes)} of "
        f"{size(first.total_bytes)} are free, memory is read at {rate / 1e9:.1f} GB/s"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("experts", no_wrap=True)
    table.add_column("kernel", no_wrap=True)
    for heading in ("bits", "size", "in memory", "context", "requests"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    for way in found:
        own = way.description
        memory = size(way.expert_memory) if way.expert_memory else "all"
        speed = way.tokens_per_second
        table.add_row(
            own.weight_format,
            escape(own.kernel or "-"),
            f"{own.bits_per_weight:.2f}",
            size(own.expert_bytes),
            memory if way.fits else "no room",
            str(way.context or "-"),
            str(way.requests or "-"),
            f"{speed:.0f}" if way.fits and speed is not None else "-",
        )
    console.print(table)
    console.print(
        "Tokens/s: of one request, if nothing but reading its weights took time. Requests: at once "
        "with a whole context each; shorter ones are more."
    )
    if chosen is not None:
        typer.echo(chosen.command())
        return
    reason = first.reason or "too large in every format"
    console.print(
        f"no way fits: {escape(reason)}. A directory that ktk convert wrote, or a .gguf file, may "
        "be larger than memory: see --expert-memory"
    )
