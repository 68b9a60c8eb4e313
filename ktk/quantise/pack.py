"""Float experts to panels, by the fastest quantiser present: C, else Numba. NumPy is their oracle.

All three find the same codes, so what is written does not depend on the machine.
Experts that are 4-bit codes already keep them where the groups fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ktk._cy import native_module
from ktk.experts.formats import Format
from ktk.experts.formats.floats import as_bits, as_values, to_f32
from ktk.experts.layout import PANEL, MatrixLayout
from ktk.experts.panels import lay_float_panels, lay_panels, padded
from ktk.experts.rotation import rotate
from ktk.experts.spec import MoESpec
from ktk.experts.stored import CodedExpert, CodedMatrix, ExpertWeights, StoredExperts, order_of
from ktk.machine import cpu
from ktk.machine.memory import aligned_buffer
from ktk.quantise.coded import quantise_coded
from ktk.quantise.levels import round_levels

F = np.float32
NOT_FINITE = "weights hold NaN or inf: mend the checkpoint"


def check_expert(spec: MoESpec, weights: ExpertWeights) -> None:
    """ValueError / TypeError unless shapes and dtypes are what the spec says."""
    i, h = spec.intermediate_size, spec.hidden_size
    wanted: dict[str, tuple[int, ...] | None] = {
        "gate": (i, h) if spec.has_gate else None,
        "up": (i, h),
        "down": (h, i),
        "gate_bias": (i,) if spec.has_bias and spec.has_gate else None,
        "up_bias": (i,) if spec.has_bias else None,
        "down_bias": (h,) if spec.has_bias else None,
    }
    for name, shape in wanted.items():
        array = getattr(weights, name)
        if array is None and shape is None:
            continue
        if array is None or shape is None:
            have = "missing" if array is None else "given"
            raise ValueError(
                f"{name} is {have}, but the spec has has_gate={spec.has_gate}, "
                f"has_bias={spec.has_bias}"
            )
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}: must be {shape}")
        allowed = (np.float32,) if name.endswith("bias") else (np.float32, np.uint16)
        if array.dtype not in allowed:
            raise TypeError(
                f"{name} has dtype {array.dtype}: must be float32"
                + " or uint16 bf16 bits" * (len(allowed) - 1)
            )
        if name.endswith("bias") and not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or inf")


def _is_finite(w: np.ndarray) -> bool:
    """Of float32 or bf16 bits."""
    if w.dtype == np.uint16:
        return not bool(((w & np.uint16(0x7F80)) == 0x7F80).any())
    return bool(np.isfinite(w).all())


def _pack_numba(w: np.ndarray, layout: MatrixLayout, panels: np.ndarray) -> None:
    from ktk.quantise._pack_numba import quantise_panel

    fmt = layout.format
    assert fmt.search is not None
    one = dataclasses.replace(layout, num_panels=1, out_features=PANEL)
    codes = np.empty((layout.padded_in, PANEL), F)
    scales = np.empty((layout.num_groups, PANEL), F)
    for p in range(layout.num_panels):
        rows = to_f32(w[p * PANEL : (p + 1) * PANEL])
        x = np.zeros((layout.padded_in, PANEL), F)
        x[: layout.in_features, : len(rows)] = rows.T
        if not np.isfinite(x).all():
            raise ValueError(NOT_FINITE)
        quantise_panel(
            x,
            layout.group_size,
            layout.ladder,
            fmt.search.refits,
            F(fmt.code_min),
            F(fmt.code_max),
            layout.scales_are_bf16,
            codes,
            scales,
        )
        unsigned = (codes.T.astype(np.int32) + fmt.zero_point).astype(np.uint8)
        panels[p] = lay_panels(unsigned, np.ascontiguousarray(scales.T), one)[0]


def pack_matrix(w: np.ndarray, layout: MatrixLayout, panels: np.ndarray) -> None:
    """Quantise (out, in) float32 or bf16 bits into ``panels``, uint8 (num_panels, panel_bytes),
    a view.
    """
    search, scales = layout.format.search, layout.format.scales
    if search is None:
        if not _is_finite(w):
            raise ValueError(NOT_FINITE)
        if layout.format.levels:
            panels[:] = round_levels(to_f32(w), layout).panels(layout)
        elif scales is None:
            panels[:] = lay_float_panels(w, layout)
        else:
            lay_codes(quantise_coded(to_f32(w), layout), layout, panels)
        return
    if layout.rotation.width:
        whole = np.zeros((len(w), layout.padded_in), F)
        whole[:, : layout.in_features] = to_f32(w)
        w, layout = rotate(whole, layout.rotation), _as_rotated(layout)
    native, isa = native_module(), cpu.best_isa()
    if native is None or isa is None:
        _pack_numba(w, layout, panels)
    else:
        native.pack_matrix(w, layout, isa, layout.ladder, search.refits, panels)


def _as_rotated(layout: MatrixLayout) -> MatrixLayout:
    """The same panels of weights that are rotated already."""
    return dataclasses.replace(layout, in_features=layout.padded_in)


def keeps_codes(spec: MoESpec, coded: CodedExpert) -> bool:
    """Whether panels of this spec take the codes of an expert as they are.

    Smaller groups than the codes have get the same scale again. Scales of int4's groups are rounded
    to bf16: bf16 values do not change, others by 2**-8 of themselves at most. All other scales
    must be what the format stores, bit for bit.
    """
    return all(_keeps(spec, m) for m in (coded.gate, coded.up, coded.down) if m is not None)


def _keeps(spec: MoESpec, coded: CodedMatrix) -> bool:
    coded, plane = _as_format(coded, spec.format), spec.format.scales
    if coded.format is not spec.format or plane is None or spec.turns.width:
        return False
    if plane.dtype != "bf16" and not _is_exact(coded.scales, plane.dtype):
        return False
    rows, columns = coded.codes.shape
    if plane.weights:  # blocks of their own
        return coded.block == (min(plane.rows, rows), min(plane.weights, columns))
    if not spec.group_size:
        return coded.scales.shape[1] == 1
    return coded.group_size % spec.group_size == 0


def _as_format(coded: CodedMatrix, fmt: Format) -> CodedMatrix:
    """The same codes as another format has them, where it does: int4's with zero points of 8."""
    if not fmt.has_zero_points or coded.format.name != "int4":
        return coded
    zero = coded.format.zero_point
    codes = (coded.codes + np.int8(zero)).astype(np.uint8)
    zeros = np.full(coded.scales.shape, zero, np.uint8)
    return dataclasses.replace(coded, codes=codes, zero_points=zeros, format=fmt)


def _is_exact(scales: np.ndarray, dtype: str) -> bool:
    """Whether that dtype holds float32 scales as they are."""
    return dtype == "f32" or np.array_equal(as_values(as_bits(scales, dtype), dtype), scales)


def lay_codes(coded: CodedMatrix, layout: MatrixLayout, panels: np.ndarray) -> None:
    """Codes as they are into ``panels``, uint8 (num_panels, panel_bytes), a view.

    ``keeps_codes`` must hold.
    """
    if not np.isfinite(coded.scales).all():
        raise ValueError("scales hold NaN or inf: mend the checkpoint")
    fmt = layout.format
    coded = _as_format(coded, fmt)
    codes = coded.codes
    if fmt.is_integer:
        codes = (codes + np.int8(fmt.zero_point)).astype(np.uint8)
    elif not np.isfinite(as_values(codes, fmt.codes.dtype)).all():
        raise ValueError(NOT_FINITE)
    whole = padded(codes, layout, fmt.zero_point)
    scales = _by_group(coded.spread_scales(), coded, layout)
    zeros = coded.zero_points
    more = None if zeros is None else _by_group(zeros, coded, layout)
    panels[:] = lay_panels(whole, scales, layout, more, coded.tensor_scale)


def _by_group(values: np.ndarray, coded: CodedMatrix, layout: MatrixLayout) -> np.ndarray:
    """(out_features, the codes' groups) to (padded_out, the layout's), zeros beyond."""
    if coded.group_size > layout.group_size:
        values = np.repeat(values, coded.group_size // layout.group_size, axis=1)
    whole = np.zeros((layout.num_panels * PANEL, layout.num_groups), values.dtype)
    width = min(layout.num_groups, values.shape[1])
    whole[: len(values), :width] = values[:, :width]
    return whole


def pack_expert(spec: MoESpec, weights: ExpertWeights | CodedExpert, out: np.ndarray) -> None:
    """Quantise one expert, or keep its codes where they fit, and lay its panels and biases into
    ``out``.

    out : uint8 (spec.layout.expert_bytes,), writable; every byte is written. Runs mostly without
    the GIL.
    Raises ValueError / TypeError if a shape, dtype or value does not fit.
    """
    coded: CodedExpert | None = None
    if isinstance(weights, CodedExpert):
        coded = weights if keeps_codes(spec, weights) else None
        weights = weights.dequantised()
    check_expert(spec, weights)
    layout = spec.layout
    out[:] = 0
    for name in layout.projections:
        matrix, panels = layout.matrix(name), layout.panels(out, name)
        if coded is not None:
            lay_codes(getattr(coded, name), matrix, panels)
        else:
            pack_matrix(getattr(weights, name), matrix, panels)
        bias = layout.bias(out, name)
        if bias is not None:
            given = getattr(weights, f"{name}_bias")
            bias.view(F)[: len(given)] = given


def pack_experts(
    spec: MoESpec,
    read: Callable[[int], ExpertWeights | CodedExpert],
    num_threads: int | None = None,
    experts: Sequence[int] | None = None,
) -> StoredExperts:
    """Pack ``read(expert)`` for all experts, or for those named; others are then not stored.

    At most ``num_threads`` experts are unpacked at a time.
    """
    names = range(spec.num_experts) if experts is None else experts
    data = aligned_buffer(len(names) * spec.layout.expert_bytes)
    data = data.reshape(len(names), spec.layout.expert_bytes)

    def work(at: int) -> None:
        expert = names[at]
        try:
            pack_expert(spec, read(expert), data[at])
        except (ValueError, TypeError) as error:
            raise type(error)(f"expert {expert}: {error}") from None

    with ThreadPoolExecutor(num_threads or cpu.num_physical_cores()) as pool:
        list(pool.map(work, range(len(names))))
    order = None if experts is None else order_of(spec.num_experts, experts)
    return StoredExperts.of_panels(spec, data, order)
