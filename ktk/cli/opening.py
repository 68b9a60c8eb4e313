"""What run, chat, serve and doctor share: the options that name a model,
loading it with a progress bar, its description.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktk import env

if TYPE_CHECKING:
    from rich.table import Table

    from ktk.generate.describe import ModelDescription
    from ktk.generate.open import OpenModel
    from ktk.generate.session import Session
    from ktk.kv.prefix.store import PrefixStore
    from ktk.placement.masks.request import HybridRequest
    from ktk.placement.residency.expert_memory import ExpertMemory

KV_DISK_LIMIT = "20GiB"
SLOW = 2.0  # seconds after which a progress bar is shown

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face directory, one that ktk convert wrote, or a .gguf file.",
    ),
]
Method = Annotated[
    str, typer.Option("--method", help="What runs the experts: auto, a backend or a format.")
]
WeightFormat = Annotated[
    str,
    typer.Option(
        "--weight-format",
        help="Of float experts: int8, nl4, nl3, int4, bf16, fp32; auto: int8 if it fits into "
        "memory, else nl4.",
    ),
]
Linear = Annotated[
    str,
    typer.Option(
        "--linear",
        help="Dense linear layers: file runs them as they are, int8 or int4 packs them, none "
        "leaves them to torch.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="Of all but the experts: bfloat16, float16, float32; default: the model's."
    ),
]
ExpertLimit = Annotated[
    str | None,
    typer.Option(
        "--expert-memory",
        metavar="SIZE",
        help="Memory for experts: 8GiB, 25% of them, or their number. The others are read from the "
        "disk when tokens need them, with the same results. Default: all are loaded.",
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        "--residency-policy",
        metavar="NAME",
        help="With --expert-memory: which expert leaves for another, see `ktk residency replay`; "
        "default: lrfu.",
    ),
]
GpuExperts = Annotated[
    str | None,
    typer.Option(
        "--gpu-experts",
        metavar="N|SHARE|SIZE",
        help="Experts that a device runs: 16 of each layer, 0.4 or 40% of all, 8GiB of its memory.",
    ),
]
Placement = Annotated[
    str | None,
    typer.Option(
        "--placement",
        metavar="NAME|FILE",
        help="Which ones: uniform, front-loading, random, or a .pt file of masks (`ktk place`) or "
        "of statistics; default: uniform.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="With --gpu-experts: torch's device; default: its accelerator."),
]
Deferred = Annotated[
    int,
    typer.Option(
        "--max-deferred-experts",
        min=0,
        help="Experts of a token that may run beside the next layer: faster with a device, not the "
        "same text.",
    ),
]
KvDisk = Annotated[
    str | None,
    typer.Option(
        "--kv-disk",
        metavar="PATH",
        help="A directory for keys and values of texts: a prompt that begins as one before is not "
        "computed again, nor after a restart.",
    ),
]
KvDiskLimit = Annotated[
    str | None,
    typer.Option(
        "--kv-disk-limit",
        metavar="SIZE",
        help="With --kv-disk: at most this much of it; texts used longest ago leave. "
        f"Default: {KV_DISK_LIMIT}.",
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        help="A directory that ktk train wrote: adapters of experts run beside their weights, "
        "those of attention are added to its own.",
    ),
]
KvDtype = Annotated[
    str | None,
    typer.Option(
        "--kv-dtype",
        help="Of keys and values: bf16, fp16, int8 (half of that), fp32; default: --dtype.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Load it even if memory is too small.")]
MaxTokens = Annotated[
    int,
    typer.Option("--max-tokens", "-n", min=0, help="At most this many; 0: to the context's end."),
]
ANSWER_TOKENS = (
    2048  # unless told otherwise: a model that repeats itself would go on to its context's end
)
Temperature = Annotated[
    float | None,
    typer.Option(min=0, max=10, help="0 is greedy; default: the model's own setting, else 0."),
]
TopP = Annotated[float | None, typer.Option("--top-p", min=0.001, max=1, help="Nucleus sampling.")]
TopK = Annotated[int | None, typer.Option("--top-k", min=0, help="Of the K likeliest; 0: of all.")]
PromptLookup = Annotated[
    int,
    typer.Option(
        "--prompt-lookup",
        min=0,
        max=32,
        help="Tokens guessed for each answer and pass, at most, from what followed the same words "
        "before; fewer or none where that does not pay. 0: none.",
    ),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="End before this text; may be given again.")
]
System = Annotated[str | None, typer.Option("--system", help="The system message.")]


@contextlib.contextmanager
def loading(description: ModelDescription) -> Iterator[None]:
    """Shows how far memory has grown towards what the model needs, on stderr,
    if it is a terminal and takes over 2 s.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    total = description.needed_bytes
    bar = Progress(
        TextColumn("loading {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    over = threading.Event()

    def show() -> None:
        if over.wait(SLOW):
            return
        with bar:
            task = bar.add_task(Path(description.path).name, total=total)
            before = _own_memory()
            while not over.wait(0.2):
                bar.update(task, completed=min(total, max(0, _own_memory() - before)))

    if not console.is_terminal:
        yield
        return
    thread = threading.Thread(target=show, name="ktk-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _own_memory() -> int:
    """Bytes of this process that no file backs; 0 where the system does not tell."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    lines = (line.split() for line in text.splitlines() if line.startswith("RssAnon:"))
    return next((int(words[1]) * 1024 for words in lines), 0)


def load(
    path: str,
    method: str,
    weight_format: str,
    linear: str,
    dtype: str | None,
    force: bool,
    context: int | None = None,
    memory: ExpertMemory | None = None,
    hybrid: HybridRequest | None = None,
    adapter: Path | None = None,
    kv_dtype: str | None = None,
) -> OpenModel:
    """The model of a command line; its warning, if any, goes to stderr,
    and how many of its experts are in memory, if not all.
    """
    quiet_transformers()
    from ktk.generate.describe import describe_model
    from ktk.generate.open import open_model

    description = describe_model(
        path, method, weight_format, dtype, context, linear, memory, kv_dtype
    )
    if description.warning:
        typer.echo(f"ktk: warning: {description.warning}", err=True)
    with loading(description):
        opened = open_model(
            path,
            method,
            weight_format,
            linear,
            dtype,
            context=context,
            force=force,
            expert_memory=memory,
            hybrid=hybrid,
            adapter=adapter,
            kv_dtype=kv_dtype,
        )
    if (report := opened.residency()) is not None:
        typer.echo(f"experts: {report.line()}", err=True)
    return opened


def expert_memory(limit: str | None, policy: str | None) -> ExpertMemory | None:
    """What --expert-memory and --residency-policy ask for. ValueError for what they do not take."""
    if limit is None:
        if policy is not None:
            raise typer.BadParameter("--residency-policy needs --expert-memory")
        return None
    from ktk.placement.residency.expert_memory import ExpertMemory

    return ExpertMemory(limit) if policy is None else ExpertMemory(limit, policy)


def hybrid(
    gpu_experts: str | None, placement: str | None, device: str | None, deferred: int
) -> HybridRequest | None:
    """What --gpu-experts, --placement, --device and --max-deferred-experts ask for. ValueError for
    what they do not take.
    """
    from ktk.placement.masks.request import HybridRequest

    return HybridRequest.of(gpu_experts, placement, device, deferred)


def kept_texts(
    call: typer.Context, path: str | None, limit: str | None, hybrid: HybridRequest | None
) -> PrefixStore | None:
    """The store that --kv-disk and --kv-disk-limit ask for, open until the command ends.

    Raises as ``PrefixStore``, ValueError for a limit that is no size.
    """
    if path is None:
        if limit is not None:
            raise typer.BadParameter("--kv-disk-limit needs --kv-disk")
        return None
    if hybrid is not None:
        raise typer.BadParameter("--kv-disk takes no experts on a device, and none deferred")
    from ktk.kv.prefix.kept import open_store

    return call.with_resource(open_store(path, limit or KV_DISK_LIMIT))


def model_of(call: typer.Context) -> tuple[OpenModel, PrefixStore | None]:
    """What the options that run, chat and serve share ask for: the model, loaded, and the store of
    --kv-disk. Typer reads them off the commands' signatures; their values are ``call.params``.
    """
    given = call.params
    memory = expert_memory(given["expert_memory"], given["residency_policy"])
    asked = hybrid(
        given["gpu_experts"], given["placement"], given["device"], given["max_deferred_experts"]
    )
    store = kept_texts(call, given["kv_disk"], given["kv_disk_limit"], asked)
    shared = ("method", "weight_format", "linear", "dtype", "force", "adapter", "kv_dtype")
    own = {name: given[name] for name in shared} | {"context": given.get("context")}
    return load(given["model"], **own, memory=memory, hybrid=asked), store


def session_of(call: typer.Context) -> tuple[OpenModel, Session]:
    """``model_of``, and the fastest session of it, over the store where it can be."""
    opened, store = model_of(call)
    from ktk.generate.session import Session

    kv_dtype, lookup = call.params["kv_dtype"], call.params["prompt_lookup"]
    session = Session.fastest(opened.model, opened.tokenizer, kv_dtype, lookup)
    if store is not None and not session.keep(store, opened, call.params["linear"]):
        typer.echo("ktk: warning: --kv-disk is not used: torch runs this model's layers", err=True)
    return opened, session


def quiet_transformers() -> None:
    """Its warnings and bars belong to programmers: they are shown with KTK_LOG=debug or info."""
    from transformers import logging as transformers_logging

    if env.log_level() not in ("debug", "info"):
        transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()


def description_table(found: ModelDescription) -> Table:
    """A description as ``ktk doctor`` shows it."""
    from rich.markup import escape
    from rich.table import Table

    from ktk.generate.describe import OVERHEAD, size

    kinds = {
        "packed": "packed by ktk convert",
        "float": "float checkpoint, experts are packed while it loads",
        "quantised": "quantised checkpoint, experts are packed while it loads",
        "gguf": "GGUF, run from the mapped file",
    }
    is_mapped = found.kind == "gguf" and not found.resident_experts
    mapped = ", mapped: need not fit" if is_mapped else ""
    rows: dict[str, str] = {
        "model": f"{found.path} ({kinds[found.kind]})",
        "architecture": (
            f"{found.architecture}, {found.num_layers} layers, {found.num_moe_layers} of them "
            f"with {found.num_experts} experts, {found.num_experts_per_tok} for each token"
        ),
        "experts": (
            f"{found.weight_format}, {found.bits_per_weight:.2f} bits per weight, "
            f"{size(found.expert_bytes)}{mapped}"
        ),
        "of them in memory": (
            f"room for {found.resident_experts} experts, {size(found.resident_bytes)}"
            if found.resident_experts
            else ""
        ),
        "run by": f"{found.backend}: {found.kernel}" if found.kernel else "nothing",
        "other weights": f"{size(found.rest_bytes - found.linear_bytes)} in {found.dtype}"
        + (f", {size(found.linear_bytes)} as the file has them" if found.linear_bytes else ""),
        "KV cache": (
            f"{size(found.kv_bytes)} for {found.context} tokens"
            + (f" in {found.kv_dtype}" if found.kv_dtype else "")
            + f" (the model's longest: {found.max_context or 'unknown'})"
        ),
        "working memory": size(OVERHEAD),
        "needed": size(found.needed_bytes),
        "free": f"{size(found.available_bytes)} of {size(found.total_bytes)}",
    }
    if found.reason:
        verdict = f"[red]cannot run[/red]: {escape(found.reason)}"
    elif found.fits:
        verdict = "[green]fits[/green]"
    else:
        verdict = (
            f"[red]does not fit[/red]: {size(found.needed_bytes - found.available_bytes)} too "
            "little"
        )
    table = Table(show_header=False, box=None)
    for name, text in rows.items():
        if not text:
            continue
        table.add_row(f"[bold]{name}[/bold]", escape(text))
    table.add_row("[bold]verdict[/bold]", verdict)
    if found.warning:
        table.add_row("[bold]warning[/bold]", f"[yellow]{escape(found.warning)}[/yellow]")
    return table


def sampling_of(
    model: Any,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
) -> Any:
    """The sampling that options ask for, over the model's own settings."""
    from ktk.generate.sampling import Sampling

    return Sampling.of(
        model.generation_config, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
