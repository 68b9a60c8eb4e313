"""``ktk train export``: an adapter as others load it, or added to its model."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ktk.cli import opening

if TYPE_CHECKING:
    from ktk.train.adapter import Adapter


def command(
    adapter: Annotated[Path, typer.Argument(help="A directory that ktk train wrote.")],
    to: Annotated[
        str,
        typer.Option(
            help="peft, vllm or sglang: an adapter that these load; merged: the float checkpoint "
            "with the adapter in it; packed: that with its experts packed, which ktk runs fastest."
        ),
    ],
    out: Annotated[Path, typer.Option(help="A new directory.")],
    base: Annotated[
        Path | None,
        typer.Option(
            help="The model's directory: for merged and packed its float checkpoint. Default: what "
            "was trained."
        ),
    ] = None,
    quant_method: Annotated[
        str,
        typer.Option(
            help="Of packed: int8, nl4, nl3, nl2, int4, fp8 or bf16, as ktk convert takes it."
        ),
    ] = "int8",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON summary.")] = False,
) -> None:
    """Write an adapter for peft, vLLM or SGLang, or a model that has it in its weights.

    Example: ktk train export adapter --to packed --base Qwen3-30B-A3B --out tuned-int8
    """
    opening.quiet_transformers()
    from ktk.train.adapter import read_adapter
    from ktk.train.exports import LAYOUTS, base_path, export

    if to not in (*LAYOUTS, "merged", "packed"):
        raise ValueError(f"--to {to}: must be one of {', '.join(LAYOUTS)}, merged, packed")
    found = read_adapter(adapter)
    if to in LAYOUTS:
        export(found, to, out, base)
    else:
        _merge(found, base_path(found, base), out, None if to == "merged" else quant_method)
    summary = {
        "adapter": str(adapter),
        "to": to,
        "out": str(out),
        "rank": found.rank,
        "experts_modules": len(found.experts),
        "linear_layers": len(found.linears),
    }
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        typer.echo(
            f"{out}: {to}, rank {found.rank}, adapters of {len(found.experts)} layers' experts and "
            f"{len(found.linears)} linear layers"
        )


def _merge(adapter: Adapter, base: Path, out: Path, quant_method: str | None) -> None:
    from rich.console import Console

    from ktk.train.merging import merge

    with Console(stderr=True, highlight=False).status("merging") as status:

        def show(name: str) -> None:
            status.update(f"merging {name}")

        if quant_method is None:
            merge(adapter, base, out, show)
            return
        from ktk.convert.run import convert

        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".ktk-merged-", dir=out.parent) as folder:
            merged = merge(adapter, base, Path(folder) / base.resolve().name, show)
            status.update("packing")
            convert(merged, out, quant_method=quant_method)
