"""What the compiled backends share: one runner over the C operator, told apart by ISA level."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np

from ktk._cy import native_module
from ktk.backends.base import Backend, Operands, Runner, describe, refuse_blocks
from ktk.experts.layout import round_up
from ktk.experts.lora import ExpertLora
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.machine import cpu, openmp
from ktk.machine.memory import aligned_buffer
from ktk.machine.threads import EngineLayout
from ktk.placement.blocks import in_whole_panels
from ktk.placement.parts import join, join_one, layout_of, parts_of
from ktk.placement.store import ExpertStore


def kernel_isa(weight_format: str) -> str | None:
    """The ISA level that the kernel which runs a format here was compiled for, None where no
    compiled one does.

    weight_format : a packed format's name, or a ggml type's that kernels read.
    """
    isa = cpu.best_isa()
    return None if isa is None else str(native_module().kernel_isa(isa, weight_format))


class NativeRunner(Runner):
    """Experts of any format behind the C operator, with the kernels of ISA level ``isa``."""

    def __init__(
        self, experts: StoredExperts | ExpertStore, isa: str, engine: EngineLayout
    ) -> None:
        self.native: Any = native_module()
        self.store = experts if isinstance(experts, ExpertStore) else None
        if isinstance(experts, ExpertStore):  # an expert moves as one piece
            stored = runs = experts.experts
            self.parts = [experts.part]
        else:
            stored, runs = experts, in_whole_panels(experts)
            self.parts = parts_of(runs, engine)
        self.spec, self.order = stored.spec, stored.order
        group = self.spec.activation_group or 0
        matrices = {n: (layout_of(m, group), m.is_repacked) for n, m in runs.matrices.items()}
        order = None if self.order is None else np.ascontiguousarray(self.order)
        self.z_width: int = matrices["down"][0].padded_in
        self.experts = self.native.Experts(self.spec, matrices, self.parts, order, isa, engine)
        # Panels were copied to the nodes and may go, and come back from there.
        is_copied = self.store is None and engine.is_bound and stored.is_packed
        self.stored: StoredExperts | None = None if is_copied else stored
        if self.store is not None:
            self.store.attach(self._move, self.experts.set_arrival)

    def _move(self, expert: int, addresses: Mapping[str, int] | None, is_unused: bool) -> None:
        for table in self.experts.tables:
            address = addresses[table] if addresses else 0
            self.experts.set_address(0, table, expert, address, is_unused)

    def forward(self, given: Operands) -> None:
        if openmp.is_pending:
            openmp.borrow(self.native)
        if self.store is None:
            self.experts.forward(*given)
            return
        with self.store.pinned(given.topk_ids, given.skip):
            self.experts.forward(*given)

    def why_not_prepared(self) -> str | None:
        return None if self.store is None else "experts of an ExpertStore are pinned by Python"

    def prepared(self, given: Operands) -> Any:
        return self.native.Prepared(self.experts, *given)

    def why_not_trained(self) -> str | None:
        return None if self.store is None else "experts of an ExpertStore come and go"

    def forward_saved(
        self,
        hidden: np.ndarray,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        lora: ExpertLora | None,
        out: np.ndarray,
    ) -> np.ndarray:
        if openmp.is_pending:
            openmp.borrow(self.native)
        shape = (topk_ids.size, 1 + self.spec.has_gate, self.z_width)
        z = np.empty(shape, np.float32)
        self.experts.forward_saved(hidden, topk_ids, topk_weights, lora, z, out)
        return z

    def backward(
        self,
        hidden: np.ndarray,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        lora: ExpertLora | None,
        z: np.ndarray,
        grad: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        if openmp.is_pending:
            openmp.borrow(self.native)
        shape = (topk_ids.size, 1 + self.spec.has_gate, self.z_width)
        if z.shape != shape:
            raise ValueError(f"z has shape {z.shape}: these experts' forward pass leaves {shape}")
        d_hidden = np.empty(hidden.shape, np.float32)
        d_weights = np.empty(topk_ids.shape, np.float32)
        arrays = lora.arrays if lora is not None else {}
        d_lora = _zeros_like(arrays)
        given = (hidden, topk_ids, topk_weights, lora, z, grad)
        self.experts.backward(*given, d_hidden, d_weights, d_lora)
        return d_hidden, d_weights, d_lora

    def linear(self, projection: str, x: np.ndarray, expert_ids: np.ndarray) -> np.ndarray:
        if openmp.is_pending:
            openmp.borrow(self.native)
        with self.store.pinned(expert_ids, None) if self.store else nullcontext():
            result: np.ndarray = self.experts.linear(projection, x, expert_ids)
        return result

    def combine(
        self,
        y: np.ndarray,
        place: np.ndarray,
        weights: np.ndarray,
        add: np.ndarray | None,
        out: np.ndarray,
    ) -> None:
        self.experts.combine(y, place, weights, add, out)

    def packed(self) -> StoredExperts:
        return self.stored or join(self.spec, self.parts, self.order)

    def packed_expert(self, expert: int) -> StoredExperts:
        return self.stored or join_one(self.spec, self.parts, self.order, expert)

    def weights(self) -> list[np.ndarray]:
        if self.stored is not None and self.stored.spans is not None:
            return [self.stored.spans]
        found = [(part.gate, part.up, part.down) for part in self.parts]
        return [matrix for part in found for matrix in part if matrix is not None]


def _zeros_like(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """float32, one behind the other in huge pages: small ones take longer to clear than what is
    written into them.
    """
    starts = np.cumsum([0, *(round_up(matrix.size, 16) for matrix in arrays.values())])
    memory = aligned_buffer(4 * int(starts[-1])).view(np.float32)
    return {
        name: memory[start : start + matrix.size].reshape(matrix.shape)
        for (name, matrix), start in zip(arrays.items(), starts[:-1].tolist(), strict=True)
    }


class NativeBackend(Backend):
    """A compiled backend: ``isa_rows`` lists its rows of ``ktk._cy.isa``, best first."""

    isa_rows: tuple[str, ...]
    takes_stores = True

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

    def load(self, packed: StoredExperts | ExpertStore, engine: EngineLayout) -> Runner:
        isa = self.isa()
        assert isa is not None  # select() asked why_not first
        return NativeRunner(packed, isa, engine)
