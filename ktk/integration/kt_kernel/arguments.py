"""KTMoEWrapper's arguments: what they may be, and what KT-Kernel means by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ktk.experts.activation import Activation
from ktk.ops.inputs import is_bf16, on_host, to_numpy

# KT-Kernel's methods that go by another name here.
METHODS = {
    "RAWINT4": "INT4",
    "GPTQ_INT4": "INT4",
    "MOE_INT4": "INT4",
    "MOE_INT8": "INT8",
    "FP8_PERCHANNEL": "FP8_CHANNEL",
}
# Its methods for devices that ktk does not run on.
_NOT_HERE = ("SYCL_GPTQ_INT4",)

SFT_ONLY = (
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "max_cache_depth",
    "zero_point",
    "full_weight_grad",
)


def check_top_k(num_experts_per_tok: int, num_experts: int) -> None:
    """ValueError if a token would use more experts than there are."""
    if num_experts_per_tok > num_experts:
        raise ValueError(
            f"num_experts_per_tok={num_experts_per_tok}: must be at most num_experts={num_experts}"
        )


def ktk_method(method: Any) -> Any:
    """What KT-Kernel's name of a method is here; any other name as it is.

    ValueError for those that ktk does not run.
    """
    key = method.upper() if isinstance(method, str) else method
    if key in _NOT_HERE:
        raise ValueError(
            f"method={method!r}: ktk runs experts on CPUs alone; GPTQ_INT4 takes the same files"
        )
    return METHODS.get(key, method)


def checked_int(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r}: must be an int")
    if not least <= value <= 2**24:
        raise ValueError(f"{name}={value}: must be at least {least}, at most {2**24}")
    return int(value)


def checked_nodes(numa_nodes: Any, threadpool_count: int | None) -> tuple[int, ...] | None:
    """The NUMA node of each part, if they are named."""
    if numa_nodes is None:
        return None
    nodes = tuple(checked_int("numa_nodes", node, 0) for node in numa_nodes)
    if threadpool_count is not None and len(nodes) != threadpool_count:
        raise ValueError(
            f"numa_nodes={list(nodes)} has {len(nodes)} entries: "
            f"must be one per thread pool, threadpool_count={threadpool_count}"
        )
    return nodes


def check_mode(mode: str, sft_only: Sequence[Any]) -> None:
    """ValueError for another mode, or for arguments that only mode="sft" has: those of SFT_ONLY."""
    if mode != "inference":
        raise ValueError(f"mode={mode!r}: must be 'inference' or 'sft'")
    given = [name for name, x in zip(SFT_ONLY, sft_only, strict=True) if x is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: only with mode='sft'")


def swiglu_activation(limit: float, alpha: float) -> Activation | None:
    """KT-Kernel's swiglu_limit and swiglu_alpha; None if both are 0."""
    for name, value in (("swiglu_limit", limit), ("swiglu_alpha", alpha)):
        if not isinstance(value, (int, float, np.floating)) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: must be a float")
        if not 0 <= value < 1e30:
            raise ValueError(f"{name}={value}: must be finite and not negative; 0 turns it off")
    if alpha > 0:
        return Activation.swigluoai(float(alpha), float(limit), gate_floor=True)
    return Activation.silu(float(limit)) if limit > 0 else None


def mask_of(mask: Any, count: int | None, num_experts: int) -> Any:
    """A new CPU bool tensor (num_experts,) from a mask, a count (the first n) or both,
    if they agree.
    """
    import torch

    if isinstance(mask, (int, np.integer)):  # the argument's old meaning in this place
        mask, old = None, checked_int("num_gpu_experts", mask, least=0)
        if count is not None and count != old:
            raise ValueError(
                f"gpu_experts_mask={old} and num_gpu_experts={count}: give one of them"
            )
        count = old
    first = None
    if count is not None:
        count = checked_int("num_gpu_experts", count, least=0)
        if count > num_experts:
            raise ValueError(f"num_gpu_experts={count}: must be at most num_experts={num_experts}")
        first = np.arange(num_experts) < count
    if mask is None:
        mask = np.zeros(num_experts, bool) if first is None else first
    array = np.array(
        mask if isinstance(mask, (list, tuple)) else to_numpy(on_host(mask), "gpu_experts_mask")
    )
    if array.shape != (num_experts,):
        raise ValueError(
            f"gpu_experts_mask has shape {tuple(array.shape)}: must be ({num_experts},), one bool "
            "per expert"
        )
    if array.dtype.kind not in "biu" or is_bf16(mask):
        raise TypeError(
            f"gpu_experts_mask has dtype {getattr(mask, 'dtype', array.dtype)}: must be bool"
        )
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise ValueError(
            "gpu_experts_mask holds other values than 0 and 1: it is one flag per expert, not a "
            "list of ids"
        )
    if first is not None and not np.array_equal(first, array.astype(bool)):
        raise ValueError(
            f"num_gpu_experts={count} means the first {count} experts, gpu_experts_mask names "
            "others: give one of them"
        )
    with torch.inference_mode(False):  # else it could not be updated outside of that mode
        return torch.from_numpy(array.astype(bool))
