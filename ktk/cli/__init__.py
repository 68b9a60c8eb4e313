"""The command line. Each sub-command is a module with a function ``command``, or a table COMMANDS
of such functions with a HELP, and one line in COMMANDS here. The function that a table calls "" is
meant where the first argument names none of the others.

A ``command`` is an ordinary typer function; heavy imports belong inside it, so that ``ktk --help``
is quick.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ktk import __version__, env, log
from ktk.paths import user_path

# In the order a newcomer needs them.
COMMANDS = {
    "doctor": "ktk.cli.doctor",
    "run": "ktk.cli.run",
    "chat": "ktk.cli.chat",
    "serve": "ktk.cli.serve",
    "convert": "ktk.cli.convert",
    "quant": "ktk.cli.convert",  # as users of KTransformers' kt know it
    "imatrix": "ktk.cli.imatrix",
    "train": "ktk.cli.train",
    "demo": "ktk.cli.demo",
    "eval": "ktk.cli.eval",
    "bench": "ktk.cli.bench",
    "bench-serve": "ktk.cli.bench_serve",
    "residency": "ktk.cli.residency",
    "place": "ktk.cli.place",
    "sglang": "ktk.cli.sglang",
}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ktk {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Experts of mixture-of-experts models on the CPU."""


def _with_home(command: Callable[..., None]) -> Callable[..., None]:
    """The command, a leading ~ in its paths expanded:
    no shell does that after ``--option=`` or in quotes.
    """

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(**{k: user_path(v) if isinstance(v, Path) else v for k, v in given.items()})

    return run


_UNNAMED = " "  # of a typer command: "" would be the function's


class _WithUnnamed(TyperGroup):
    """A group whose unnamed command takes what begins with none of the other names."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = [_UNNAMED, *(args or ["--help"])]
        return super().parse_args(ctx, args)


def app() -> typer.Typer:
    """The typer application with every sub-command."""
    application = typer.Typer(
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, callback=_root
    )
    for name, module in COMMANDS.items():
        row = importlib.import_module(module)
        if table := getattr(row, "COMMANDS", None):
            kind = _WithUnnamed if "" in table else None
            group = typer.Typer(no_args_is_help=kind is None, help=row.HELP, cls=kind)
            for own, function in table.items():
                group.command(own or _UNNAMED)(_with_home(function))
            application.add_typer(group, name=name)
            continue
        command = _with_home(row.command)
        application.command(
            name,
            epilog=getattr(row, "EPILOG", None),
            context_settings=getattr(row, "CONTEXT", None),
        )(command)
    return application


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a failure is one line on stderr and exit code 1 (KTK_LOG=debug:
    with traceback).
    """
    debug = False
    try:
        debug = env.log_level() == "debug"
        log.configure()
        app()(args=arguments)
    except KeyboardInterrupt:
        print("ktk: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:  # the border: whatever went wrong, a person reads one line
        if debug:
            raise
        print(f"ktk: error: {str(error) or type(error).__name__}", file=sys.stderr)
        sys.exit(1)
