"""Pages are held by whom they were given to, shared by texts that begin alike and by no others."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ktk.kv.pages import PAGE
from ktk.kv.pool import NOTHING, PagePool

PAGES = 6
SHAPES = [((2, 16), (2, 8)), ((1, 4), (3, 4))]


def pool_of(count: int = PAGES) -> PagePool:
    return PagePool(count, SHAPES, np.dtype(np.float32))


def text(*words: int) -> list[int]:
    """A page of each word, and one token more."""
    return [word for word in words for _ in range(PAGE)] + [99]


class Sharing(RuleBasedStateMachine):
    """Sequences come, fill their pages in order and go. A page's first number says what its keys
    are of: of a text that a match gives, they must be that text's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of()
        self.written: dict[int, tuple[int, ...]] = {}  # page -> all words up to its own
        self.open: list[tuple[list[int], list[int], int, int]] = []  # tokens, pages, content, full

    @rule(words=st.lists(st.integers(0, 2), min_size=1, max_size=4))
    def begin(self, words: list[int]) -> None:
        tokens = text(*words)
        pages, content = self.pool.match(tokens)
        for index, page in enumerate(pages):
            assert self.written[page] == tuple(words[: index + 1])
        self.open.append((tokens, pages, content, len(pages)))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 99))
    def fill(self, which: int) -> None:
        """The next page, as far as there is one."""
        place = which % len(self.open)
        tokens, pages, content, full = self.open[place]
        if (full + 1) * PAGE >= len(tokens):
            return
        page = self.pool.take()
        held = {p for _, ps, _, _ in self.open for p in ps}
        if page is None:
            assert len(held) == PAGES
            return
        assert page not in held
        words = tuple(tokens[PAGE * i] for i in range(full + 1))
        self.written[page] = words
        content = self.pool.keep(page, content, tokens[full * PAGE : (full + 1) * PAGE])
        assert content != NOTHING
        self.open[place] = tokens, [*pages, page], content, full + 1

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        self.pool.give_back(self.open.pop(which % len(self.open))[1])

    @invariant()
    def free_are_those_that_nobody_holds(self) -> None:
        assert self.pool.free == PAGES - len({p for _, pages, _, _ in self.open for p in pages})


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def fill(pool: PagePool, tokens: list[int]) -> list[int]:
    pages, content = pool.match(tokens)
    for first in range(len(pages) * PAGE, len(tokens) - PAGE + 1, PAGE):
        page = pool.take()
        assert page is not None
        content = pool.keep(page, content, tokens[first : first + PAGE])
        pages.append(page)
    return pages


def test_a_text_that_was_there_finds_all_but_what_must_be_computed() -> None:
    pool = pool_of()
    pages = fill(pool, text(1, 2, 3))
    pool.give_back(pages)
    assert pool.match(text(1, 2, 3))[0] == pages
    assert pool.match(text(1, 2, 3)[:-1])[0] == pages[:2], "one token is left to be computed"
    assert pool.match(text(1, 2, 4))[0] == pages[:2]
    assert pool.match(text(2, 2, 3))[0] == pool.match([])[0] == []


def test_the_ends_of_old_texts_make_room_first() -> None:
    pool = pool_of()
    old, new = fill(pool, text(1, 2, 3)), fill(pool, text(7, 8))
    pool.give_back(old)
    pool.give_back(new)
    taken = [pool.take() for _ in range(3)]
    assert taken[1:] == [old[2], old[1]], "first the page that holds nothing"
    assert pool.match(text(1, 2))[0] == old[:1] and pool.match(text(7, 8))[0] == new


def test_two_who_compute_the_same_at_once_are_found_as_one() -> None:
    pool = pool_of()
    first, second = pool.take(), pool.take()
    assert first is not None and second is not None
    word = text(5)[:PAGE]
    contents = {pool.keep(page, NOTHING, word) for page in (first, second)}
    assert len(contents) == 1
    third = pool.take()
    assert third is not None
    pool.keep(third, contents.pop(), text(6)[:PAGE])
    assert pool.match(text(5, 6))[0] == [first, third]


def test_pages_of_all_layers_lie_apart() -> None:
    """Each page's bytes, from its address on, are its own and lie in memory that the pool has."""
    pool = pool_of(40)
    pages = [pool.take() for _ in range(37)]
    assert None not in pages
    spans = []
    for shapes, table in zip(SHAPES, pool.tables([p for p in pages if p is not None]), strict=True):
        assert table.shapes == shapes and table.num_tokens == 37 * PAGE
        assert table.dtype == np.float32
        for addresses, (heads, width) in zip(table._tables, shapes, strict=True):
            size = heads * width * PAGE * 4
            spans += [(int(address), int(address) + size) for address in addresses]
    spans.sort()
    assert all(end <= after for (_, end), (after, _) in pairwise(spans))
    slabs = [(slab.ctypes.data, slab.ctypes.data + slab.nbytes) for slab in pool._slabs.values()]
    assert all(any(a <= begin and end <= b for a, b in slabs) for begin, end in spans)


def test_memory_is_taken_when_it_is_needed() -> None:
    pool = PagePool(1 << 20, [((8, 128), (8, 128))] * 48, np.dtype(np.uint16))  # 13 TB
    assert not pool._slabs
    assert {pool.take() for _ in range(20)} == set(range(20))
    assert len(pool._slabs) == 2
