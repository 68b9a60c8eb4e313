"""nl4's rounding: how near it comes, what it leaves alone, and that the kernels' numbers are the
table's.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from ktk.experts.formats import PANELS
from ktk.experts.layout import matrix_layout
from ktk.experts.panels import dequantised, read_panels
from ktk.experts.rotation import Rotation
from ktk.experts.spec import MoESpec
from ktk.ops.requantise import packed_spec
from ktk.quantise.feedback import factorise
from ktk.quantise.levels import round_levels
from make import ROOT
from make.cases import pack_all, random_experts

F = np.float32
NL4 = PANELS["nl4"]


def relative_error(w: np.ndarray, group: int, rotation: Rotation) -> float:
    layout = matrix_layout(NL4, w.shape[1], len(w), group, 128, rotation)
    got = dequantised(round_levels(w, layout).panels(layout), layout)
    return float(np.square(w - got).sum() / np.square(w).sum())


@pytest.mark.parametrize(("group", "most"), [(16, 0.0054), (32, 0.0067), (0, 0.0110)])
@pytest.mark.parametrize("rotation", [Rotation(), Rotation(64), Rotation(256, 3)])
def test_error_of_normal_weights(group: int, most: float, rotation: Rotation) -> None:
    w = np.random.default_rng(0).standard_normal((64, 1024)).astype(F)
    assert relative_error(w, group, rotation) < most


def test_rotation_takes_outliers_apart() -> None:
    w = np.random.default_rng(1).standard_normal((32, 512)).astype(F)
    w[:, ::61] *= 30
    assert relative_error(w, 0, Rotation(64)) < relative_error(w, 0, Rotation()) / 1.5


@pytest.mark.parametrize("group", [16, 32, 0])
def test_zeros_stay_zeros_and_padding_adds_nothing(group: int) -> None:
    w = np.random.default_rng(2).standard_normal((5, 70)).astype(F)
    w[1] = 0
    layout = matrix_layout(NL4, 70, 5, group, 128)
    codes, scales = read_panels(round_levels(w, layout).panels(layout), layout)
    assert (codes[:, 70:] == NL4.zero_point).all() and (codes[5:] == NL4.zero_point).all()
    assert (codes[1] == NL4.zero_point).all() and scales[1] == 0


def test_sizes_of_any_order_give_the_same_codes() -> None:
    w = np.random.default_rng(3).standard_normal((16, 256)).astype(F)
    layout = matrix_layout(NL4, 256, 16, 16, 128)
    want = round_levels(w, layout)
    for size in (2.0**-100, 2.0**-60, 2.0**60, 2.0**100):
        got = round_levels(w * F(size), layout)
        np.testing.assert_array_equal(want.codes, got.codes)
        np.testing.assert_allclose(got.scales, want.scales * F(size), rtol=1e-6)


def test_feedback_lowers_the_loss_of_rotated_columns() -> None:
    rng = np.random.default_rng(4)
    mixing = rng.standard_normal((256, 256)) * rng.lognormal(0, 1, 256)
    h = mixing @ mixing.T / 256
    w = rng.standard_normal((32, 256)).astype(F)
    factor = factorise(h)
    layout = matrix_layout(NL4, 256, 32, 16, 128)

    def loss(error: np.ndarray) -> float:
        e = error[:32].astype(np.float64)
        return float(np.einsum("ij,jk,ik->", e, h, e))

    plain = round_levels(w, layout)
    handed_on = round_levels(w, layout, factor.upper, factor.weight)
    assert loss(handed_on.error) < 0.6 * loss(plain.error)


def test_the_kernels_have_the_tables_numbers() -> None:
    text = (ROOT / "ktk/_cy/include/ktk_levels.h").read_text()
    levels = tuple(int(n) for n in re.findall(r"KTK_LEVEL\((-?\d+)\)", text))
    (listed,) = re.findall(r"ktk_multipliers\[16\][^{]*{([^}]*)}", text)
    (zero,) = re.findall(r"KTK_LEVEL_ZERO = (\d+)", text)
    assert levels == NL4.levels == tuple(sorted(NL4.levels)) and 0 in levels
    assert tuple(int(n) for n in re.findall(r"-?\d+", listed)) == NL4.multipliers
    # What the kernels' sums of 16 bits, and products of 8, stand on.
    assert max(abs(n) for n in levels) <= int(zero)
    assert max(abs(n) for n in levels) * max(NL4.multipliers) <= 127


def test_gguf_experts_packed_as_nl4_are_rotated() -> None:
    spec = MoESpec(2, 64, 64, "int8")
    experts = pack_all(spec, random_experts(spec, 1))
    assert packed_spec(experts, "nl4").turns == (64, 0)
    assert packed_spec(experts, "int4").turns == (0, 0)
