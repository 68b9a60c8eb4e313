"""Experts as they are stored: float, coded, packed in panels, or in a GGUF file's blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ktk.experts.layout import K_ALIGN, PANEL, round_up
from ktk.experts.spec import MoESpec


@dataclass(frozen=True)
class Packed:
    """One layer's experts in panel16 layout, ready for every kernel.

    data : uint8 (num_experts, layout.expert_bytes), C-contiguous, 64-byte aligned at least.
    """

    spec: MoESpec
    data: np.ndarray

    def __post_init__(self) -> None:
        layout = self.spec.layout
        want = (self.spec.num_experts, layout.expert_bytes)
        if self.data.dtype != np.uint8 or self.data.shape != want:
            raise ValueError(
                f"packed data is {self.data.dtype} {self.data.shape}: must be uint8 {want}"
            )
        if not self.data.flags.c_contiguous or self.data.ctypes.data % 64:
            raise ValueError("packed data must be C-contiguous and 64-byte aligned")

    @property
    def bits_per_weight(self) -> float:
        """Bits at rest per weight, scales, padding and biases included."""
        return self.spec.bits_per_weight


@dataclass(frozen=True)
class BlockMatrix:
    """One projection of all experts of a layer as a GGUF file holds it.

    type : the ggml type's name, e.g. "Q4_K".
    in_features : weights of a row. data : uint8 (num_experts, out_features, row bytes); each expert's rows lie
        one behind the other, experts at any distance (the gate half of a fused tensor is one).
    is_repacked : the same bytes in the order kernels read them, see ``ktk.backends.llamafile.repack``.
    """

    type: str
    in_features: int
    data: np.ndarray
    is_repacked: bool = False

    def __post_init__(self) -> None:
        data = self.data
        if data.dtype != np.uint8 or data.ndim != 3 or 0 in data.shape:
            raise ValueError(
                f"{self.type} blocks are {data.dtype} {data.shape}: must be uint8 (experts, rows, row bytes)"
            )
        if data.strides[1:] != (data.shape[2], 1):
            raise ValueError(f"{self.type} blocks: an expert's rows must lie one behind the other")

    @property
    def num_bytes(self) -> int:
        """Bytes of all experts."""
        return int(self.data.size)


@dataclass(frozen=True)
class BlockExperts:
    """One layer's experts in a GGUF file's blocks, each projection in its own type.

    spec : weight_format is "gguf". gate : None without a gate projection.
    Biases : float32 (num_experts, out_features) or None.
    order : int64 (num_experts,) or None: expert e is the one stored at order[e].
    """

    spec: MoESpec
    gate: BlockMatrix | None
    up: BlockMatrix
    down: BlockMatrix
    gate_bias: np.ndarray | None = None
    up_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None
    order: np.ndarray | None = None

    def __post_init__(self) -> None:
        spec = self.spec
        if spec.weight_format != "gguf" or spec.has_gate != (self.gate is not None):
            raise ValueError(
                f"{spec}: weight_format must be 'gguf', has_gate must be as the blocks"
            )
        for name, matrix in self.matrices.items():
            ins, outs = spec.hidden_size, spec.intermediate_size
            if name == "down":
                ins, outs = outs, ins
            if matrix.is_repacked:  # padded to whole panels
                ins, outs = round_up(ins, K_ALIGN), round_up(outs, PANEL)
            if (matrix.in_features, *matrix.data.shape[:2]) != (ins, spec.num_experts, outs):
                raise ValueError(
                    f"{name} is ({matrix.data.shape[0]}, {matrix.data.shape[1]}, {matrix.in_features}): "
                    f"must be ({spec.num_experts}, {outs}, {ins}), experts x out x in"
                )
        for name, bias in self.biases.items():
            shape = (
                spec.num_experts,
                spec.hidden_size if name == "down" else spec.intermediate_size,
            )
            if bias.dtype != np.float32 or bias.shape != shape:
                raise ValueError(
                    f"{name} bias is {bias.dtype} {bias.shape}: must be float32 {shape}"
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
        if order.min() < 0 or order.max() >= spec.num_experts:
            raise ValueError(
                f"order goes from {order.min()} to {order.max()}: must stay in 0..{spec.num_experts - 1}"
            )

    @property
    def matrices(self) -> dict[str, BlockMatrix]:
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
        types = [matrix.type for matrix in self.matrices.values()]
        return types[0] if len(set(types)) == 1 else "/".join(types)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included."""
        num_bytes = sum(matrix.num_bytes for matrix in self.matrices.values())
        return num_bytes * 8 / (self.spec.num_weights * self.spec.num_experts)


class ExpertWeights(NamedTuple):
    """One expert's matrices as a checkpoint has them, dequantised.

    gate, up : float32, or uint16 holding bf16 bits, (intermediate_size, hidden_size); gate None without one.
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
    """One matrix as a checkpoint's symmetric 4-bit codes; int4 panels of fitting groups take them as they are.

    codes : int8 (out_features, in_features), -8 to 7. scales : float32 (out_features, groups), groups of one size.
    """

    codes: np.ndarray
    scales: np.ndarray

    @property
    def group_size(self) -> int:
        """Weights along in_features that share a scale."""
        return int(self.codes.shape[1] // self.scales.shape[1])

    def dequantised(self) -> np.ndarray:
        """float32 (out_features, in_features)."""
        return self.codes.astype(np.float32) * np.repeat(self.scales, self.group_size, axis=1)


class CodedExpert(NamedTuple):
    """One expert of ``CodedMatrix``; gate None without one. Biases : float32 (out_features,) or None."""

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
