"""SGLang's --kt-... arguments, looked at before SGLang starts: what ktk cannot serve is told in one
line instead of by a scheduler process minutes later.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from ktk import backends
from ktk.checkpoint import is_gguf
from ktk.integration.kt_kernel.arguments import ktk_method
from ktk.machine import threads as engine
from ktk.paths import user_path

# Decode steps of ktk's experts can be captured in a CUDA graph, which no GPU here has tried: so
# SGLang is told to do without, except where ktk's own argument asks for graphs.
NO_GRAPH = "--disable-cuda-graph"
WITH_GRAPH = "--ktk-cuda-graph"
_LORA = ("--kt-lora-path", "--kt-expert-lora-path")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--kt-weight-path")
    parser.add_argument("--kt-method", default="AMXINT4")
    for name in ("cpuinfer", "threadpool-count", "num-gpu-experts"):
        parser.add_argument(f"--kt-{name}", type=int)
    parser.add_argument("--kt-numa-nodes", type=int, nargs="+")
    parser.add_argument("--kt-gpu-experts-ratio", type=float)
    parser.add_argument("--kt-max-deferred-experts-per-token", type=int)
    parser.add_argument("--kt-gpu-prefill-token-threshold", type=int)
    for name in _LORA:
        parser.add_argument(name)
    return parser


def checked_arguments(arguments: Sequence[str]) -> list[str]:
    """What to start SGLang with: the arguments without ``WITH_GRAPH``, and ``NO_GRAPH`` where
    neither is among them.

    Raises ValueError that names the argument and what it may be.
    """
    given = [a.partition("=")[0] for a in arguments]
    found, _ = _parser().parse_known_args(list(arguments))
    _check_weights(given, found)
    for name in _LORA:
        if name in given:
            raise ValueError(f"{name}: experts with adapters are not in this version of ktk")
    least = {
        "--kt-num-gpu-experts": found.kt_num_gpu_experts,
        "--kt-max-deferred-experts-per-token": found.kt_max_deferred_experts_per_token,
        "--kt-gpu-prefill-token-threshold": found.kt_gpu_prefill_token_threshold,
    }
    for name, value in least.items():
        if value is not None and value < 0:
            raise ValueError(f"{name} {value}: must be at least 0")
    ratio = found.kt_gpu_experts_ratio
    if ratio is not None and not 0 <= ratio <= 1:
        raise ValueError(f"--kt-gpu-experts-ratio {ratio}: must be 0 to 1")
    backends.check_method(ktk_method(found.kt_method))
    # SGLang's own default is 2, which only a machine of two NUMA nodes has.
    count = 2 if found.kt_threadpool_count is None else found.kt_threadpool_count
    nodes = None if found.kt_numa_nodes is None else tuple(found.kt_numa_nodes)
    try:
        engine.acquire(engine.Holder(), found.kt_cpuinfer, count, nodes)
    except ValueError as error:
        raise ValueError(
            "--kt-cpuinfer, --kt-threadpool-count (SGLang's default is 2) and --kt-numa-nodes: "
            f"{error}"
        ) from error
    passed = [a for a in arguments if a != WITH_GRAPH]
    return [*passed, *(() if NO_GRAPH in given or WITH_GRAPH in given else (NO_GRAPH,))]


def _check_weights(given: Sequence[str], found: Any) -> None:
    if found.kt_weight_path is None:
        others = ", ".join(name for name in given if name.startswith("--kt-"))
        raise ValueError(
            "--kt-weight-path is missing: without it SGLang puts every expert on the GPU"
            + (f" and ignores {others}" if others else "")
            + "; name a packed directory (ktk convert), the model's own, or a GGUF file"
        )
    path = user_path(found.kt_weight_path)
    if not path.exists():
        raise ValueError(f"--kt-weight-path {path}: no such file or directory")
    if not path.is_dir() and not is_gguf(path):
        raise ValueError(f"--kt-weight-path {path}: must be a directory or a .gguf file")
