"""``ktk sglang``: SGLang's own server, its CPU experts run by ktk."""

from __future__ import annotations

import importlib.util
import os
import sys

import typer

EPILOG = """Example:

  ktk sglang --model-path Qwen3-30B-A3B --kt-weight-path Qwen3-30B-A3B-int4
  --kt-method AMXINT4 --kt-cpuinfer 32 --kt-threadpool-count 1 --kt-num-gpu-experts 32

All arguments are SGLang's (python -m sglang.launch_server --help), except --ktk-cuda-graph:
SGLang may capture decode steps in CUDA graphs.
"""
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


def command(context: typer.Context) -> None:
    """Start SGLang's server (python -m sglang.launch_server) with ktk as its kt_kernel.

    Arguments behind it are SGLang's, and are passed on. Those that begin with --kt- are looked at
    first.
    """
    from ktk.integration.kt_kernel import install
    from ktk.integration.kt_kernel.sglang_arguments import NO_GRAPH, WITH_GRAPH, checked_arguments

    arguments = checked_arguments(context.args)
    if importlib.util.find_spec("sglang") is None:
        raise ImportError("SGLang is not installed: pip install sglang, or sglang-kt")
    if (other := install.installed()) is not None:
        print(f"ktk stands in for the kt_kernel of {other}", file=sys.stderr)
    if NO_GRAPH in arguments and NO_GRAPH not in context.args:
        print(f"with {NO_GRAPH}; {WITH_GRAPH} leaves it out", file=sys.stderr)
    environment = dict(os.environ)
    install.environment(environment)
    started = [sys.executable, "-m", "sglang.launch_server", *arguments]
    sys.stderr.flush()
    os.execve(sys.executable, started, environment)
