"""Reads ahead of calls: their turn, their end, and whether they pay."""

from __future__ import annotations

import threading

from ktk.placement.residency.ahead import Ahead
from ktk.placement.residency.reads import Reads


def run(
    ahead: Ahead, now: list[float], used: bool, seconds: float, back: bool = False
) -> list[int]:
    """One call of layer 0, for which its router named expert 3, at rank 0; what was worth it.

    seconds : from the read's begin to the call, and from there to its end if it was of no use.
    back : the one that left for it is wanted then.
    """
    found = ahead.worthy(0, [3, -1], 2)
    for key in found:
        ahead.begin(key, victim=7)
        now[0] += seconds
    ahead.call(0, {3} if used else {4})
    for key in found:
        ahead.judge(key, used)
        now[0] += 0 if used else seconds
        ahead.end(key)
        if back:
            ahead.miss(7)
    return found


def test_what_calls_seldom_use_is_not_read_ahead_and_is_again_once_they_do() -> None:
    now = [0.0]
    ahead = Ahead(1, lambda: now[0])
    assert run(ahead, now, True, 1e-3) == [3]
    for _ in range(200):
        run(ahead, now, False, 1e-3)
    assert run(ahead, now, False, 1e-3) == []
    for _ in range(200):  # learned though nothing is read
        run(ahead, now, True, 1e-3)
    assert run(ahead, now, True, 1e-3) == [3]


def test_ranks_of_a_layer_have_chances_of_their_own() -> None:
    ahead = Ahead(2)
    for _ in range(200):
        ahead.worthy(0, [3, 5, 4, 6], 2)
        ahead.call(0, {3, 4})
    assert ahead.worthy(0, [5, 3, 6, 3], 2) == [5, 6]  # the second is never right
    assert ahead.worthy(1, [5, 3], 2) == [5, 3]


def test_reading_ahead_ends_where_its_cost_is_above_what_it_saves_and_is_tried_again() -> None:
    """Two of three are used: worth it if both cost the same, not if who left comes back."""
    now = [0.0]
    ahead = Ahead(1, lambda: now[0])
    for turn in range(300):
        run(ahead, now, turn % 3 != 0, 1e-3)
    assert run(ahead, now, True, 1e-3) == [3]
    for turn in range(600):  # a read that has hardly begun when its call comes saves nothing
        run(ahead, now, turn % 3 != 0, 1e-5 if turn % 3 else 1e-2, back=True)
    assert ahead.threshold > 2 / 3
    assert run(ahead, now, True, 1e-5) == []
    for _ in range(40000):
        ahead.call(0, set())
    assert ahead.threshold < 0.6


def test_one_that_left_unjudged_has_no_part_in_how_long_a_read_takes() -> None:
    now = [0.0]
    ahead = Ahead(1, lambda: now[0])
    ahead.begin(3, None)
    ahead.leave(3)
    now[0] = 1000.0
    ahead.end(3)  # read again, for a call
    for turn in range(100):
        ahead.begin(5, None)
        now[0] += 1e-3
        ahead.end(5)
        ahead.judge(5, is_used=turn % 2 == 0)
    assert ahead.threshold < 0.2  # what is made up at first counts little: 8 ms, not 8 seconds


def test_reads_that_calls_wait_for_go_before_those_ahead() -> None:
    reads, order = Reads(1), []
    gate, begun = threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        gate.wait(10)

    reads.want(first)
    begun.wait(10)
    for key in range(5):
        reads.foresee(key, lambda key=key: order.append(f"ahead {key}"))
    reads.want(lambda: order.append("wanted"))
    reads.hurry(3)
    assert reads.cancel(1)
    assert not reads.cancel(1)
    gate.set()
    reads.shutdown()
    assert order == ["wanted", "ahead 3", "ahead 0", "ahead 2", "ahead 4"]
    assert reads.cancel_all() == []


def test_one_ahead_that_runs_does_not_keep_a_call_waiting() -> None:
    """No more than two run at once, though four threads are there."""
    reads, gate, running = Reads(4), threading.Event(), threading.Semaphore(0)

    def ahead() -> None:
        running.release()
        gate.wait(10)

    for key in range(4):
        reads.foresee(key, ahead)
    assert running.acquire(timeout=10)
    assert running.acquire(timeout=10)
    done = threading.Event()
    reads.want(done.set)
    assert done.wait(10)
    assert not running.acquire(timeout=0.05)
    assert reads.cancel_all() == [2, 3]
    gate.set()
    reads.shutdown()
