"""Formats of GGUF files: rows of blocks, run as they lie in the file.

Source: the ggml block structures.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ktk.experts.formats.base import (
    TO_F16,
    TO_POWER_OF_TWO,
    Format,
    Grid,
    Plane,
    Search,
    steps,
)

NEIGHBOURS = (0, -1, 1)  # integer multipliers tried around the ideal one
E2M1_LEVELS = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)  # doubled, as ggml has them
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_IQ4_STEPS = steps(98, 130, 8, True)


def _scales(weights: int) -> Plane:
    return Plane("scales", "f16", weights)


def _minima(weights: int) -> Plane:
    return Plane("minima", "f16", weights)


def _codes(bits: int, weights: int = 1) -> Plane:
    return Plane("codes", f"u{bits}", weights)


def _multipliers(dtype: str, weights: int) -> Plane:
    return Plane("multipliers", dtype, weights)


def _signs(bits: int) -> Plane:
    return Plane("signs", f"u{bits}", 8)


def _row(name: str, number: int, block: int, *planes: Plane, **more: Any) -> Format:
    """more : other fields of Format; what is written also has a ``file_type``."""
    return Format(name, planes, "s8" if block > 1 else "f32", block, number, **more)


# Fewest bits per weight first. Ladders of code spans: finer ones, longer ones and more refits
# gained less than 0.3 % of RMSE each (bench/RESULTS.md, Quantisers of ggml blocks).
ROWS = (
    # Codes are places of eight or four weights in a table that ggml has.
    _row("IQ1_S", 19, 256, _scales(256), _codes(11, 8), _multipliers("u4", 32)),
    # Three-valued weights, five to a byte.
    _row("TQ1_0", 34, 256, _codes(8, 5), _scales(256)),
    # Its scale stands in the high nibbles of the multipliers' four words.
    _row("IQ1_M", 29, 256, _codes(12, 8), _multipliers("u3", 16), _scales(256)),
    _row("IQ2_XXS", 16, 256, _scales(256), _codes(8, 8), _signs(7), _multipliers("u4", 32)),
    _row("TQ2_0", 35, 256, _codes(2), _scales(256)),
    _row("IQ2_XS", 17, 256, _scales(256), _codes(9, 8), _signs(7), _multipliers("u4", 16)),
    _row("IQ2_S", 22, 256, _scales(256), _codes(10, 8), _signs(8), _multipliers("u4", 16)),
    _row(
        *("Q2_K", 10, 256, _multipliers("u8", 16), _codes(2), _scales(256), _minima(256)),
        file_type="MOSTLY_Q2_K_S",
        grid=Grid(16, steps(2.5, 4.5, 0.25), 0, 3, 256, is_affine=True, int_max=15),
    ),
    _row("IQ3_XXS", 18, 256, _scales(256), _codes(8, 4), _signs(7), _multipliers("u4", 32)),
    _row(
        *("Q3_K", 11, 256, _codes(3), _multipliers("u6", 16), _scales(256)),
        file_type="MOSTLY_Q3_K_S",
        grid=Grid(16, steps(2.75, 4.75, 0.25, True), -4, 3, 256, int_min=-32, int_max=31),
    ),
    _row("IQ3_S", 21, 256, _scales(256), _codes(9, 4), _signs(8), _multipliers("u4", 32)),
    _row(
        *("MXFP4", 39, 32, Plane("scales", "e8m0", 32), _codes(4)),
        file_type="MOSTLY_MXFP4_MOE",
        search=Search(),
        grid=Grid(32, (8, 4, 16), 0, 14, 32, refits=0, rounding=TO_POWER_OF_TWO, table=E2M1_LEVELS),
    ),
    _row(
        *("IQ4_XS", 23, 256, _scales(256), _multipliers("u6", 32), _codes(4)),
        file_type="MOSTLY_IQ4_XS",
        grid=Grid(32, _IQ4_STEPS, 0, 15, 256, int_min=-32, int_max=31, table=IQ4_LEVELS),
    ),
    _row(
        *("IQ4_NL", 20, 32, _scales(32), _codes(4)),
        file_type="MOSTLY_IQ4_NL",
        grid=Grid(32, _IQ4_STEPS, 0, 15, 32, rounding=TO_F16, table=IQ4_LEVELS),
    ),
    _row(
        *("Q4_0", 2, 32, _scales(32), _codes(4)),
        file_type="MOSTLY_Q4_0",
        search=Search(steps(6, 9.5, 0.25, True), 2),
        grid=Grid(32, steps(5.6, 9.6, 0.25, True), -8, 7, 32, rounding=TO_F16),
    ),
    _row(
        *("Q4_K", 12, 256, _scales(256), _minima(256), _multipliers("u12", 32), _codes(4)),
        file_type="MOSTLY_Q4_K_S",
        search=Search(steps(12.5, 16.9, 0.2), 2, NEIGHBOURS),
        grid=Grid(32, steps(12.5, 17, 0.5), 0, 15, 256, is_affine=True, int_max=63),
    ),
    _row("Q4_1", 3, 32, _scales(32), _minima(32), _codes(4)),
    _row("Q5_0", 6, 32, _scales(32), _codes(5)),
    _row(
        *("Q5_K", 13, 256, _scales(256), _minima(256), _multipliers("u12", 32), _codes(5)),
        file_type="MOSTLY_Q5_K_S",
        grid=Grid(32, steps(27, 33, 1), 0, 31, 256, is_affine=True, int_max=63),
    ),
    _row("Q5_1", 7, 32, _scales(32), _minima(32), _codes(5)),
    _row(
        *("Q6_K", 14, 256, _codes(6), _multipliers("s8", 16), _scales(256)),
        file_type="MOSTLY_Q6_K",
        search=Search(tuple(-v for v in steps(28, 37, 0.25)), 1, NEIGHBOURS),
        grid=Grid(16, steps(28, 36.5, 0.5, True), -32, 31, 256, int_min=-128, int_max=127),
    ),
    _row(
        *("Q8_0", 8, 32, _scales(32), Plane("codes", "s8")),
        file_type="MOSTLY_Q8_0",
        search=Search(),
        grid=Grid(32, steps(126, 130, 1), -127, 127, 32, rounding=TO_F16),
    ),
    _row("BF16", 30, 1, Plane("codes", "bf16"), file_type="MOSTLY_BF16"),
    _row("F16", 1, 1, Plane("codes", "f16"), file_type="MOSTLY_F16"),
    _row("F32", 0, 1, Plane("codes", "f32"), file_type="ALL_F32"),
)


@cache
def decoded_only() -> dict[str, Format]:
    """Types of GGUF files that no kernel reads and the gguf package decodes: they run as floats."""
    import gguf

    found, have = {}, {row.name for row in ROWS}
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.name in have:
            continue
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        found[kind.name] = Format(
            kind.name, (Plane("codes", f"u{8 * size}", block),), "f32", block, int(kind)
        )
    return found
