"""LLAMAFILE: experts in GGUF blocks, run from the file's own bytes (vendor/llamafile)."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ktk._cy import native_module
from ktk.backends.base import Backend, Runner
from ktk.backends.native import OperatorRunner, kernel_isa
from ktk.errors import BackendError
from ktk.experts.dequantise import dequantise
from ktk.experts.formats import BLOCKS, GGUF, decoded_only
from ktk.experts.layout import K_ALIGN, PANEL, round_up
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts, StoredMatrix
from ktk.log import warn_once
from ktk.machine import cpu
from ktk.machine.memory import aligned_buffer
from ktk.machine.threads import EngineLayout
from ktk.placement.parts import bound_buffer, cut


class BlockFormat(NamedTuple):
    """table_index : in the kernels' table. fine : weights that share a scale; 0: a float format."""

    table_index: int
    block_weights: int
    block_bytes: int
    fine: int


@cache
def formats() -> dict[str, BlockFormat]:
    """What the kernels read, by the ggml type's name; empty where the extension is not built."""
    native = native_module()
    if native is None:
        return {}
    return {name: BlockFormat(*row) for name, row in native.block_formats().items()}


def types_by_path() -> dict[str, list[str]]:
    """GGUF types by what becomes of their weights here, those of most bits first.

    kernel : read as they lie. float_copies : no kernel, they run as F16 or F32 copies. packed_anew : no kernel over blocks
    runs here at all, they become int8 or int4.
    """
    rows = {**BLOCKS, **decoded_only()}
    ordered = sorted(rows, key=lambda name: -rows[name].bits_per_weight)
    runs, known = LlamafileBackend().why_not() is None, formats()
    paths: dict[str, list[str]] = {"kernel": [], "float_copies": [], "packed_anew": []}
    for name in ordered:
        path = "packed_anew"
        if runs:
            path = "kernel" if name in known else "float_copies"
        paths[path].append(name)
    return paths


class Part(NamedTuple):
    """A part of every expert: rows of gate and up, rows of down, and the biases.

    gate, up, down : uint8 (num_experts, rows, row bytes); biases : float32 (num_experts, padded to panels) or None.
    """

    gate: np.ndarray | None
    up: np.ndarray
    down: np.ndarray
    gate_bias: np.ndarray | None
    up_bias: np.ndarray | None
    down_bias: np.ndarray | None
    order: np.ndarray | None
    first_up_panel: int
    num_up_panels: int
    first_down_panel: int
    num_down_panels: int


def _without_kernel(matrix: StoredMatrix) -> StoredMatrix:
    """The same values in a float format: for types that no kernel reads. BackendError if gguf cannot either."""
    try:
        values = np.stack([dequantise(matrix, e) for e in range(len(matrix.data))])
    except ValueError as error:
        raise BackendError(
            f"LLAMAFILE: no kernel over GGUF type {matrix.format.name}, and {error}; kernels read {', '.join(formats())}"
        ) from error
    half = values.astype(np.float16)
    exact = np.array_equal(half.astype(np.float32), values)
    name = "F16" if exact else "F32"
    text = "GGUF type %s has no kernel: its weights run as a copy in %s"
    warn_once(f"no kernel {matrix.format.name}", text, matrix.format.name, name)
    raw = (half if exact else values).view(np.uint8)
    return StoredMatrix.of_rows(name, matrix.in_features, raw)


def whole_panels(matrix: StoredMatrix) -> StoredMatrix:
    """Rows in sixteens and, of float formats, in_features in whole steps; a zero-padded copy only where they are not."""
    if matrix.format.name not in formats():
        matrix = _without_kernel(matrix)
    experts, rows, row_bytes = matrix.data.shape
    in_features = round_up(matrix.in_features, K_ALIGN)
    if matrix.is_repacked or (rows % PANEL == 0 and in_features == matrix.in_features):
        return matrix
    bytes_in = matrix.format.row_bytes(in_features)
    data = aligned_buffer(experts * round_up(rows, PANEL) * bytes_in)
    data = data.reshape(experts, round_up(rows, PANEL), bytes_in)
    data[:, :rows, :row_bytes] = matrix.data
    return dataclasses.replace(matrix, data=data)


def repack(experts: StoredExperts, num_threads: int) -> StoredExperts:
    """A copy in huge-page memory, in the order the kernels read: the same bytes, values and results.

    It costs the experts' size in memory and saves the kernels the gathering of bytes from sixteen rows.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        copies = {
            name: _repacked(whole_panels(matrix), pool) for name, matrix in experts.matrices.items()
        }
    return dataclasses.replace(
        experts, gate=copies.get("gate"), up=copies["up"], down=copies["down"]
    )


def _repacked(matrix: StoredMatrix, pool: ThreadPoolExecutor) -> StoredMatrix:
    if matrix.is_repacked:
        return matrix
    native, data = native_module(), matrix.data
    out = aligned_buffer(data.size).reshape(data.shape)
    isa = cpu.best_isa()
    index = formats()[matrix.format.name].table_index
    k = round_up(matrix.in_features, K_ALIGN)
    list(pool.map(lambda e: native.repack_blocks(data[e], index, k, isa, out[e]), range(len(data))))
    return dataclasses.replace(matrix, data=out, is_repacked=True)


def _rows(
    matrix: StoredMatrix | None, first: int, many: int, node: int | None
) -> np.ndarray | None:
    """Panels [first, first + many) of every expert: a view, or, repacked, a copy in the node's memory."""
    if matrix is None:
        return None
    data = matrix.data[:, first * PANEL : (first + many) * PANEL]
    if node is None or not matrix.is_repacked:
        return data
    own = bound_buffer(data.size, node).reshape(data.shape)
    own[:] = data
    return own


def _parts_of(
    experts: StoredExperts, matrices: dict[str, StoredMatrix], engine: EngineLayout
) -> list[Part]:
    """Rows of every expert for each NUMA part: of the file as it is mapped, or, repacked, in the node's memory."""
    spec, count = experts.spec, engine.threadpool_count if engine.is_bound else 1
    biases = {name: _padded_bias(bias) for name, bias in experts.biases.items()}
    order = None if experts.order is None else np.ascontiguousarray(experts.order)
    parts = []
    for i in range(count):
        node = engine.numa_nodes[i] if engine.is_bound else None
        up = cut(-(-spec.intermediate_size // PANEL), i, count)
        down = cut(-(-spec.hidden_size // PANEL), i, count)
        gates, ups = (_rows(matrices.get(name), *up, node) for name in ("gate", "up"))
        downs = _rows(matrices["down"], *down, node)
        assert ups is not None and downs is not None
        gate_bias, up_bias, down_bias = (biases.get(name) for name in ("gate", "up", "down"))
        parts.append(Part(gates, ups, downs, gate_bias, up_bias, down_bias, order, *up, *down))
    return parts


def _padded_bias(bias: np.ndarray) -> np.ndarray:
    padded = np.zeros((len(bias), round_up(bias.shape[1], PANEL)), np.float32)
    padded[:, : bias.shape[1]] = bias
    return padded


class LlamafileRunner(OperatorRunner):
    def __init__(self, experts: StoredExperts, isa: str, engine: EngineLayout) -> None:
        self.native = native_module()
        self.blocks = experts
        whole = {name: whole_panels(matrix) for name, matrix in experts.matrices.items()}
        self.parts = _parts_of(experts, whole, engine)
        matrices = {
            name: (
                formats()[matrix.format.name].table_index,
                round_up(matrix.in_features, K_ALIGN),
                matrix.data.shape[1] // PANEL,
                matrix.is_repacked,
            )
            for name, matrix in whole.items()
        }
        self.experts = self.native.Experts.of_blocks(
            experts.spec, matrices, self.parts, isa, engine
        )

    def packed(self) -> StoredExperts:
        return self.blocks

    def weights(self) -> list[np.ndarray]:
        found = [(part.gate, part.up, part.down) for part in self.parts]
        return [matrix for part in found for matrix in part if matrix is not None]


class LlamafileBackend(Backend):
    name = "LLAMAFILE"

    def why_not(self, spec: MoESpec | None = None) -> str | None:
        if native_module() is None:
            return "the compiled extension is not built (reinstall with a C compiler)"
        if reason := cpu.why_not("avx2", cpu.detect()):
            return reason
        if spec is not None and spec.is_packed:
            return f"runs the blocks of GGUF files, these are {spec.weight_format} weights"
        return None

    def kernel(self, spec: MoESpec) -> str:
        return f"{kernel_isa('BF16')} {GGUF.name}"  # the level of most instructions

    def load(self, packed: Any, engine: EngineLayout) -> Runner:
        isa = cpu.best_isa()
        assert isa is not None  # select() asked why_not first
        return LlamafileRunner(packed, isa, engine)
