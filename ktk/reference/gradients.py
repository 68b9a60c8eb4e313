"""Experts with adapters and their gradients in NumPy: the oracle of training, written from the
formulas.

For P of gate and up:  z_P = W_P x + b_P + s B_P A_P drop(x);  h = act(z);
y = W_d h + b_d + s B_d A_d drop(h);  output = sum over slots of weight * y.

In float64, or in the dtype that is asked for. The rounding of activations counts as the identity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ktk.experts.activation import Activation
from ktk.experts.formats.floats import to_f32
from ktk.experts.lora import ExpertLora
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights
from ktk.reference.moe import oracle_activation, oracle_sigmoid

_MOD = 1 << 32


def _fmix32(h: int) -> int:
    """The finaliser of MurmurHash3 (Appleby), which mixes all bits of 32."""
    h ^= h >> 16
    h = h * 0x85EBCA6B % _MOD
    h ^= h >> 13
    h = h * 0xC2B2AE35 % _MOD
    return h ^ h >> 16


def dropout_factor(lora: ExpertLora, pair: int, is_down: bool, columns: int) -> np.ndarray:
    """float64 (columns,): 0 where a pair's input of A is dropped, else 1 / (1 - dropout).

    pair : token * top_k + slot. is_down : of the down projection's adapter; gate and up share the
        other.
    """
    if not lora.dropout:
        return np.ones(columns)
    base = _fmix32((lora.seed + 0x9E3779B9 * (2 * pair + is_down)) % _MOD)
    bits = [_fmix32((base + 0x9E3779B9 * column) % _MOD) for column in range(columns)]
    is_kept = np.array(bits, np.int64) >= int(lora.dropout * _MOD)
    return np.where(is_kept, 1 / (1 - lora.dropout), 0.0)


def oracle_slopes(
    gate: np.ndarray | None, up: np.ndarray, act: Activation
) -> tuple[np.ndarray, np.ndarray]:
    """The activation's derivatives by gate (zero without one) and by up, from its definition."""
    x = up if gate is None else gate
    f = oracle_activation(None, np.clip(x, *_gate_bounds(gate, act)), act)
    if act.kind == "sigmoid_glu":
        clipped = np.clip(x, *_gate_bounds(gate, act))
        z = act.alpha * clipped
        slope = oracle_sigmoid(z) * (1 + z * oracle_sigmoid(-z))
        low, high = _gate_bounds(gate, act)
        slope = slope * ((x >= low) & (x <= high))
    elif act.kind == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        tanh = np.tanh(c * (x + 0.044715 * x**3))
        slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * c * (1 + 3 * 0.044715 * x**2)
    else:
        slope = 2 * np.maximum(x, 0)
    if gate is None:
        return np.zeros_like(up), slope
    factor = np.clip(up, act.up_min, act.up_max) + act.up_offset
    return slope * factor, f * ((up >= act.up_min) & (up <= act.up_max))


def _gate_bounds(gate: np.ndarray | None, act: Activation) -> tuple[float, float]:
    is_clipped = gate is not None and act.kind == "sigmoid_glu"
    return (act.gate_min, act.gate_max) if is_clipped else (-math.inf, math.inf)


@dataclass
class _Pair:
    """One token in one of its slots, and what its expert makes of it."""

    token: int
    slot: int
    expert: int
    weights: ExpertWeights
    x: np.ndarray  # (H,)
    factors: dict[str, np.ndarray]  # of each projection's input of A
    z: dict[str, np.ndarray]  # of gate and up, (I,)
    h: np.ndarray  # (I,)
    y: np.ndarray  # (H,)


class LoraOracle:
    """One layer's float experts with adapters: pair by pair, as slow as it is plain.

    experts : ids outside their range add nothing. dtype : of all arithmetic.
    """

    def __init__(
        self,
        experts: list[ExpertWeights],
        spec: MoESpec,
        lora: ExpertLora | None = None,
        dtype: Any = np.float64,
    ) -> None:
        self.spec, self.dtype = spec, dtype
        self.experts = [
            ExpertWeights(*(None if a is None else to_f32(a).astype(dtype) for a in e))  # type: ignore[arg-type]
            for e in experts
        ]
        self.lora = lora or ExpertLora()
        self.adapters = {n: to_f32(a).astype(dtype) for n, a in self.lora.arrays.items()}

    def forward(
        self, hidden: np.ndarray, topk_ids: np.ndarray, topk_weights: np.ndarray
    ) -> np.ndarray:
        """(num_tokens, hidden_size) of ``dtype``; arguments as ``ktk.MoE.forward`` takes them."""
        out = np.zeros((len(hidden), self.spec.hidden_size), self.dtype)
        for pair in self._pairs(hidden, topk_ids, None):
            out[pair.token] += self.dtype(topk_weights[pair.token, pair.slot]) * pair.y
        return out

    def backward(
        self,
        hidden: np.ndarray,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        grad: np.ndarray,
        z: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Gradients of hidden, of topk_weights and of each matrix of the adapters.

        grad : (num_tokens, hidden_size), of the output. z : (pairs, projections, I) gate (if there
            is one) and up of the forward pass, in the order of expert, token, slot; None computes
            them.
        """
        s, spec = self.dtype(self.lora.scaling), self.spec
        d_hidden = np.zeros((len(hidden), spec.hidden_size), self.dtype)
        d_weights = np.zeros(topk_ids.shape, self.dtype)
        d_adapters = {name: np.zeros_like(a) for name, a in self.adapters.items()}
        for pair in self._pairs(hidden, topk_ids, z):
            g, w = grad[pair.token].astype(self.dtype), pair.weights
            # y of the h that is differentiated, not of the one that was rounded
            d_weights[pair.token, pair.slot] = g @ pair.y
            d_y = self.dtype(topk_weights[pair.token, pair.slot]) * g
            d_h = w.down.T @ d_y + self._adapter_back(pair, "down", pair.h, d_y, s, d_adapters)
            d_gate, d_up = oracle_slopes(pair.z.get("gate"), pair.z["up"], spec.activation)
            d_x = w.up.T @ (d_h * d_up)
            d_x += self._adapter_back(pair, "up", pair.x, d_h * d_up, s, d_adapters)
            if w.gate is not None:
                d_x += w.gate.T @ (d_h * d_gate)
                d_x += self._adapter_back(pair, "gate", pair.x, d_h * d_gate, s, d_adapters)
            d_hidden[pair.token] += d_x
        return d_hidden, d_weights, d_adapters

    def _adapter(self, e: int, name: str, dropped: np.ndarray) -> Any:
        if f"{name}_a" not in self.adapters:
            return 0
        a, b = self.adapters[f"{name}_a"][e], self.adapters[f"{name}_b"][e]
        return self.dtype(self.lora.scaling) * (b @ (a @ dropped))

    def _adapter_back(
        self, pair: _Pair, name: str, x: np.ndarray, d_z: np.ndarray, s: Any, totals: dict[str, Any]
    ) -> Any:
        """The gradient of x through the adapter; A's and B's are added to ``totals``."""
        if f"{name}_a" not in self.adapters:
            return 0
        a, b = self.adapters[f"{name}_a"][pair.expert], self.adapters[f"{name}_b"][pair.expert]
        dropped = x * pair.factors[name]
        totals[f"{name}_b"][pair.expert] += s * np.outer(d_z, a @ dropped)
        totals[f"{name}_a"][pair.expert] += s * np.outer(b.T @ d_z, dropped)
        return s * pair.factors[name] * (a.T @ (b.T @ d_z))

    def _pairs(
        self, hidden: np.ndarray, topk_ids: np.ndarray, z: np.ndarray | None
    ) -> Iterator[_Pair]:
        """In the order of expert, token, slot."""
        spec, top_k, number = self.spec, topk_ids.shape[1], 0
        for e, w in enumerate(self.experts):
            for token, slot in np.argwhere(topk_ids == e).tolist():
                x, at = hidden[token].astype(self.dtype), token * top_k + slot
                first = dropout_factor(self.lora, at, False, spec.hidden_size).astype(self.dtype)
                last = dropout_factor(self.lora, at, True, spec.intermediate_size)
                factors = {"gate": first, "up": first, "down": last.astype(self.dtype)}
                found = {"up": w.up @ x + _or_zero(w.up_bias)}
                if w.gate is not None:
                    found["gate"] = w.gate @ x + _or_zero(w.gate_bias)
                found = {n: v + self._adapter(e, n, x * first) for n, v in found.items()}
                if z is not None:
                    names = ("gate", "up") if w.gate is not None else ("up",)
                    found = dict(zip(names, z[number].astype(self.dtype), strict=True))
                h = oracle_activation(found.get("gate"), found["up"], spec.activation)
                y = w.down @ h + _or_zero(w.down_bias)
                y = y + self._adapter(e, "down", h * factors["down"])
                number += 1
                yield _Pair(token, slot, e, w, x, factors, found, h, y)


def _or_zero(bias: np.ndarray | None) -> Any:
    return 0 if bias is None else bias
