"""GGUF blocks to floats, by the gguf package: the oracle of the kernels over blocks."""

from __future__ import annotations

import numpy as np

from ktk.experts.stored import BlockExperts, BlockMatrix, ExpertWeights


def dequantise(matrix: BlockMatrix, expert: int) -> np.ndarray:
    """One expert's projection, float32 (out_features, in_features).

    ValueError for a type the gguf package does not decode, and for repacked blocks, which nothing puts back in order.
    """
    import gguf

    if matrix.is_repacked:
        raise ValueError(
            f"{matrix.type} blocks are repacked for the kernels: cannot be decoded; take them from the file again"
        )
    try:
        kind = gguf.GGMLQuantizationType[matrix.type]
        with np.errstate(all="ignore"):  # a stranger's scales may be inf or NaN
            values = gguf.dequantize(np.ascontiguousarray(matrix.data[expert]), kind)
    except (KeyError, NotImplementedError):
        raise ValueError(f"the gguf package does not decode {matrix.type}") from None
    return np.ascontiguousarray(values, np.float32).reshape(-1, matrix.in_features)


def expert_weights(experts: BlockExperts, expert: int) -> ExpertWeights:
    """One expert, dequantised to float32. ValueError for one that is not there, or as ``dequantise`` raises it."""
    if not 0 <= expert < experts.spec.num_experts:
        raise ValueError(f"expert {expert}: must be 0 to {experts.spec.num_experts - 1}")
    stored = expert if experts.order is None else int(experts.order[expert])
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
