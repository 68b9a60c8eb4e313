"""Round a layer's experts for an importance matrix: the mean squares of the inputs alone.

No model has to run, so any source can be rounded so, quantised ones too. What error feedback gains
beyond it, ``ktk.quantise.feedback`` needs the inputs' products for.
"""

from __future__ import annotations

import numpy as np

from ktk.experts.formats.floats import to_f32
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights
from ktk.quantise.feedback import Encode, Factor, factorise, turned
from ktk.quantise.pack import check_expert

F = np.float32


class LayerImportance:
    """Rounds the experts of one layer, in any order and from any thread.

    mean_squares, counts : by projection, float32 (num_experts, in_features), of inputs, and
    (num_experts,), of the tokens that each expert saw. An expert without tokens gets the mean of
    the others, weighted by theirs.
    """

    def __init__(
        self, spec: MoESpec, mean_squares: dict[str, np.ndarray], counts: dict[str, np.ndarray]
    ) -> None:
        self.spec = spec
        self._squares: dict[str, np.ndarray] = {}
        for name, squares in mean_squares.items():
            count = counts[name][:, None]
            total = float(count.sum())
            mean = (squares * count).sum(axis=0) / total if total else np.ones(squares.shape[1])
            self._squares[name] = np.where(count > 0, squares, mean).astype(F)

    def filled_up(self, spec: MoESpec) -> LayerImportance:
        """The same for rows that zeros fill up to this spec's sizes, whose inputs count as 1."""
        other = LayerImportance(spec, {}, {})
        for name, squares in self._squares.items():
            columns = spec.intermediate_size if name == "down" else spec.hidden_size
            more = columns - squares.shape[1]
            other._squares[name] = np.pad(squares, ((0, 0), (0, more)), constant_values=1)
        return other

    def expert(self, expert: int, weights: ExpertWeights, encode: Encode) -> dict[str, np.ndarray]:
        """The bytes of each projection.

        Raises ValueError / TypeError as ``ktk.quantise.pack.pack_expert``.
        """
        check_expert(self.spec, weights)
        stored = {}
        for name in ("gate", "up", "down"):
            w = getattr(weights, name)
            if w is not None:
                factor = self._factor(self._squares[name][expert])
                stored[name] = encode(name, to_f32(w), factor)[0]
        return stored

    def _factor(self, mean_square: np.ndarray) -> Factor:
        """Of a diagonal; where columns are rotated, of what it becomes."""
        turns = self.spec.turns
        if not turns.width:
            size = len(mean_square)
            mean = float(mean_square.mean())
            weight = mean_square / F(mean) if mean > 0 else np.ones(size, F)
            return Factor(np.zeros((size, size), F), np.maximum(weight, F(1e-6)))
        rows = turned(np.diag(mean_square), turns)
        return factorise(turned(np.ascontiguousarray(rows[: len(mean_square)].T), turns))
