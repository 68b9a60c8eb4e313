"""Experts as they are stored, in panels or in a GGUF file's blocks,
and as checkpoints give them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ktk.errors import BackendError
from ktk.experts.formats import Format, block_format
from ktk.experts.formats.floats import as_values
from ktk.experts.layout import K_ALIGN, PANEL, round_up
from ktk.experts.rotation import NO_ROTATION, Rotation
from ktk.experts.spec import MoESpec
from ktk.machine.memory import aligned_buffer


@dataclass(frozen=True)
class StoredMatrix:
    """One projection of all experts of a layer.

    data : uint8 views of the memory that kernels read, experts at any distance: (num_experts,
        panels, panel bytes), panels at any distance, or, in blocks, (num_experts, rows, row bytes),
        each expert's rows one behind the other.
    group_size, rotation : of panels, as in MoESpec. is_repacked : blocks in the order the kernels
        read them, see ``ktk.placement.blocks.repack``. Rows may then be padded to whole panels, and
        float ones to a multiple of 32 weights.
    Raises ValueError unless the data is what the format and the sizes say.
    """

    format: Format
    in_features: int
    out_features: int
    data: np.ndarray
    group_size: int = 0
    is_repacked: bool = False
    rotation: Rotation = NO_ROTATION

    def __post_init__(self) -> None:
        data, name = self.data, self.format.name
        if data.dtype != np.uint8 or data.ndim != 3 or 0 in data.shape:
            raise ValueError(
                f"{name} is {data.dtype} {data.shape}: must be uint8 (experts, rows or panels, "
                "bytes)"
            )
        if data.strides[2] != 1:
            raise ValueError(f"{name}: the bytes of a row or panel must lie one behind the other")
        if self.format.is_packed:
            return  # views that ``StoredExperts.of_panels`` makes
        rows, size = data.shape[1:]
        if data.strides[1] != size:
            raise ValueError(f"{name} blocks: an expert's rows must lie one behind the other")
        whole = round_up(self.in_features, K_ALIGN)
        if rows not in (self.out_features, round_up(self.out_features, PANEL)):
            raise ValueError(f"{name} blocks have {rows} rows: must have {self.out_features}")
        fitting = {self.format.row_bytes(columns) for columns in (self.in_features, whole)}
        if size not in fitting:
            raise ValueError(
                f"{name} rows of {self.in_features} weights have {size} bytes: must have "
                f"{min(fitting)}"
            )

    @classmethod
    def of_rows(cls, name: str, in_features: int, data: np.ndarray) -> StoredMatrix:
        """Blocks as a GGUF file holds them, uint8 (num_experts, out_features, row bytes).

        name : the type's.
        """
        rows = data.shape[1] if data.ndim == 3 else 0
        return cls(block_format(name), in_features, rows, data)

    @property
    def num_bytes(self) -> int:
        """Bytes of all experts."""
        return int(self.data.size)


@dataclass(frozen=True)
class StoredExperts:
    """One layer's experts, ready for the kernels: in panels (``of_panels``), or in the blocks of a
    GGUF file.

    gate : None without a gate projection. Biases : float32 (stored, out_features) or None; views,
        at any distance.
    order : int64 (num_experts,) or None: expert e is the one stored at order[e]; -1: it is not
        here. With an order, fewer experts than num_experts may be stored: a rank's own, or those
        that no GPU has.
    spans : of panels, uint8 (stored, layout.expert_bytes): what the matrices are views of; None of
        blocks.
    """

    spec: MoESpec
    gate: StoredMatrix | None
    up: StoredMatrix
    down: StoredMatrix
    gate_bias: np.ndarray | None = None
    up_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None
    order: np.ndarray | None = None
    spans: np.ndarray | None = None

    def __post_init__(self) -> None:
        spec = self.spec
        if spec.has_gate != (self.gate is not None):
            raise ValueError(f"{spec}: has_gate must be as the matrices")
        for name, matrix in self.matrices.items():
            if matrix.format.is_packed != spec.is_packed:
                raise ValueError(
                    f"{name} is {matrix.format.name}: weight_format={spec.weight_format!r} must "
                    "be 'gguf' of blocks alone"
                )
            ins, outs = spec.hidden_size, spec.intermediate_size
            if name == "down":
                ins, outs = outs, ins
            found = (len(matrix.data), matrix.out_features, matrix.in_features)
            if found != (self.num_stored, outs, ins):
                raise ValueError(
                    f"{name} is {found}: must be ({self.num_stored}, {outs}, {ins}), experts x "
                    "out x in"
                )
        for name, bias in self.biases.items():
            outs = spec.hidden_size if name == "down" else spec.intermediate_size
            if bias.dtype != np.float32 or bias.shape != (self.num_stored, outs):
                raise ValueError(
                    f"{name} bias is {bias.dtype} {bias.shape}: must be float32 "
                    f"{(self.num_stored, outs)}"
                )
        if spec.has_bias != bool(self.biases):
            raise ValueError(f"has_bias={spec.has_bias}, but there are {len(self.biases)} biases")
        order = self.order
        if order is None:
            return
        if order.dtype != np.int64 or order.shape != (spec.num_experts,):
            raise ValueError(
                f"order is {order.dtype} {order.shape}: must be int64 ({spec.num_experts},)"
            )
        if order.min() < -1 or order.max() >= self.num_stored:
            raise ValueError(
                f"order goes from {order.min()} to {order.max()}: must stay in "
                f"0..{self.num_stored - 1}, "
                "-1 for an expert that is not here"
            )

    @classmethod
    def of_panels(
        cls, spec: MoESpec, spans: np.ndarray, order: np.ndarray | None = None
    ) -> StoredExperts:
        """Packed experts. spans : uint8 (stored, layout.expert_bytes), C-contiguous, 64-byte
        aligned at least.

        ValueError if they are not, or the spec's format does not lie in panels.
        """
        if not spec.is_packed:
            raise ValueError(f"weight_format={spec.weight_format!r}: does not lie in panels")
        layout = spec.layout
        stored = spec.num_experts if order is None else len(spans)
        want = (stored, layout.expert_bytes)
        if spans.dtype != np.uint8 or spans.shape != want:
            raise ValueError(f"packed data is {spans.dtype} {spans.shape}: must be uint8 {want}")
        if not spans.flags.c_contiguous or spans.ctypes.data % 64:
            raise ValueError("packed data must be C-contiguous and 64-byte aligned")
        matrices: dict[str, StoredMatrix] = {}
        biases: dict[str, np.ndarray] = {}
        for name in layout.projections:
            matrix = layout.matrix(name)
            matrices[name] = StoredMatrix(
                spec.format,
                matrix.in_features,
                matrix.out_features,
                layout.panels(spans, name),
                spec.group_size or 0,
                rotation=spec.turns,
            )
            bias = layout.bias(spans, name)
            if bias is not None:
                biases[f"{name}_bias"] = bias.view(np.float32)[:, : matrix.out_features]
        gate, up, down = matrices.get("gate"), matrices["up"], matrices["down"]
        return cls(spec, gate, up, down, **biases, order=order, spans=spans)

    @property
    def num_stored(self) -> int:
        """Experts whose weights are here: all of them, unless ``order`` leaves some out."""
        return self.spec.num_experts if self.order is None else len(self.up.data)

    def place_or_none(self, expert: int) -> int | None:
        """Where an expert stands in the matrices, None for one that is not here."""
        at = expert if self.order is None else int(self.order[expert])
        return None if at < 0 else at

    def place(self, expert: int) -> int:
        """Where an expert stands in the matrices. BackendError for one that is not here."""
        at = self.place_or_none(expert)
        if at is None:
            raise BackendError(f"experts {expert} are not in memory: bring them back first")
        return at

    def without(self, absent: np.ndarray) -> StoredExperts:
        """Only the others. absent : bool (num_experts,).

        Panels are copied, so that the memory of all can go; blocks stay where they are mapped.
        """
        places = [self.place_or_none(e) for e in range(self.spec.num_experts)]
        kept = [e for e, at in enumerate(places) if at is not None and not absent[e]]
        if self.spans is None:
            order = np.array([-1 if at is None else at for at in places])
            return dataclasses.replace(self, order=np.where(absent, -1, order))
        rows, size = max(len(kept), 1), self.spec.layout.expert_bytes  # shapes must be somewhere
        spans = aligned_buffer(rows * size).reshape(rows, size)
        for row, expert in enumerate(kept):
            spans[row] = self.spans[self.place(expert)]
        return StoredExperts.of_panels(self.spec, spans, order_of(self.spec.num_experts, kept))

    @property
    def is_packed(self) -> bool:
        """Whether they lie in panels, else in the blocks of a GGUF file."""
        return self.spec.is_packed

    @property
    def data(self) -> np.ndarray:
        """Packed experts in one piece, uint8 (num_experts, expert_bytes),
        as packed directories hold them.
        """
        if self.spans is None:
            raise ValueError(f"{self.types} experts do not lie in one piece")
        return self.spans

    @property
    def matrices(self) -> dict[str, StoredMatrix]:
        """The projections there are, by name."""
        named = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: matrix for name, matrix in named.items() if matrix is not None}

    @property
    def biases(self) -> dict[str, np.ndarray]:
        """The biases there are, by projection."""
        named = {"gate": self.gate_bias, "up": self.up_bias, "down": self.down_bias}
        return {name: bias for name, bias in named.items() if bias is not None}

    @property
    def types(self) -> str:
        """``Q4_K``, or ``Q4_K/Q4_K/Q6_K`` where projections differ."""
        types = [matrix.format.name for matrix in self.matrices.values()]
        return types[0] if len(set(types)) == 1 else "/".join(types)

    @property
    def bits_per_weight(self) -> float:
        """Bits at rest per weight, scales included, of packed experts padding and biases too."""
        if self.is_packed:
            return self.spec.bits_per_weight
        num_bytes = sum(matrix.num_bytes for matrix in self.matrices.values())
        return num_bytes * 8 / (self.spec.num_weights * self.num_stored)


def order_of(num_experts: int, stored: Sequence[int]) -> np.ndarray:
    """``StoredExperts.order`` where only these experts are stored, in this order."""
    order = np.full(num_experts, -1, np.int64)
    order[list(stored)] = np.arange(len(stored))
    return order


class ExpertWeights(NamedTuple):
    """One expert's matrices as a checkpoint has them, dequantised.

    gate, up : float32, or uint16 holding bf16 bits, (intermediate_size, hidden_size); gate None
        without one.
    down : likewise (hidden_size, intermediate_size). Biases : float32 (out_features,) or None.
    """

    gate: np.ndarray | None
    up: np.ndarray
    down: np.ndarray
    gate_bias: np.ndarray | None = None
    up_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None


@dataclass(frozen=True)
class CodedMatrix:
    """One matrix as a checkpoint codes it; panels of the same format take codes and fitting scales
    as they are.

    codes : (out_features, in_features), of int4 int8 -8 to 7, of others their bits, one in a byte.
    scales : float32 (blocks of rows, groups), each for ``block`` rows and columns. format : the
    panels' that hold such codes. tensor_scale : times all scales. zero_points : uint8
    (out_features, groups), of formats that have them.
    """

    codes: np.ndarray
    scales: np.ndarray
    format: Format
    block: tuple[int, int]
    tensor_scale: float = 1.0
    zero_points: np.ndarray | None = None

    @property
    def group_size(self) -> int:
        """Weights along in_features that share a scale."""
        return self.block[1]

    def spread_scales(self) -> np.ndarray:
        """float32 (out_features, groups)."""
        return np.repeat(self.scales, self.block[0], axis=0)[: len(self.codes)]

    def dequantised(self) -> np.ndarray:
        """float32 (out_features, in_features)."""
        group = self.group_size
        if self.format.is_integer:
            return self.codes.astype(np.float32) * np.repeat(self.spread_scales(), group, axis=1)
        values = as_values(self.codes, self.format.codes.dtype)
        if self.zero_points is not None:
            zeros = self.zero_points.astype(np.float32)
            values -= np.repeat(zeros, group, axis=1)[:, : values.shape[1]]
        each = self.scales * np.float32(self.tensor_scale)
        for row, scales in enumerate(each):  # in place: a matrix may be large
            band = values[row * self.block[0] : (row + 1) * self.block[0]]
            band *= np.repeat(scales, group)[: values.shape[1]]
        return values


class CodedExpert(NamedTuple):
    """One expert of ``CodedMatrix``; gate None without one.

    Biases : float32 (out_features,) or None.
    """

    gate: CodedMatrix | None
    up: CodedMatrix
    down: CodedMatrix
    gate_bias: np.ndarray | None = None
    up_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None

    def dequantised(self) -> ExpertWeights:
        """The same as floats."""
        return ExpertWeights(
            None if self.gate is None else self.gate.dequantised(),
            self.up.dequantised(),
            self.down.dequantised(),
            self.gate_bias,
            self.up_bias,
            self.down_bias,
        )
