"""Random experts, routings and the exact comparison every kernel test uses."""

from __future__ import annotations

import functools

import numpy as np

from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights, StoredExperts
from ktk.machine.memory import aligned_buffer
from ktk.quantise.pack import pack_expert


def random_experts(spec: MoESpec, seed: int, scale: float = 0.05) -> list[ExpertWeights]:
    """Normal weights with some outliers, float32; biases where the spec has them."""
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        w = rng.standard_normal(shape) * scale
        return (w * np.where(rng.random(shape) < 0.01, 4, 1)).astype(np.float32)

    def bias(n: int) -> np.ndarray | None:
        return matrix(n) if spec.has_bias else None

    i, h = spec.intermediate_size, spec.hidden_size
    return [
        ExpertWeights(
            matrix(i, h) if spec.has_gate else None,
            matrix(i, h),
            matrix(h, i),
            bias(i) if spec.has_gate else None,
            bias(i),
            bias(h),
        )
        for _ in range(spec.num_experts)
    ]


def pack_all(spec: MoESpec, experts: list[ExpertWeights]) -> StoredExperts:
    data = aligned_buffer(spec.num_experts * spec.layout.expert_bytes).reshape(spec.num_experts, -1)
    for e, weights in enumerate(experts):
        pack_expert(spec, weights, data[e])
    return StoredExperts.of_panels(spec, data)


@functools.lru_cache(maxsize=1)  # the implementations that run a case follow each other
def packed_experts(spec: MoESpec, seed: int) -> StoredExperts:
    """``random_experts``, packed; the same ones again, which nobody may change."""
    return pack_all(spec, random_experts(spec, seed))


def random_routing(
    num_tokens: int, top_k: int, num_experts: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids per token as int64, positive weights that sum to 1 as float32."""
    rng = np.random.default_rng(seed)
    order = rng.random((num_tokens, num_experts)).argsort(axis=1)
    ids = np.ascontiguousarray(order[:, :top_k], np.int64)
    weights = rng.random((num_tokens, top_k)) + 0.1
    return ids, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def random_hidden(num_tokens: int, hidden_size: int, seed: int) -> np.ndarray:
    """float32 (num_tokens, hidden_size) with a few large entries, as real activations have."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_tokens, hidden_size))
    return (x * np.where(rng.random(x.shape) < 0.02, 10, 1)).astype(np.float32)


def assert_exact(expected: np.ndarray, got: np.ndarray) -> None:
    """Same dtype, shape and bits; NaN equals NaN whatever its payload.

    Names the first differing element.
    """
    if expected.dtype != got.dtype or expected.shape != got.shape:
        raise AssertionError(
            f"expected {expected.dtype} {expected.shape}, got {got.dtype} {got.shape}"
        )
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[expected.dtype.itemsize]
    a, b = np.ascontiguousarray(expected), np.ascontiguousarray(got)
    differs = a.view(unsigned) != b.view(unsigned)
    if expected.dtype.kind == "f":
        differs &= ~(np.isnan(a) & np.isnan(b))
    if differs.any():
        where = tuple(int(i) for i in np.argwhere(differs)[0])
        raise AssertionError(
            f"{int(differs.sum())} of {differs.size} elements differ, first at {where}: "
            f"expected {a[where]!r}, got {b[where]!r}"
        )
