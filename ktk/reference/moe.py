"""The operator in NumPy: once exactly as the kernels compute it, once in float64 as an oracle.

Shared with what runs, because it says where bytes lie and what they mean, and tests of its own
compare it: the geometry of panels (``ktk.experts.layout``, ``panels``), decoding, and the rounding
of activations (``ktk.experts.rows``), which the NUMBA backend takes too and the C kernels do not.
All sums, products and activation functions are this package's own.
"""

from __future__ import annotations

import numpy as np

from ktk.experts.activation import Activation
from ktk.experts.dequantise import expert_weights
from ktk.experts.fma import fma
from ktk.experts.formats import FINE_MOST
from ktk.experts.layout import MatrixLayout
from ktk.experts.panels import read_fine_panels, read_panels
from ktk.experts.rows import poison_rows, quantise_activations
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights, StoredExperts
from ktk.reference.activation import activate
from ktk.reference.linear import linear_fine, linear_float, linear_integer
from ktk.reference.tiles import linear_bf16

F = np.float32


class ExactExperts:
    """Exact model of one layer's packed experts: what every kernel's output is compared with.

    bf16_on_tiles : bf16 panels are multiplied as AMX tiles do it, in other float sums.
    """

    def __init__(self, packed: StoredExperts, bf16_on_tiles: bool = False) -> None:
        self.stored, self.spec = packed, packed.spec
        self.is_on_tiles = bf16_on_tiles and packed.spec.weight_format == "bf16"
        self.layout = packed.spec.layout

    def panels(self, expert: int, projection: str) -> np.ndarray:
        """One projection's panels, uint8 (num_panels, panel_bytes); a view. gate, up or down."""
        return self.stored.matrices[projection].data[self.stored.place(expert)]

    def bias(self, expert: int, projection: str) -> np.ndarray | None:
        """float32 (out_features,) or None."""
        bias = self.stored.biases.get(projection)
        return None if bias is None else bias[self.stored.place(expert)]

    def matrix(self, projection: str) -> MatrixLayout:
        return self.layout.matrix(projection)

    def linear(self, expert: int, projection: str, x: np.ndarray) -> np.ndarray:
        """float32 (rows, in_features) to float32 (rows, out_features), bias not added."""
        matrix = self.matrix(projection)
        panels = self.panels(expert, projection)
        if matrix.format.is_fine:
            group = matrix.activation_group
            act = quantise_activations(x, matrix.padded_in, group, most=FINE_MOST)
            y = linear_fine(*read_fine_panels(panels, matrix), act, matrix)
            return y[:, : matrix.out_features]
        codes, scales = read_panels(panels, matrix)
        if matrix.format.is_integer:
            act = quantise_activations(
                x, matrix.padded_in, matrix.activation_group, matrix.rotation
            )
            y = linear_integer(codes, scales, act, matrix, matrix.format.zero_point)
        elif self.is_on_tiles:
            y = linear_bf16(codes[:, : x.shape[1]], x)
        else:
            grouped = (scales, matrix.group_size) if scales.size else ()
            y = linear_float(codes[:, : x.shape[1]], x, *grouped)
        return y[:, : matrix.out_features]

    def dequantised(self, expert: int) -> ExpertWeights:
        """The expert's weights as the codes say, float32."""
        return expert_weights(self.stored, expert)

    def expert(self, expert: int, x: np.ndarray) -> np.ndarray:
        """One expert on float32 (rows, hidden_size): float32 (rows, hidden_size),
        down bias added.
        """
        x = poison_rows(x)
        up = _add(self.linear(expert, "up", x), self.bias(expert, "up"))
        gate = None
        if self.spec.has_gate:
            gate = _add(self.linear(expert, "gate", x), self.bias(expert, "gate"))
        h = activate(gate, up, self.spec.activation)  # (rows, intermediate_size)
        return _add(self.linear(expert, "down", h), self.bias(expert, "down"))

    def forward(
        self,
        hidden: np.ndarray,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        skip: np.ndarray | None = None,
        add: np.ndarray | None = None,
    ) -> np.ndarray:
        """float32 (tokens, hidden_size); slots summed in top-k order, ``add`` last."""
        tokens, top_k = topk_ids.shape
        live = (topk_ids >= 0) & (topk_ids < self.spec.num_experts)
        if skip is not None:
            live &= ~skip.astype(bool)[np.where(live, topk_ids, 0)]
        y = np.zeros((tokens, top_k, self.spec.hidden_size), F)
        for e in np.unique(topk_ids[live]):
            token, slot = np.nonzero(live & (topk_ids == e))
            y[token, slot] = self.expert(int(e), hidden[token])
        out = np.zeros((tokens, self.spec.hidden_size), F)
        for j in range(top_k):
            out = np.where(live[:, j, None], fma(topk_weights[:, j, None], y[:, j], out), out)
        return out if add is None else out + add


def _add(y: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    return y if bias is None else y + bias


def oracle_sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) in float64, of any x: nothing overflows."""
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, e) / (1.0 + e))


def oracle_activation(gate: np.ndarray | None, up: np.ndarray, act: Activation) -> np.ndarray:
    """The activation in float64, written from its definition."""
    x = up if gate is None else np.clip(gate, act.gate_min, act.gate_max)
    if act.kind == "sigmoid_glu":
        h = x * oracle_sigmoid(act.alpha * x)
    elif act.kind == "gelu_tanh":
        x = up if gate is None else gate
        h = 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))
    else:
        h = np.maximum(up if gate is None else gate, 0.0) ** 2
    return h if gate is None else h * (np.clip(up, act.up_min, act.up_max) + act.up_offset)


def oracle_forward(
    experts: list[ExpertWeights],
    spec: MoESpec,
    hidden: np.ndarray,
    topk_ids: np.ndarray,
    topk_weights: np.ndarray,
) -> np.ndarray:
    """float64 (tokens, hidden_size) of float experts, nothing quantised."""
    out = np.zeros((len(hidden), spec.hidden_size))
    x = hidden.astype(np.float64)
    for e, w in enumerate(experts):
        for j in range(topk_ids.shape[1]):
            t = np.nonzero(topk_ids[:, j] == e)[0]
            if not len(t):
                continue
            up = x[t] @ w.up.astype(np.float64).T + (0.0 if w.up_bias is None else w.up_bias)
            gate = None
            if w.gate is not None:
                gate = x[t] @ w.gate.astype(np.float64).T + (
                    0.0 if w.gate_bias is None else w.gate_bias
                )
            h = oracle_activation(gate, up, spec.activation)
            y = h @ w.down.astype(np.float64).T + (0.0 if w.down_bias is None else w.down_bias)
            out[t] += topk_weights[t, j, None].astype(np.float64) * y
    return out
