"""The one table of formats: what it says agrees with ggml's sizes and with the kernels' own
table.
"""

from __future__ import annotations

import gguf
import pytest

from ktk._cy import native_module
from ktk.experts.formats import (
    BLOCKS,
    FORMATS,
    PANELS,
    block_format,
    decoded_only,
    get_format,
    written_types,
)
from ktk.experts.formats.ik import BLOCK, ROWS


@pytest.mark.parametrize("name", [*BLOCKS, *decoded_only()])
def test_planes_fill_a_block_of_ggmls_size(name: str) -> None:
    row = block_format(name)
    assert not row.is_packed
    if name in gguf.GGMLQuantizationType.__members__:
        kind = gguf.GGMLQuantizationType[name]
        assert (row.number, row.block, row.block_bytes) == (int(kind), *gguf.GGML_QUANT_SIZES[kind])
        assert row.row_bytes(row.block) == row.block_bytes
    else:
        assert row in ROWS and row.block == BLOCK


def test_the_kernels_read_every_block_row_and_no_other() -> None:
    native = native_module()
    if native is None:
        pytest.skip("the extension is not built")
    kernels = native.block_formats()
    assert set(kernels) == set(BLOCKS)
    for name, (block, block_bytes, fine, head) in kernels.items():
        row = BLOCKS[name]
        assert (row.block, row.block_bytes, row.is_integer) == (block, block_bytes, fine > 0), name
        assert row.row_head == head, name


def test_panels_and_blocks_are_one_table_ordered_by_bits() -> None:
    assert list(FORMATS) == [*PANELS, *BLOCKS]
    bits = [row.bits for row in PANELS.values()]
    assert bits == sorted(bits) == [2, 3] + [4] * 5 + [8] * 5 + [16, 32]
    bits = [row.bits_per_weight for row in BLOCKS.values()]
    assert bits == sorted(bits)
    for name, row in PANELS.items():
        assert row.is_packed and get_format(name) is row and row.number is None


def test_what_is_written_can_be_rounded_or_is_float() -> None:
    for row in written_types():
        assert row.grid is not None or row.activations == "f32"
        assert row.file_type in gguf.LlamaFileType.__members__
    assert {row.name for row in BLOCKS.values() if row.grid} < {r.name for r in written_types()}


def test_rows_of_broken_blocks_are_refused() -> None:
    assert BLOCKS["Q4_K"].row_bytes(512) == 288
    for in_features in (0, 33, 576):
        with pytest.raises(ValueError, match="Q4_K needs a multiple of 256"):
            BLOCKS["Q4_K"].row_bytes(in_features)
    with pytest.raises(ValueError, match="decodes Q9_X"):
        block_format("Q9_X")
