"""NUMBA: compiled at first use, on any CPU that LLVM knows. Same bits as the C kernels."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ktk.backends.base import Backend, Operands, Runner, describe, refuse_blocks
from ktk.experts.activation import ACTIVATION_KINDS
from ktk.experts.formats import FINE_MOST
from ktk.experts.formats.floats import to_f32
from ktk.experts.layout import PANEL
from ktk.experts.panels import decoded_codes, read_fine_panels, read_panels
from ktk.experts.rows import poison_rows, quantise_activations, store_rows
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.machine.threads import EngineLayout

F = np.float32


def _by_panel(rows: np.ndarray) -> np.ndarray:
    """(padded_out, n) to (panels, n, 16)."""
    panels = rows.reshape(len(rows) // PANEL, PANEL, rows.shape[1])
    return np.ascontiguousarray(panels.transpose(0, 2, 1))


class NumbaRunner(Runner):
    """Experts are tasks of a thread pool; within one, NumPy lays out and Numba computes."""

    def __init__(self, packed: StoredExperts, num_threads: int) -> None:
        from ktk.backends import _numba_kernels

        self.kernels: Any = _numba_kernels
        self.stored = packed
        self.spec = packed.spec
        self.num_threads = num_threads

    def packed(self) -> StoredExperts:
        return self.stored

    def weights(self) -> list[np.ndarray]:
        return [self.stored.data]

    def _linear(self, expert: int, projection: str, x: np.ndarray) -> np.ndarray:
        """float32 (rows, in_features) to (rows, out_features), bias added."""
        matrix, fmt = self.spec.layout.matrix(projection), self.spec.format
        panels = np.ascontiguousarray(
            self.stored.matrices[projection].data[self.stored.place(expert)]
        )
        out = np.empty((len(x), matrix.num_panels, PANEL), F)
        if fmt.is_integer:
            act = quantise_activations(
                x, matrix.padded_in, matrix.activation_group, matrix.rotation
            )
            starts = np.arange(0, matrix.padded_in, matrix.fine_group)
            sums = np.add.reduceat(act.codes.astype(np.int32), starts, axis=1)
            correction = (-fmt.zero_point * sums).astype(np.int32)
            scales = matrix.scale_values(panels)
            codes, bits = panels[:, matrix.scale_bytes :], fmt.bits
            if fmt.levels:
                codes, bits = decoded_codes(panels, matrix), 8
            self.kernels.gemm_integer(
                codes,
                bits,
                scales.reshape(len(panels), -1, PANEL),
                act.codes,
                act.scales,
                correction,
                matrix.group_size,
                matrix.activation_group,
                out,
            )
        elif fmt.is_fine:
            group = matrix.activation_group
            act = quantise_activations(x, matrix.padded_in, group, most=FINE_MOST)
            values, scales, by = read_fine_panels(panels, matrix)
            self.kernels.gemm_fine(
                _by_panel(values),
                _by_panel(scales),
                by,
                matrix.fine_group,
                act.codes.astype(F),
                act.scales,
                out,
            )
        else:
            padded = np.zeros((len(x), matrix.padded_in), F)
            padded[:, : x.shape[1]] = x
            weights, scales = read_panels(panels, matrix)
            group = matrix.group_size if scales.size else matrix.padded_in
            if not scales.size:
                scales = np.empty((len(weights), 0), F)
            self.kernels.gemm_float(_by_panel(weights), _by_panel(scales), group, padded, out)
        return out.reshape(len(x), -1)[:, : matrix.out_features]

    def _biased(self, expert: int, projection: str, x: np.ndarray) -> np.ndarray:
        y = self._linear(expert, projection, x)
        bias = self.stored.biases.get(projection)
        return np.ascontiguousarray(y if bias is None else y + bias[expert])

    def _expert(self, expert: int, x: np.ndarray) -> np.ndarray:
        a = self.spec.activation
        up = self._biased(expert, "up", x)
        gate = self._biased(expert, "gate", x) if self.spec.has_gate else up
        h = np.empty_like(up)
        with np.errstate(all="ignore"):
            self.kernels.activate(
                gate,
                up,
                ACTIVATION_KINDS.index(a.kind),
                self.spec.has_gate,
                F(a.alpha),
                F(a.gate_min),
                F(a.gate_max),
                F(a.up_min),
                F(a.up_max),
                F(a.up_offset),
                h,
            )
        return self._biased(expert, "down", h)

    def forward(self, given: Operands) -> None:
        hidden, topk_ids, topk_weights, skip, out, add = given
        x = poison_rows(to_f32(hidden))
        tokens, top_k = topk_ids.shape
        live = (topk_ids >= 0) & (topk_ids < self.spec.num_experts)
        if skip is not None:
            live &= ~skip[np.where(live, topk_ids, 0)]
        y = np.zeros((tokens, top_k, self.spec.hidden_size), F)

        def work(expert: int) -> None:
            token, slot = np.nonzero(live & (topk_ids == expert))
            y[token, slot] = self._expert(expert, x[token])

        self._each(work, np.unique(topk_ids[live]))
        acc = np.zeros((tokens, self.spec.hidden_size), F)
        for t, j in np.argwhere(live):  # slots in top-k order
            self.kernels.add_scaled(acc[t], y[t, j], topk_weights[t, j])
        store_rows(acc if add is None else acc + add, out)

    def linear(self, projection: str, x: np.ndarray, expert_ids: np.ndarray) -> np.ndarray:
        names = (
            ("down",) if projection == "down" else ("gate", "up") if self.spec.has_gate else ("up",)
        )
        x = poison_rows(x)
        y = np.empty((len(x), sum(self.stored.matrices[n].out_features for n in names)), F)

        def work(expert: int) -> None:
            rows = np.nonzero(expert_ids == expert)[0]
            y[rows] = np.concatenate([self._linear(expert, n, x[rows]) for n in names], axis=1)

        self._each(work, np.unique(expert_ids))
        return y

    def _each(self, work: Any, experts: np.ndarray) -> None:
        if len(experts) <= 1 or self.num_threads == 1:
            for e in experts:
                work(int(e))
            return
        with ThreadPoolExecutor(self.num_threads) as pool:
            list(pool.map(work, map(int, experts)))


class NumbaBackend(Backend):
    name = "NUMBA"
    is_last_resort = True

    def why_not(self, spec: MoESpec | None = None) -> str | None:
        if importlib.util.find_spec("numba") is None:
            return "numba is not installed (pip install numba)"
        return refuse_blocks(spec)

    def kernel(self, spec: MoESpec) -> str:
        return f"numba {describe(spec)}"

    def load(self, packed: StoredExperts, engine: EngineLayout) -> Runner:
        return NumbaRunner(packed, engine.num_threads)
