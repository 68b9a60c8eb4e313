"""What a format's row says: its planes, how activations meet them, and how weights become it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

GROUP_SIZES = (32, 64, 128)
ACTIVATION_GROUPS = (*GROUP_SIZES, 256)
# Of activations "s15" (KTK_PLANES_MOST, ktk_kernels.h): sums of 32 products with 15 are exact in
# fp32, and the error is a sixteenth of bf16's where values are alike.
FINE_MOST, FINE_GROUP = 85 * 171 + 85, 32
TINY_PEAK = 1e-30  # a group whose weights are all smaller is stored as zeros
# Bits of the dtypes that do not end in them.
_BITS = {"e8m0": 8, "e4m3": 8, "e5m2": 8, "e2m1": 4}
NUMPY_FLOATS = {"f16": "<f2", "f32": "<f4"}


class Plane(NamedTuple):
    """One kind of number a format stores.

    name : codes; scales; tensor_scale (of a matrix, times its scales); zero_points (codes that mean
        0); minima; multipliers (integers: a group's scale or minimum by that of its block or row);
        signs; shifts (bits: whether a group's values are the larger ones).
    dtype : u4, s8, f16, bf16, f32, e8m0 (a power of two), ...
    weights : along in_features that share a value; 0: those of the matrix's group.
    rows : of a matrix that share a value.
    """

    name: str
    dtype: str
    weights: int = 1
    rows: int = 1

    @property
    def bits(self) -> int:
        """Of one value."""
        return _BITS.get(self.dtype) or int(self.dtype.lstrip("usbf"))

    def num_bytes(self, weights: int) -> int:
        """Of so many weights along in_features, of a plane with a group of its own."""
        return math.ceil(self.bits * weights / (8 * self.weights))


class Search(NamedTuple):
    """How weights become codes where every weight counts alike (``ktk.quantise``): what is tried
    for each scale.

    ladder : candidates are the group's largest weight (or its span) by each of these; a negative
    one puts that weight on the code range's other end. channel_ladder : likewise where a whole
    channel shares the scale. refits : least-squares scales for the best codes, tried after them.
    neighbours : integer multipliers tried around the ideal one.
    """

    ladder: tuple[float, ...] = ()
    refits: int = 0
    neighbours: tuple[int, ...] = ()
    channel_ladder: tuple[float, ...] = ()


# How Grid.rounding rounds a scale that is stored itself.
NOT_ROUNDED, TO_BF16, TO_F16, TO_POWER_OF_TWO = range(4)


class Grid(NamedTuple):
    """What values a format can hold: scale * level - low, scale and low shared by ``group``
    columns; for rounding with feedback.

    levels : integers code_min..code_max, or those of ``table``. ladder : candidate scales are the
    group's largest weight (is_affine: its span) by each of these. block : columns whose integer
    scales int_min..int_max share the number they multiply; int_max 0: scales are stored themselves,
    rounded by ``rounding``. group 0: the matrix's.
    """

    group: int
    ladder: tuple[float, ...]
    code_min: int
    code_max: int
    block: int = 0
    refits: int = 2
    rounding: int = NOT_ROUNDED
    is_affine: bool = False
    int_min: int = 0
    int_max: int = 0
    neighbours: tuple[int, ...] = (0, -1, 1)
    table: tuple[float, ...] = ()


def steps(first: float, last: float, step: float, both_signs: bool = False) -> tuple[float, ...]:
    """first, first + step, ... last; with ``both_signs`` their negatives before them."""
    values = tuple(np.arange(first, last + step / 2, step).tolist())
    return (*(-v for v in values), *values) if both_signs else values


@dataclass(frozen=True, eq=False)
class Format:
    """One row of the format table.

    planes : in the order of the bytes. block : weights of a row that form a block of a GGUF file;
    0: the format lies in panels (``ktk.experts.layout``). number : of the type in GGUF files, None
    of panels. file_type : the name GGUF files of mostly this type state. row_scale : dtype of a
    scale that stands before a row's blocks; "" : there is none.
    activations : "s8", rounded to int8 in groups of ``activation_group``; "s15", to integers
        within +-``FINE_MOST`` in groups of ``FINE_GROUP``, of which no spec has others; or "f32",
        as they are.
    zero_point : the code that means 0. code_min, code_max : range of (code - zero_point) the
        quantiser of panels uses.
    group_sizes : allowed values of MoESpec.group_size; 0 = per output channel.
    default_group, default_activation_group, default_rotation : what None means in a MoESpec.
    levels : integers that codes stand for, where they are no code - zero_point. multipliers :
        integers that groups of weights are multiplied by, channels alone having scales; a product
        of the two is within +-127, and all sums are of such products.
    search : None where only rounding with feedback, or nothing, makes the format of floats. grid :
        None where feedback does not.
    """

    name: str
    planes: tuple[Plane, ...]
    activations: str
    block: int = 0
    number: int | None = None
    file_type: str = ""
    row_scale: str = ""
    zero_point: int = 0
    code_min: int = 0
    code_max: int = 0
    group_sizes: tuple[int, ...] = (0,)
    default_group: int = 0
    default_activation_group: int = 0
    default_rotation: int = 0
    levels: tuple[int, ...] = ()
    multipliers: tuple[int, ...] = ()
    search: Search | None = None
    grid: Grid | None = None

    @property
    def is_packed(self) -> bool:
        """Whether it lies in panels; else in the rows of a GGUF file, as blocks."""
        return not self.block

    @property
    def is_integer(self) -> bool:
        """Whether activations are rounded to int8 for it."""
        return self.activations == "s8"

    @property
    def is_fine(self) -> bool:
        """Whether activations are rounded so finely that integers stand for them exactly enough."""
        return self.activations == "s15"

    @cached_property
    def codes(self) -> Plane:
        """The plane of codes."""
        return next(plane for plane in self.planes if plane.name == "codes")

    @cached_property
    def scales(self) -> Plane | None:
        """The plane of scales, if there is one."""
        return next((plane for plane in self.planes if plane.name == "scales"), None)

    @cached_property
    def has_zero_points(self) -> bool:
        """Whether each group has its own code that means 0."""
        return any(plane.name == "zero_points" for plane in self.planes)

    @cached_property
    def has_tensor_scale(self) -> bool:
        """Whether a matrix has a scale that multiplies its scales."""
        return any(plane.name == "tensor_scale" for plane in self.planes)

    @property
    def bits(self) -> int:
        """Of a code of a panel."""
        return self.codes.bits

    @cached_property
    def block_bytes(self) -> int:
        """Of a block of a GGUF file."""
        return sum(plane.num_bytes(self.block) for plane in self.planes)

    @property
    def row_head(self) -> int:
        """Bytes of a row before its blocks."""
        return np.dtype(NUMPY_FLOATS[self.row_scale]).itemsize if self.row_scale else 0

    @property
    def bits_per_weight(self) -> float:
        """Of a block of a GGUF file."""
        return self.block_bytes * 8 / self.block

    def row_bytes(self, in_features: int) -> int:
        """Of a row of blocks; ValueError unless it holds whole ones."""
        if in_features <= 0 or in_features % self.block:
            raise ValueError(
                f"in_features={in_features}: {self.name} needs a multiple of {self.block}"
            )
        return self.row_head + in_features // self.block * self.block_bytes

    def check_groups(self, group_size: object, activation_group: object) -> None:
        """ValueError if MoESpec's fields of these names do not fit this format."""
        if type(group_size) is not int or group_size not in self.group_sizes:
            allowed = ", ".join(map(str, self.group_sizes))
            raise ValueError(
                (
                    f"group_size={group_size!r}: {self.name} takes {allowed} (0 = one scale per "
                    "output channel)"
                )
                if self.is_packed
                else (
                    f"group_size={group_size!r}: GGUF blocks have groups of their own, leave it out"
                )
            )
        groups = ACTIVATION_GROUPS if self.is_integer else (0,)
        if type(activation_group) is not int or activation_group not in groups:
            raise ValueError(
                f"activation_group={activation_group!r}: {self.name} takes "
                f"{', '.join(map(str, groups))}"
            )
