"""NUMPY: the exact reference as a backend. Runs everywhere, for tests and as the last resort."""

from __future__ import annotations

import numpy as np

from ktk.backends.base import Backend, Operands, Runner, describe, refuse_blocks
from ktk.experts.formats.floats import to_f32
from ktk.experts.rows import poison_rows, store_rows
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.machine.threads import EngineLayout
from ktk.reference.moe import ExactExperts


class NumpyRunner(Runner):
    def __init__(self, packed: StoredExperts) -> None:
        self.experts = ExactExperts(packed)

    def packed(self) -> StoredExperts:
        return self.experts.stored

    def weights(self) -> list[np.ndarray]:
        return [self.experts.stored.data]

    def forward(self, given: Operands) -> None:
        hidden, ids, weights, skip, out, add = given
        store_rows(self.experts.forward(to_f32(hidden), ids, weights, skip, add), out)

    def linear(self, projection: str, x: np.ndarray, expert_ids: np.ndarray) -> np.ndarray:
        spec = self.experts.spec
        names = ("down",) if projection == "down" else ("gate", "up") if spec.has_gate else ("up",)
        width = sum(self.experts.matrix(name).out_features for name in names)
        x = poison_rows(x)
        y = np.empty((len(x), width), np.float32)
        for e in np.unique(expert_ids):
            rows = np.nonzero(expert_ids == e)[0]
            y[rows] = np.concatenate(
                [self.experts.linear(int(e), n, x[rows]) for n in names], axis=1
            )
        return y


class NumpyBackend(Backend):
    name = "NUMPY"
    is_last_resort = True

    def why_not(self, spec: MoESpec | None = None) -> str | None:
        return refuse_blocks(spec)

    def kernel(self, spec: MoESpec) -> str:
        return f"numpy {describe(spec)}"

    def load(self, packed: StoredExperts, engine: EngineLayout) -> Runner:
        return NumpyRunner(packed)
