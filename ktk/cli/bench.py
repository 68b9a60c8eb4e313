"""``ktk bench``: one MoE layer's speed per method and number of tokens,
beside what the machine could give.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

    from ktk.bench.run import Result
    from ktk.bench.shapes import Shape

TOKENS = "1,4,16,64,256,1024"
METHODS = "INT4:32,INT4:128,INT8,BF16"
BAR = 14  # characters of a full bar
OTHER_COLUMNS = 51  # characters beside methods and bars
PROGRESS_AFTER = 2.0  # seconds: shorter runs show no progress


def split(texts: list[str]) -> list[str]:
    """Options given several times or with commas, each value once."""
    return list(
        dict.fromkeys(part.strip() for text in texts for part in text.split(",") if part.strip())
    )


def chosen_shapes(
    names: list[str],
    hidden: int | None,
    intermediate: int | None,
    experts: int | None,
    top_k: int | None,
) -> list[Shape]:
    """The named shapes, or the one of explicit sizes.

    ValueError says what is missing or unknown.
    """
    from ktk.bench.shapes import SHAPES, Shape

    if hidden is not None or intermediate is not None:
        sizes = {
            "--hidden": hidden,
            "--intermediate": intermediate,
            "--experts": experts,
            "--top-k": top_k,
        }
        missing = [name for name, value in sizes.items() if value is None]
        if missing or names:
            raise ValueError(
                (
                    "a layer of your own needs --hidden, --intermediate, --experts and --top-k, "
                    "and no --shape: "
                )
                + (f"{', '.join(missing)} missing" if missing else "--shape given too")
            )
        assert hidden and intermediate and experts and top_k
        return [Shape("custom", hidden, intermediate, experts, top_k)]
    shapes = []
    for name in names or ["qwen3-30b-a3b"]:
        if name not in SHAPES:
            raise ValueError(f"--shape {name}: must be one of {', '.join(SHAPES)}")
        shape = SHAPES[name]
        if experts is not None:
            whole = shape.cut_from or shape.num_experts
            cut = whole if experts != whole else None
            shape = dataclasses.replace(shape, num_experts=experts, cut_from=cut)
        shapes.append(dataclasses.replace(shape, top_k=top_k or shape.top_k))
    return shapes


def command(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="qwen3-30b-a3b, deepseek-v3, mixtral-8x7b, gpt-oss-120b, kimi-k2; several with "
            "commas. Large models are cut to fewer experts; --experts takes another number."
        ),
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(min=1, help="hidden_size of a layer of your own.")
    ] = None,
    intermediate: Annotated[int | None, typer.Option(min=1, help="Its intermediate_size.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Its num_experts.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Its experts per token.")] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(help=f"Tokens of a call; several with commas. Default: {TOKENS}."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="FORMAT, FORMAT:GROUP, BACKEND:FORMAT or BACKEND:FORMAT:GROUP (INT4:128, "
            "AVX2:INT8), LLAMAFILE:TYPE or LLAMAFILE:TYPE:repack (GGUF blocks as they are or "
            "in the kernels' order, LLAMAFILE:Q4_K), "
            f"or torch, its bf16 loop over experts; several with commas. Default: {METHODS}."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: KTK_NUM_THREADS, or the physical cores.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds over everything, to take medians of.")
    ] = 7,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write all figures to this file; - prints them instead of the tables."
        ),
    ] = None,
) -> None:
    """Measure one MoE layer's speed, and how near it comes to what memory and arithmetic units
    give.

    Every round samples the machine's ceilings before and after the calls, so the fractions hold on
    a busy machine.

    \b
    ktk bench
    ktk bench --shape mixtral-8x7b --method INT4:128,torch --tokens 1,512
    ktk bench --method AVX512:INT8,AVX2:INT8 --json speeds.json
    ktk bench --method LLAMAFILE:Q4_K,LLAMAFILE:Q4_K:repack,LLAMAFILE:BF16
    ktk bench --hidden 4096 --intermediate 1536 --experts 64 --top-k 6
    """
    from ktk.bench.layer import parse_method
    from ktk.bench.roofline import Roofline
    from ktk.bench.run import build_layers, measure, report
    from ktk.machine import cpu

    shapes = chosen_shapes(split(shape or []), hidden, intermediate, experts, top_k)
    methods = [parse_method(text) for text in split(method or [METHODS])]
    counts = [number(text, "--tokens") for text in split(tokens or [TOKENS])]
    if not methods or not counts:
        raise ValueError("--method and --tokens must not be empty")
    if json_file is not None and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise ValueError(f"--json {json_file}: must be a file in a directory that exists, or -")
    num_threads = threads or cpu.default_threads()
    roofline = Roofline(num_threads)
    results: list[Result] = []
    with StepProgress() as progress:
        for each in shapes:
            more = 0 if results else roofline.buffer_bytes
            layers = build_layers(
                each, methods, num_threads=num_threads, more_bytes=more, progress=progress
            )
            results.append(
                measure(each, layers, counts, rounds=rounds, roofline=roofline, progress=progress)
            )
            del layers  # before the next shape's
    found = report(results, num_threads, rounds)
    if json_file is not None and str(json_file) != "-":
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if str(json_file) == "-":
        typer.echo(json.dumps(found, indent=2))
    else:
        print_tables(found, results)


def number(text: str, option: str) -> int:
    """ValueError naming the option unless ``text`` is a whole number above 0."""
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise ValueError(f"{option} {text}: must be whole numbers above 0, with commas between")
    return int(text)


class StepProgress:
    """A bar on a terminal's stderr that appears once a run has taken PROGRESS_AFTER seconds,
    and goes away.
    """

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.bar: Progress | None = None

    def __enter__(self) -> StepProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        if self.bar is None:
            if time.monotonic() - self.begin < PROGRESS_AFTER or not sys.stderr.isatty():
                return
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
                auto_refresh=False,  # a refreshing thread would run beside what is measured
            )
            self.bar.start()
            self.bar.add_task(what, total=total)
        self.bar.update(self.bar.task_ids[0], completed=done, total=total, description=what)
        self.bar.refresh()


def bar(fraction: float) -> str:
    """``fraction`` of BAR characters, in eighths of one; full at 1 and above."""
    eighths = round(min(max(fraction, 0.0), 1.0) * BAR * 8)
    part = " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    return "█" * (eighths // 8) + part


def print_tables(found: dict[str, Any], results: list[Result]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    m = found["machine"]
    console.print(f"ktk {found['ktk']} on {escape(m['cpu'])}, {m['threads']} threads")
    for result in results:
        console.print(f"\n[bold]{escape(str(result.shape))}[/bold]")
        for layer in result.layers:
            console.print(
                f"{escape(layer['method'])}: {escape(layer['kernel'])}, "
                f"{layer['bits_per_weight']:.2f} bits per weight, "
                f"{layer['layer_bytes'] / 1e9:.2f} GB"
                + (", may stay in cache" if layer["in_cache"] else "")
            )
        for name, c in result.ceilings.items():
            digits = 1 if c["unit"] == "GB/s" else 0
            console.print(
                f"ceiling {name}: {c['median']:.{digits}f} {c['unit']} "
                f"({c['min']:.{digits}f} - {c['max']:.{digits}f})"
            )
        longest = max(len(case.method) for case in result.cases)
        has_bars = console.width >= OTHER_COLUMNS + longest + BAR  # names matter more
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
        for heading, justify in (
            ("tokens", "right"),
            ("method", "left"),
            ("ms", "right"),
            ("GB/s", "right"),
            ("GOP/s", "right"),
            ("bound by", "left"),
            ("of bound", "right"),
            *([("", "left")] if has_bars else []),
        ):
            table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        last = None
        for case in result.cases:
            c = case.to_json()
            if last not in (None, case.num_tokens):
                table.add_section()
            table.add_row(
                str(case.num_tokens) if last != case.num_tokens else "",
                escape(case.method),
                f"{c['median_ms']:.3g}" if c["median_ms"] < 100 else f"{c['median_ms']:.0f}",
                f"{c['gb_per_s']:.1f}",
                f"{c['gop_per_s']:.0f}",
                c["bound_by"],
                f"{case.fraction:.0%}",
                *([bar(case.fraction)] if has_bars else []),
            )
            last = case.num_tokens
        console.print(table)
    console.print(
        "GB/s: codes and scales of the experts touched. Bound: the larger of those bytes by the "
        "read ceiling and the operations by the kernel's peak; fractions are medians over rounds, "
        "ceilings taken in each."
    )
