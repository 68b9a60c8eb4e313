"""Experts split over NUMA nodes: gate and up by their channels, down by its outputs.

Every output is then still one sum over all of k, made in one place: the results have the same bits as one part's,
and what crosses between the nodes is h, 8 bits a channel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ktk.experts.layout import PANEL
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.log import warn_once
from ktk.machine import numa
from ktk.machine.memory import aligned_buffer
from ktk.machine.threads import EngineLayout

BLOCK = 128  # channels a cut falls between: a multiple of every activation group


class Part(NamedTuple):
    """One part of every expert, as ktk_part in ktk.h has it. data : uint8 (num_experts, bytes)."""

    data: np.ndarray
    down_offset: int
    gate_bias_offset: int
    up_bias_offset: int
    down_bias_offset: int
    first_up_panel: int
    num_up_panels: int
    first_down_panel: int
    num_down_panels: int


def whole(packed: StoredExperts) -> Part:
    """All of it, as it lies."""
    layout = packed.spec.layout
    return Part(
        packed.data,
        layout.down_offset,
        layout.gate_bias_offset,
        layout.up_bias_offset,
        layout.down_bias_offset,
        0,
        layout.gate_up.num_panels,
        0,
        layout.down.num_panels,
    )


def parts_of(packed: StoredExperts, engine: EngineLayout) -> list[Part]:
    """``packed`` itself on a machine of one node, else a copy of each part in its node's memory."""
    if not engine.is_bound:
        return [whole(packed)]
    count = engine.threadpool_count
    return [_copy(packed, i, count, node) for i, node in enumerate(engine.numa_nodes)]


def cut(num_panels: int, index: int, count: int) -> tuple[int, int]:
    """First panel and number of panels of part ``index``."""
    step = BLOCK // PANEL
    blocks = -(-num_panels // step)
    first, end = (min(i * blocks // count * step, num_panels) for i in (index, index + 1))
    return first, end - first


def _copy(packed: StoredExperts, index: int, count: int, node: int) -> Part:
    layout = packed.spec.layout
    projections = 2 if layout.has_gate else 1
    first_up, num_up = cut(layout.gate_up.num_panels, index, count)
    first_down, num_down = cut(layout.down.num_panels, index, count)
    up_bytes = projections * layout.gate_up.panel_bytes
    spans = (
        (first_up * up_bytes, num_up * up_bytes),
        (
            layout.down_offset + first_down * layout.down.panel_bytes,
            num_down * layout.down.panel_bytes,
        ),
        (layout.down_end, layout.expert_bytes - layout.down_end),  # biases
    )
    size = sum(length for _, length in spans)
    data = bound_buffer(packed.spec.num_experts * size, node).reshape(packed.spec.num_experts, size)
    at = 0
    for start, length in spans:
        data[:, at : at + length] = packed.data[:, start : start + length]
        at += length
    down_offset = spans[0][1]
    moved = down_offset + spans[1][1] - layout.down_end
    gate_bias, up_bias, down_bias = (
        offset if offset < 0 else offset + moved
        for offset in (layout.gate_bias_offset, layout.up_bias_offset, layout.down_bias_offset)
    )
    return Part(
        data, down_offset, gate_bias, up_bias, down_bias, first_up, num_up, first_down, num_down
    )


def bound_buffer(num_bytes: int, node: int) -> np.ndarray:
    """uint8 (num_bytes,) in the node's memory, or with one warning wherever the OS puts it."""
    buffer = aligned_buffer(num_bytes)
    try:
        if num_bytes:
            numa.bind(buffer.ctypes.data, num_bytes, node)
    except (OSError, ValueError) as error:  # a container may forbid it: slower, not wrong
        warn_once("bind", "weights are not bound to NUMA nodes: %s", error)
    return buffer


def join(spec: MoESpec, parts: list[Part]) -> StoredExperts:
    """The experts in one piece again."""
    layout = spec.layout
    projections = 2 if layout.has_gate else 1
    data = aligned_buffer(spec.num_experts * layout.expert_bytes).reshape(spec.num_experts, -1)
    for part in parts:
        start = part.first_up_panel * projections * layout.gate_up.panel_bytes
        data[:, start : start + part.down_offset] = part.data[:, : part.down_offset]
        size = part.num_down_panels * layout.down.panel_bytes
        start = layout.down_offset + part.first_down_panel * layout.down.panel_bytes
        data[:, start : start + size] = part.data[:, part.down_offset : part.down_offset + size]
        data[:, layout.down_end :] = part.data[:, part.down_offset + size :]
    return StoredExperts.of_panels(spec, data)
