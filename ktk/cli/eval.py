"""``ktk eval``: what each way to code the experts costs in accuracy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ktk.evaluate.run import Row

WINDOW = 256


def command(
    model: Annotated[Path, typer.Argument(help="An unquantised Hugging Face directory.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text to measure on.")],
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "-f",
            help="int8, int4:32 (:64, :128, :0 = per channel), a GGUF type (Q4_K; Q4_K:ggml "
            "quantised by llama.cpp), or the path of a converted directory or GGUF file; "
            "again for more. Default: all.",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="auto, or a backend of `ktk doctor`, for packed formats.")
    ] = "auto",
    activation_group: Annotated[
        int | None,
        typer.Option(
            help="Activations that share a scale: 32, 64, 128 or 256; default: the format's."
        ),
    ] = None,
    rotation: Annotated[
        int | None,
        typer.Option(help="Columns turned together: 64, 256 or 0; default: the format's."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=256, help="Tokens to measure on, in windows of 256.")
    ] = 2048,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Another UTF-8 text: adds each format calibrated on it, llama.cpp's by importance "
            "matrix."
        ),
    ] = None,
    calibrate_tokens: Annotated[
        int, typer.Option(min=256, help="Tokens of that text, in windows of 256.")
    ] = 8192,
    ggml: Annotated[
        Path | None,
        typer.Option(
            help="Folder of libggml-base.so (llama.cpp) or libggml.so (ik_llama.cpp), for :ggml."
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="A directory that ktk train wrote, beside the weights of all rows."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="A .png or .svg to draw: bits per weight against KL. Needs matplotlib."),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            help="What an earlier ktk eval --json of the same model and text gave, or "
            "bench/accuracy.py: more points for --plot; again for more."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table.")
    ] = False,
) -> None:
    """Perplexity, KL divergence and top-1 agreement of quantised experts against the unquantised
    model.

    Example: ktk eval demo/smollm2-moe --text book.txt -f int4 -f Q4_K --calibrate other.txt --plot
    accuracy.png
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local; read when transformers is imported
    if plot is not None:
        _check_plot(plot)
    elif beside:
        raise ValueError("--beside: goes with --plot alone")
    _check_texts(text, calibrate)
    from rich.console import Console

    # says what to install if transformers is missing
    import ktk.integration.transformers  # noqa: F401

    errors = Console(stderr=True, highlight=False)
    rows: list[Row] = []
    with errors.status("reading") as status:
        import torch
        from transformers import AutoTokenizer, logging

        from ktk.evaluate.frontier import draw, read_rows
        from ktk.evaluate.run import evaluate
        from ktk.evaluate.variants import Variant, all_variants
        from ktk.integration.transformers.model_config import model_config
        from ktk.quantise.ggml_library import GgmlLibrary
        from ktk.quantise.texts import read_text, windows

        logging.disable_progress_bar()
        others = read_rows(beside or [])  # a bad file is told before the measuring
        library = None if ggml is None else GgmlLibrary(ggml)
        variants = (
            [Variant.parse(f) for f in formats] if formats else all_variants(ggml is not None)
        )
        if calibrate is not None:
            variants = [
                v for plain in variants for v in (plain, plain.calibrated()) if v is not None
            ]
        if not (model / "config.json").is_file():
            raise ValueError(f"{model}: must be a Hugging Face directory with a config.json")
        model_config(model)  # says what of its files cannot be meant
        tokenizer = AutoTokenizer.from_pretrained(model)

        def windows_of(path: Path, count: int) -> list[list[int]]:
            ids = tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"]
            return windows(ids, count // WINDOW, WINDOW)

        parts = windows_of(text, tokens)
        calibration = None
        if calibrate is not None:
            calibration = torch.tensor(windows_of(calibrate, calibrate_tokens))
        for row in evaluate(
            model,
            parts,
            variants,
            ggml=library,
            calibration_ids=calibration,
            method=method,
            activation_group=activation_group,
            rotation=rotation,
            adapter=adapter,
            step=lambda label: status.update(f"{label} ({len(rows)} of {len(variants) + 1})"),
        ):
            rows.append(row)
    if plot is not None:
        draw([*rows, *others], plot)
    if as_json:
        typer.echo(json.dumps(_report(model, text, calibrate, adapter, rows), indent=2))
    else:
        _print_table(rows)


def _check_texts(text: Path, calibrate: Path | None) -> None:
    """ValueError unless both can be read and differ."""
    from ktk.quantise.texts import read_text

    measured = read_text(text)
    if calibrate is not None and read_text(calibrate) == measured:
        raise ValueError(
            f"--calibrate {calibrate}: is the text that is measured on; its figures would "
            "flatter, take another"
        )


def _check_plot(plot: Path) -> None:
    if plot.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"--plot {plot}: must end in .png or .svg")
    if not os.access(plot.parent, os.W_OK):  # before the measuring, which may take hours
        raise ValueError(f"--plot {plot}: {plot.parent} must be a directory that can be written")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'ktk[plot]'") from None


def _report(
    model: Path, text: Path, calibrate: Path | None, adapter: Path | None, rows: list[Row]
) -> dict[str, Any]:
    return {
        "model": str(model),
        "text": str(text),
        "calibration_text": None if calibrate is None else str(calibrate),
        "adapter": None if adapter is None else str(adapter),
        "rows": [row.to_json() for row in rows],
    }


def _print_table(rows: list[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("experts", no_wrap=True)
    groups = ("bits/\nweight", "act.\ngroup", "rota-\ntion")
    for heading in (*groups, "perplexity", "KL", "KL\n99 %", "top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        d = row.distance
        table.add_row(
            row.label,
            f"{row.bits_per_weight:.2f}",
            str(row.activation_group or "-"),
            str(row.rotation or "-"),
            f"{d.perplexity:.3f}",
            f"{d.kl:.4f}",
            f"{d.kl_p99:.3f}",
            f"{d.top1:.1%}",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{rows[0].distance.num_tokens} tokens. KL in nats per token against the unquantised "
        "model, all but the experts in fp32."
    )
