"""Reads ahead of calls: their turn, their end, and whether they pay."""

from __future__ import annotations

import threading

from ktk.placement.residency.ahead import REST, WINDOW, Ahead
from ktk.placement.residency.reads import Reads


def test_reading_ahead_ends_where_it_does_not_pay_and_is_tried_again() -> None:
    ahead, third = Ahead(), -(-WINDOW // 3)
    ahead.judge(used=third - 1, useless=WINDOW - third)
    assert ahead.is_on  # the window is not full
    ahead.judge(used=1, useless=0)
    assert ahead.is_on  # a third was used, and that is enough
    ahead.judge(used=third - 1, useless=WINDOW - third + 1)
    assert not ahead.is_on
    for _ in range(REST - 1):
        ahead.call()
    assert not ahead.is_on
    ahead.call()
    assert ahead.is_on
    ahead.judge(used=WINDOW, useless=0)
    assert ahead.is_on


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
