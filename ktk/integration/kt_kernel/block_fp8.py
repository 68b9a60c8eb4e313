"""Experts as KT-Kernel's trainer hands them out of a block-fp8 checkpoint: codes and scales of each
expert, no float copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ktk.experts.formats import get_format
from ktk.experts.stored import CodedExpert, CodedMatrix


def block_fp8_reader(
    weights: Any, num_experts: int, hidden_size: int, intermediate_size: int
) -> Callable[[int], CodedExpert]:
    """Reader of the experts that KT-Kernel's BlockFP8ExpertWeights holds.

    weights : gate_proj, up_proj, down_proj, a float8_e4m3fn tensor (out_features, in_features) for
        each expert; gate_scale and so on, a float tensor for each, one number for a block;
        block_size, rows and columns of a block.
    Raises TypeError, ValueError naming what does not fit.
    """
    block = tuple(getattr(weights, "block_size", ()))
    if len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise ValueError(f"block_size={block!r}: must be two positive ints")
    up, down = (intermediate_size, hidden_size), (hidden_size, intermediate_size)
    shapes = {"gate": up, "up": up, "down": down}
    for name, shape in shapes.items():
        scales = tuple(-(-n // by) for n, by in zip(shape, block, strict=True))
        _check(f"{name}_proj", weights, num_experts, shape, (torch.float8_e4m3fn,))
        _check(f"{name}_scale", weights, num_experts, scales, (torch.float32, torch.bfloat16))

    def matrix(name: str, expert: int) -> CodedMatrix:
        codes = getattr(weights, f"{name}_proj")[expert].detach().view(torch.uint8).numpy()
        scales = getattr(weights, f"{name}_scale")[expert].detach().float().numpy()
        rows, columns = (min(n, by) for n, by in zip(shapes[name], block, strict=True))
        return CodedMatrix(np.ascontiguousarray(codes), scales, get_format("fp8"), (rows, columns))

    return lambda e: CodedExpert(matrix("gate", e), matrix("up", e), matrix("down", e))


def _check(
    name: str, weights: Any, num_experts: int, shape: tuple[int, ...], dtypes: tuple[Any, ...]
) -> None:
    """That each expert has such a tensor on the CPU."""
    given = getattr(weights, name, None)
    if given is None or len(given) != num_experts:
        found = "none" if given is None else len(given)
        raise ValueError(f"{name} has tensors of {found} experts: must be of {num_experts}")
    for expert, tensor in enumerate(given):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}[{expert}] is a {type(tensor).__name__}: must be a tensor")
        if tensor.dtype not in dtypes or tensor.device.type != "cpu":
            allowed = " or ".join(map(str, dtypes))
            raise ValueError(
                f"{name}[{expert}] is {tensor.dtype} on {tensor.device}: must be {allowed} on the "
                "CPU"
            )
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}[{expert}] has shape {tuple(tensor.shape)}: must be {shape}")
