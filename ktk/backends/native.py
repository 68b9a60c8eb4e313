"""What the compiled backends share: one runner over the C operator, told apart by ISA row."""

from __future__ import annotations

from typing import Any

import numpy as np

from ktk._cy import native_module
from ktk.backends.base import Backend, Runner, describe, refuse_blocks
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.machine import cpu
from ktk.machine.openmp import borrow
from ktk.machine.threads import EngineLayout
from ktk.placement.parts import join, parts_of


def kernel_isa(weight_format: str) -> str | None:
    """The ISA level that the kernel which runs a format here was compiled for, None where no compiled one does.

    weight_format : a packed format's name, or a ggml type's that kernels read.
    """
    isa = cpu.best_isa()
    return None if isa is None else str(native_module().kernel_isa(isa, weight_format))


class OperatorRunner(Runner):
    """Experts behind the C operator; what they are made of is the subclass's."""

    native: Any
    experts: Any

    def forward(
        self,
        hidden: np.ndarray,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        skip: np.ndarray | None,
        out: np.ndarray,
        add: np.ndarray | None,
    ) -> None:
        borrow(self.native)
        self.experts.forward(hidden, topk_ids, topk_weights, skip, out, add)

    def linear(self, projection: str, x: np.ndarray, expert_ids: np.ndarray) -> np.ndarray:
        borrow(self.native)
        result: np.ndarray = self.experts.linear(projection, x, expert_ids)
        return result


class NativeRunner(OperatorRunner):
    """Packed experts."""

    def __init__(self, packed: StoredExperts, isa: str, engine: EngineLayout) -> None:
        self.native = native_module()
        self.spec = packed.spec
        self.parts = parts_of(packed, engine)
        self.experts = self.native.Experts.of_panels(
            packed.spec, packed.spec.layout, self.parts, isa, engine
        )

    def weights(self) -> list[np.ndarray]:
        return [part.data for part in self.parts]

    def packed(self) -> StoredExperts:
        if len(self.parts) == 1:
            return StoredExperts.of_panels(self.spec, self.parts[0].data)
        return join(self.spec, self.parts)


class NativeBackend(Backend):
    """A compiled backend: ``isa_rows`` lists its rows of ``ktk._cy.isa``, best first."""

    isa_rows: tuple[str, ...]

    def isa(self) -> str | None:
        """The best of its rows that this CPU and this build run, or None."""
        return cpu.best_isa(self.isa_rows)

    def why_not(self, spec: MoESpec | None = None) -> str | None:
        if native_module() is None:
            return "the compiled extension is not built (reinstall with a C compiler)"
        if reason := cpu.why_not(self.isa_rows[-1], cpu.detect()):
            return reason
        if self.isa() is None:
            return f"this build has none of {', '.join(self.isa_rows)}"
        return refuse_blocks(spec)

    def kernel(self, spec: MoESpec) -> str:
        return f"{self.isa()} {describe(spec)}"

    def load(self, packed: StoredExperts, engine: EngineLayout) -> Runner:
        isa = self.isa()
        assert isa is not None  # select() asked why_not first
        return NativeRunner(packed, isa, engine)
