"""What callers hand over, checked once and made plain memory: NumPy arrays or CPU torch tensors."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ktk.experts.formats.floats import bf16_to_f32
from ktk.machine.devices import is_tensor

MAX_TOP_K = 65536


def to_numpy(x: Any, name: str) -> np.ndarray:
    """A NumPy view of an array or CPU tensor; bf16 comes as uint16 bits (see ``is_bf16``)."""
    if is_tensor(x):
        torch: Any = sys.modules["torch"]
        if x.dtype is not torch.bfloat16 and not x.requires_grad:
            try:
                array: np.ndarray = x.numpy()  # refuses what the rest looks at
                return array
            except (TypeError, RuntimeError):
                pass
        if x.device.type != "cpu":
            raise ValueError(
                f"{name} is on {x.device}: ktk.MoE takes CPU tensors; call {name}.cpu()"
            )
        if x.layout != torch.strided:
            raise TypeError(f"{name} is a {x.layout} tensor: must be dense")
        x = x.detach().resolve_neg().resolve_conj()
        return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
    if isinstance(x, np.ndarray):
        return x.view(np.uint16) if is_bf16(x) else x
    raise TypeError(f"{name} is a {type(x).__name__}: must be a NumPy array or a CPU torch tensor")


def is_bf16(x: Any) -> bool:
    if is_tensor(x):
        return bool(x.dtype == sys.modules["torch"].bfloat16)
    # A dtype's name is slow to build: ask only those NumPy does not have itself.
    return isinstance(x, np.ndarray) and x.dtype.isbuiltin != 1 and x.dtype.name == "bfloat16"


def plain(array: np.ndarray) -> np.ndarray:
    """The array C-contiguous and aligned, as C reads it; copied only if it is not."""
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else array.copy(order="C")


def as_hidden(x: Any, hidden_size: int) -> np.ndarray:
    """(tokens, hidden_size) C-contiguous float32 / float16 / bf16 bits, copied only if it must be."""
    array = to_numpy(x, "hidden_states")
    if not is_bf16(x) and array.dtype not in (np.float32, np.float16):
        raise TypeError(
            f"hidden_states has dtype {array.dtype}: must be float32, float16 or bfloat16"
        )
    if array.ndim != 2 or array.shape[1] != hidden_size:
        raise ValueError(
            f"hidden_states has shape {array.shape}: must be (num_tokens, {hidden_size})"
        )
    return plain(array)


def as_routing(topk_ids: Any, topk_weights: Any, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 (tokens, top_k) ids and float32 (tokens, top_k) weights."""
    ids = to_numpy(topk_ids, "topk_ids")
    if ids.dtype.kind not in "iu" or is_bf16(topk_ids):
        raise TypeError(
            f"topk_ids has dtype {'bfloat16' if is_bf16(topk_ids) else ids.dtype}: must be an integer type"
        )
    weights = to_numpy(topk_weights, "topk_weights")
    if is_bf16(topk_weights):
        weights = bf16_to_f32(weights)
    elif weights.dtype.kind != "f":
        raise TypeError(f"topk_weights has dtype {weights.dtype}: must be a float type")
    if ids.ndim != 2 or ids.shape[0] != num_tokens or ids.shape[1] == 0:
        raise ValueError(
            f"topk_ids has shape {ids.shape}: must be ({num_tokens}, top_k), top_k at least 1"
        )
    if ids.shape[1] > MAX_TOP_K:
        raise ValueError(f"topk_ids has shape {ids.shape}: top_k must be at most {MAX_TOP_K}")
    if weights.shape != ids.shape:
        raise ValueError(
            f"topk_weights has shape {weights.shape}: must be that of topk_ids, {ids.shape}"
        )
    if ids.dtype == np.uint64:  # values over int64 stay out of range instead of wrapping
        ids = np.where(ids > np.uint64(2**62), np.uint64(2**62), ids)
    return plain(ids.astype(np.int64, copy=False)), plain(weights.astype(np.float32, copy=False))


def as_mask(mask: Any, num_experts: int) -> np.ndarray | None:
    """bool (num_experts,) of experts to skip, or None."""
    if mask is None:
        return None
    array = to_numpy(mask, "skip")
    if array.dtype != np.bool_ or array.shape != (num_experts,):
        raise ValueError(
            f"the expert mask is {array.dtype} {array.shape}: must be bool ({num_experts},)"
        )
    return np.ascontiguousarray(array)


def as_add(add: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """float32 ``shape`` of what is added last, or None."""
    if add is None:
        return None
    array = to_numpy(add, "add")
    if array.dtype != np.float32 or array.shape != shape:
        raise ValueError(f"add is {array.dtype} {array.shape}: must be float32 {shape}")
    return plain(array)


def new_like(x: Any, shape: tuple[int, ...]) -> tuple[Any, np.ndarray]:
    """A new array or CPU tensor of ``x``'s kind and dtype, not filled, and a NumPy view of it."""
    if is_tensor(x):
        result = sys.modules["torch"].empty(shape, dtype=x.dtype)
    else:
        result = np.empty(shape, x.dtype)
    return result, to_numpy(result, "out")


def as_weights(x: Any, name: str) -> np.ndarray:
    """A float array or tensor as float32, or uint16 bf16 bits without a copy."""
    array = to_numpy(x, name)
    if is_bf16(x):
        return array
    if array.dtype not in (np.float32, np.float16):
        raise TypeError(f"{name} has dtype {array.dtype}: must be float32, float16 or bfloat16")
    return array.astype(np.float32, copy=False)
