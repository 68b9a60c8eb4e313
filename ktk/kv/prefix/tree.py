"""The prefix tree: a page is a node, its parent the page of the tokens before it.

Pages are found by the hash of all tokens up to their end, and taken only if their own tokens and
their parent are those wanted. So texts whose hashes collide lie side by side.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from ktk.kv.prefix.config import TOKEN_BYTES, CacheInfo, PageLayout
from ktk.kv.prefix.hashing import digest, prefix_hashes

_ticks = itertools.count(1)


class MatchStatus(enum.Enum):
    """What a store has of one page of a prompt, which may be a whole page or the tokens left."""

    EXACT = "a whole page, stored"
    PARTIAL = "the tokens left, which a stored page begins with"
    NOT_MATCH_EXACT = "a whole page, not stored"
    NOT_MATCH_PARTIAL = "the tokens left, with which no stored page begins"


class Page:
    """Keys and values of a page of tokens that follow others; the tiers write where they lie.

    tokens : uint32 bytes. chain : digest of the store, the CacheInfo and all tokens up to its end.
    data : its frame in memory, or None. place : its runs of elements on disk, or None. Who changes
    any of it holds the store's lock.
    """

    __slots__ = (
        "chain",
        "checksum",
        "children",
        "column",
        "column_pins",
        "data",
        "hash",
        "index",
        "is_removed",
        "is_volatile",
        "loading",
        "parent",
        "pins",
        "place",
        "row",
        "tokens",
        "tree",
        "used",
    )

    def __init__(
        self, tree: PrefixTree, parent: Page | None, tokens: bytes, hash: int, chain: bytes
    ) -> None:
        self.tree, self.parent = tree, parent
        self.tokens, self.hash, self.chain = tokens, hash, chain
        self.index: int = -1 if parent is None else parent.index + 1
        self.children: list[Page] = []
        self.used = next(_ticks)
        self.pins = 0  # of handles; a pinned page stays where it is
        self.data: np.ndarray | None = None
        self.loading: Future[bool] | None = None
        self.place: tuple[tuple[int, int], ...] | None = None
        self.checksum = b""
        self.row = 0  # of the metadata
        self.is_removed = False  # from the tree; pins may still hold it
        self.is_volatile = False  # not to be saved
        self.column: int | None = None  # of the device's pages
        self.column_pins = 0

    @property
    def is_dirty(self) -> bool:
        """Whether a disk, if there is one, has yet to get it."""
        return self.place is None and not self.is_volatile and not self.is_removed


class PrefixTree:
    """All pages of one CacheInfo. origin : names the store."""

    def __init__(self, layout: PageLayout, origin: bytes) -> None:
        self.layout = layout
        self.page_bytes = layout.page_tokens * TOKEN_BYTES
        self.root = Page(self, None, b"", 0, digest(origin, layout.info.to_json().encode()))
        self._by_hash: dict[int, list[Page]] = {}

    @property
    def info(self) -> CacheInfo:
        return self.layout.info

    def __len__(self) -> int:
        return sum(map(len, self._by_hash.values()))

    def __iter__(self) -> Iterator[Page]:
        for pages in self._by_hash.values():
            yield from pages

    def match(self, tokens: bytes) -> list[Page]:
        """The stored pages that a text begins with, first to last."""
        found, parent = list[Page](), self.root
        for index, value in enumerate(prefix_hashes(tokens, self.page_bytes)):
            own = tokens[index * self.page_bytes : (index + 1) * self.page_bytes]
            page = self._find(parent, own, value)
            if page is None:
                break
            found.append(page)
            parent = page
        return found

    def drafts(self, pages: Sequence[Page], tokens: bytes) -> list[Page]:
        """Pages for a text's whole pages behind the ``pages`` found, not yet in the tree."""
        made = list(pages)
        for index, value in enumerate(prefix_hashes(tokens, self.page_bytes)):
            if index >= len(pages):
                own = tokens[index * self.page_bytes : (index + 1) * self.page_bytes]
                parent = made[-1] if made else self.root
                made.append(Page(self, parent, own, value, digest(parent.chain, own)))
        return made[len(pages) :]

    def adopt(self, draft: Page) -> Page:
        """Put a draft into the tree, or find the page that has come there meanwhile."""
        assert draft.parent is not None
        found = self._find(draft.parent, draft.tokens, draft.hash)
        if found is None:
            self._insert(draft)
        return found or draft

    def grow(self, parent: Page, tokens: bytes, value: int) -> Page | None:
        """One page more behind ``parent``; None if it is there.

        value : the hash of all tokens up to its end.
        """
        return None if self._find(parent, tokens, value) else self._add(parent, tokens, value)

    def _find(self, parent: Page, tokens: bytes, value: int) -> Page | None:
        for page in self._by_hash.get(value, ()):
            if page.parent is parent and page.tokens == tokens:
                return page
        return None

    def _add(self, parent: Page, tokens: bytes, value: int) -> Page:
        page = Page(self, parent, tokens, value, digest(parent.chain, tokens))
        self._insert(page)
        return page

    def _insert(self, page: Page) -> None:
        assert page.parent is not None
        page.parent.children.append(page)
        self._by_hash.setdefault(page.hash, []).append(page)

    def status(self, tokens: bytes, pages: Sequence[Page]) -> list[MatchStatus]:
        """Of each page of a text and of the tokens left; ``pages`` are those that were found."""
        whole, rest = divmod(len(tokens), self.page_bytes)
        found = [MatchStatus.EXACT] * len(pages)
        found += [MatchStatus.NOT_MATCH_EXACT] * (whole - len(pages))
        if rest:
            last = pages[-1] if pages else self.root
            is_begun = len(pages) == whole and any(
                page.tokens.startswith(tokens[-rest:]) for page in last.children
            )
            found.append(MatchStatus.PARTIAL if is_begun else MatchStatus.NOT_MATCH_PARTIAL)
        return found

    def remove(self, page: Page) -> list[Page]:
        """Take out a page and all that follow it; returns them, parents first."""
        gone = [page]
        for each in gone:
            gone += each.children
        if page.parent is not None and not page.is_removed:
            page.parent.children.remove(page)
        for each in gone:
            if not each.is_removed:
                each.is_removed = True
                same = self._by_hash[each.hash]
                same.remove(each)
                if not same:
                    del self._by_hash[each.hash]
        return gone


def touch(pages: Sequence[Page]) -> None:
    """They are used now; of two that are, the first of a text is the later, so leaves go first."""
    for page in reversed(pages):
        page.used = next(_ticks)


def use_after(tick: int) -> None:
    """Let everything that comes be later than ``tick``."""
    global _ticks
    _ticks = itertools.count(max(tick, next(_ticks)) + 1)


def token_bytes(ids: Any) -> bytes:
    """Tokens as the store keeps them: uint32, little-endian.

    ids : whole numbers (length,). Raises ValueError for others, below 0 or from 2**32 on.
    """
    array = np.asarray(ids)
    if array.size == 0:
        return b""
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"ids: {array.dtype} {array.shape}: must be whole numbers (length,)")
    if array.min() < 0 or array.max() >= 2**32:
        raise ValueError(f"ids: {array.min()} to {array.max()}: must be 0 to 2**32 - 1")
    return array.astype("<u4").tobytes()
