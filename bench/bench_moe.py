"""One MoE layer: ktk's methods against torch's bf16 loop, grouped by shape and number of tokens.
`make bench`.

For figures beside the machine's ceilings, interleaved, use `ktk bench`; this one compares with
saved runs (pytest bench/bench_moe.py --benchmark-autosave, --benchmark-compare).
"""

from __future__ import annotations

import gc
from typing import Any

import pytest

from ktk.bench.layer import Caller, Layer, build, check_memory, hidden_states, parse_method
from ktk.bench.shapes import SHAPES, routings
from ktk.machine import cpu

METHODS = ["INT4:32", "INT4:128", "INT8", "BF16", "torch"]
TOKENS = [1, 4, 16, 64, 256, 1024]
FEW = 64  # up to this many tokens a call is short
_built: dict[tuple[str, str], Layer] = {}


def layer(shape_name: str, method_text: str) -> Layer:
    """One layer at a time stays in memory."""
    key = (shape_name, method_text)
    if key not in _built:
        _built.clear()
        gc.collect()
        shape, method = SHAPES[shape_name], parse_method(method_text)
        check_memory(shape, [method], 0)
        made = build(shape, method, None)
        made.check(hidden_states(shape, 2), routings(shape, 2, 1, seed=0)[0])
        _built[key] = made
    return _built[key]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape_name", SHAPES)
def test_layer(benchmark: Any, shape_name: str, method: str, tokens: int) -> None:
    benchmark.group = f"{shape_name} tokens={tokens}"
    shape, made = SHAPES[shape_name], layer(shape_name, method)
    pool = routings(shape, tokens, 16 if tokens <= FEW else 3, seed=tokens)
    call = Caller(made, hidden_states(shape, tokens), pool)
    benchmark.pedantic(call, rounds=40 if tokens <= FEW else 5, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    touched = sum(r.touched for r in pool) / len(pool) * made.expert_bytes
    benchmark.extra_info["GOP/s"] = round(shape.operations(tokens) / seconds / 1e9, 1)
    benchmark.extra_info["GB/s"] = round(touched / seconds / 1e9, 1)
    benchmark.extra_info["kernel"] = made.kernel
    benchmark.extra_info["threads"] = cpu.num_physical_cores()
