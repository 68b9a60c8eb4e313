"""Adapters, calls and bounds for tests of training."""

from __future__ import annotations

import numpy as np

from ktk.experts.activation import Activation
from ktk.experts.formats.floats import f32_to_bf16
from ktk.experts.lora import ExpertLora
from ktk.experts.spec import MoESpec
from make.cases import random_hidden, random_routing

ACTIVATIONS = {
    "silu": Activation.silu(),
    "silu clamped": Activation.silu(2.0),
    "swigluoai": Activation.swigluoai(1.702, 3.0),
    "swigluoai with a floor": Activation.swigluoai(1.5, 2.0, gate_floor=True),
    "gelu_tanh": Activation.gelu_tanh(),
    "relu2": Activation.relu2(),
}
PROJECTIONS = ("gate", "up", "down")


def random_lora(
    spec: MoESpec,
    rank: int,
    targets: tuple[str, ...] = PROJECTIONS,
    *,
    scaling: float = 0.7,
    dropout: float = 0.0,
    seed: int = 0,
    is_bf16: bool = False,
) -> ExpertLora:
    """Normal A and B, none of them zero."""
    rng = np.random.default_rng(rank)
    arrays = {}
    for target in targets:
        if target == "gate" and not spec.has_gate:
            continue
        for letter in "ab":
            name = f"{target}_{letter}"
            shape = ExpertLora.shape(name, spec, rank)
            values = (rng.standard_normal(shape) * 0.2).astype(np.float32)
            arrays[name] = f32_to_bf16(values) if is_bf16 else values
    return ExpertLora(**arrays, scaling=scaling, dropout=dropout, seed=seed)


def random_call(
    spec: MoESpec, tokens: int, top_k: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """hidden, topk_ids, topk_weights and the output's gradient."""
    ids, weights = random_routing(tokens, top_k, spec.num_experts, seed)
    hidden = random_hidden(tokens, spec.hidden_size, seed + 1)
    return hidden, ids, weights, random_hidden(tokens, spec.hidden_size, seed + 2)


def assert_near(want: np.ndarray, got: np.ndarray, bound: float, size: float = 0.0) -> None:
    """The difference's norm is at most ``bound`` of want's, or of ``size`` if that is more: what
    want's terms come to where they cancel. No element is off by more than 4 times its share.
    """
    if want.shape != got.shape:
        raise AssertionError(f"shape {got.shape}, not {want.shape}")
    error = got.astype(np.float64) - want
    norm = max(float(np.linalg.norm(want)), size)
    if not np.linalg.norm(error) <= bound * norm:
        raise AssertionError(f"off by {np.linalg.norm(error) / norm:.3g} of {bound}")
    largest = max(np.abs(want).max(initial=0), size)
    if not np.abs(error).max(initial=0) <= 4 * bound * largest:
        raise AssertionError("one element is off by more than the rest")
