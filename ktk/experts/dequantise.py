"""Experts as they are stored, back to floats: panels by their layout,
GGUF blocks by their types.
"""

from __future__ import annotations

import numpy as np

from ktk.experts.formats.decode import decode_rows
from ktk.experts.layout import matrix_layout
from ktk.experts.panels import dequantised
from ktk.experts.stored import ExpertWeights, StoredExperts, StoredMatrix


def dequantise(matrix: StoredMatrix, expert: int) -> np.ndarray:
    """One expert's projection, float32 (out_features, in_features).

    ValueError for repacked blocks, which nothing puts back in order.
    """
    name, data = matrix.format.name, matrix.data[expert]
    if matrix.format.is_packed:
        layout = matrix_layout(
            matrix.format,
            matrix.in_features,
            matrix.out_features,
            matrix.group_size,
            0,
            matrix.rotation,
        )
        return dequantised(data, layout)
    if matrix.is_repacked:
        raise ValueError(
            f"{name} blocks are repacked for the kernels: cannot be decoded; take them from the "
            "file again"
        )
    rows = decode_rows(name, data)[: matrix.out_features, : matrix.in_features]
    return np.ascontiguousarray(rows, np.float32)


def expert_weights(experts: StoredExperts, expert: int) -> ExpertWeights:
    """One expert, dequantised to float32.

    ValueError for one that is not there, or as ``dequantise`` raises it.
    """
    if not 0 <= expert < experts.spec.num_experts:
        raise ValueError(f"expert {expert}: must be 0 to {experts.spec.num_experts - 1}")
    stored = experts.place(expert)
    decoded = {name: dequantise(matrix, stored) for name, matrix in experts.matrices.items()}
    biases = {name: bias[stored] for name, bias in experts.biases.items()}
    return ExpertWeights(
        decoded.get("gate"),
        decoded["up"],
        decoded["down"],
        biases.get("gate"),
        biases.get("up"),
        biases.get("down"),
    )
