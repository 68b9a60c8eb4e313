"""``SwapSpace``: memory for the keys and values of sequences that had to give their pages back.

A pool has only so many pages. A sequence that leaves it for want of them takes copies along, bit by
bit, and goes on from where it was once there is room again; nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ktk.kv.pages import PAGE
from ktk.kv.pool import PagePool


@dataclass(frozen=True, eq=False)
class Swapped:
    """What a sequence took along. computed : its tokens whose keys and values are in the frames.
    frames : uint8 (page_bytes,), of each of its pages, as ``PagePool.copy_out`` gives them.
    """

    computed: int
    frames: list[np.ndarray]


class SwapSpace:
    """limit : bytes of all frames together; memory is taken when it is needed, and given back.

    swapped_out, recomputed : how often a sequence took its pages along, or found no room for that.
    pages_out, pages_in : copied from the pool and back. Not for several threads at once.
    """

    def __init__(self, pool: PagePool, limit: int) -> None:
        self._pool, self.limit = pool, limit
        self.num_bytes = 0
        self.swapped_out = self.recomputed = self.pages_out = self.pages_in = 0

    def to_json(self) -> dict[str, int]:
        """Its bytes, and what was counted so far."""
        return {
            "bytes": self.num_bytes,
            "limit_bytes": self.limit,
            "swapped_out": self.swapped_out,
            "recomputed": self.recomputed,
            "pages_out": self.pages_out,
            "pages_in": self.pages_in,
        }

    def put(self, pages: Sequence[int], computed: int) -> Swapped | None:
        """Copies of the pages that a sequence's computed tokens are in; None if there is no room,
        or nothing to copy.
        """
        pages = pages[: -(-computed // PAGE)]
        if not pages:
            return None
        size = len(pages) * self._pool.page_bytes
        if self.num_bytes + size > self.limit:
            self.recomputed += 1
            return None
        frames = []
        for page in pages:
            frames.append(np.empty(self._pool.page_bytes, np.uint8))
            self._pool.read(page, frames[-1])
        self.num_bytes += size
        self.swapped_out += 1
        self.pages_out += len(frames)
        return Swapped(computed, frames)

    def bring(self, swapped: Swapped, index: int, page: int) -> None:
        """Fill a page that its one holder has taken with the sequence's page of that index."""
        self._pool.copy_in(page, swapped.frames[index])
        self.pages_in += 1

    def forget(self, swapped: Swapped) -> None:
        """Its room is free again: the sequence is back, or has ended."""
        self.num_bytes -= len(swapped.frames) * self._pool.page_bytes
        swapped.frames.clear()
