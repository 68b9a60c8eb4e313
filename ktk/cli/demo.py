"""``ktk demo``: convert a real model's experts, answer a question with each method, compare."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ktk.demo.run import Options, Row


def command(
    model: Annotated[
        Path | None,
        typer.Option(
            help="An unquantised Hugging Face directory; default: SmolLM2 cut into experts."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="auto, or a backend of `ktk doctor`.")] = "auto",
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to compare on; default: the docstrings of Python's library."),
    ] = None,
    work_dir: Annotated[Path, typer.Option(help="Where converted checkpoints are kept.")] = Path(
        "demo"
    ),
    tokens: Annotated[
        int, typer.Option(min=256, help="Tokens of the text to compare on, in windows of 256.")
    ] = 2048,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table.")
    ] = False,
) -> None:
    """Convert a model's experts to INT8, INT4 and GGUF files, answer a question with each,
    and compare with bf16.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local; read when transformers is imported
    from rich.console import Console

    # says what to install if transformers is missing
    import ktk.integration.transformers  # noqa: F401
    from ktk.demo.run import Options, Reporter, run

    console = Console(highlight=False, soft_wrap=True)
    errors = Console(stderr=True, highlight=False)

    class ConsoleReporter(Reporter):
        """Steps on stderr, one line each that goes away; answers on stdout as they come."""

        @contextlib.contextmanager
        def step(self, text: str) -> Iterator[Callable[[int, int], None]]:
            with errors.status(text) as status:
                yield lambda done, total: status.update(f"{text}: {done} of {total}")

        def row(self, row: Row) -> None:
            if not as_json:
                console.print(f"[bold]{row.method}[/bold] ({row.kernel}): ", end="")
                console.print(row.answer, markup=False)

    options = Options(model, method, text, work_dir, tokens)
    rows = run(options, ConsoleReporter())
    if as_json:
        typer.echo(json.dumps(_report(options, rows), indent=2))
    else:
        _print_table(rows)


def _report(options: Options, rows: list[Row]) -> dict[str, object]:
    from ktk.demo.evaluate import QUESTION

    return {
        "model": str(options.model) if options.model else "smollm2-moe",
        "question": QUESTION,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _print_table(rows: list[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # fits 80 columns
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for heading in ("method", "kernel"):
        table.add_column(heading, no_wrap=True)
    numbers = ("bits/\nweight", "experts\nMB", "KL", "top-1", "prefill\ntok/s", "decode\ntok/s")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.method,
            row.kernel,
            f"{row.bits_per_weight:.2f}",
            f"{row.expert_bytes / 1e6:.1f}",
            "-" if row.kl is None else f"{row.kl:.4f}",
            "-" if row.top1 is None else f"{row.top1:.1%}",
            f"{row.prefill_tokens_per_s:.0f}",
            f"{row.decode_tokens_per_s:.1f}",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "KL (nats per token) and top-1 agreement: against bf16 experts, all else in fp32. "
        "Speeds: all in the checkpoint's own dtype. Kernels named gguf run the mapped file."
    )
