"""What a backend is, and the shapes its runners take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np

from ktk.errors import BackendError
from ktk.experts.fma import fma
from ktk.experts.lora import ExpertLora
from ktk.experts.rows import store_rows
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.machine.threads import EngineLayout


class Operands(NamedTuple):
    """What a forward pass reads, and ``out``, which it writes: all C-contiguous and aligned.

    hidden, out : (num_tokens, hidden_size): float32, float16, or uint16 holding bf16 bits.
    topk_ids : int64 (num_tokens, top_k); ids outside 0..num_experts-1 or with skip[id] add exactly
        zero.
    topk_weights : float32 (num_tokens, top_k). skip : bool (num_experts,) or None.
    add : float32 (num_tokens, hidden_size) or None; added last.
    """

    hidden: np.ndarray
    topk_ids: np.ndarray
    topk_weights: np.ndarray
    skip: np.ndarray | None
    out: np.ndarray
    add: np.ndarray | None = None

    def part(self, tokens: slice) -> Operands:
        """Those of some of the tokens: views."""
        hidden, ids, weights, skip, out, add = self
        own = None if add is None else add[tokens]
        return Operands(hidden[tokens], ids[tokens], weights[tokens], skip, out[tokens], own)


class Runner(ABC):
    """One layer's experts, loaded by a backend."""

    @abstractmethod
    def forward(self, given: Operands) -> None:
        """out = sum over slots of weight * expert(hidden), plus ``add``."""

    def why_not_trained(self) -> str | None:
        """Why ``forward_saved`` and ``backward`` do nothing; None if they run."""
        return "kernels that are not compiled have no backward pass"

    def forward_saved(
        self,
        hidden: np.ndarray,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        lora: ExpertLora | None,
        out: np.ndarray,
    ) -> np.ndarray:
        """``forward`` with adapters. Returns what ``backward`` needs: gate and up before the
        activation, as the kernels have them, float32.

        lora : checked against the spec. Raises BackendError where ``why_not_trained`` says why.
        """
        raise BackendError(self.why_not_trained() or "")

    def backward(
        self,
        hidden: np.ndarray,
        topk_ids: np.ndarray,
        topk_weights: np.ndarray,
        lora: ExpertLora | None,
        z: np.ndarray,
        grad: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Gradients of hidden and of topk_weights, float32 of their shapes, and of the adapters'
        matrices by name.

        z : what ``forward_saved`` of the same arguments returned. grad : of its output, of any
        dtype that hidden may have.
        """
        raise BackendError(self.why_not_trained() or "")

    @abstractmethod
    def linear(self, projection: str, x: np.ndarray, expert_ids: np.ndarray) -> np.ndarray:
        """One projection without its bias, for activations ktk does not know.

        projection : "gate_up" (columns gate then up) or "down". x : float32 (rows, in_features).
        expert_ids : int64 (rows,), all valid. Returns float32 (rows, out_features).
        """

    def why_not_prepared(self) -> str | None:
        """Why ``prepared`` makes nothing; None if it does."""
        return "kernels that are not compiled need Python"

    def prepared(self, given: Operands) -> Any:
        """``forward`` as a function of C over these buffers: ``ktk._cy.native.Prepared``.

        Raises BackendError where ``why_not_prepared`` says why.
        """
        raise BackendError(self.why_not_prepared() or "")

    def combine(
        self,
        y: np.ndarray,
        place: np.ndarray,
        weights: np.ndarray,
        add: np.ndarray | None,
        out: np.ndarray,
    ) -> None:
        """out = sum over slots of weight * y[place], as ``forward`` sums them, plus ``add``.

        y : float32 (rows, hidden_size padded to a multiple of 16), outputs of single experts.
        place : int32 (tokens, top_k), rows of y; -1 adds nothing. weights, add, out : as in
        ``forward``; all C-contiguous.
        """
        total = np.zeros(out.shape, np.float32)
        y = y if len(y) else np.zeros((1, out.shape[1]), np.float32)
        for slot in range(place.shape[1]):
            rows = place[:, slot]
            product = fma(weights[:, slot, None], y[rows, : out.shape[1]], total)
            total = np.where(rows[:, None] >= 0, product, total)
        store_rows(total if add is None else total + add, out)

    @abstractmethod
    def packed(self) -> StoredExperts:
        """The experts it runs, in one piece; put together again if they were split over NUMA
        nodes.
        """

    def packed_expert(self, expert: int) -> StoredExperts:
        """Experts of which at least this one is there, without a copy of the others."""
        return self.packed()

    def weights(self) -> list[np.ndarray]:
        """The memory that ``forward`` reads: uint8 arrays, views of it.

        None where the backend does not tell.
        """
        return []


class Backend(ABC):
    """Kernels for one kind of CPU. They run experts in panels; LLAMAFILE's run GGUF blocks."""

    name: str
    is_last_resort: bool = False  # it runs where nothing compiled does, many times slower
    takes_stores: bool = False  # it runs a ktk.placement.store.ExpertStore

    @property
    def is_emulated(self) -> bool:
        """Its instructions are (KTK_TILE): it runs when named, ``auto`` passes it over."""
        return False

    @abstractmethod
    def why_not(self, spec: MoESpec | None = None) -> str | None:
        """None if it runs here (and runs ``spec``, if given), else the reason."""

    @abstractmethod
    def kernel(self, spec: MoESpec) -> str:
        """What will really run, e.g. ``avx512vnni int4 g32``."""

    @abstractmethod
    def load(self, packed: Any, engine: EngineLayout) -> Runner:
        """A runner over ``packed``: shared, not copied,
        but where ``engine`` binds weights to NUMA nodes.
        """


def refuse_blocks(spec: MoESpec | None) -> str | None:
    """Why a backend for packed weights does not run ``spec``: None if they are packed."""
    if spec is not None and not spec.is_packed:
        return "runs packed weights, these are GGUF blocks: LLAMAFILE runs them as they are"
    return None


def describe(spec: MoESpec) -> str:
    """``int4 g32``: the format part of a kernel's name."""
    return spec.weight_format + (f" g{spec.group_size}" if spec.group_size else "")
