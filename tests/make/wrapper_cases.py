"""Small wrappers, routings and what they must give, for the KTMoEWrapper tests."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import ktk
from ktk.backends import Operands
from ktk.machine import queue as fifo
from ktk.reference.moe import ExactExperts

E, K, H, N = 6, 3, 64, 32
NAMES = ("gate", "up", "down")


def make(layer_idx: int = 0, **arguments: Any) -> ktk.KTMoEWrapper:
    """A small wrapper on the NUMPY backend; ``arguments`` replace its own."""
    fields: dict[str, Any] = {
        "num_experts": E,
        "num_experts_per_tok": K,
        "hidden_size": H,
        "moe_intermediate_size": N,
        "method": "NUMPY",
        "weight_format": "int8",
    }
    return ktk.KTMoEWrapper(layer_idx, **{**fields, **arguments})


def random_weights(seed: int = 0, num_experts: int = E) -> tuple[np.ndarray, ...]:
    """float32 gate, up (E, N, H) and down (E, H, N)."""
    rng = np.random.default_rng(seed)
    shapes = ((num_experts, N, H), (num_experts, N, H), (num_experts, H, N))
    return tuple((rng.standard_normal(s) / 8).astype(np.float32) for s in shapes)


def loaded(layer_idx: int = 0, seed: int = 0, **arguments: Any) -> ktk.KTMoEWrapper:
    wrapper = make(layer_idx, **arguments)
    wrapper.load_weights_from_tensors(*random_weights(seed + layer_idx))
    return wrapper


def routed(
    num_tokens: int, seed: int = 0, top_k: int = K
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 hidden (tokens, H), int64 ids of distinct experts, float32 weights (tokens,
    top_k).
    """
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((num_tokens, H)).astype(np.float32)
    ids = (
        np.stack([rng.permutation(E)[:top_k] for _ in range(num_tokens)])
        if num_tokens
        else np.empty((0, top_k))
    )
    return hidden, ids.astype(np.int64), rng.random((num_tokens, top_k), np.float32)


def exact(
    wrapper: Any,
    hidden: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    skip: np.ndarray | None = None,
    add: np.ndarray | None = None,
) -> np.ndarray:
    """What the wrapper's packed experts must give, bit for bit: float32."""
    return ExactExperts(wrapper.moe.packed).forward(hidden, ids, weights, skip, add)


def assert_same_bits(expected: np.ndarray, got: Any) -> None:
    got = got.numpy() if isinstance(got, torch.Tensor) else got
    assert expected.dtype == got.dtype
    assert expected.shape == got.shape
    assert expected.tobytes() == np.ascontiguousarray(got).tobytes()


@contextlib.contextmanager
def worker_held() -> Iterator[None]:
    """Nothing submitted inside runs before the block ends."""
    gate = threading.Event()
    fifo.submit(lambda: gate.wait(30))
    try:
        yield
    finally:
        gate.set()


def spy(
    wrapper: Any,
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[np.ndarray], object] = lambda hidden: None,
) -> list[int]:
    """Token counts of the runner's calls; ``before`` runs ahead of each."""
    calls: list[int] = []
    real = wrapper.moe.runner.forward

    def forward(given: Operands) -> None:
        calls.append(len(given.hidden))
        before(given.hidden)
        real(given)

    monkeypatch.setattr(wrapper.moe.runner, "forward", forward)
    return calls
