"""One MoE layer: ktk's methods against torch's bf16 loop. `make bench`, or pytest bench --benchmark-group-by=group.

Routing is fresh for every call, so decode reads its weights from RAM as it does in a model.
"""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from shapes import SHAPES, Shape

import ktk
from ktk import backends
from ktk.memory import aligned_buffer
from ktk.pack import pack_experts
from ktk.reference.moe import ExactExperts
from ktk.types import ExpertWeights, MoESpec

METHODS = [("INT4", 32), ("INT4", 128), ("INT8", 0), ("BF16", 0)]
TOKENS = [1, 4, 16, 64, 256, 1024]
_built: dict[tuple[str, str, int], ktk.MoE] = {}


def build(shape_name: str, method: str, group: int) -> ktk.MoE:
    """One layer at a time stays in memory: the experts share one random expert's codes, not its memory."""
    key = (shape_name, method, group)
    if key not in _built:
        _built.clear()
        gc.collect()
        s = SHAPES[shape_name]
        rng = np.random.default_rng(0)
        shapes = [(s.intermediate_size, s.hidden_size)] * 2 + [(s.hidden_size, s.intermediate_size)]
        weights = ExpertWeights(*(rng.standard_normal(x, np.float32) * 0.02 for x in shapes))
        fmt = backends.method_format(method)
        assert fmt is not None
        spec = MoESpec(s.num_experts, s.hidden_size, s.intermediate_size, fmt, group)
        one = pack_experts(MoESpec(1, *shapes[2], fmt, group), lambda e: weights)
        data = aligned_buffer(spec.num_experts * spec.layout.expert_bytes)
        data = data.reshape(spec.num_experts, -1)
        data[:] = one.data
        moe = ktk.MoE(ktk.Packed(spec, data))
        x, ids, w = inputs(s, 2, 0)
        assert np.array_equal(moe(x, ids, w), ExactExperts(moe.packed).forward(x, ids, w))
        _built[key] = moe
    return _built[key]


def inputs(s: Shape, tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, s.hidden_size), np.float32)
    ids = rng.random((tokens, s.num_experts)).argsort(axis=1)[:, : s.top_k].copy()
    return x, ids, np.full((tokens, s.top_k), 1 / s.top_k, np.float32)


def report(benchmark, s: Shape, tokens: int, bits: float) -> None:  # type: ignore[no-untyped-def]
    """GOP/s of the multiplications and GB/s of the expected unique experts, in extra_info."""
    weights = 3 * s.hidden_size * s.intermediate_size
    touched = s.num_experts * (1 - (1 - s.top_k / s.num_experts) ** tokens)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["GOP/s"] = round(2 * weights * s.top_k * tokens / seconds / 1e9, 1)
    benchmark.extra_info["GB/s"] = round(touched * weights * bits / 8 / seconds / 1e9, 1)
    benchmark.extra_info["threads"] = ktk.cpu.num_physical_cores()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("method", "group"), METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ktk(benchmark, shape: str, method: str, group: int, tokens: int) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"{shape} tokens={tokens}"
    s, moe = SHAPES[shape], build(shape, method, group)
    calls = [inputs(s, tokens, seed) for seed in range(16 if tokens <= 64 else 3)]
    state = {"i": 0}

    def call() -> None:
        state["i"] += 1
        moe(*calls[state["i"] % len(calls)])

    benchmark.pedantic(call, rounds=40 if tokens <= 64 else 5, warmup_rounds=3)
    report(benchmark, s, tokens, moe.packed.bits_per_weight)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_bf16(benchmark, shape: str, tokens: int) -> None:  # type: ignore[no-untyped-def]
    """The loop over experts everyone has, in bf16."""
    benchmark.group = f"{shape} tokens={tokens}"
    s = SHAPES[shape]
    _built.clear()
    gc.collect()
    rng = torch.Generator().manual_seed(0)
    gate_up = torch.randn(2 * s.intermediate_size, s.hidden_size, generator=rng).bfloat16() * 0.02
    down = torch.randn(s.hidden_size, s.intermediate_size, generator=rng).bfloat16() * 0.02
    experts = [(gate_up.clone(), down.clone()) for _ in range(s.num_experts)]
    x, ids, w = (torch.from_numpy(a) for a in inputs(s, tokens, 0))
    x = x.bfloat16()

    def call() -> torch.Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = (ids == e).nonzero(as_tuple=True)
            g, u = (x[t] @ experts[e][0].T).chunk(2, dim=-1)
            y = (torch.nn.functional.silu(g) * u) @ experts[e][1].T
            out.index_add_(0, t, y * w[t, j, None].bfloat16())
        return out

    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    report(benchmark, s, tokens, 16)
