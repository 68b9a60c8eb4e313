"""``ktk doctor``: what this machine is, which backends run on it or why not,
and how GGUF types run.
"""

from __future__ import annotations

import contextlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktk.cli import opening
from ktk.cli.plan import print_plan

if TYPE_CHECKING:
    from ktk.bench.forecast import Forecast
    from ktk.generate.describe import ModelDescription
    from ktk.placement.residency.expert_memory import ExpertMemory

# Paths of ktk.backends.llamafile.types_by_path, and what they mean.
GGUF_PATHS = {
    "kernel": "as they lie in the file",
    "float_copies": "as a float copy: no kernel reads them",
    "packed_anew": "packed to INT8 or INT4: LLAMAFILE does not run here",
}
PACKAGES = ("numpy", "torch", "numba", "llvmlite", "safetensors", "gguf", "transformers")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def diagnosis() -> dict[str, Any]:
    """Everything ``ktk doctor`` shows, JSON-able; memory in bytes."""
    from ktk import __version__, backends, env
    from ktk._cy import native_module
    from ktk.backends.llamafile import types_by_path
    from ktk.backends.native import kernel_isa
    from ktk.machine import cpu
    from ktk.ops.device_experts import accelerator

    features = cpu.detect()
    total, available = cpu.memory()
    return {
        "ktk": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "name": cpu.brand(),
            "allowed_cpus": len(cpu.allowed_cpus()),
            "physical_cores": cpu.num_physical_cores(),
            "quota": cpu.cpu_quota(),
            "features": [name for name in cpu.FEATURES if name in features],
            "features_from": features.source,
            "disabled": sorted(features.disabled),
            "emulated": sorted(features.emulated),
            "refused_tiles": features.refused_tiles,
            "levels": {level: cpu.missing(level, features) for level in cpu.ISA_LEVELS},
        },
        "numa_nodes": [
            {"id": n.id, "cpus": list(n.cpus), "memory_bytes": n.memory_bytes}
            for n in cpu.numa_nodes()
        ],
        "memory": {"total_bytes": total, "available_bytes": available},
        "huge_pages": cpu.huge_pages(),
        "accelerator": None if (device := accelerator()) is None else str(device),
        "extension": {"built": native_module() is not None, "kernels": kernel_isa("int4")},
        "backends": [
            {"name": r.name, "runs": r.reason is None, "reason": r.reason, "kernel": r.kernel}
            for r in backends.report()
        ],
        "gguf_types": types_by_path(),
        "environment": env.in_effect(),
    }


EPILOG = """Examples:

  ktk doctor

  ktk doctor Qwen3-30B-A3B --weight-format int4 --context 32768

  ktk doctor Qwen3-30B-A3B --plan

  ktk doctor model.gguf --json --headers
"""
TRIED_CONTEXT = 512  # tokens: of the trial that says which fast paths are taken


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="A model's path: what it is, what runs it, does it fit."
        ),
    ] = None,
    method: opening.Method = "auto",
    weight_format: opening.WeightFormat = "auto",
    linear: opening.Linear = "file",
    dtype: opening.Dtype = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of KV cache to reckon with.")
    ] = None,
    headers: Annotated[
        bool,
        typer.Option("--headers", help="Do not load the model: fast paths are not tried."),
    ] = False,
    expert_memory: opening.ExpertLimit = None,
    residency_policy: opening.Policy = None,
    kv_dtype: opening.KvDtype = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Propose format, context and requests at once to serve the model with."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what this machine is and which backends run on it; or what a model is, what runs it, if
    it fits (else exit code 1), and, once it is loaded and tried, which fast paths it takes or why
    not.
    """
    if plan:
        print_plan(model, context, method, linear, dtype, kv_dtype, as_json)
        return
    if model is not None:
        options = (model, method, weight_format, linear, dtype)
        memory = opening.expert_memory(expert_memory, residency_policy)
        _diagnose_model(options, context, memory, kv_dtype, headers, as_json)
        return
    found = diagnosis()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    c, memory, pages = found["cpu"], found["memory"], found["huge_pages"]
    nodes = ", ".join(
        f"node {n['id']}: {len(n['cpus'])} CPUs, {n['memory_bytes'] / 2**30:.1f} GiB"
        for n in found["numa_nodes"]
    )
    quota = "" if c["quota"] is None else f", cgroup quota {c['quota']:g} CPUs"
    facts = {
        "ktk": f"{found['ktk']}, Python {found['python']}, {found['system']}",
        "packages": ", ".join(f"{k} {v or '-'}" for k, v in found["packages"].items()),
        "CPU": c["name"],
        "cores": (
            f"{c['physical_cores']} physical of {c['allowed_cpus']} CPUs this process may "
            f"use{quota}"
        ),
        "features": f"{' '.join(c['features']) or 'none'} (from {c['features_from']})",
        "switched off": " ".join(c["disabled"]),
        "emulated": f"{' '.join(c['emulated'])} (KTK_TILE: for tests, very slow)"
        if c["emulated"]
        else "",
        "AMX tiles": c["refused_tiles"],
        "ISA levels": ", ".join(
            f"{level} {'no: ' + ' '.join(lacking) if lacking else 'yes'}"
            for level, lacking in c["levels"].items()
        ),
        "NUMA": nodes,
        "memory": (
            f"{memory['available_bytes'] / 2**30:.1f} GiB free of "
            f"{memory['total_bytes'] / 2**30:.1f} GiB"
        ),
        "huge pages": (
            f"transparent: {pages['enabled'] or 'unknown'}, defrag: "
            f"{pages['defrag'] or 'unknown'}, reserved: {pages['reserved_2MiB'] or '0'}"
        ),
        "accelerator": found["accelerator"] or "none that torch finds: the CPU runs all experts",
        "extension": f"built, kernels {found['extension']['kernels']}"
        if found["extension"]["built"]
        else "not built: Numba and NumPy run; reinstall with a C compiler for the fast kernels",
        "environment": ", ".join(f"{k}={v}" for k, v in found["environment"].items()),
    }
    table = Table(show_header=False, box=None)
    for name, text in facts.items():
        if text:
            table.add_row(f"[bold]{name}[/bold]", escape(text))
    console.print(table)
    rows = Table("backend", "", "kernel or reason")
    for b in found["backends"]:
        state = "[green]runs[/green]" if b["runs"] else "[yellow]no[/yellow]"
        rows.add_row(b["name"], state, escape(b["kernel"] if b["runs"] else b["reason"]))
    console.print(rows)
    types = Table("GGUF types", "run")
    for path, names in found["gguf_types"].items():
        if names:
            types.add_row(" ".join(names), GGUF_PATHS[path])
    console.print(types)


Options = tuple[str, str, str, str, str | None]  # path, method, weight format, linear, dtype


def _diagnose_model(
    options: Options,
    context: int | None,
    memory: ExpertMemory | None,
    kv_dtype: str | None,
    headers: bool,
    as_json: bool,
) -> None:
    """What a model is and needs, and what it is like when it runs;
    exit code 1 if it cannot run here.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ktk.generate.describe import describe_model

    path, method, weight_format, linear, dtype = options
    found = describe_model(path, method, weight_format, dtype, context, linear, memory, kv_dtype)
    runs = not found.reason and found.fits
    console = Console(highlight=False)
    if not as_json:
        console.print(opening.description_table(found))
    told = None if memory is None or not runs else _forecast(found, memory)
    if told is not None and not as_json:
        console.print(f"[bold]predicted[/bold]      {escape(told.line())}")
    paths = [] if headers or not runs else _fast_paths(options, memory, kv_dtype)
    if as_json:
        tried = [path.to_json() for path in paths] if paths else None
        predicted = None if told is None else told.to_json()
        shown = {**found.to_json(), "forecast": predicted, "fast_paths": tried}
        typer.echo(json.dumps(shown, indent=2))
    elif paths:
        table = Table(show_header=False, box=None)
        for path in paths:
            state = "[green]yes[/green]" if path.is_taken else "[yellow]no[/yellow]"
            text = ", ".join(filter(None, (path.detail, path.reason)))
            table.add_row(f"[bold]{path.name:<14}[/bold]", state, escape(text))
        console.print(table)
    if not runs:
        raise typer.Exit(1)


def _fast_paths(options: Options, memory: ExpertMemory | None, kv_dtype: str | None) -> list[Any]:
    """Loads the model, continues a short text with it as ``ktk run`` and as ``ktk serve`` do,
    and tells what was fast.
    """
    from ktk.generate.engine import Limits
    from ktk.generate.trial import start_engine
    from ktk.integration.transformers.fast_paths import memory_paths, run_paths

    opened = opening.load(*options, force=False, memory=memory)
    context = min(TRIED_CONTEXT, opened.description.max_context or TRIED_CONTEXT)
    limits = Limits(context, 2, 2, context, 1 << 62, kv_dtype=kv_dtype)
    engine = start_engine(opened, limits)
    engine.stop()
    return [
        *run_paths(opened.model, engine.why_alone, engine.why_not_native),
        *memory_paths(opened.model),
    ]


def _forecast(found: ModelDescription, memory: ExpertMemory) -> Forecast:
    """Of a model that is not loaded yet."""
    from ktk.bench.forecast import forecast
    from ktk.integration.transformers.sources import gguf_source, packed_directory
    from ktk.ops.gguf_model import open_experts

    path = Path(found.path)
    if found.kind == "gguf":
        source = gguf_source(path, open_experts(path))
    else:
        source = packed_directory(path)
    assert source.open_reader is not None
    layers = sorted(source.specs)
    top_k = found.num_experts_per_tok
    with contextlib.closing(source.open_reader(layers)) as reader:
        return forecast(reader, len(layers), memory, top_k, found.rest_bytes)
