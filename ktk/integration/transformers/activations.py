"""Which ``ktk.Activation`` an experts module computes: tried on numbers, so a name never decides.

Every activation ktk knows, with the limits and alphas found on the module and its config, is
compared with the module's own ``_apply_gate`` (``act_fn`` without a gate) on a fixed probe that
goes beyond those limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ktk.experts.activation import Activation

_LIMIT_NAMES = ("limit", "swiglu_limit", "clamp_limit")
_ALPHA_NAMES = ("alpha", "swiglu_alpha")
_PROBE_WIDTH = 64


def _numbers(module: Any, names: tuple[str, ...]) -> list[float]:
    """Positive numbers under these names on the module or its config, without repeats."""
    found: list[float] = []
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and value > 0
                and value not in found
            ):
                found.append(float(value))
    return found


def _candidates(module: Any) -> Iterator[Activation]:
    yield Activation.silu()
    yield Activation.gelu_tanh()
    yield Activation.relu2()
    for limit in _numbers(module, _LIMIT_NAMES):
        yield Activation.silu(limit)
        for alpha in (*_numbers(module, _ALPHA_NAMES), 1.702):
            yield Activation.swigluoai(alpha, limit)
            yield Activation.swigluoai(alpha, limit, gate_floor=True)
    for alpha in (*_numbers(module, _ALPHA_NAMES), 1.702):
        yield Activation.swigluoai(alpha, 0.0)


def _probe(limits: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """float64 (rows, 64) gate and up, fixed: small values,
    and some to four times the largest limit.
    """
    rng = np.random.default_rng(20240711)
    scales = [0.3, 2.0, 10.0, *(1.5 * limit for limit in limits)]
    rows = [rng.standard_normal((2, _PROBE_WIDTH)) * scale for scale in scales]
    edge = 4 * max(limits, default=8.0)
    rows.append(
        np.stack([np.linspace(-edge, edge, _PROBE_WIDTH), np.linspace(edge, -edge, _PROBE_WIDTH)])
    )
    rows.append(np.stack([np.linspace(-edge, edge, _PROBE_WIDTH)] * 2))
    stacked = np.stack(rows)  # (rows, 2, 64)
    return stacked[:, 0], stacked[:, 1]


def join_gate_up(gate: torch.Tensor, up: torch.Tensor, is_concatenated: bool) -> torch.Tensor:
    """(rows, I) gate and up in the order the module's ``_apply_gate`` takes: (rows, 2 I)."""
    if is_concatenated:
        return torch.cat([gate, up], dim=-1)
    return torch.stack([gate, up], dim=-1).flatten(-2)


def recognise(module: Any) -> Activation | None:
    """The activation of an experts module, or None if ktk has none that computes the same."""
    gate, up = _probe(_numbers(module, _LIMIT_NAMES))
    try:
        with torch.no_grad(), torch.device("cpu"):
            if module.has_gate:
                joined = join_gate_up(
                    torch.from_numpy(gate), torch.from_numpy(up), module.is_concatenated
                )
                given = module._apply_gate(joined)
            else:
                given = module.act_fn(torch.from_numpy(up))
            got = given.double().numpy()
    except (
        Exception
    ):  # it needs something a probe does not have: the fallback calls it with the real thing
        return None
    if got.shape != up.shape:
        return None
    # float32 inside the module is fine, another function is not: exact GELU is 5e-4 from its tanh
    # form.
    tolerance = 1e-6 * (1 + np.abs(up)) * ((1 + np.abs(gate)) if module.has_gate else 1)
    for activation in _candidates(module):
        expected = activation.apply(gate if module.has_gate else None, up)
        if (np.abs(got - expected) <= tolerance + 1e-5 * np.abs(expected)).all():
            return activation
    return None


def recognise_gate(act: Any) -> Activation | None:
    """The activation of an MLP down(act(gate) * up), from its elementwise function;
    None if ktk has none that computes the same.
    """
    gate = _probe([])[0]
    try:
        with torch.no_grad():
            got = act(torch.from_numpy(gate)).double().numpy()
    except Exception:  # no function of one tensor
        return None
    for activation in (Activation.silu(), Activation.gelu_tanh(), Activation.relu2()):
        expected = activation.apply(gate, np.ones_like(gate))
        if np.allclose(got, expected, rtol=1e-5, atol=1e-5):
            return activation
    return None
