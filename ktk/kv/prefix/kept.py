"""``KeptPages``: a store beneath the page pool of an engine.

Pages that a text has filled go to the disk once the text has ended, in a thread of their own; a
text that begins alike gets them back, read ahead of the thread that puts them into the pool. The
pool's thread waits for no disk. Whatever a disk does, a text is computed then.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ktk.kv.pages import PAGE
from ktk.kv.pool import FullPage, PagePool
from ktk.kv.prefix.config import CacheInfo, StoreConfig
from ktk.kv.prefix.store import PrefixStore
from ktk.log import warn_once
from ktk.placement.residency.capacity import parse_bytes

QUEUE = 64  # texts that wait to be saved; more are not
AHEAD = 8  # frames that wait for the pool's thread, for each text
FETCHES = 2  # texts read at a time


class Fetch:
    """Pages on their way from a store. ``run`` in one thread, all else in the pool's."""

    def __init__(self) -> None:
        self._ready: deque[np.ndarray] = deque()
        self._room = threading.Semaphore(AHEAD)
        self._is_cancelled = self._is_over = False

    @property
    def is_done(self) -> bool:
        """Whether all have been taken that come."""
        return self._is_over and not self._ready  # in this order: the last comes before the end

    def take(self) -> list[np.ndarray]:
        """The frames that have come since, in order."""
        frames = [self._ready.popleft() for _ in range(len(self._ready))]
        if frames:
            self._room.release(len(frames))
        return frames

    def cancel(self) -> None:
        """Nobody wants them any more."""
        self._is_cancelled = True
        self._room.release()

    def run(self, frames: Generator[np.ndarray, None, None], wake: Callable[[], None]) -> None:
        """Read all; ``wake`` tells the pool's thread of news."""
        try:
            for frame in frames:
                self._room.acquire()
                if self._is_cancelled:
                    return
                self._ready.append(frame)
                wake()
        except Exception as error:  # whatever it was, the text is computed from there on
            warn_once("kv-read", "KV pages on the disk cannot be read: %s", error)
        finally:
            frames.close()
            self._is_over = True
            wake()


@dataclass
class Saved:
    """Texts that this process brought to the disk; their pages that were not there, their bytes,
    the seconds that took. left_out : texts that were not, because the disk was behind or failed.
    """

    texts: int = 0
    pages: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    left_out: int = 0


def open_store(path: str | os.PathLike[str], limit: str) -> PrefixStore:
    """One for engines: what they have in memory is in their pools. limit : of the disk, as "20GiB".

    Raises as ``PrefixStore``, ValueError for a limit that is no size.
    """
    disk_limit = parse_bytes(limit)
    config = StoreConfig(path, num_token_per_page=PAGE, memory_pool_size=0, disk_limit=disk_limit)
    return PrefixStore(config)


class KeptPages:
    """store : of pages of PAGE tokens. pool : whose pages ``info`` tells of. wake : called when a
    fetch has news, in any thread.
    """

    def __init__(
        self, store: PrefixStore, info: CacheInfo, pool: PagePool, wake: Callable[[], None]
    ) -> None:
        self.store, self.info = store, info
        self.saved = Saved()
        self.pool, self._wake = pool, wake
        self._texts: queue.Queue[list[FullPage] | None] = queue.Queue(QUEUE)
        self._is_stopping = False
        self._fetching = ThreadPoolExecutor(FETCHES, "ktk-kv-fetch")
        self._saver = threading.Thread(target=self._run, name="ktk-kv-save", daemon=True)
        self._saver.start()

    def line(self) -> str:
        """``1,024 tokens of this model, 0.3 GB in all of 21.5 GB``: as people read it."""
        usage = self.store.usage(self.info)
        limit = usage.limit_bytes
        of = "" if limit is None else f" of {limit / 1e9:.1f} GB"
        return (
            f"{usage.own_pages * PAGE:,} tokens of this model, "
            f"{usage.disk_bytes / 1e9:.2f} GB in all{of}"
        )

    def to_json(self) -> dict[str, Any]:
        """The same, and what this process saved."""
        usage = self.store.usage(self.info)
        return {
            "path": usage.path,
            "limit_bytes": usage.limit_bytes,
            "bytes": usage.disk_bytes,
            "pages": usage.pages,
            "pages_of_model": usage.own_pages,
            "page_tokens": PAGE,
            "page_bytes": self.pool.page_bytes,
            "saved_pages": self.saved.pages,
            "saved_bytes": self.saved.num_bytes,
            "unsaved_texts": self.saved.left_out,
        }

    # In the pool's thread.

    def find(self, tokens: Sequence[int], known: int) -> Fetch | None:
        """The pages behind the ``known`` first ones that a text begins with, as far as stored.

        At least one token is in none of them, as in ``PagePool.match``.
        """
        most = (len(tokens) - 1) // PAGE
        if known >= most:
            return None
        ids = np.array(tokens[: most * PAGE], np.int64)
        if self.store.stored_length(self.info, ids) <= known * PAGE:
            return None
        fetch = Fetch()
        frames = self.store.read_pages(self.info, ids, known)
        self._fetching.submit(fetch.run, frames, self._wake)
        return fetch

    def offer(self, content: int) -> None:
        """Let the pages of a text that has ended be saved. content : of its last full page."""
        pages = self.pool.pages_of(content)
        if pages:
            try:
                self._texts.put_nowait(pages)
            except queue.Full:
                self.saved.left_out += 1

    def close(self, seconds: float = 10.0) -> None:
        """Save what has been offered, for so long; the store stays open."""
        end = time.monotonic() + seconds
        try:
            self._texts.put(None, timeout=seconds)
        except queue.Full:
            self._is_stopping = True
        self._saver.join(max(0.0, end - time.monotonic()))
        self._is_stopping = True
        self._saver.join()
        self._fetching.shutdown()

    # In the saver's.

    def _run(self) -> None:
        while not self._is_stopping and (pages := self._texts.get()) is not None:
            try:
                self._save(pages)
            except Exception as error:  # a full disk, a damaged store: the next text is tried again
                self.saved.left_out += 1
                warn_once("kv-save", "KV pages are not saved: %s", error)

    def _save(self, pages: Sequence[FullPage]) -> None:
        start, written = time.perf_counter(), 0

        def fill(index: int, frame: np.ndarray) -> bool:
            nonlocal written
            is_there = not self._is_stopping and self.pool.copy_out(pages[index], frame)
            written += is_there
            return is_there

        ids = np.array([token for page in pages for token in page.tokens], np.int64)
        self.store.insert_pages(self.info, ids, fill)
        self.saved.pages += written
        self.saved.num_bytes += written * self.pool.page_bytes
        self.saved.seconds += time.perf_counter() - start if written else 0.0
        self.saved.texts += 1
