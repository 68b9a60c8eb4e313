"""The one window of a conversion: work done by threads a little ahead of the writer, in order.

Whatever is converted, from whatever source into whatever sink, goes through ``in_order``. What is
written therefore depends neither on the number of threads nor on which of them was faster, and
memory holds a few experts however large the model is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Job], Result], jobs: Iterable[Job], threads: int
) -> Generator[Result, None, None]:
    """``work(job)`` of each job, in the jobs' order, by so many threads.

    At most two jobs a thread are begun and not handed out, and one result is with the caller, whose
    disk may be slow. An exception of a job is raised in its place. When the generator ends or is
    closed, no thread of it runs any more: close it where the caller may fail.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ktk-convert")
    pending: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(work, job))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
