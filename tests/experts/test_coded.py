"""Formats of checkpoints: what codes and scales stand for, by torch's own small floats, and that
panels keep them bit for bit.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ktk.checkpoint.packed import read_layer, write_layer
from ktk.errors import CheckpointError
from ktk.experts.dequantise import expert_weights
from ktk.experts.formats import PANELS
from ktk.experts.formats.floats import as_bits, as_values, f32_to_bf16, nearest_codes, values_of
from ktk.experts.panels import read_panels
from ktk.experts.spec import MoESpec
from ktk.experts.stored import CodedExpert, CodedMatrix
from ktk.quantise.pack import keeps_codes, pack_expert
from make.cases import assert_exact, pack_all, random_experts

F = np.float32
CODED = [f for f in PANELS.values() if not f.is_integer and f.scales is not None]
TORCH = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e8m0": getattr(torch, "float8_e8m0fnu", None),
}


@pytest.mark.parametrize("dtype", TORCH)
def test_values_are_torchs(dtype: str) -> None:
    if TORCH[dtype] is None:
        pytest.skip(f"this torch has no {dtype}")
    codes = torch.arange(256, dtype=torch.uint8).view(TORCH[dtype])
    assert_exact(codes.float().numpy(), values_of(dtype).copy())


def test_e2m1_has_the_values_of_its_definition() -> None:
    """Exponent bias 1; 0 00 0 is zero, 0 00 1 a half."""
    want = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert values_of("e2m1").tolist() == want + [-v for v in want]
    assert np.signbit(values_of("e2m1")[8])


@pytest.mark.parametrize("dtype", ["e4m3", "e5m2"])
def test_rounding_is_torchs(dtype: str) -> None:
    x = np.random.default_rng(0).standard_normal(4000).astype(F) * F(40)
    x[:3] = 0, -1e-6, 447
    want = torch.from_numpy(x).to(TORCH[dtype]).view(torch.uint8).numpy()
    assert_exact(want, nearest_codes(x, dtype))


def test_what_is_too_large_becomes_the_largest() -> None:
    x = np.array([1e9, -1e9], F)
    assert values_of("e2m1")[nearest_codes(x, "e2m1")].tolist() == [6, -6]
    assert values_of("e4m3")[nearest_codes(x, "e4m3")].tolist() == [448, -448]


def any_codes(rng: np.random.Generator, dtype: str, shape: tuple[int, int]) -> np.ndarray:
    """Codes of finite values, uint8."""
    table = values_of(dtype)
    return rng.choice(np.flatnonzero(np.isfinite(table)), shape).astype(np.uint8)


def any_matrix(name: str, group: int, rows: int, columns: int, seed: int) -> CodedMatrix:
    """A matrix as a checkpoint may have it."""
    fmt, rng = PANELS[name], np.random.default_rng(seed)
    assert fmt.scales is not None
    block = min(fmt.scales.rows, rows), group or columns
    shape = -(-rows // block[0]), -(-columns // block[1])
    scales = np.exp2(rng.integers(-12, 0, shape)).astype(F)
    if fmt.scales.dtype != "e8m0":
        scales = scales * rng.uniform(1, 2, shape).astype(F)
        scales = as_values(as_bits(scales, fmt.scales.dtype), fmt.scales.dtype)
    zeros = rng.integers(0, 16, shape, dtype=np.uint8) if fmt.has_zero_points else None
    tensor_scale = 0.37 if fmt.has_tensor_scale else 1.0
    codes = any_codes(rng, fmt.codes.dtype, (rows, columns))
    return CodedMatrix(codes, scales, fmt, block, tensor_scale, zeros)


def weights_of(m: CodedMatrix) -> np.ndarray:
    """What it stands for, code by code."""
    values = values_of(m.format.codes.dtype)[m.codes]
    rows, columns = np.indices(m.codes.shape)
    at = rows // m.block[0], columns // m.block[1]
    if m.zero_points is not None:
        values = values - m.zero_points[at]
    return values * (m.scales * F(m.tensor_scale))[at]


EVERY = [(f.name, g) for f in CODED for g in f.group_sizes]


@pytest.mark.parametrize(("name", "group"), EVERY)
def test_panels_keep_codes_scales_and_zero_points(name: str, group: int) -> None:
    hidden, intermediate = 256, 48
    spec = MoESpec(1, hidden, intermediate, name, group)
    if group > intermediate:  # an experts layer whose down projection has whole groups
        intermediate = 128
        spec = MoESpec(1, hidden, intermediate, name, group)
    if intermediate % (group or 1):
        intermediate = 96 if group == 32 else 64
        spec = MoESpec(1, hidden, intermediate, name, group)
    gate, up, down = (
        any_matrix(name, group, rows, columns, seed)
        for seed, (rows, columns) in enumerate(
            [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
        )
    )
    coded = CodedExpert(gate, up, down)
    assert keeps_codes(spec, coded)
    out = np.empty((1, spec.layout.expert_bytes), np.uint8)
    pack_expert(spec, coded, out[0])
    for part, matrix in zip(("gate", "up", "down"), (gate, up, down), strict=True):
        assert_exact(weights_of(matrix), matrix.dequantised())
        layout = spec.layout.matrix(part)
        values, scales = read_panels(spec.layout.panels(out[0], part), layout)
        spread = np.repeat(scales, layout.group_size, axis=1)[:, : layout.padded_in]
        got = (values * spread)[: matrix.codes.shape[0], : matrix.codes.shape[1]]
        assert_exact(weights_of(matrix), np.ascontiguousarray(got))


def test_int4_is_int4_asym_with_zero_points_of_8() -> None:
    rng = np.random.default_rng(1)
    spec = MoESpec(1, 128, 64, "int4_asym", 64)

    def matrix(rows: int, columns: int) -> CodedMatrix:
        codes = rng.integers(-8, 8, (rows, columns), dtype=np.int8)
        scales = rng.uniform(1e-3, 1e-2, (rows, columns // 64)).astype(np.float16).astype(F)
        return CodedMatrix(codes, scales, PANELS["int4"], (1, 64))

    coded = CodedExpert(matrix(64, 128), matrix(64, 128), matrix(128, 64))
    assert keeps_codes(spec, coded)
    packed = pack_all(spec, [coded])  # type: ignore[list-item]
    for want, got in zip(coded.dequantised()[:3], expert_weights(packed, 0)[:3], strict=True):
        assert_exact(want, got)


def test_scales_that_a_format_cannot_hold_are_not_kept() -> None:
    """fp16 of int4_asym has 11 bits, and none of 1e-9."""
    for scale, is_kept in ((0.01 + 2.0**-30, False), (1e-9, False), (0.0078125, True)):
        m = any_matrix("int4_asym", 64, 64, 64, 3)
        m.scales[:] = scale
        spec = MoESpec(1, 64, 64, "int4_asym", 64)
        assert keeps_codes(spec, CodedExpert(m, m, m)) == is_kept
    m = any_matrix("mxfp8", 32, 64, 64, 3)
    m.scales[:] = 0.75
    assert not keeps_codes(MoESpec(1, 64, 64, "mxfp8"), CodedExpert(m, m, m))


@pytest.mark.parametrize("name", [f.name for f in CODED])
def test_packed_layers_with_a_broken_scale_are_refused(name: str, tmp_path: object) -> None:
    """NaN of each dtype: 255 of e8m0, 127 of e4m3, all exponent bits of others."""
    spec = MoESpec(1, 64, 32, name)
    packed = pack_all(spec, random_experts(spec, 1))
    write_layer(str(tmp_path), spec, 0, packed.data)
    read_layer(str(tmp_path), 0)
    data = packed.data.copy()
    data[0, : {"e8m0": 1, "e4m3": 1, "f16": 2, "f32": 4}[spec.format.scales.dtype]] = 0xFF
    write_layer(str(tmp_path), spec, 0, data)
    with pytest.raises(CheckpointError, match="gate projection: a scale is NaN"):
        read_layer(str(tmp_path), 0)


@pytest.mark.parametrize("name", [f.name for f in CODED])
def test_floats_become_codes_as_near_as_the_format_allows(name: str) -> None:
    """Relative squared error of normal weights; zeros, and bf16 bits, stay what they are."""
    bound = {"e4m3": 1e-3, "e5m2": 4e-3, "e2m1": 0.02, "u4": 0.012}[PANELS[name].codes.dtype]
    spec = MoESpec(1, 256, 64, name)
    (weights,) = random_experts(spec, 1)
    weights.up[3] = 0
    got = expert_weights(pack_all(spec, [weights]), 0)
    for part in ("gate", "up", "down"):
        w, v = getattr(weights, part), getattr(got, part)
        assert 1e-5 < np.square(v - w).mean() / np.square(w).mean() < bound
    assert not got.up[3].any()
    bits = weights._replace(up=f32_to_bf16(weights.up))
    assert np.isfinite(expert_weights(pack_all(spec, [bits]), 0).up).all()
