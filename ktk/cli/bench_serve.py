"""``ktk bench-serve``: how fast servers of OpenAI's API answer, by number of clients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ktk import __version__, env
from ktk.bench.serving.client import Client
from ktk.bench.serving.load import Case, Load, run_load
from ktk.cli.bench import StepProgress, number, split
from ktk.cli.place_views import check_plot
from ktk.quantise.texts import read_text, stdlib_text

EPILOG = """Examples:

  ktk bench-serve http://127.0.0.1:8000

  ktk bench-serve ktk=http://127.0.0.1:8000 llama.cpp=http://127.0.0.1:8080
  --concurrency 1,8,16 --plot serving.png

  ktk bench-serve http://127.0.0.1:8000 --prompt 2048 --shared-prefix 2000
"""
PROMPT, CONCURRENCY = "128,1024", "1,4,16"
WIDTH = 100  # characters of the table at least: half a figure is none
PANELS = (
    ("tokens_per_second", "tokens/s in all"),
    ("ttft_ms", "ms to the first token, median to p90"),
    ("tpot_ms", "ms a token after it, median to p90"),
)


def command(
    url: Annotated[
        list[str],
        typer.Argument(
            metavar="URL...",
            help="A server, with or without /v1; NAME=URL names it. Several are asked in turns.",
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Name of the model; default: the server's first one.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help=f"Tokens of a prompt; several with commas. Default: {PROMPT}."),
    ] = None,
    concurrency: Annotated[
        list[str] | None,
        typer.Option(
            "--concurrency",
            "-c",
            help=f"Clients at once; several with commas. Default: {CONCURRENCY}.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 64,
    requests: Annotated[
        int, typer.Option(min=1, help="Of each client in a round, one after the other.")
    ] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Of everything.")] = 3,
    shared_prefix: Annotated[
        int,
        typer.Option(
            min=0, help="Tokens that all prompts of a length begin with, asked once before."
        ),
    ] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask by /v1/chat/completions, not /v1/completions.")
    ] = False,
    may_end: Annotated[
        bool,
        typer.Option(
            "--may-end", help="Leave ignore_eos out, which not all servers know: answers may end."
        ),
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of the requests, whose seed is --seed.")
    ] = 0.0,
    api_key: Annotated[str | None, typer.Option(help="Default: KTK_API_KEY.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A UTF-8 text to take prompts of; default: docstrings of Python's."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write all figures to this file; - prints them instead of the table."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="A .png or .svg to draw. Needs matplotlib.")
    ] = None,
) -> None:
    """Load servers of OpenAI's API with clients, and tell how long the first token takes (TTFT),
    each one after it (TPOT), and tokens/s. Exit code 1 if a request failed.
    """
    if plot is not None:
        check_plot(plot)
    if json_file is not None and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise ValueError(f"--json {json_file}: must be a file in a directory that exists, or -")
    load = Load(
        [number(part, "--prompt") for part in split(prompt or [PROMPT])],
        [number(part, "--concurrency") for part in split(concurrency or [CONCURRENCY])],
        tokens,
        requests,
        rounds,
        shared_prefix,
        seed,
    )
    options: dict[str, Any] = {"temperature": temperature, "seed": seed}
    if not may_end:
        options["ignore_eos"] = True
    key = api_key or env.api_key()
    clients = {
        name: Client(address, model, key, chat, options) for name, address in named(url).items()
    }
    words = stdlib_text() if text is None else read_text(text)
    with StepProgress() as progress:
        cases = list(run_load(clients, load, words, progress))
    found = {
        "ktk": __version__,
        "servers": [
            {"name": name, "url": client.address, "model": client.model}
            for name, client in clients.items()
        ],
        "output_tokens": tokens,
        "requests_of_a_client": requests,
        "rounds": rounds,
        "shared_prefix_tokens": shared_prefix,
        "seed": seed,
        "cases": [case.to_json() for case in cases],
    }
    if json_file is not None and str(json_file) != "-":
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        draw(found, plot)
    if str(json_file) == "-":
        typer.echo(json.dumps(found, indent=2))
    else:
        _print_table(found)
    if any(case.errors for case in cases):
        _print_errors(cases)
        raise typer.Exit(1)


def named(texts: list[str]) -> dict[str, str]:
    """Addresses by name: NAME=URL, or the address without its scheme. ValueError if two have the
    same.
    """
    found: dict[str, str] = {}
    for text in texts:
        before, is_named, after = text.partition("=")
        if is_named and "/" not in before:
            name, address = before, after
        else:
            name, address = text.split("://")[-1].rstrip("/").removesuffix("/v1"), text
        if not name or name in found:
            raise ValueError(f"{text}: give each server a name of its own, as NAME=URL")
        found[name] = address
    return found


def _print_table(found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    for server in found["servers"]:
        console.print(
            f"{escape(server['name'])}: {escape(server['model'])} at {escape(server['url'])}"
        )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for heading in ("prompt", "clients"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("server", no_wrap=True)
    for heading in (
        "tokens/s\nin all",
        "a stream\nmedian",
        "TTFT ms\nmedian",
        "\np90",
        "\np99",
        "TPOT ms\nmedian",
        "\np90",
        "\np99",
        "errors",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    last: tuple[int, int] | None = None
    for case in found["cases"]:
        own = (case["prompt_tokens"], case["concurrency"])
        if last is not None and own[0] != last[0]:
            table.add_section()
        counted = case["prompt_tokens_counted"]
        table.add_row(
            "" if own == last else f"{counted or own[0]:.0f}",
            "" if own == last else str(own[1]),
            escape(case["server"]),
            _figure(case["tokens_per_second"]),
            _figure(case["tokens_per_second_of_a_stream"]),
            *map(_figure, (case["ttft_ms"] or dict.fromkeys(("median", "p90", "p99"))).values()),
            *map(_figure, (case["tpot_ms"] or dict.fromkeys(("median", "p90", "p99"))).values()),
            str(sum(case["errors"].values()) or ""),
        )
        last = own
    console.print(table)
    shared = found["shared_prefix_tokens"]
    begin = f"share their first {shared} tokens" if shared else "begin all differently"
    console.print(
        f"Answers of {found['output_tokens']} tokens; {found['requests_of_a_client']} of each "
        f"client in each of {found['rounds']} rounds; prompts {begin}. In all: the rounds' "
        "median, prompts computed in the same time."
    )


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _print_errors(cases: list[Case]) -> None:
    for case in cases:
        for text, count in case.errors.items():
            where = f"{case.server}, {case.concurrency} x {case.prompt_tokens} tokens"
            typer.echo(f"ktk: error: {where}: {count} times {text}", err=True)


def draw(found: dict[str, Any], path: Path) -> None:
    """What ``found["cases"]`` has, against the number of clients: a row of panels for each length
    of prompts, a line for each server, its p90 as a shade; .png or .svg.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    lengths = list(dict.fromkeys(case["prompt_tokens"] for case in found["cases"]))
    figure = Figure(figsize=(12, 3.4 * len(lengths)), layout="constrained")
    grid = figure.subplots(len(lengths), len(PANELS), squeeze=False)
    for length, row in zip(lengths, grid, strict=True):
        for (name, title), axes in zip(PANELS, row, strict=True):
            for server in found["servers"]:
                own = [
                    case
                    for case in found["cases"]
                    if case["server"] == server["name"]
                    and case["prompt_tokens"] == length
                    and case[name] is not None
                ]
                clients = [case["concurrency"] for case in own]
                values = [case[name] for case in own]
                if name != "tokens_per_second":
                    high = [value["p90"] for value in values]
                    values = [value["median"] for value in values]
                    axes.fill_between(clients, values, high, alpha=0.15)
                axes.plot(clients, values, "o-", label=server["name"], markersize=4)
            axes.set_title(f"prompts of {length}: {title}", fontsize=10)
            axes.set_xlabel("clients")
            axes.set_ylim(bottom=0)
            axes.grid(visible=True, alpha=0.3)
    grid[0][0].legend()
    figure.savefig(path)
