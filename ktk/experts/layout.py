"""panel16: the one layout of every packed expert, on disk and in memory.

A panel is sixteen output channels by all of in_features, its scales first, its codes behind them,
so that a kernel which needs the scales at once reads memory in one stream:

           scales                                        codes
    8 bit  fp32 [16] (per channel) or bf16 [groups][16]  [K/4][16][4] bytes
    4 bit  as above                                      [K/8][16][4] bytes; low nibble = k..k+3,
                                                         high = k+4..k+7
    nl4    fp32 [16], then multipliers [K/2 groups][16]  as of 4 bit
           bytes: low nibble = even group, high = odd
    nl3    as of nl4                                     [K/32][3][16][4]: nibbles of rows hold
                                                         k..k+23 in steps of 4; their top bits
                                                         k+24..k+31: bit i in row i, low nibble
                                                         = first four
    nl2    as of nl4                                     [K/16][16][4]; two bits, from the lowest
                                                         on = k..k+3, k+4..k+7, ...
    fp8    fp32 [groups], of all channels, or [16];      as of 8 bit
           mxfp8: e8m0 [groups][16]
    mxfp4  e8m0 [groups][16]                             as of 4 bit
    nvfp4  e4m3 [groups][16], then the matrix's, fp32    as of 4 bit
    int4_asym  fp16 [groups][16], then zero points       as of 4 bit
           [groups/2][16], as nl4's multipliers
    bf16   none                                          [K/2][16][2]
    fp32   none                                          [K][16]

K is in_features padded to a multiple of 32, and of a rotation's width where there is one;
out_features is padded to a multiple of 16. Padding holds the zero point, so it adds nothing. One
64-byte row of codes is at once a ``vpdpbusd`` operand, two AVX2 loads and one row of an AMX B tile
(Intel SDM vol. 2, VPDPBUSD and TDPBSUD).

An expert is one span, 4 KiB aligned: gate panel 0, up panel 0, gate panel 1, ..., then the down
panels, then fp32 biases (gate, up, down; each padded to whole panels) where the family has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ktk.experts.formats import FINE_GROUP, Format
from ktk.experts.formats.floats import as_values
from ktk.experts.rotation import NO_ROTATION, Rotation

PANEL = 16  # output channels in a panel
K_ALIGN = 32  # in_features padding: the smallest group, and eight nibble rows' worth of k
EXPERT_ALIGN = 4096  # one O_DIRECT read
LAYOUT_VERSION = 3  # 2 had fp8's codes one k behind the other, 1 scales behind the codes
# How the bits of a scale are looked at.
_STORED: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.uint16),
    "bf16": np.dtype(np.uint16),
    "e8m0": np.dtype(np.uint8),
    "e4m3": np.dtype(np.uint8),
}


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class MatrixLayout:
    """One projection's geometry. group_size and activation_group are in k, never 0 here."""

    format: Format
    in_features: int
    out_features: int
    padded_in: int
    num_panels: int
    group_size: int
    num_groups: int
    activation_group: int
    code_bytes: int  # of one panel
    scale_bytes: int  # of one panel, multipliers included, padded to 64
    scale_dtype: str = ""  # f32, f16, bf16, e8m0 or e4m3; empty without scales
    scales_of_group: int = 0  # of one panel: 16, or 1 where all its channels share it
    multiplier_group: int = 0  # k that share a multiplier or zero point; 0: there are none
    rotation: Rotation = NO_ROTATION

    @property
    def panel_bytes(self) -> int:
        return self.code_bytes + self.scale_bytes

    @property
    def scales_are_bf16(self) -> bool:
        return self.scale_dtype == "bf16"

    @property
    def scales_end(self) -> int:
        """Bytes of a panel's scales, without what follows them."""
        if not self.scale_dtype:
            return 0
        return self.num_groups * self.scales_of_group * _STORED[self.scale_dtype].itemsize

    def scales(self, panels: np.ndarray) -> np.ndarray:
        """The stored scales of uint8 (panels, panel_bytes): float32 or bit patterns, uint16 or
        uint8 (panels, groups, scales_of_group); a copy.
        """
        raw = np.ascontiguousarray(panels[:, : self.scales_end])
        stored = raw.view(_STORED[self.scale_dtype])
        return stored.reshape(len(panels), self.num_groups, self.scales_of_group)

    def scale_values(self, panels: np.ndarray) -> np.ndarray:
        """What weights are multiplied by, float32 (panels, groups, scales_of_group): the stored
        scales, times the matrix's where it has one.
        """
        values = self.group_scales(panels)
        if self.format.has_tensor_scale:
            values = values * self.tensor_scales(panels)[:, None, None]
        return values

    def group_scales(self, panels: np.ndarray) -> np.ndarray:
        """The same without the matrix's."""
        stored = self.scales(panels)
        return as_values(stored.reshape(len(panels), -1), self.scale_dtype).reshape(stored.shape)

    def tensor_scales(self, panels: np.ndarray) -> np.ndarray:
        """The matrix's scale as each panel has it, float32 (panels,)."""
        raw = panels[:, self.scales_end : self.scales_end + 4]
        return np.ascontiguousarray(raw).view(np.float32)[:, 0]

    def multipliers(self, panels: np.ndarray) -> np.ndarray:
        """Indices of the stored multipliers, or zero points, of uint8 (panels, panel_bytes): uint8
        (panels, groups, 16).
        """
        groups = self.padded_in // self.multiplier_group
        groups += self.padded_in % self.multiplier_group > 0
        pairs, start = -(-groups // 2), self.scales_end
        both = panels[:, start : start + pairs * PANEL].reshape(len(panels), pairs, 1, PANEL)
        each = np.concatenate([both & 15, both >> 4], axis=2).reshape(len(panels), -1, PANEL)
        return each[:, :groups]

    def codes(self, panels: np.ndarray) -> np.ndarray:
        """The stored codes of uint8 (panels, panel_bytes): uint8 (panels, code_bytes); a copy."""
        return np.ascontiguousarray(panels[:, self.scale_bytes :])

    @property
    def ladder(self) -> np.ndarray:
        """What the search of a scale tries (``Search``), float32 (candidates,);
        of integer formats.
        """
        search = self.format.search
        assert search is not None
        return np.array(
            search.ladder if self.scales_are_bf16 else search.channel_ladder, np.float32
        )

    @property
    def fine_group(self) -> int:
        """k that one integer accumulator covers: the smaller of the two groups."""
        return min(self.group_size, self.activation_group)


@dataclass(frozen=True)
class ExpertLayout:
    """Byte offsets inside one expert's span; bias offsets are -1 without biases."""

    gate_up: MatrixLayout
    down: MatrixLayout
    down_offset: int
    gate_bias_offset: int
    up_bias_offset: int
    down_bias_offset: int
    expert_bytes: int
    has_gate: bool

    @property
    def down_end(self) -> int:
        """Where the down panels end: codes and scales of one expert, in bytes."""
        return self.down_offset + self.down.num_panels * self.down.panel_bytes

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections, in the order they are computed."""
        return ("gate", "up", "down") if self.has_gate else ("up", "down")

    def matrix(self, projection: str) -> MatrixLayout:
        return self.down if projection == "down" else self.gate_up

    def panels(self, spans: np.ndarray, projection: str) -> np.ndarray:
        """One projection's panels in spans uint8 (..., expert_bytes): uint8 (..., num_panels,
        panel_bytes), a view.
        """
        size = self.matrix(projection).panel_bytes
        if projection == "down":
            part = spans[..., self.down_offset : self.down_end]
            return part.reshape(*spans.shape[:-1], -1, size)
        both = spans[..., : self.down_offset].reshape(*spans.shape[:-1], -1, size)
        return both[..., int(projection == "up") :: 2, :] if self.has_gate else both

    def bias(self, spans: np.ndarray, projection: str) -> np.ndarray | None:
        """One projection's bias in spans: uint8, padded to whole panels, a view; None without."""
        start = {
            "gate": self.gate_bias_offset,
            "up": self.up_bias_offset,
            "down": self.down_bias_offset,
        }[projection]
        if start < 0:
            return None
        return spans[..., start : start + self.matrix(projection).num_panels * PANEL * 4]


def matrix_layout(
    fmt: Format,
    in_features: int,
    out_features: int,
    group_size: int,
    activation_group: int,
    rotation: Rotation = NO_ROTATION,
) -> MatrixLayout:
    """Of panels of ``fmt``. group_size, activation_group : as in MoESpec, 0 = the whole channel."""
    padded_in = round_up(in_features, max(K_ALIGN, rotation.width))
    multiplier_group = group_size if fmt.multipliers else 0
    group = padded_in if fmt.multipliers else min(group_size or padded_in, padded_in)
    if fmt.has_zero_points:
        multiplier_group = group
    num_groups = -(-padded_in // group)
    scale_dtype, scales_of_group = "", 0
    if fmt.scales is not None:
        is_of_channel = fmt.scales.dtype == "bf16" and not group_size
        scale_dtype = "f32" if is_of_channel else fmt.scales.dtype
        scales_of_group = PANEL if fmt.scales.rows < PANEL else 1
    head = num_groups * scales_of_group * _STORED[scale_dtype].itemsize if scale_dtype else 0
    if multiplier_group:
        head += -(-padded_in // (2 * multiplier_group)) * PANEL
    if fmt.has_tensor_scale:
        head += 4
    return MatrixLayout(
        format=fmt,
        in_features=in_features,
        out_features=out_features,
        padded_in=padded_in,
        num_panels=-(-out_features // PANEL),
        group_size=group,
        num_groups=num_groups,
        activation_group=FINE_GROUP if fmt.is_fine else activation_group or padded_in,
        code_bytes=padded_in * PANEL * fmt.bits // 8,
        scale_bytes=round_up(head, 64),
        scale_dtype=scale_dtype,
        scales_of_group=scales_of_group,
        multiplier_group=multiplier_group,
        rotation=rotation,
    )


@lru_cache(maxsize=256)
def expert_layout(
    fmt: Format,
    hidden_size: int,
    intermediate_size: int,
    group_size: int,
    activation_group: int,
    rotation: Rotation,
    has_gate: bool,
    has_bias: bool,
) -> ExpertLayout:
    """Of an expert whose MoESpec has these fields."""
    groups = group_size, activation_group, rotation
    gate_up = matrix_layout(fmt, hidden_size, intermediate_size, *groups)
    down = matrix_layout(fmt, intermediate_size, hidden_size, *groups)
    projections = 2 if has_gate else 1
    down_offset = projections * gate_up.num_panels * gate_up.panel_bytes
    end = down_offset + down.num_panels * down.panel_bytes
    gate_bias = up_bias = down_bias = -1
    if has_bias:
        bias_bytes = gate_up.num_panels * PANEL * 4
        if has_gate:
            gate_bias, end = end, end + bias_bytes
        up_bias, end = end, end + bias_bytes
        down_bias, end = end, end + down.num_panels * PANEL * 4
    return ExpertLayout(
        gate_up,
        down,
        down_offset,
        gate_bias,
        up_bias,
        down_bias,
        round_up(end, EXPERT_ALIGN),
        has_gate,
    )
