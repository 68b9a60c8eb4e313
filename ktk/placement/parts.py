"""Experts split over NUMA nodes: gate and up by their channels, down by its outputs.

Every output is then still one sum over all of k, made in one place: the results have the same bits
as one part's, and what crosses between the nodes is h, 8 bits a channel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ktk.experts.layout import K_ALIGN, PANEL, MatrixLayout, matrix_layout, round_up
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts, StoredMatrix
from ktk.log import warn_once
from ktk.machine import numa
from ktk.machine.memory import aligned_buffer
from ktk.machine.threads import EngineLayout

LEAST_BLOCK = 128  # channels that a cut leaves together, at least


class Part(NamedTuple):
    """One part of every expert, as ktk_part in ktk.h has it, whatever the format.

    gate, up, down : uint8 (num_experts, panels or rows, bytes), experts at any distance; gate None
    without one. In panels those of gate and up alternate. Biases : float32 (num_experts, padded to
    panels), whole, or None.
    """

    gate: np.ndarray | None
    up: np.ndarray
    down: np.ndarray
    gate_bias: np.ndarray | None
    up_bias: np.ndarray | None
    down_bias: np.ndarray | None
    first_up_panel: int
    num_up_panels: int
    first_down_panel: int
    num_down_panels: int


def layout_of(matrix: StoredMatrix, activation_group: int) -> MatrixLayout:
    """Of one expert's matrix, in panels or in whole panels of rows of blocks,
    as kernels take it.
    """
    if matrix.format.is_packed:
        sizes = matrix.in_features, matrix.out_features
        group, rotation = matrix.group_size, matrix.rotation
        return matrix_layout(matrix.format, *sizes, group, activation_group, rotation)
    return MatrixLayout(
        format=matrix.format,
        in_features=matrix.in_features,
        out_features=matrix.out_features,
        padded_in=round_up(matrix.in_features, K_ALIGN),
        num_panels=-(-matrix.out_features // PANEL),
        group_size=0,
        num_groups=0,
        activation_group=activation_group,
        code_bytes=PANEL * matrix.data.shape[2],
        scale_bytes=0,
    )


def parts_of(experts: StoredExperts, engine: EngineLayout) -> list[Part]:
    """The experts themselves on a machine of one node, else a part for each; in that node's memory,
    but for mapped files.

    experts : in panels, or in whole panels of rows (``ktk.placement.blocks.whole_panels``).
    """
    if not engine.is_bound:
        return [whole_part(experts)]
    count = engine.threadpool_count
    return [_part(experts, i, count, node) for i, node in enumerate(engine.numa_nodes)]


def whole_part(experts: StoredExperts) -> Part:
    """All of the experts, where they lie."""
    return _part(experts, 0, 1, None)


def cut(out_features: int, index: int, count: int, together: int = LEAST_BLOCK) -> tuple[int, int]:
    """First panel and number of panels of part ``index``; channels of a block of ``together`` stay
    in one.
    """
    num_panels, step = -(-out_features // PANEL), together // PANEL
    blocks = -(-num_panels // step)
    first, end = (min(i * blocks // count * step, num_panels) for i in (index, index + 1))
    return first, end - first


def _part(
    experts: StoredExperts,
    index: int,
    count: int,
    node: int | None,
) -> Part:
    spec = experts.spec
    # What down reads is quantised, and turned, where it is made.
    together = max(LEAST_BLOCK, spec.activation_group or 0, spec.turns.width)
    up = cut(spec.intermediate_size, index, count, together)
    down = cut(spec.hidden_size, index, count)
    views = {
        name: _panels(matrix, *(down if name == "down" else up))
        for name, matrix in experts.matrices.items()
    }
    if node is not None:
        own = {
            n: views[n] for n, m in experts.matrices.items() if m.format.is_packed or m.is_repacked
        }
        views |= _copies(own, node, experts.is_packed)
    gate, up_bias, down_bias = (_padded_bias(experts, name) for name in ("gate", "up", "down"))
    return Part(views.get("gate"), views["up"], views["down"], gate, up_bias, down_bias, *up, *down)


def _panels(matrix: StoredMatrix, first: int, many: int) -> np.ndarray:
    """Panels [first, first + many) of every expert, a view."""
    rows = 1 if matrix.format.is_packed else PANEL
    return matrix.data[:, first * rows : (first + many) * rows]


def _copies(views: dict[str, np.ndarray], node: int, are_packed: bool) -> dict[str, np.ndarray]:
    """The same in the node's memory. are_packed : panels of gate and up alternate there, too."""
    copies = {}
    if are_packed and "gate" in views:
        experts, many, size = views["up"].shape
        both = bound_buffer(experts * 2 * many * size, node).reshape(experts, 2 * many, size)
        copies = {"gate": both[:, 0::2], "up": both[:, 1::2]}
    for name, view in views.items():
        if name not in copies:
            copies[name] = bound_buffer(view.size, node).reshape(view.shape)
        copies[name][:] = view
    return copies


def _padded_bias(experts: StoredExperts, name: str) -> np.ndarray | None:
    """A projection's bias, zeros behind it up to whole panels: as it lies in packed experts,
    else a copy.
    """
    bias = experts.biases.get(name)
    if bias is None:
        return None
    if experts.spans is not None:
        raw = experts.spec.layout.bias(experts.spans, name)
        assert raw is not None
        return raw.view(np.float32)
    padded = np.zeros((len(bias), round_up(bias.shape[1], PANEL)), np.float32)
    padded[:, : bias.shape[1]] = bias
    return padded


def bound_buffer(num_bytes: int, node: int) -> np.ndarray:
    """uint8 (num_bytes,) in the node's memory, or with one warning wherever the OS puts it."""
    buffer = aligned_buffer(num_bytes)
    try:
        if num_bytes:
            numa.bind(buffer.ctypes.data, num_bytes, node)
    except (OSError, ValueError) as error:  # a container may forbid it: slower, not wrong
        warn_once("bind", "weights are not bound to NUMA nodes: %s", error)
    return buffer


def join(spec: MoESpec, parts: list[Part], order: np.ndarray | None) -> StoredExperts:
    """Packed experts in one piece again."""
    layout, stored = spec.layout, len(parts[0].up)
    data = aligned_buffer(stored * layout.expert_bytes).reshape(stored, -1)
    for part in parts:
        for name in layout.projections:
            first = part.first_down_panel if name == "down" else part.first_up_panel
            panels = getattr(part, name)
            layout.panels(data, name)[:, first : first + panels.shape[1]] = panels
    for name in layout.projections:
        bias, place = getattr(parts[0], f"{name}_bias"), layout.bias(data, name)
        if place is not None:
            place.view(np.float32)[:] = bias
    return StoredExperts.of_panels(spec, data, order)


def join_one(
    spec: MoESpec, parts: list[Part], order: np.ndarray | None, expert: int
) -> StoredExperts:
    """Of packed experts one in one piece, the others absent; all absent if it is."""
    at = expert if order is None else int(order[expert])
    alone = np.full(spec.num_experts, -1, np.int64)
    alone[expert] = min(at, 0)
    return join(spec, [_one(part, max(at, 0)) for part in parts], alone)


def _one(part: Part, at: int) -> Part:
    tables = [None if table is None else table[at : at + 1] for table in part[:6]]
    return Part._make([*tables, *part[6:]])
