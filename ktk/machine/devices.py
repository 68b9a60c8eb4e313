"""Where hidden states live: NumPy arrays, CPU tensors, or tensors on a device, and the stream they belong to."""

from __future__ import annotations

import contextlib
import math
import sys
from typing import Any


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


def num_tokens_of(x: Any, hidden_size: int) -> int | None:
    """Rows of (..., hidden_size); None if it has no such shape."""
    shape = tuple(getattr(x, "shape", ()))
    return math.prod(shape[:-1]) if shape and shape[-1] == hidden_size else None
