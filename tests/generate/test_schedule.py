"""What a pass computes: every answer's next row, prompts in fair parts, pages for all of it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktk.generate.schedule import LEAST_PROMPT, PROMPT_SHARE, Piece, Schedule, Sequence
from ktk.kv.pages import PAGE
from ktk.kv.pool import PagePool

SHAPES = [((1, 2), (1, 2))]


def schedule_of(
    pages: int, running: int = 4, batch_tokens: int = 96, swap_pages: int = 0
) -> Schedule[str]:
    pool = PagePool(pages, SHAPES, np.dtype(np.float32))
    return Schedule(pool, running, batch_tokens, swap_pages * pool.page_bytes)


def write(schedule: Schedule[str], piece: Piece[str]) -> None:
    """Where its keys are to lie, bytes that tell of the text up to each page's last row."""
    for index in range(piece.first // PAGE, (piece.end - 1) // PAGE + 1):
        frame = page_bytes(piece.sequence.tokens[: min(piece.end, (index + 1) * PAGE)])
        schedule.pool.copy_in(piece.sequence.pages[index], frame)


def page_bytes(tokens: list[int]) -> np.ndarray:
    """Of one page: uint8 (page_bytes,)."""
    size = sum(heads * width for heads, width in SHAPES[0]) * PAGE * 4
    return np.full(size // 8, hash(tuple(tokens)), np.int64).view(np.uint8)


def read(schedule: Schedule[str], sequence: Sequence[str]) -> None:
    """What a sequence has computed lies in its pages."""
    frame = page_bytes([])
    for index in range(-(-sequence.computed // PAGE)):
        schedule.pool.read(sequence.pages[index], frame)
        want = page_bytes(sequence.tokens[: min(sequence.computed, (index + 1) * PAGE)])
        np.testing.assert_array_equal(want, frame)


def check(schedule: Schedule[str], pieces: list[Piece[str]]) -> None:
    assert 0 < sum(piece.end - piece.first for piece in pieces) <= schedule.batch_tokens
    assert len(schedule.running) <= schedule.most_running
    for piece in pieces:
        sequence = piece.sequence
        assert sequence in schedule.running
        assert piece.first == sequence.computed < piece.end <= len(sequence.tokens)
        assert len(sequence.pages) * PAGE >= piece.end
        assert sequence.tables[0].num_tokens >= piece.end
    written = [
        page
        for piece in pieces
        for page in piece.sequence.pages[piece.first // PAGE : (piece.end - 1) // PAGE + 1]
    ]
    assert len(set(written)) == len(written), "two sequences write into one page"
    held = {page for sequence in schedule.running for page in sequence.pages}
    assert schedule.pool.free == schedule.pool.count - len(held)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 4 * PAGE), min_size=1, max_size=9),
    answer=st.integers(1, PAGE + 5),
    pages=st.integers(6, 14),
    words=st.integers(1, 3),
    swap_pages=st.integers(0, 12),
)
def test_all_sequences_end_whatever_the_room(
    lengths: list[int], answer: int, pages: int, words: int, swap_pages: int
) -> None:
    """pages : at least for the longest sequence alone. words : prompts that begin differently."""
    schedule = schedule_of(pages, swap_pages=swap_pages)
    wanted = {}
    for number, length in enumerate(lengths):
        sequence = schedule.add(str(number), [number % words] * length)
        wanted[sequence] = length + answer
    for _ in range(10_000):
        were_running = set(schedule.running)
        pieces = schedule.next_pass()
        if not pieces:
            break
        check(schedule, pieces)
        swap = schedule.swap
        of_waiting = sum(len(s.swapped.frames) for s in schedule.waiting if s.swapped)
        assert swap.num_bytes == of_waiting * schedule.pool.page_bytes <= swap.limit
        for sequence in set(schedule.running) - were_running:
            assert sequence.swapped is None
            read(schedule, sequence)
        answering = {s for s in schedule.running if s.pending == 1}
        assert answering <= {piece.sequence for piece in pieces}, "an answer waits"
        for piece in pieces:
            write(schedule, piece)
            schedule.done(piece)
        for piece in pieces:
            if piece.is_last:
                piece.sequence.tokens.append(7)
                if len(piece.sequence.tokens) == wanted[piece.sequence]:
                    schedule.remove(piece.sequence)
    assert not schedule.running and not schedule.waiting
    assert schedule.pool.free == pages
    assert schedule.swap.num_bytes == 0


def rows(pieces: list[Piece[str]]) -> dict[str, int]:
    return {piece.sequence.owner: piece.end - piece.first for piece in pieces}


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    schedule = schedule_of(100, batch_tokens=96)
    schedule.add("long", [1] * 3000)
    schedule.add("short", [2] * 30)
    schedule.add("middle", [3] * 300)
    assert rows(schedule.next_pass()) == {"long": 48, "short": 30, "middle": 18}


def test_beside_an_answer_prompts_get_a_part_of_a_pass() -> None:
    schedule = schedule_of(100, batch_tokens=256)
    schedule.add("answer", [1])
    for piece in schedule.next_pass():
        schedule.done(piece)
        piece.sequence.tokens.append(5)
    schedule.add("long", [2] * 3000)
    assert rows(schedule.next_pass()) == {"answer": 1, "long": 256 // PROMPT_SHARE}
    small = schedule_of(100, batch_tokens=64)
    small.add("answer", [1])
    small.add("long", [2] * 3000)
    assert rows(small.next_pass()) == {"answer": 1, "long": LEAST_PROMPT}


def test_the_last_to_come_is_put_off_and_comes_back_first() -> None:
    schedule = schedule_of(4, batch_tokens=512)
    first = schedule.add("first", [1] * (PAGE + 1))
    second = schedule.add("second", [2] * (PAGE - 2))
    third = schedule.add("third", [3] * 5)
    for step in itertools.count():
        assert step < 3 * PAGE
        pieces = schedule.next_pass()
        check(schedule, pieces)
        for piece in pieces:
            schedule.done(piece)
            piece.sequence.tokens.append(9)
        if third not in schedule.running:
            break
    assert schedule.running == [first, second] and schedule.waiting[0] is third
    assert (third.pages, third.computed) == ([], 0)
    schedule.remove(second)
    assert {piece.sequence for piece in schedule.next_pass()} == {first, third}


def test_a_lower_priority_comes_first() -> None:
    schedule = schedule_of(100, batch_tokens=96)
    schedule.most_running = 3
    schedule.add("later", [1] * 200, priority=1)
    schedule.add("soon", [2] * 100)
    schedule.add("now", [3] * 40, priority=-1)
    schedule.add("waits", [4] * 10, priority=1)
    assert rows(schedule.next_pass()) == {"now": 40, "soon": 56}
    assert [sequence.owner for sequence in schedule.running] == ["now", "soon", "later"]
    assert schedule.add("first to wait", [5]) is schedule.waiting[0]


def test_where_pages_run_out_the_higher_priority_gives_way() -> None:
    schedule = schedule_of(4, batch_tokens=512)
    early = schedule.add("early", [1] * (PAGE - 2), priority=1)
    urgent = schedule.add("urgent", [2] * (2 * PAGE + 1))
    for step in itertools.count():
        assert step < 3 * PAGE
        pieces = schedule.next_pass()
        check(schedule, pieces)
        for piece in pieces:
            schedule.done(piece)
            piece.sequence.tokens.append(9)
        if schedule.waiting:
            break
    assert schedule.running == [urgent] and schedule.waiting == [early]


def put_off_with(swap_pages: int) -> tuple[Schedule[str], Sequence[str], Sequence[str]]:
    """Two sequences, the second put off after a page and a part of another had been computed."""
    schedule = schedule_of(4, batch_tokens=512, swap_pages=swap_pages)
    first = schedule.add("first", [1] * (PAGE + 1))
    second = schedule.add("second", [2] * (PAGE // 2))
    for _ in range(PAGE + 1):
        for piece in schedule.next_pass():
            write(schedule, piece)
            schedule.done(piece)
            piece.sequence.tokens.append(9)
    assert list(schedule.waiting) == [second] and len(second.tokens) == PAGE // 2 + PAGE
    return schedule, first, second


def test_who_is_put_off_takes_pages_along_and_goes_on_from_there() -> None:
    schedule, first, second = put_off_with(2)
    swap = schedule.swap
    assert (second.computed, second.swapped is not None) == (0, True)
    assert (swap.swapped_out, swap.pages_out, swap.recomputed) == (1, 2, 0)
    schedule.remove(first)
    (piece,) = schedule.next_pass()
    end = len(second.tokens)
    assert (piece.sequence, piece.first, piece.end) == (second, end - 1, end)
    read(schedule, second)
    assert swap.num_bytes == 0 and 0 < swap.pages_in <= 2


def test_without_room_for_its_pages_it_is_computed_again() -> None:
    schedule, first, second = put_off_with(1)
    assert second.swapped is None
    assert (schedule.swap.swapped_out, schedule.swap.recomputed) == (0, 1)
    schedule.remove(first)
    (piece,) = schedule.next_pass()
    assert piece.first <= PAGE < piece.end


def test_who_leaves_while_it_waits_leaves_no_pages_behind() -> None:
    schedule, _, second = put_off_with(2)
    assert schedule.swap.num_bytes == 2 * schedule.pool.page_bytes
    schedule.remove(second)
    assert schedule.swap.num_bytes == 0


@pytest.mark.parametrize("length", [2 * PAGE, 2 * PAGE + 1, 2 * PAGE + 30])
def test_a_prompt_of_before_is_computed_from_where_it_differs(length: int) -> None:
    schedule = schedule_of(8, batch_tokens=512)
    first = schedule.add("first", [1] * length)
    for piece in schedule.next_pass():
        schedule.done(piece)
    schedule.remove(first)
    again = schedule.add("again", [1] * length)
    (piece,) = schedule.next_pass()
    assert piece.first == again.shared == (length - 1) // PAGE * PAGE
