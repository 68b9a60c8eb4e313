"""GGUF blocks to floats, by the gguf package: the oracle of the kernels over blocks."""

from __future__ import annotations

import numpy as np

from ktk.types import BlockExperts, BlockMatrix, ExpertWeights


def dequantise(matrix: BlockMatrix, expert: int) -> np.ndarray:
    """One expert's projection, float32 (out_features, in_features), by the gguf package."""
    import gguf

    kind = gguf.GGMLQuantizationType[matrix.type]
    values = gguf.quants.dequantize(np.ascontiguousarray(matrix.data[expert]), kind)
    return np.asarray(values, np.float32).reshape(-1, matrix.in_features)


def expert_weights(experts: BlockExperts, expert: int) -> ExpertWeights:
    """One expert, dequantised to float32."""
    stored = expert if experts.order is None else int(experts.order[expert])
    matrices = {name: dequantise(matrix, stored) for name, matrix in experts.matrices.items()}
    biases = {name: bias[stored] for name, bias in experts.biases.items()}
    return ExpertWeights(
        matrices.get("gate"),
        matrices["up"],
        matrices["down"],
        biases.get("gate"),
        biases.get("up"),
        biases.get("down"),
    )
