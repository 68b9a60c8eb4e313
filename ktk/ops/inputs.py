"""What callers hand over, checked once and made plain memory: NumPy arrays, CPU tensors,
tensors on a device.
"""

from __future__ import annotations

import contextlib
import math
import sys
from typing import Any, NamedTuple

import numpy as np

from ktk.experts.formats.floats import bf16_to_f32

MAX_TOP_K = 65536


def is_tensor(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def device_of(x: Any) -> str:
    return str(x.device) if is_tensor(x) else "numpy"


def on_host(x: Any) -> Any:
    return x.detach().cpu() if is_tensor(x) and x.device.type != "cpu" else x


def on_stream(device: str, stream: Any) -> contextlib.AbstractContextManager[Any]:
    """Order copies from and to ``device`` behind the caller's work on that CUDA stream."""
    handle = getattr(stream, "cuda_stream", stream) or 0
    if not isinstance(handle, int):
        raise TypeError(f"cuda_stream={stream!r}: must be a CUDA stream handle, or None")
    if not handle:
        return contextlib.nullcontext()
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        raise ValueError(f"cuda_stream={handle}: this process has no CUDA; pass None or 0")
    if not device.startswith("cuda"):
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = torch.cuda.stream(
        torch.cuda.ExternalStream(handle, device=torch.device(device))
    )
    return context


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
    """(tokens, hidden_size) C-contiguous float32 / float16 / bf16 bits,
    copied only if it must be.
    """
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
            f"topk_ids has dtype {'bfloat16' if is_bf16(topk_ids) else ids.dtype}: must be an "
            "integer type"
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


class Call(NamedTuple):
    """A forward pass on the host, checked; ``out`` is where its result goes, seen as bits.

    hidden, out : float32, float16 or uint16 bf16 bits (num_tokens, hidden_size); topk_ids : int64
    (num_tokens, top_k); topk_weights : float32, likewise. result : of the caller's kind and dtype,
    on the CPU. device : where the caller's hidden states are, "numpy" for an array.
    """

    hidden: np.ndarray
    topk_ids: np.ndarray
    topk_weights: np.ndarray
    result: Any
    out: np.ndarray
    device: str


def as_call(
    hidden_states: Any, topk_ids: Any, topk_weights: Any, hidden_size: int, stream: Any
) -> Call:
    """Arguments on any device, hidden_states (..., hidden_size),
    copied on ``stream`` if not the CPU's.

    RuntimeError while a CUDA graph is captured, whose replay would not come to the CPU again.
    """
    device = device_of(hidden_states)
    torch = sys.modules.get("torch")
    if torch and device.startswith("cuda") and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured: experts run in it as work of its stream, given as "
            "KTMoEWrapper's cuda_stream; nothing else of ktk does"
        )
    with on_stream(device, stream):
        hidden = on_host(hidden_states)
        shape = tuple(getattr(hidden, "shape", ()))
        if shape and shape[-1] == hidden_size:
            hidden = hidden.reshape(math.prod(shape[:-1]), hidden_size)
        bits = as_hidden(hidden, hidden_size)
        ids, weights = as_routing(on_host(topk_ids), on_host(topk_weights), len(bits))
    return Call(bits, ids, weights, *new_like(hidden, bits.shape), device)


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
