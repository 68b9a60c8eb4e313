"""Who leaves the disk when it is full: pages that nothing follows, used longest ago first."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from ktk.kv.prefix.tree import Page


def victims(pages: Iterable[Page], num_elements: int) -> list[Page]:
    """Pages that free so many elements, or all that may leave if they do not suffice.

    pages : all. What follows a page leaves before it; pinned pages and all before them stay, and so
    do those that the disk does not have yet.
    """
    following = {page: len(page.children) for page in pages}
    leaves = [(page.used, id(page), page) for page in following if _may_leave(page, following)]
    heapq.heapify(leaves)
    found, freed = list[Page](), 0
    while leaves and freed < num_elements:
        page = heapq.heappop(leaves)[2]
        found.append(page)
        freed += page.tree.layout.num_elements
        parent = page.parent
        if parent in following:
            following[parent] -= 1
            if _may_leave(parent, following):
                heapq.heappush(leaves, (parent.used, id(parent), parent))
    return found


def _may_leave(page: Page, following: dict[Page, int]) -> bool:
    return not following[page] and not page.pins and page.place is not None
