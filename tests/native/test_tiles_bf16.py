"""The bf16 kernel on tiles, called alone: it needs no AVX-512, so the emulator runs it on any CPU.

The operator over it is in test_kernels.py, for CPUs whose vectors the level needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ktk._cy import emulate_tiles, native_module
from ktk.experts.formats.floats import bf16_to_f32, f32_to_bf16
from ktk.machine import cpu
from ktk.reference.tiles import linear_bf16
from make.cases import assert_exact
from make.gemm_calls import Bf16Gemm

SYMBOL = "ktk_gemm_bf16_amxbf16"
SUMS_BYTES, ROW_32K = 8 * 4 * 1024 * 4, 68  # of the kernel's row in the table
pytestmark = pytest.mark.skipif(native_module() is None, reason="the extension is not built")


@pytest.fixture(autouse=True)
def emulator() -> Any:
    """None where the CPU's own tiles run."""
    if "amx_bf16" in cpu.detect() and not cpu.detect().emulated:
        return None
    try:
        return emulate_tiles()
    except ValueError as error:
        pytest.skip(str(error))


def case(rows: int, in_features: int, out_features: int, seed: int) -> tuple[Any, Any]:
    """Weights that bf16 has exactly, and activations, of which some are far from 1."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((out_features, in_features)).astype(np.float32)
    x = rng.standard_normal((rows, in_features)) * 2.0 ** rng.integers(-9, 9, (rows, in_features))
    return bf16_to_f32(f32_to_bf16(w)), x.astype(np.float32)


def work_of(rows: int, in_features: int) -> int:
    return SUMS_BYTES + rows * -(-in_features // 32) * ROW_32K


@pytest.mark.parametrize(
    ("in_features", "num_panels"), [(32, 1), (40, 2), (512, 3), (544, 2), (1100, 5)]
)
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 70])
def test_it_is_the_tile_model_bit_for_bit(in_features: int, num_panels: int, rows: int) -> None:
    """Blocks of 512 k and parts of one; row pairs of one tile and of two, all heights."""
    w, x = case(rows + 3, in_features, 16 * num_panels, rows)
    index = np.random.default_rng(rows).permutation(rows + 3)[:rows]
    got = Bf16Gemm(SYMBOL, w)(x, index, num_panels, work_of(rows, in_features))
    assert_exact(linear_bf16(w, x[index]), got)


def test_a_row_has_its_bits_in_every_batch() -> None:
    w, x = case(256, 1056, 48, seed=5)
    gemm = Bf16Gemm(SYMBOL, w)
    want = gemm(x, np.arange(256), 3, work_of(256, 1056))
    for rows in [*range(1, 71), 129, 255]:
        index = (np.arange(rows) * 7 + rows) % 256
        assert_exact(want[index], gemm(x, index, 3, work_of(rows, 1056)))


def test_panels_do_not_depend_on_their_neighbours() -> None:
    w, x = case(33, 576, 80, seed=6)
    gemm = Bf16Gemm(SYMBOL, w)
    want = gemm(x, np.arange(33), 5, work_of(33, 576))
    for panels in range(1, 5):
        assert_exact(want[:, : 16 * panels], gemm(x, np.arange(33), panels, work_of(33, 576)))


@pytest.mark.parametrize("rows", [1, 40])
def test_its_error_is_that_of_float_sums_over_rounded_activations(rows: int) -> None:
    """Against float64: half an ulp of bf16 a product at most, 2^-8 of it, and float sums."""
    w, x = case(rows, 2048, 32, seed=7)
    got = Bf16Gemm(SYMBOL, w)(x, np.arange(rows), 2, work_of(rows, 2048))
    exact, size = x.astype(np.float64) @ w.T, np.abs(x).astype(np.float64) @ np.abs(w).T
    assert (np.abs(got - exact) <= size * (2.0**-8 + 2048 * 2.0**-24)).all()
    rounded = bf16_to_f32(f32_to_bf16(x)).astype(np.float64)
    assert (np.abs(got - rounded @ w.T) <= size * 2048 * 2.0**-24).all()
    assert np.abs(got - exact).max() > 0


def test_nan_and_inf_stay_in_their_rows() -> None:
    w, x = case(20, 64, 16, seed=8)
    x[3], x[11] = np.nan, np.inf
    gemm, index = Bf16Gemm(SYMBOL, w), np.arange(20)
    got, clean = gemm(x, index, 1, work_of(20, 64)), ~np.isin(index, [3, 11])
    assert not np.isfinite(got[~clean]).any()
    assert_exact(linear_bf16(w, x[clean]), got[clean])


@pytest.mark.parametrize(("rows", "num_pairs"), [(1, 1), (16, 1), (32, 1), (33, 2), (64, 2)])
def test_products_loads_and_stores_are_as_few_as_stated(
    emulator: Any, rows: int, num_pairs: int
) -> None:
    """1024 k, 8 panels: 32 steps of k in two blocks, between which C waits only for several
    pairs.
    """
    if emulator is None:
        pytest.skip("the CPU's own tiles run, which count nothing")
    w, x = case(rows, 1024, 128, seed=9)
    gemm, tiles = Bf16Gemm(SYMBOL, w), -(-rows // 16)
    emulator.reset_counts()
    gemm(x, np.arange(rows), 8, work_of(rows, 1024))
    counts = emulator.counts()
    waits = num_pairs > 1
    assert counts["tdpbf16ps"] == 8 * tiles * 32
    assert counts["tileloadd"] == (8 * num_pairs + 4 * tiles) * 32 + waits * 8 * tiles
    assert counts["tilestored"] == (1 + waits) * 8 * tiles
