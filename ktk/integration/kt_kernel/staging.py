"""Staging buffers: copies of what was submitted, so that the caller may overwrite its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from ktk.fork import Lock


class Staging:
    """Copies of one pass's inputs, so that the caller may overwrite them."""

    def __init__(self, key: tuple[Any, ...], dtype: np.dtype) -> None:
        tokens, hidden_size, top_k = key[:3]
        self.key = key
        self.hidden = np.empty((tokens, hidden_size), dtype)
        self.ids = np.empty((tokens, top_k), np.int64)
        self.weights = np.empty((tokens, top_k), np.float32)


class Buffers:
    """Staging buffers by (tokens, hidden_size, top_k, dtype, device): kept if captured,
    else one of all.
    """

    def __init__(self) -> None:
        self.captured: tuple[int, ...] = ()
        self._lock = Lock()
        self.kept: dict[tuple[Any, ...], list[Staging]] = {}
        self.temporary: Staging | None = None

    def clear(self) -> None:
        with self._lock:
            self.kept.clear()
            self.temporary = None

    def take(
        self, key: tuple[Any, ...], hidden: np.ndarray, ids: np.ndarray, weights: np.ndarray
    ) -> Staging:
        """A buffer of that key, filled; a new one while others of it are in use."""
        staging = None
        with self._lock:
            if self.kept.get(key):
                staging = self.kept[key].pop()
            elif self.temporary is not None and self.temporary.key == key:
                staging, self.temporary = self.temporary, None
        staging = staging or Staging(key, hidden.dtype)
        staging.hidden[:] = hidden
        staging.ids[:] = ids
        staging.weights[:] = weights
        return staging

    def give_back(self, staging: Staging) -> None:
        with self._lock:
            if staging.key[0] in self.captured:
                self.kept.setdefault(staging.key, []).append(staging)
            else:
                self.temporary = staging
