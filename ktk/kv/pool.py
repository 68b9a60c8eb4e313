"""``PagePool``: the pages of keys and values of all sequences, shared where they begin alike.

A page that nobody holds keeps what is in it until it is needed: a sequence that begins with the
same tokens takes it as it is. A page's content has a number that no other content ever gets, and is
found by the number of the page before and its own tokens themselves, not by a hash of them: another
text's keys cannot be taken for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ktk.kv.pages import PAGE
from ktk.machine.memory import aligned_buffer
from ktk.ops.decoder import Pages, PageTables, Shapes, row_width

NOTHING = 0  # the content before a sequence's first page
SLAB = 16  # pages of which memory is taken at once, for all layers, when the first is


@dataclass(frozen=True)
class FullPage:
    """A page as it is found: what is in it, and its own PAGE tokens."""

    page: int
    content: int
    tokens: tuple[int, ...]


class PagePool:
    """count pages of PAGE tokens for every layer.

    shapes : of each layer, ((heads, width) of keys, (heads, width) of values). dtype : of all, as
    ``ktk.ops.decoder.Pages`` takes them.
    Not for several threads at once, except ``copy_out``.
    """

    def __init__(self, count: int, shapes: Sequence[Shapes], dtype: np.dtype) -> None:
        self.count, self._shapes, self._dtype = count, shapes, dtype
        # A slab: of each layer SLAB pages of keys, then SLAB of values.
        self._page_bytes = [
            [heads * row_width(width, dtype) * PAGE * dtype.itemsize for heads, width in both]
            for both in shapes
        ]
        self._slabs: dict[int, np.ndarray] = {}
        self._bases = np.zeros(-(-count // SLAB), np.uintp)  # addresses of slabs
        self._holders = [0] * count
        self._content = [NOTHING] * count
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}  # content -> how it is found
        self._found: dict[tuple[int, tuple[int, ...]], int] = {}  # -> page
        self._unheld = OrderedDict.fromkeys(range(count))  # the next to be taken first
        self._last_content = NOTHING

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._unheld)

    @property
    def num_full(self) -> int:
        """Pages that a sequence may take as they are."""
        return len(self._found)

    @property
    def num_kept(self) -> int:
        """Of those, pages that nobody holds: room is made of them."""
        return max(0, self.num_full - (self.count - self.free))

    @property
    def page_bytes(self) -> int:
        """Of one page in all layers."""
        return sum(map(sum, self._page_bytes))

    def take(self) -> int | None:
        """A page for its one holder, what was in it forgotten; None if all are held."""
        if not self._unheld:
            return None
        page, _ = self._unheld.popitem(last=False)
        slab = page // SLAB
        if slab not in self._slabs:
            memory = aligned_buffer(SLAB * sum(map(sum, self._page_bytes)))
            self._slabs[slab], self._bases[slab] = memory, memory.ctypes.data
        if self._content[page] != NOTHING:
            del self._found[self._keys.pop(self._content[page])]
            self._content[page] = NOTHING
        self._holders[page] = 1
        return page

    def match(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """Pages that hold the beginning of a sequence, now held once more; the last one's content.

        At least one of the tokens is in none of them: there is one to compute.
        """
        pages: list[int] = []
        content = NOTHING
        for first in range(0, len(tokens) - PAGE, PAGE):
            page = self._found.get((content, tuple(tokens[first : first + PAGE])))
            if page is None:
                break
            content = self._content[page]
            self._holders[page] += 1
            self._unheld.pop(page, None)
            pages.append(page)
        return pages, content

    def keep(self, page: int, before: int, tokens: Sequence[int]) -> int:
        """A page is full: sequences that begin alike may take it. Returns its content.

        before : the content of the page before, or NOTHING. tokens : its own PAGE ones.
        """
        key = before, tuple(tokens)
        if key in self._found:
            return self._content[self._found[key]]
        self._last_content += 1
        self._content[page] = self._last_content
        self._keys[self._last_content] = key
        self._found[key] = page
        return self._last_content

    def pages_of(self, content: int) -> list[FullPage]:
        """The pages up to a content, first to last; none if one of them is there no longer."""
        found: list[FullPage] = []
        while content != NOTHING:
            key = self._keys.get(content)
            if key is None:
                return []
            found.append(FullPage(self._found[key], content, key[1]))
            content = key[0]
        return found[::-1]

    def copy_out(self, full: FullPage, frame: np.ndarray) -> bool:
        """Copy a page to ``frame``; False if something else is in it, and then in the frame.

        frame : uint8 (at least page_bytes,): layer by layer keys, then values, each (heads, PAGE,
        width). In any thread: a page gets another content before anybody writes to it.
        """
        if self._content[full.page] != full.content:
            return False
        self.read(full.page, frame)
        return self._content[full.page] == full.content

    def read(self, page: int, frame: np.ndarray) -> None:
        """``copy_out`` of a page that its holder has."""
        for place, part in self._spans(page):
            frame[part] = place

    def copy_in(self, page: int, frame: np.ndarray) -> None:
        """Fill a page that its one holder has taken with what ``copy_out`` gave."""
        for place, part in self._spans(page):
            place[:] = frame[part]

    def _spans(self, page: int) -> Iterator[tuple[np.ndarray, slice]]:
        """Of a page's keys and values in each layer: where they lie, and which part they are."""
        memory, place = self._slabs[page // SLAB], page % SLAB
        offset = done = 0
        for both in self._page_bytes:
            for size in both:
                begin = offset + place * size
                yield memory[begin : begin + size], slice(done, done + size)
                offset, done = offset + SLAB * size, done + size

    def give_back(self, pages: Sequence[int]) -> None:
        """A sequence's pages, held once less. Its last ones are the first to be taken again."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._unheld[page] = None
                if self._content[page] == NOTHING:  # of no use to anybody
                    self._unheld.move_to_end(page, last=False)

    def tables(self, pages: Sequence[int]) -> PageTables:
        """A sequence's pages as each layer's ``DecoderLayer`` takes them."""
        numbers = np.array(pages, np.uintp)
        slabs, places = self._bases[numbers // np.uintp(SLAB)], numbers % np.uintp(SLAB)
        tables, offset = list[Pages](), 0
        for shapes, both in zip(self._shapes, self._page_bytes, strict=True):
            addresses = []
            for page_bytes in both:
                addresses.append(slabs + np.uintp(offset) + places * np.uintp(page_bytes))
                offset += SLAB * page_bytes
            tables.append(Pages.at(addresses[0], addresses[1], shapes, PAGE, self._dtype))
        return PageTables(tables)
