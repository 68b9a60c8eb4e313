"""``ktk convert``: a checkpoint's experts into a packed directory that loads, or a GGUF file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ktk.convert.run import Summary


def command(
    input_path: Annotated[
        Path,
        typer.Option(
            "--input-path",
            "-i",
            help="A Hugging Face directory, a .safetensors file, or a GGUF model.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The directory to write, new or empty; or a new .gguf file."
        ),
    ],
    quant_method: Annotated[
        str | None,
        typer.Option(
            help="nl4, nl3, nl2, int4, int8, fp8, fp8_channel, fp8_e5m2, mxfp8, mxfp4, nvfp4, "
            "int4_asym or bf16; for a .gguf output q8_0, q6_k, q5_k, q4_k, q4_0, iq4_nl, iq4_xs, "
            "mxfp4, q3_k, q2_k, bf16, f16 or f32. Default: what keeps the "
            "input's codes, else nl4; or the recipe alone."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A file of lines PATTERN = FORMAT, regular expressions over names like "
            "blk.3.ffn_down_exps.weight, the first found counts; or auto: measured on the "
            "calibration text."
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(help="For --recipe auto: bits per weight of the experts, at most."),
    ] = None,
    among: Annotated[
        list[str] | None,
        typer.Option(help="For --recipe auto: a format to choose from; again for more."),
    ] = None,
    save_recipe: Annotated[
        Path | None,
        typer.Option(help="Write what --recipe auto chose as a file for --recipe."),
    ] = None,
    input_type: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16, bf16, fp8, fp8_e5m2, mxfp8, mxfp4, nvfp4 or int4; default: read "
            "from the input."
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale or multiplier: 32, 64 or 128 for int4 and int4_asym, "
            "16 or 32 for nl2 to nl4, 0 = per channel; default: the format's."
        ),
    ] = None,
    activation_group: Annotated[
        int | None,
        typer.Option(
            help="Activations that share a scale: 32, 64, 128 or 256; "
            "default: 128 for int4, 256 for int8 and nl2 to nl4."
        ),
    ] = None,
    rotation: Annotated[
        int | None,
        typer.Option(
            help="Columns of weights and activations that are turned together, so that outliers "
            "spread: 64 or 256, 0 = none; default: 64 for int8 and nl2 to nl4, else none."
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="A UTF-8 text like what the model will read: "
            "rounds with error feedback on what it gives the experts."
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a text an importance matrix of llama.cpp's or of ktk imatrix, .gguf "
            "or .dat: rounds where inputs are large."
        ),
    ] = None,
    calibrate_tokens: Annotated[
        int, typer.Option(min=256, help="Tokens of that text, in windows of 256 spread over it.")
    ] = 8192,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Experts packed at a time; default: physical cores.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")
    ] = False,
    whole: Annotated[
        str | None,
        typer.Option(
            help="For a .gguf output: write the whole model, not the experts alone, its other "
            "weights in this type (q8_0, q4_0, ..., f32)."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON summary, and no progress.")
    ] = False,
) -> None:
    """Convert a checkpoint's experts to panels of a format, everything else copied; or to a GGUF
    file."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as SpeedColumn

    from ktk.cli.recipe import Asked, print_choice
    from ktk.convert.run import Progress as Report
    from ktk.convert.run import convert
    from ktk.quantise.texts import read_text

    calibration = None
    if calibrate is not None:
        read_text(calibrate)  # before anything is made
        os.environ.setdefault(
            "HF_HUB_OFFLINE", "1"
        )  # all is local; read when transformers is imported
        from ktk.integration.transformers.calibration import Calibration

        calibration = Calibration(calibrate, calibrate_tokens)
    asked = Asked(recipe, bits, among, save_recipe)
    asked.check(calibration is not None, resume)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        SpeedColumn(),
        TimeRemainingColumn(),
        console=errors,
        disable=as_json or not errors.is_terminal,
        transient=True,
    )
    try:
        with bar:
            task = bar.add_task("reading headers", total=None)
            rules, choice = asked.recipe(
                input_path,
                output,
                calibration,
                threads,
                lambda done, total: bar.update(
                    task, description="measuring formats", completed=done, total=total
                ),
            )
            if choice is not None and not as_json:
                print_choice(choice)

            def show(progress: Report) -> None:
                # What an earlier run did is not this run's speed.
                bar.update(
                    task,
                    description=progress.what,
                    completed=progress.done_bytes - progress.reused_bytes,
                    total=progress.total_bytes - progress.reused_bytes,
                )

            summary = convert(
                input_path,
                output,
                quant_method=quant_method,
                input_type=input_type,
                group_size=group_size,
                activation_group=activation_group,
                rotation=rotation,
                threads=threads,
                resume=resume,
                whole=whole,
                progress=show,
                calibration=calibration,
                recipe=rules,
                imatrix=imatrix,
            )
    except KeyboardInterrupt:
        is_file = output.name.lower().endswith(".gguf")
        again = "; nothing was written" if is_file else "; run again with --resume to go on"
        errors.print(f"interrupted{again}")
        raise typer.Exit(130) from None
    if as_json:
        chosen = {} if choice is None else {"recipe": choice.to_json()}
        typer.echo(json.dumps({**summary.to_json(), **chosen}, indent=2))
    else:
        typer.echo(_report(summary))


def _report(s: Summary) -> str:
    reused = f", {s.reused_layers} of them from an earlier run" if s.reused_layers else ""
    return "\n".join([_figures(s, reused), *s.notes])


def _figures(s: Summary, reused: str) -> str:
    turned = "" if s.rotation is None else f" rotated by {s.rotation[0]}"
    return (
        f"{s.output}: {s.num_layers} layers of {s.num_experts} experts{reused}, "
        f"{s.family} {s.source_dtype} -> {s.weight_format}{turned}, "
        f"{s.bits_per_weight:.2f} bits per weight\n"
        f"experts {s.expert_bytes / 1e6:.1f} MB, other tensors {s.other_bytes / 1e6:.1f} MB, "
        f"{s.seconds:.1f} s, {s.mb_per_second:.0f} MB/s of input"
    )
