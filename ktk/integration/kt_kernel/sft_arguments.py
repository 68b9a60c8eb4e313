"""The arguments of KTMoEWrapper(mode="sft"): methods, numbers, the twelve tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# KT-Kernel's methods for fine-tuning, and what loads the weights. Its KGroup is int4 in groups.
_SFT_METHODS = {
    "AMXBF16_SFT": "AMXBF16",
    "AMXFP8_SFT": "FP8",
    "AMXINT8_SFT": "AMXINT8",
    "INT8_SFT": "INT8",
    "AMXINT4_SFT": "AMXINT4",
    "AMXINT4_KGROUP_SFT": "INT4",
}
_SKIP_LORA = "_SKIPLORA"


@dataclass(frozen=True)
class SftMethod:
    """A method for fine-tuning. inference : the one that runs its weights. is_without_lora : there
    are no adapters; gradients are of hidden states and routing weights.
    """

    name: str
    inference: str
    is_without_lora: bool

    @classmethod
    def of(cls, method: Any) -> SftMethod:
        """One of KT-Kernel's names, or any other method of ktk's; "_SkipLoRA" may follow.

        ValueError for those that ktk does not run.
        """
        if not isinstance(method, str):
            raise ValueError(f"method={method!r} is unknown")
        key = method.upper()
        base = key.removesuffix(_SKIP_LORA)
        if base in ("AMXINT4_1_SFT", "AMXINT4_1KGROUP_SFT"):
            raise ValueError(f"method={method!r}: ktk's int4 has no zero points; use AMXINT4_SFT")
        return cls(method, _SFT_METHODS.get(base, base), base != key)


MATRICES = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")
# What means nothing while training, and the value that leaves it out.
_INFERENCE_ONLY: dict[str, Any] = {
    "max_deferred_experts_per_token": 0,
    "max_resident_experts": None,
    "zero_point": False,
    "full_weight_grad": False,
}
_WHY = {
    "max_deferred_experts_per_token": "gradients are of a layer's own output",
    "max_resident_experts": "experts that come and go cannot be trained through",
    "zero_point": "no format here has zero points",
    "full_weight_grad": "packed weights have no gradient; ktk.train.train_experts trains chosen "
    "experts in full",
}


def refuse_inference_only(given: dict[str, Any]) -> None:
    """Take from KTMoEWrapper's arguments those that training does not have.

    ValueError for one that asks for something.
    """
    for name, left_out in _INFERENCE_ONLY.items():
        value = given.pop(name, None)
        if value is not None and value != left_out:
            raise ValueError(f"{name}={value!r}: not with mode='sft': {_WHY[name]}; leave it out")


def registered(
    form: str,
    tensors: tuple[torch.Tensor, ...],
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    rank: int,
) -> dict[str, np.ndarray]:
    """The tensors' own memory as bf16 bits, uint16, by the names of MATRICES.

    form : of their names in messages. ValueError for a shape, dtype, device or layout that does not
    fit, TypeError for what is no tensor.
    """
    found = {}
    for matrix, tensor in zip(MATRICES, tensors, strict=True):
        columns, rows = hidden_size, intermediate_size
        if matrix.startswith("down"):
            columns, rows = rows, columns
        part = (rank, columns) if matrix.endswith("_a") else (rows, rank)
        name = form.format(*matrix.split("_"))
        found[matrix] = _memory(name, checked_tensor(name, tensor), (num_experts, *part))
    return found


def _memory(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be {shape}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}: must be on the CPU")
    if tensor.dtype is not torch.bfloat16:
        raise ValueError(f"{name} is {tensor.dtype}: must be torch.bfloat16")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous: its memory is used, not a copy")
    bits: np.ndarray = tensor.detach().view(torch.uint16).numpy()
    return bits


def checked_tensor(name: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: must be a torch tensor")
    return value


def checked_number(name: str, value: Any, *, least: float = math.ulp(0.0)) -> float:
    """A finite number of at least ``least``: by default a positive one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
        raise TypeError(f"{name}={value!r}: must be a number")
    if not math.isfinite(value) or value < least:
        raise ValueError(f"{name}={value}: must be finite and {'positive' if least else '>= 0'}")
    return float(value)
