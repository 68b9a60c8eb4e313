"""``Linear``: y = x W^T + bias by the kernels of the experts, for the linear layers around them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ktk import cpu
from ktk._cy import native_module
from ktk.backends._openmp import borrow
from ktk.errors import BackendError
from ktk.formats import GGUF
from ktk.formats.floats import to_f32
from ktk.layout import PANEL
from ktk.memory import aligned_buffer
from ktk.moe import as_hidden, as_weights, is_tensor, to_numpy
from ktk.pack import best_isa, pack_matrix
from ktk.runtime import engine
from ktk.types import MoESpec


def why_not() -> str | None:
    """None if linear layers run here, else the reason."""
    if native_module() is None:
        return "the compiled extension is not built (reinstall with a C compiler)"
    lacking = cpu.missing("avx2", cpu.detect())
    return f"CPU lacks {', '.join(lacking)}" if lacking else None


class Linear:
    """A dense matrix in panels, and its bias.

    Parameters
    ----------
    weight : (out_features, in_features), float32, float16 or bfloat16, an array or CPU tensor; quantised, not kept.
    bias : (out_features,), a float type, or None.
    weight_format, group_size, activation_group, num_threads : as in ``ktk.MoE.from_weights``.

    Results have the same bits for any number of rows and threads. Raises ValueError / TypeError naming the argument that
    does not fit, BackendError without the compiled extension, EngineError as ``ktk.MoE``.
    """

    def __init__(
        self,
        weight: Any,
        bias: Any = None,
        *,
        weight_format: str = "int8",
        group_size: int | None = None,
        activation_group: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        if reason := why_not():
            raise BackendError(f"ktk.linear.Linear cannot run here: {reason}")
        if weight_format == GGUF.name:
            raise ValueError("weight_format='gguf': must be a format of panels, e.g. 'int8'")
        w = as_weights(weight, "weight")
        if w.ndim != 2 or not w.size:
            raise ValueError(f"weight has shape {w.shape}: must be (out_features, in_features)")
        # A matrix is the down projection of a single expert.
        out_features, in_features = w.shape
        self.spec = MoESpec(
            1,
            out_features,
            in_features,
            weight_format,
            group_size,
            activation_group,
            has_gate=False,
        )
        layout = self.spec.layout.down
        self.in_features, self.out_features = layout.in_features, layout.out_features
        shape = (layout.num_panels, layout.panel_bytes)
        self.panels = aligned_buffer(layout.num_panels * layout.panel_bytes).reshape(shape)
        self.bias = None if bias is None else self._padded(bias, layout.num_panels * PANEL)
        pack_matrix(w, layout, self.spec, self.panels)
        self.bits_per_weight = 8 * self.panels.size / w.size
        threads = engine.acquire(self, num_threads)
        self.num_threads = threads.num_threads
        isa = best_isa()
        self.kernel = f"{isa} {weight_format}" + (
            f" g{self.spec.group_size}" if self.spec.group_size else ""
        )
        self.native: Any = native_module()
        self.matrix = self.native.Matrix(
            layout, weight_format, self.panels, self.bias, isa, threads
        )

    def _padded(self, bias: Any, length: int) -> np.ndarray:
        given = as_weights(bias, "bias")
        if given.shape != (self.out_features,):
            raise ValueError(f"bias has shape {given.shape}: must be ({self.out_features},)")
        padded = np.zeros(length, np.float32)
        padded[: len(given)] = to_f32(given)
        return padded

    def forward(self, x: Any) -> Any:
        """x : (rows, in_features), float32, float16 or bfloat16. Returns (rows, out_features), an array or tensor like x.

        Raises TypeError / ValueError as ``ktk.MoE.forward``.
        """
        rows = as_hidden(x, self.in_features)
        shape = (len(rows), self.out_features)
        if is_tensor(x):
            result = sys.modules["torch"].empty(shape, dtype=x.dtype)
        else:
            result = np.empty(shape, x.dtype)
        if len(rows):
            borrow(self.native)
            self.matrix.forward(rows, to_numpy(result, "out"))
        return result

    __call__ = forward

    def __deepcopy__(self, memo: dict[int, object]) -> Linear:
        return self  # packed weights never change

    def __repr__(self) -> str:
        return (
            f"Linear({self.in_features} -> {self.out_features}, {self.kernel}, {self.bits_per_weight:.2f} bits per weight, "
            f"{self.num_threads} threads)"
        )
