"""``ktk residency``: which experts would be in memory where not all fit, found by trying."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ktk.cli import opening
from ktk.placement.residency.capacity import parse_capacity
from ktk.placement.residency.policies import POLICIES, find_policy
from ktk.placement.residency.pools import PoolOptions
from ktk.placement.residency.replay import Replay
from ktk.placement.residency.replay import replay as run
from ktk.placement.residency.synthetic import Synthetic, synthetic_trace
from ktk.placement.residency.trace import Trace, read_trace, spread

Trace_ = Annotated[Path, typer.Argument(metavar="TRACE", help="A file of record or generate.")]


def replay(
    trace: Trace_,
    capacity: Annotated[
        list[str] | None,
        typer.Option(
            "--capacity",
            "-c",
            help="Room for experts of all layers: their number, a share as 25%, bytes as 8GiB; "
            "again for more. Default: 25%, 50%, 75%.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", "-p", help="Again for more; default: all, and the bound."),
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option(help='Of the one policy, as JSON: {"a1_share": 0.3}.'),
    ] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Equal room for each layer, not one pool for all.")
    ] = False,
    min_per_layer: Annotated[
        int, typer.Option(min=0, help="Experts of a layer that other layers leave it.")
    ] = 0,
    expert_bytes: Annotated[
        int | None, typer.Option(min=1, help="Size of an expert; default: as the trace has it.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="A .png or .svg to draw: hit rate against room. Needs matplotlib."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table.")
    ] = False,
) -> None:
    """Hit rates of residency policies on a trace, beside Belady's optimum, which none can exceed.

    Example: ktk residency replay chat.trace -c 25% -c 8GiB -p lru -p slru --per-layer
    """
    if plot is not None:
        _check_plot(plot)
    names = [find_policy(name).name for name in policy or POLICIES]
    names = list(dict.fromkeys([*names, "belady"]))
    given = _parameters(parameters, names)
    found = read_trace(trace)
    total, size = found.num_layers * found.num_experts, expert_bytes or found.expert_bytes
    rooms = [parse_capacity(text, total, size) for text in capacity or ["25%", "50%", "75%"]]
    calls = list(found.each_call())
    results: list[Replay] = []
    for room in dict.fromkeys(rooms):
        for name in names:
            own = given if name == names[0] else {}
            options = PoolOptions(room, name, own, per_layer, min_per_layer)
            results.append(run(found, options, calls))
    if plot is not None:
        draw(found, results, plot)
    if as_json:
        typer.echo(json.dumps(_report(trace, found, size, results), indent=2))
    else:
        _print_table(found, size, results)


def record(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hugging Face or packed directory, or .gguf.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The trace to write.")],
    text: Annotated[
        Path | None,
        typer.Option(help="A UTF-8 text; default: docstrings of Python's standard library."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to run.")] = 512,
    prompt: Annotated[
        int, typer.Option(min=1, help="The first of them, in one call; the others one by one.")
    ] = 32,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Keep the first experts of each token; default: all it uses."),
    ] = None,
) -> None:
    """Run a text through a model and write which experts its tokens went to."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local; read when transformers is imported
    opening.quiet_transformers()
    from ktk.integration.transformers.router_trace import open_plain, record_text
    from ktk.quantise.texts import read_text, stdlib_text

    words = stdlib_text() if text is None else read_text(text)
    loaded, tokenizer = open_plain(model)
    ids = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    source = f"{Path(model).name}, {'standard library' if text is None else text.name}"
    trace = record_text(loaded, ids, min(prompt, len(ids)), source)
    trace = trace if top_k is None else trace.first(top_k)
    trace.save(output)
    _print_spread(trace, output)


def generate(
    output: Annotated[Path, typer.Option("--output", "-o", help="The trace to write.")],
    layers: Annotated[int, typer.Option(min=1)] = 24,
    experts: Annotated[int, typer.Option(min=1, help="Of each layer.")] = 128,
    top_k: Annotated[int, typer.Option(min=1, help="Experts of a token in each layer.")] = 8,
    tokens: Annotated[int, typer.Option(min=1)] = 512,
    prompt: Annotated[int, typer.Option(min=0, help="The first tokens, in one call.")] = 0,
    skew: Annotated[float, typer.Option(min=0, help="How much some experts are liked.")] = 0.3,
    persistence: Annotated[
        float, typer.Option(min=0, max=0.999, help="What a token keeps of the last one's state.")
    ] = 0.8,
    drift: Annotated[int, typer.Option(min=1, help="Tokens of a subject, on average.")] = 128,
    noise: Annotated[float, typer.Option(min=0, help="Of each token alone.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a made-up trace: liked experts, a subject that drifts, noise; the same for a seed."""
    options = Synthetic(
        layers, experts, top_k, tokens, prompt, skew, persistence, drift, noise, seed
    )
    trace = synthetic_trace(options)
    trace.save(output)
    _print_spread(trace, output)


HELP = "Which experts stay in memory where not all fit: record traces, make them, replay them."
COMMANDS = {"replay": replay, "record": record, "generate": generate}


def _parameters(text: str | None, names: list[str]) -> dict[str, Any]:
    """ValueError unless they are one policy's; Belady's bound comes by itself."""
    if text is None:
        return {}
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--parameters: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f'--parameters {text}: must be an object, as {{"a1_share": 0.3}}')
    if len([name for name in names if name != "belady"]) != 1:
        raise ValueError("--parameters are of one policy: name it with --policy")
    return given


def _print_spread(trace: Trace, output: Path) -> None:
    found = spread(trace)
    typer.echo(
        f"{output}: {len(trace.layers) // trace.num_layers} tokens, {trace.num_layers} layers of "
        f"{trace.num_experts} experts, {trace.top_k} a token; {found.reuse:.0%} of a token's "
        f"experts are the last one's, the most used tenth has {found.top_tenth:.0%} of uses"
    )


def _report(path: Path, trace: Trace, size: int, results: list[Replay]) -> dict[str, Any]:
    rows = [
        {
            "policy": r.options.policy,
            "capacity": r.options.capacity,
            "capacity_share": r.options.capacity / (trace.num_layers * trace.num_experts),
            "capacity_bytes": r.options.capacity * size or None,
            "hits": r.total.hits,
            "misses": r.total.misses,
            "evictions": r.total.evictions,
            "hit_rate": r.total.hit_rate,
            "layer_hit_rates": [counts.hit_rate for counts in r.layers],
        }
        for r in results
    ]
    options = results[0].options
    return {
        "trace": str(path),
        "source": trace.source,
        "num_layers": trace.num_layers,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "per_layer": options.is_per_layer,
        "min_per_layer": options.min_per_layer,
        "rows": rows,
    }


def _by_policy(results: list[Replay]) -> dict[str, list[Replay]]:
    found: dict[str, list[Replay]] = {}
    for result in results:
        found.setdefault(result.options.policy, []).append(result)
    return found


def _print_table(trace: Trace, size: int, results: list[Replay]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ktk.generate.describe import size as bytes_text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("hit rate", no_wrap=True)
    rows, total = _by_policy(results), trace.num_layers * trace.num_experts
    for r in next(iter(rows.values())):
        room = r.options.capacity
        memory = f"\n{bytes_text(room * size)}" if size else ""
        table.add_column(f"{room}\n{room / total:.0%}{memory}", justify="right", no_wrap=True)
    for name, found in rows.items():
        table.add_row(name, *(f"{r.total.hit_rate:.1%}" for r in found))
    console = Console(highlight=False)
    console.print(table)
    pool = "a pool for each layer" if results[0].options.is_per_layer else "one pool"
    console.print(
        f"{results[0].total.uses} uses of experts in {trace.num_layers} layers of "
        f"{trace.num_experts}, {pool}, empty at first. belady knows the future: no policy that "
        "reads on demand has more hits."
    )


def _check_plot(plot: Path) -> None:
    if plot.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"--plot {plot}: must end in .png or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'ktk[plot]'") from None


def draw(trace: Trace, results: list[Replay], path: Path) -> None:
    """Hit rate against room, a line for each policy, Belady's dashed; .png or .svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes, total = figure.subplots(), trace.num_layers * trace.num_experts
    for name, found in _by_policy(results).items():
        points = sorted((r.options.capacity / total, r.total.hit_rate) for r in found)
        style = "k--" if name == "belady" else "o-"
        axes.plot(*zip(*points, strict=True), style, label=name, markersize=3)
    axes.set_xlabel("experts in memory, share of all")
    axes.set_ylabel("hit rate")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path)
