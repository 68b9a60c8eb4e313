"""``ktk train``: adapters of a model whose experts lie packed, from a file of texts."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ktk.cli import opening, train_export
from ktk.cli.place_views import check_plot
from ktk.machine.memory import give_back_freed, peak_memory

if TYPE_CHECKING:
    from ktk.generate.describe import ModelDescription
    from ktk.train.data import Example
    from ktk.train.run import Recipe, Run, Step

HELP = "Fine-tune a model with adapters; export what was trained."


def command(
    model: opening.Model,
    data: Annotated[
        Path,
        typer.Option(
            help='JSON Lines: {"messages": [...]}, {"prompt", "completion"} or {"text"} each.'
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the adapter and of the run's state.")],
    lora: Annotated[int, typer.Option(min=1, max=128, help="Rank of the adapters.")] = 16,
    alpha: Annotated[
        float | None, typer.Option(help="Adapters are times alpha / rank; default: twice the rank.")
    ] = None,
    targets: Annotated[
        str, typer.Option(help="What gets adapters: experts, attention, or both by a comma.")
    ] = "experts,attention",
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 2e-4,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the optimiser; default: by --epochs.")
    ] = None,
    epochs: Annotated[
        float, typer.Option(min=0.001, help="How often each example is taken.")
    ] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="Examples of one forward pass.")] = 1,
    accumulate: Annotated[int, typer.Option(min=1, help="Forward passes of one step.")] = 8,
    warmup: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the steps in which the rate rises.")
    ] = 0.05,
    context: Annotated[int, typer.Option(min=2, help="Longest sequence, in tokens.")] = 512,
    dropout: Annotated[
        float, typer.Option(min=0, max=0.99, help="Of the adapters' inputs, in training.")
    ] = 0.0,
    weight_decay: Annotated[float, typer.Option(min=0, help="AdamW's.")] = 0.0,
    held_out: Annotated[
        str,
        typer.Option(
            metavar="SHARE|FILE",
            help="Examples whose loss is measured before and after: a share of the data, or a file "
            "of their own; 0: none.",
        ),
    ] = "0.1",
    seed: Annotated[int, typer.Option(min=0, max=(1 << 32) - 1)] = 0,
    save_every: Annotated[
        int, typer.Option(min=1, help="Steps between two states that --resume goes on from.")
    ] = 50,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, with the same bits.")
    ] = False,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute", help="Compute layers again for gradients: less memory, more time."
        ),
    ] = False,
    method: opening.Method = "auto",
    weight_format: opening.WeightFormat = "auto",
    dtype: opening.Dtype = None,
    force: opening.Force = False,
    plot: Annotated[
        Path | None, typer.Option(help="A .png or .svg of the loss to draw. Needs matplotlib.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end, nothing before.")
    ] = False,
) -> None:
    """Fine-tune a model's adapters on a file: its experts stay packed, no GPU is needed.

    Ctrl-C writes the state; --resume goes on from there, or after a kill from the last state.

    Example: ktk train Qwen3-30B-A3B-int4 --data chats.jsonl --lora 16 --out adapter

    `ktk train export --help`: the adapter for peft, vLLM or SGLang, or added to the model.
    """
    if recompute:
        give_back_freed()
    if plot is not None:
        check_plot(plot)
    _check_out(out, resume)
    opening.quiet_transformers()
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ValueError("ktk train needs peft: pip install 'ktk[train]'") from None
    from ktk.generate.describe import describe_model
    from ktk.train import tuning
    from ktk.train.float32 import compute_in_float32

    description = describe_model(model, method, weight_format, dtype, context, "none")
    tokenizer = _tokenizer(description)
    trained, kept = _examples(data, held_out, tokenizer, context, seed)
    recipe = _recipe(
        len(trained),
        steps,
        epochs,
        warmup,
        lr=lr,
        batch=batch,
        accumulate=accumulate,
        weight_decay=weight_decay,
        seed=seed,
        save_every=save_every,
    )
    parts = [part.strip() for part in targets.split(",")]
    alpha = 2.0 * lora if alpha is None else alpha
    said = {
        "model": description.path,
        "weight_format": description.weight_format,
        "dtype": description.dtype,
        "lora": lora,
        "alpha": alpha,
        "targets": parts,
        "dropout": dropout,
    }
    base = _open(description, method, dtype, force)
    compute_in_float32(base)
    tuned = tuning.adapted(base, parts, lora, alpha, dropout, seed)
    if recompute:
        tuning.recompute(tuned.get_base_model())
    run = _run(tuned.get_base_model(), trained, kept, recipe, out, said)
    if resume and not run.resume():
        raise ValueError(f"--resume: {out} has no state of a run")
    with _stopping() as is_stopped:
        show: Any = _quietly if as_json else _shown
        with show(run) as on_step:
            is_done = run.run(on_step, is_stopped)
    if plot is not None:
        from ktk.train.curve import draw

        draw(run.progress, plot)
    if is_done:
        tuning.write_adapter(tuned, out)
    if as_json:
        typer.echo(json.dumps(_report(run, said, out if is_done else None), indent=2))
    else:
        _print(run, model, out, is_done)
    if not is_done:
        raise typer.Exit(130)


def _check_out(out: Path, resume: bool) -> None:
    """ValueError for a directory whose run would be written over."""
    from ktk.train.state import FILE

    if not resume and (out / FILE).exists():
        raise ValueError(f"--out {out}: has a run already: --resume goes on with it")


def _tokenizer(description: ModelDescription) -> Any:
    from ktk.integration.transformers.gguf_tokenizer import load_gguf_tokenizer
    from ktk.integration.transformers.tokens import load_tokenizer

    is_gguf = description.kind == "gguf"
    return (load_gguf_tokenizer if is_gguf else load_tokenizer)(description.path)


def _examples(
    data: Path, held_out: str, tokenizer: Any, context: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """To train on, and to measure on."""
    from ktk.paths import user_path
    from ktk.train.data import read_examples
    from ktk.train.order import hold_out

    examples = read_examples(data, tokenizer, context)
    try:
        share = float(held_out)
    except ValueError:
        return examples, read_examples(user_path(held_out), tokenizer, context)
    return hold_out(examples, share, seed)


def _recipe(count: int, steps: int | None, epochs: float, warmup: float, **given: Any) -> Recipe:
    from ktk.train.order import Order
    from ktk.train.run import Recipe

    order = Order(count, given["batch"] * given["accumulate"], given["seed"])
    steps = order.steps(epochs) if steps is None else steps
    return Recipe(steps=steps, warmup=math.ceil(warmup * steps), **given)


def _open(description: ModelDescription, method: str, dtype: str | None, force: bool) -> Any:
    """The model with packed experts, all else as torch runs it."""
    import torch

    from ktk.errors import CheckpointError
    from ktk.integration.transformers.gguf import load_gguf_model
    from ktk.integration.transformers.loading import load_model
    from ktk.integration.transformers.quantizer import KtkConfig

    if description.warning:
        typer.echo(f"ktk: warning: {description.warning}", err=True)
    if description.reason is not None:
        raise CheckpointError(f"{description.path}: {description.reason}")
    if not force and (refusal := description.memory_refusal()) is not None:
        raise MemoryError(refusal)
    with opening.loading(description):
        if description.kind == "gguf":
            return load_gguf_model(
                description.path, method=method, dtype=description.dtype, linear="none"
            )
        options: dict[str, Any] = {}
        if description.kind == "float":
            options["quantization_config"] = KtkConfig(description.weight_format, method=method)
        own = None if dtype is None else getattr(torch, dtype)
        return load_model(description.path, method, own, only_text=True, **options)


def _run(
    model: Any,
    trained: list[Example],
    kept: list[Example],
    recipe: Recipe,
    out: Path,
    said: dict[str, Any],
) -> Run:
    from ktk.train.run import Run

    return Run(model, trained, kept, recipe, out, said)


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Whether somebody pressed Ctrl-C; a second time ends the process at once."""
    pressed: list[int] = []

    def handle(*_: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(1)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _quietly(run: Run) -> Iterator[Callable[[Step], None]]:
    yield lambda step: None


@contextmanager
def _shown(run: Run) -> Iterator[Callable[[Step], None]]:
    """Progress on stderr: a bar at a terminal, a line now and then elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ktk.train.curve import smoothed

    console = Console(stderr=True, highlight=False)
    total = run.recipe.steps

    def said(step: Step) -> str:
        losses = [one.loss for one in run.progress.steps] or [step.loss]
        speed = step.num_tokens / step.seconds
        return f"loss {smoothed(losses)[-1]:.3f}, {speed:.0f} tokens/s"

    if not console.is_terminal:
        every = max(1, total // 20)

        def line(step: Step) -> None:
            if step.number % every == 0 or step.number == total:
                print(f"step {step.number} of {total}: {said(step)}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, completed=run.step)

        def move(step: Step) -> None:
            bar.update(task, completed=step.number, description=said(step))

        yield move


def _report(run: Run, said: dict[str, Any], adapter: Path | None) -> dict[str, Any]:
    progress = run.progress
    return {
        **said,
        "adapter": None if adapter is None else str(adapter),
        "steps": run.step,
        "of_steps": run.recipe.steps,
        "losses": [step.loss for step in progress.steps],
        "held_out_loss_before": progress.held_out_before,
        "held_out_loss_after": progress.held_out_after,
        "tokens": sum(step.num_tokens for step in progress.steps),
        "seconds": sum(step.seconds for step in progress.steps),
        "tokens_per_second": progress.speed,
        "peak_memory_bytes": peak_memory(),
    }


def _print(run: Run, model: str, out: Path, is_done: bool) -> None:
    from ktk.generate.describe import size
    from ktk.train.curve import chart

    progress = run.progress
    typer.echo(chart([step.loss for step in progress.steps]))
    seconds = sum(step.seconds for step in progress.steps)
    tokens = sum(step.num_tokens for step in progress.steps)
    typer.echo(
        f"{run.step} of {run.recipe.steps} steps, {tokens} tokens in {seconds:.0f} s: "
        f"{progress.speed:.0f} tokens/s; peak memory {size(peak_memory())}"
    )
    before, after = progress.held_out_before, progress.held_out_after
    if before is not None and after is not None:
        typer.echo(
            f"held out: loss {before:.3f} before, {after:.3f} after; perplexity "
            f"{math.exp(before):.2f} before, {math.exp(after):.2f} after"
        )
    if is_done:
        typer.echo(f"the adapter is in {out}: ktk run {model} --adapter {out} PROMPT")
    else:
        typer.echo(f"stopped: the same command with --resume goes on from {out}")


COMMANDS = {"": command, "export": train_export.command}
