"""``ktk imatrix``: the importance matrix of a model's experts, as llama.cpp reads it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[Path, typer.Argument(help="A Hugging Face directory of a model.")],
    text: Annotated[Path, typer.Option(help="A UTF-8 text like what the model will read.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write: .gguf, or .dat as before it.")
    ],
    tokens: Annotated[
        int, typer.Option(min=256, help="Tokens of that text, in windows of 256 spread over it.")
    ] = 8192,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Experts run at a time; default: physical cores.")
    ] = None,
) -> None:
    """Mean squares of what comes to each column of the experts' matrices, for llama-quantize
    --imatrix or ktk convert --imatrix."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local; read when transformers is imported
    if output.suffix.lower() not in (".gguf", ".dat"):
        raise ValueError(f"--output {output}: must end in .gguf or .dat")
    if output.exists():
        raise FileExistsError(f"{output}: exists; give another name, or remove it")
    from rich.console import Console

    from ktk.checkpoint.imatrix import write_imatrix
    from ktk.convert.importance import record
    from ktk.integration.transformers.calibration import Calibration
    from ktk.quantise.texts import read_text

    read_text(text)  # before a model is loaded
    with Console(stderr=True, highlight=False).status("reading") as status:
        imatrix = record(
            model,
            Calibration(text, tokens),
            dataset=text.name,
            threads=threads,
            progress=lambda done, total: status.update(f"{done} of {total} tensors"),
        )
    write_imatrix(output, imatrix)
    seen = max(float(entry.counts.max()) for entry in imatrix.entries.values())
    typer.echo(f"{output}: {len(imatrix.entries)} tensors, at most {seen:.0f} tokens an expert")
