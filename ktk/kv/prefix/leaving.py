"""Who leaves a tier that is full: pages used longest ago first, and each after what follows it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator

from ktk.kv.prefix.tree import Page


def oldest_first(pages: Iterable[Page], may_leave: Callable[[Page, int], bool]) -> Iterator[Page]:
    """Pages that may leave, one after the other; the caller takes as many as it needs.

    may_leave : of a page, and of how many pages follow it that have not left.
    """
    following = {page: len(page.children) for page in pages}
    heap = [(page.used, id(page), page) for page in following if may_leave(page, following[page])]
    heapq.heapify(heap)
    left = {page for _, _, page in heap}  # or will
    while heap:
        page = heapq.heappop(heap)[2]
        yield page
        parent = page.parent
        if parent is not None and parent in following:
            following[parent] -= 1
            if parent not in left and may_leave(parent, following[parent]):
                left.add(parent)
                heapq.heappush(heap, (parent.used, id(parent), parent))
