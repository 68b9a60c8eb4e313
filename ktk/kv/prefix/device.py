"""The device tier: pages where attention reads them, a column of them for each page of tokens.

A column is one index into the keys and values of all layers. What a device's memory is stands
behind ``DevicePages``; ``TorchPages`` is that of tensors on any of torch's devices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from ktk.kv.prefix.config import CacheInfo, PageLayout
from ktk.kv.prefix.tree import Page


class DevicePages(ABC):
    """Memory of ``count`` columns for pages of one layout; several threads may use different
    ones.
    """

    layout: PageLayout
    count: int

    @abstractmethod
    def write(self, column: int, frame: np.ndarray) -> None:
        """Copy a frame, uint8 (frame_bytes,), into a column; done when it returns."""

    @abstractmethod
    def read(self, column: int, frame: np.ndarray) -> None:
        """Copy a column into a frame, uint8 (frame_bytes,); done when it returns."""

    @abstractmethod
    def get_kvcache(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Keys and values of each device: (num_layers, count, page_tokens, num_heads, width)."""


class TorchPages(DevicePages):
    """Tensors on one device."""

    def __init__(
        self, info: CacheInfo, page_tokens: int, count: int, device: str | torch.device = "cpu"
    ) -> None:
        self.layout = PageLayout(info, page_tokens, 1)
        self.count = count
        shape, dtype = info.shape, getattr(torch, info.kv_dtype)
        rows = (shape.num_layers, count, page_tokens, shape.num_heads)
        self.keys = torch.zeros(*rows, shape.key_width, dtype=dtype, device=device)
        self.values = torch.zeros(*rows, shape.value_width, dtype=dtype, device=device)

    def write(self, column: int, frame: np.ndarray) -> None:
        keys, values = self._of(frame)
        self.keys[:, column] = keys.to(self.keys.device)
        self.values[:, column] = values.to(self.values.device)

    def read(self, column: int, frame: np.ndarray) -> None:
        keys, values = self._of(frame)
        keys.copy_(self.keys[:, column])
        values.copy_(self.values[:, column])

    def get_kvcache(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return [self.keys], [self.values]

    def _of(self, frame: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of a frame, (num_layers, page_tokens, num_heads, width)."""
        layers = self.keys.shape[0]
        page = torch.from_numpy(frame[: self.layout.page_bytes]).view(self.keys.dtype)
        page = page.view(layers, -1)  # (num_layers, numbers of a layer)
        of_keys = self.keys[0, 0].numel()
        keys = page[:, :of_keys].unflatten(1, self.keys.shape[2:])
        return keys, page[:, of_keys:].unflatten(1, self.values.shape[2:])


class DeviceTier:
    """Which columns are free, and which pages have one. Its calls are made under the store's
    lock.
    """

    def __init__(self, pages: DevicePages) -> None:
        self.pages = pages
        self._free = list(range(pages.count))
        self._held: set[Page] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Columns; pages that no handle has there leave, those first that were used longest ago.

        None if there are too few.
        """
        idle = sorted((p for p in self._held if not p.column_pins), key=lambda page: page.used)
        if count > len(self._free) + len(idle):
            return None
        for page in idle[: max(0, count - len(self._free))]:
            self.drop(page)
        return [self._free.pop() for _ in range(count)]

    def give_back(self, columns: Sequence[int]) -> None:
        self._free.extend(columns)

    def hold(self, page: Page, column: int) -> None:
        """The page lies in ``column`` from now on."""
        page.column = column
        self._held.add(page)

    def drop(self, page: Page) -> None:
        """The page is on the device no longer, if it was."""
        if page.column is not None:
            self._held.remove(page)
            self._free.append(page.column)
            page.column = None
