"""The memory tier: frames of pages up to a number of bytes; who was used longest ago leaves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ktk.kv.prefix.config import PageLayout
from ktk.kv.prefix.leaving import oldest_first
from ktk.kv.prefix.tree import Page


class MemoryTier:
    """The pages in memory and how many bytes all frames take, those of live handles included.

    evict_count : pages that leave at a time. keeps_new : pages that no disk has yet stay. Its calls
    are made under the store's lock.
    """

    def __init__(self, limit: int, evict_count: int, keeps_new: bool) -> None:
        self.limit, self.evict_count = limit, evict_count
        self.used_bytes = 0
        self.evictions = 0
        self._keeps_new = keeps_new
        self._pages: set[Page] = set()

    def __len__(self) -> int:
        return len(self._pages)

    def take(self, layout: PageLayout, count: int) -> list[np.ndarray] | None:
        """Frames for ``count`` pages; None if they do not fit, though all left that may."""
        need = count * layout.frame_bytes
        if need > self.limit:
            return None
        if self.used_bytes + need > self.limit:
            self._evict(self.used_bytes + need - self.limit)
        if self.used_bytes + need > self.limit:
            return None
        self.used_bytes += need
        return [layout.new_frame() for _ in range(count)]

    def give_back(self, frames: list[np.ndarray]) -> None:
        """They are no longer used by anyone."""
        self.used_bytes -= sum(map(len, frames))

    def hold(self, page: Page, frame: np.ndarray) -> None:
        """The page lies in ``frame`` from now on."""
        page.data = frame
        self._pages.add(page)

    def drop(self, page: Page) -> None:
        """The page is in memory no longer, if it was."""
        if page.data is not None:
            self._pages.remove(page)
            self.give_back([page.data])
            page.data = None

    def dirty(self) -> Iterator[Page]:
        """Pages that no disk has yet."""
        return (page for page in self._pages if page.is_dirty)

    def _may_leave(self, page: Page, following: int) -> bool:
        if page.pins or page.data is None:
            return False
        if page.place is not None:
            return True
        # With it the text would be forgotten, and what follows it could never be found.
        return not following and (page.is_volatile or not self._keeps_new)

    def _evict(self, num_bytes: int) -> None:
        """Let pages leave until so many bytes are free, evict_count pages at least."""
        freed = 0
        for count, page in enumerate(oldest_first(self._pages, self._may_leave)):
            if freed >= num_bytes and count >= self.evict_count:
                break
            assert page.data is not None
            freed += len(page.data)
            self.evictions += 1
            self.drop(page)
            if page.place is None:
                page.tree.remove(page)
