"""Streams of a CUDA device, as far as work of the CPU takes part in them.

All calls return before what they ask for is done, and may be captured in a CUDA graph: a replay
then does it again, with the same memory.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

import torch

from ktk import fork
from ktk.errors import EngineError


class CudaStreams:
    """The streams of one device, named by their handles: cudaStream_t as an int.

    Parameters
    ----------
    device : torch.device

    Raises
    ------
    EngineError from ``call`` if the driver refuses, or is not there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own: dict[int, torch.cuda.Stream] = {}

    def current(self) -> int:
        """The handle of the stream that torch's work goes on now."""
        handle: int = torch.cuda.current_stream(self.device).cuda_stream
        return handle

    def new(self) -> int:
        """A stream's handle; it lives as long as this object."""
        stream = torch.cuda.Stream(self.device)
        self._own[stream.cuda_stream] = stream
        return stream.cuda_stream

    def use(self, stream: int) -> contextlib.AbstractContextManager[Any]:
        """What torch is asked for within goes on that stream."""
        given = self._own.get(stream) or torch.cuda.ExternalStream(stream, device=self.device)
        context: contextlib.AbstractContextManager[Any] = torch.cuda.stream(given)
        return context

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the CPU that the device copies from and to by itself."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def copy(self, stream: int, to: torch.Tensor, source: torch.Tensor) -> None:
        """Between the device and pinned memory, of one dtype."""
        with self.use(stream):
            to.copy_(source, non_blocking=True)

    def call(self, stream: int, function: int, data: int) -> None:
        """``function(data)``, of C, in a thread of the driver's, in the stream's order."""
        driver = _driver()
        with self.use(stream):  # and the device's context
            status = driver.cuLaunchHostFunc(
                ctypes.c_void_p(stream), ctypes.c_void_p(function), ctypes.c_void_p(data)
            )
        if status:
            raise EngineError(f"CUDA: cuLaunchHostFunc failed with error {status}")

    def work(self, stream: int, function: Callable[[], Any]) -> None:
        """What the function asks of torch, in the stream's order."""
        with self.use(stream):
            function()

    def mark(self, stream: int) -> Any:
        """A point in the stream, to ``wait`` for or to ``finish``."""
        event = torch.cuda.Event()
        with self.use(stream):
            event.record()
        return event

    def wait(self, stream: int, mark: Any) -> None:
        """What follows on the stream begins after the mark."""
        with self.use(stream):
            mark.wait()

    def finish(self, mark: Any) -> None:
        """Return when the mark is reached. Not while capturing."""
        mark.synchronize()

    def is_capturing(self, stream: int) -> bool:
        with self.use(stream):
            return torch.cuda.is_current_stream_capturing()


_of: dict[torch.device, CudaStreams] = {}
# CUDA does not work in forked children.
fork.in_child(_of.clear)


def streams_of(device: torch.device) -> CudaStreams | None:
    """A device's streams; None for a device that has none of CUDA's."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return _of.setdefault(device, CudaStreams(device))


def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EngineError("this process has no CUDA driver: libcuda.so.1 was not found") from error
