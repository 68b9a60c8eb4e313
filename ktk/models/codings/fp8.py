"""fp8: e4m3 or e5m2 codes, and a scale for the whole matrix, each channel, or each block; MXFP8:
e4m3 codes, and one e8m0 scale for 32 of a row.

    fp8 block     weight e4m3 (N, K)    scale (ceil(N/block rows), ceil(K/block columns))
    fp8 channel   weight e4m3 (N, K)    scale (N,) or (N, 1)
    fp8 tensor    weight e4m3 (N, K)    scale () or (1,)
    mxfp8         weight e4m3 (N, K)    scale e8m0 (N, K/32)

Source: DeepSeek-V3 for the blocks; OCP Microscaling Formats specification 1.0.
"""

from __future__ import annotations

import numpy as np

from ktk.errors import CheckpointError
from ktk.experts.formats.floats import as_values
from ktk.models.codings.scaled import MX_GROUP, Coding, ScaledCoding, Shapes
from ktk.models.config import Config

DEFAULT_BLOCK = (128, 128)


def fp8_block(config: Config) -> tuple[int, int]:
    """Rows and columns of an fp8 block; (128, 128) unless quantization_config says otherwise."""
    block = config.quantization.get("weight_block_size")
    if block is None:
        return DEFAULT_BLOCK
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(b) is int and b > 0 for b in block)
    ):
        raise CheckpointError(
            f"{config.where}: quantization_config.weight_block_size={block!r}: must be two "
            "positive ints"
        )
    return block[0], block[1]


class _Fp8(ScaledCoding):
    def __init__(self, name: str, codes: str) -> None:
        self.name, self.codes = name, codes
        self.weight_dtypes = (f"F8_{codes.upper()}",)

    def values(self, raw: np.ndarray) -> np.ndarray:
        return as_values(raw, self.codes)

    def fit(self, found: Shapes) -> Coding | None:
        (rows, columns), block = found.stored, found.block
        if found.scales in ((), (1,), (1, 1)):
            return Coding(self.name, found.stored, found.stored)
        if found.scales in ((rows,), (rows, 1)):
            return Coding(self.name, found.stored, (1, columns))
        if found.scales == found.blocks(*block):
            return Coding(self.name, found.stored, (min(block[0], rows), min(block[1], columns)))
        return None

    def wanted(self, found: Shapes) -> str:
        return (
            f"a scale must be () for the tensor, ({found.stored[0]}, 1) per channel, "
            f"{found.blocks(*found.block)} for blocks of {found.block}"
        )


class _Mxfp8(_Fp8):
    def fit(self, found: Shapes) -> Coding | None:
        if found.is_e8m0 and found.scales == found.blocks(1, MX_GROUP):
            return Coding(self.name, found.stored, (1, MX_GROUP))
        return None

    def wanted(self, found: Shapes) -> str:
        return f"e8m0 {found.blocks(1, MX_GROUP)}"


FP8, FP8_E5M2, MXFP8 = _Fp8("fp8", "e4m3"), _Fp8("fp8_e5m2", "e5m2"), _Mxfp8("mxfp8", "e4m3")
