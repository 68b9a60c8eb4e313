"""``Linear``: y = x W^T + bias by the kernels of the experts, for the linear layers around them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ktk._cy import native_module
from ktk.backends.native import kernel_isa
from ktk.errors import BackendError
from ktk.experts.formats import GGUF, activation_group_of, get_format
from ktk.experts.formats.floats import to_f32
from ktk.experts.layout import PANEL, round_up
from ktk.experts.rotation import Rotation
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredMatrix
from ktk.machine import cpu, openmp
from ktk.machine import threads as engine
from ktk.machine.memory import aligned_buffer
from ktk.machine.threads import EngineLayout
from ktk.ops.inputs import as_hidden, as_weights, new_like
from ktk.placement.blocks import whole_panels
from ktk.placement.parts import layout_of
from ktk.quantise.pack import pack_matrix


def why_not() -> str | None:
    """None if linear layers run here, else the reason."""
    if native_module() is None:
        return "the compiled extension is not built (reinstall with a C compiler)"
    return cpu.why_not("avx2", cpu.detect())


def _check() -> None:
    if reason := why_not():
        raise BackendError(f"ktk.ops.linear.Linear cannot run here: {reason}")


class Linear:
    """A dense matrix, in panels or in the blocks of a GGUF file (``of_blocks``), and its bias.

    Parameters
    ----------
    weight : (out_features, in_features), float32, float16 or bfloat16, an array or CPU tensor;
        quantised, not kept.
    bias : (out_features,), a float type, or None.
    weight_format, group_size, activation_group, rotation, num_threads : as in
    ``ktk.MoE.from_weights``.

    Results have the same bits for any number of rows and threads. Raises ValueError / TypeError
    naming the argument that does not fit, BackendError without the compiled extension, EngineError
    as ``ktk.MoE``.
    """

    def __init__(
        self,
        weight: Any,
        bias: Any = None,
        *,
        weight_format: str = "int8",
        group_size: int | None = None,
        activation_group: int | None = None,
        rotation: Rotation | int | None = None,
        num_threads: int | None = None,
    ) -> None:
        _check()
        if not get_format(weight_format).is_packed:
            raise ValueError(
                "weight_format='gguf': must be a format of panels, e.g. 'int8'; blocks go to "
                "Linear.of_blocks"
            )
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
            rotation=rotation,
        )
        layout = self.spec.layout.down
        shape = (layout.num_panels, layout.panel_bytes)
        self.panels = aligned_buffer(layout.num_panels * layout.panel_bytes).reshape(shape)
        pack_matrix(w, layout, self.panels)
        threads = self._begin(bias, num_threads)
        self.kernel = f"{kernel_isa(weight_format)} {weight_format}" + (
            f" g{self.spec.group_size}" if self.spec.group_size else ""
        )
        self.matrix = self.native.Matrix(
            layout, False, self.panels, self.bias, cpu.best_isa(), threads
        )

    @classmethod
    def of_blocks(
        cls,
        matrix: StoredMatrix,
        bias: Any = None,
        *,
        activation_group: int | None = None,
        num_threads: int | None = None,
    ) -> Linear:
        """A matrix in a GGUF file's blocks, run where they lie.

        matrix : of one expert, as the file has its rows. They are copied only where out_features is
        no multiple of 16, and, as floats, where no kernel reads the type (with a warning).
        activation_group : None takes 64 for types of 5 bits and more, else 128.
        bias, num_threads : as for panels. Raises ValueError, BackendError and EngineError likewise.
        """
        _check()
        if len(matrix.data) != 1 or matrix.is_repacked:
            raise ValueError(
                f"{matrix.format.name} blocks of {len(matrix.data)} "
                f"experts{', repacked' * matrix.is_repacked}: "
                "must be one matrix, (1, out_features, row bytes), as a file holds it"
            )
        self = cls.__new__(cls)
        out_features = matrix.out_features
        if activation_group is None:
            activation_group = activation_group_of(matrix.format.bits_per_weight)
        self.spec = MoESpec(
            1,
            out_features,
            matrix.in_features,
            GGUF.name,
            activation_group=activation_group,
            has_gate=False,
        )
        whole = whole_panels(matrix)
        self.panels = whole.data[0]
        threads = self._begin(bias, num_threads)
        self.kernel = f"{kernel_isa('BF16')} {GGUF.name} {whole.format.name}"
        layout = layout_of(whole, activation_group)
        self.matrix = self.native.Matrix(
            layout, False, self.panels, self.bias, cpu.best_isa(), threads
        )
        return self

    def _begin(self, bias: Any, num_threads: int | None) -> EngineLayout:
        """What both kinds have, once ``spec`` and ``panels`` are there; returns the threads."""
        self.in_features, self.out_features = self.spec.intermediate_size, self.spec.hidden_size
        length = round_up(self.out_features, PANEL)
        self.bias = None if bias is None else self._padded(bias, length)
        self.bits_per_weight = 8 * self.panels.size / (self.in_features * self.out_features)
        threads = engine.acquire(self, num_threads)
        self.num_threads = threads.num_threads
        self.native: Any = native_module()
        return threads

    def _padded(self, bias: Any, length: int) -> np.ndarray:
        given = as_weights(bias, "bias")
        if given.shape != (self.out_features,):
            raise ValueError(f"bias has shape {given.shape}: must be ({self.out_features},)")
        padded = np.zeros(length, np.float32)
        padded[: len(given)] = to_f32(given)
        return padded

    def forward(self, x: Any) -> Any:
        """x : (rows, in_features), float32, float16 or bfloat16. Returns (rows, out_features), an
            array or tensor like x.

        Raises TypeError / ValueError as ``ktk.MoE.forward``.
        """
        rows = as_hidden(x, self.in_features)
        result, out = new_like(x, (len(rows), self.out_features))
        if len(rows):
            if openmp.is_pending:
                openmp.borrow(self.native)
            self.matrix.forward(rows, out)
        return result

    __call__ = forward

    def __deepcopy__(self, memo: dict[int, object]) -> Linear:
        return self  # nothing writes to it

    def __repr__(self) -> str:
        return (
            f"Linear({self.in_features} -> {self.out_features}, {self.kernel}, "
            f"{self.bits_per_weight:.2f} bits per weight, {self.num_threads} threads)"
        )
