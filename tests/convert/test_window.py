"""The window of a conversion: order, how far ahead threads may be, and what an error leaves."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from ktk.convert.window import in_order


def threads_of_the_window() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("ktk-convert")]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_jobs_order(threads: int) -> None:
    def work(job: int) -> int:
        time.sleep(0.002 * (job % 3))
        return job * job

    assert list(in_order(work, range(20), threads)) == [job * job for job in range(20)]
    assert list(in_order(work, (), threads)) == []
    assert not threads_of_the_window()


@pytest.mark.parametrize("threads", [1, 3])
def test_jobs_are_taken_as_the_caller_goes_on(threads: int) -> None:
    taken = 0

    def jobs() -> Iterator[int]:
        nonlocal taken
        for job in range(30):
            taken += 1
            yield job

    with contextlib.closing(in_order(lambda job: job, jobs(), threads)) as results:
        assert taken == 0
        for done, _ in enumerate(results):
            assert taken <= done + 1 + 2 * threads


def test_an_error_comes_in_its_place_and_no_thread_is_left() -> None:
    def work(job: int) -> int:
        if job == 3:
            raise ValueError("job 3")
        return job

    results = in_order(work, range(10), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="job 3"):
        next(results)
    assert not threads_of_the_window()


def test_what_was_not_begun_is_not_begun_after_the_caller_failed() -> None:
    begun = []

    def work(job: int) -> int:
        begun.append(job)
        time.sleep(0.01)
        return job

    with contextlib.closing(in_order(work, range(100), 1)) as results:
        next(results)
    assert len(begun) <= 3
    assert not threads_of_the_window()
