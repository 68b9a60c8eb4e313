"""The tree and its tiers, and who may do what when.

Two locks. ``lock`` guards the trees, the pages and the tiers' books, and is never held while a disk
or a device works. ``saving`` is held by who writes to the disk, and is taken first.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice

import numpy as np

from ktk import fork
from ktk.errors import EngineError
from ktk.kv.prefix.config import TOKEN_BYTES, CacheInfo, PageLayout, StoreConfig
from ktk.kv.prefix.device import DevicePages, DeviceTier
from ktk.kv.prefix.disk import DiskTier, Placed
from ktk.kv.prefix.handle import Handle, HandleStore, Holding
from ktk.kv.prefix.leaving import oldest_first
from ktk.kv.prefix.memory import MemoryTier
from ktk.kv.prefix.tree import Page, PrefixTree, touch
from ktk.paths import user_path

READERS = 4  # pages read from disk at a time


class Tiers(HandleStore):
    """All that a store has. disk : None without one; what it holds is in the trees."""

    def __init__(self, config: StoreConfig, device: DevicePages | None) -> None:
        self.config = config
        self.lock, self.saving = threading.RLock(), threading.RLock()
        self.observe: Callable[[str, float], None] = lambda name, value: None
        self.trees: dict[CacheInfo, PrefixTree] = {}
        self.memory = MemoryTier(config.memory_pool_size, config.evict_count, config.writes)
        self.device = None if device is None else DeviceTier(device)
        self.disk: DiskTier | None = None
        self.on_new: Callable[[], None] = lambda: None  # there are pages that the disk lacks
        self._process = fork.process()
        self.is_closed = False
        self._doomed: list[Page] = []  # removed, their rows not yet
        self._used: set[Page] = set()  # since the start
        self._returned: deque[Holding] = deque()
        self._readers: ThreadPoolExecutor | None = None
        self._origin = b""
        if config.path is not None:
            path = user_path(config.path)
            self.disk = DiskTier(path, config.element_bytes, config.disk_limit)
            self._origin = self.disk.origin

    @property
    def is_own(self) -> bool:
        """Whether this is the process that made it."""
        return fork.process() == self._process

    def check(self) -> None:
        """EngineError in a forked child, ValueError once it is closed."""
        if not self.is_own:
            raise EngineError(
                "a KV store does not go through fork: make one, of another path, in the child"
            )
        if self.is_closed:
            raise ValueError("the KV store is closed: make another")

    def tree(self, info: CacheInfo) -> PrefixTree:
        """Made if need be."""
        if info not in self.trees:
            layout = PageLayout(info, self.config.num_token_per_page, self.config.element_bytes)
            self.trees[info] = PrefixTree(layout, self._origin)
        return self.trees[info]

    def pages(self) -> Iterable[Page]:
        return (page for tree in self.trees.values() for page in tree)

    def match(self, tree: PrefixTree, tokens: bytes, on_disk: bool = False) -> list[Page]:
        """A text's stored pages, pinned and used now; ``unpin`` them.

        on_disk : only as far as the disk has them.
        """
        pages = tree.match(tokens)
        if on_disk:
            pages = until(pages, lambda page: page.place is not None)
        touch(pages)
        self._used.update(pages)
        for page in pages:
            page.pins += 1
        return pages

    def unpin(self, pages: Iterable[Page]) -> None:
        for page in pages:
            page.pins -= 1
            self._let_go(page)

    def doom(self, page: Page) -> list[Page]:
        """Take a page, and all that follow it, out of the tree at once; from the disk by
        ``bury``.
        """
        gone = page.tree.remove(page)
        for each in gone:
            self._let_go(each)
        self._doomed += [each for each in gone if each.place is not None]
        self._used.difference_update(gone)
        return gone

    def _let_go(self, page: Page) -> None:
        if page.is_removed and not page.pins:
            self.memory.drop(page)
            if self.device is not None:
                self.device.drop(page)

    def bury(self) -> None:
        """Delete what was doomed from the disk; under ``saving``."""
        if self.disk is None or not self.config.writes:
            return
        with self.lock:
            doomed, self._doomed = list(dict.fromkeys(self._doomed)), []
        self.disk.forget(doomed)

    def write(self, items: Sequence[tuple[Page, np.ndarray]]) -> int:
        """Write pages and their frames to the disk, parents first; under ``saving``.

        Pages, or drafts of pages, get where they lie, drafts their place in the tree. Returns how
        many fitted, others having left for them.
        """
        assert self.disk is not None
        self.bury()
        lacking = sum(page.tree.layout.num_elements for page, _ in items) - self.disk.free_elements
        if lacking > 0:
            with self.lock:
                for page in oldest_first(self.pages(), _may_leave_the_disk):
                    if lacking <= 0:
                        break
                    self.doom(page)
                    lacking -= page.tree.layout.num_elements
            self.bury()
        written = 0
        for placed in self.disk.write(items):
            written += len(placed)
            with self.lock:
                for each in placed:
                    self._place(each, items)
        return written

    def _place(self, placed: Placed, items: Sequence[tuple[Page, np.ndarray]]) -> None:
        draft = page = placed.page
        assert draft.parent is not None
        if draft.is_removed or draft.parent.is_removed:  # while it was written
            draft.is_removed = True
            self._doomed.append(draft)
        else:
            page = draft.tree.adopt(draft)
        page.place, page.checksum, page.row = placed.runs, placed.checksum, placed.row
        if page is not draft:
            for other, _ in items:
                if other.parent is draft:
                    other.parent = page

    def acquire(self, info: CacheInfo, tokens: bytes, count: int) -> Handle | None:
        """A text's stored pages in memory, and frames for up to ``count`` pages in all; None if
        they do not fit.
        """
        with self.lock:
            self._drain()
            tree = self.tree(info)
            pages = self.match(tree, tokens)
            missing = [page for page in pages if page.data is None and page.loading is None]
            spare = self.memory.take(tree.layout, len(missing) + count - len(pages))
            if spare is None:
                self.unpin(pages)
                return None
            frames, spare = spare[: len(missing)], spare[len(missing) :]
            for page in missing:
                page.loading = Future()
            loading = [page.loading for page in pages if page.loading is not None]
        self._load(missing, frames)
        for future in loading:
            future.result()
        with self.lock:
            good = until(pages, lambda page: page.data is not None)
            self.unpin(pages[len(good) :])
            more = self.memory.take(tree.layout, count - len(good) - len(spare))
            if more is None:
                self.unpin(good)
                self.memory.give_back(spare)
                return None
            own = [page.data for page in good if page.data is not None]
            holding = Holding(tree.layout, good, own + spare + more)
            return Handle(self, holding, tree.status(tokens, good))

    def _load(self, pages: Sequence[Page], frames: Sequence[np.ndarray]) -> None:
        """Read pages from the disk; what is not as it was written is doomed."""

        def load(page: Page, frame: np.ndarray) -> None:
            is_read = False
            try:
                is_read = self.disk is not None and self.disk.read(page, frame)
            finally:
                with self.lock:
                    if is_read:
                        self.memory.hold(page, frame)
                    else:
                        self.memory.give_back([frame])
                        self.doom(page)
                    future, page.loading = page.loading, None
                assert future is not None
                future.set_result(is_read)

        if len(pages) < 2:
            for page, frame in zip(pages, frames, strict=True):
                load(page, frame)
            return
        list(self._reading().map(load, pages, frames))

    def read_ahead(self, pages: Sequence[Page]) -> Iterator[np.ndarray]:
        """Frames of pinned pages in order, ``READERS`` of them read at a time; ends before a page
        that is not as it was written, which is doomed.
        """

        def read(page: Page) -> np.ndarray | None:
            if page.data is not None:
                return page.data
            frame = page.tree.layout.new_frame()
            return frame if self.disk is not None and self.disk.read(page, frame) else None

        readers, left = self._reading(), iter(pages)
        ahead = deque((page, readers.submit(read, page)) for page in islice(left, READERS))
        try:
            while ahead:
                frame = ahead[0][1].result()
                if frame is None:
                    with self.lock:
                        self.doom(ahead[0][0])
                    return
                ahead.popleft()
                ahead.extend((page, readers.submit(read, page)) for page in islice(left, 1))
                yield frame
        finally:
            wait([future for _, future in ahead])

    def _reading(self) -> ThreadPoolExecutor:
        with self.lock:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(READERS, "ktk-kv-read")
            return self._readers

    def append(self, holding: Holding, tokens: bytes) -> int:
        self.check()
        start = time.perf_counter()
        first = len(holding.pages)
        if holding.columns and self.device is not None:
            for index in range(first, len(tokens) // (holding.layout.page_tokens * TOKEN_BYTES)):
                self.device.pages.read(holding.columns[index], holding.frames[index])
            self.observe("device_flush_back_time_ms", 1000 * (time.perf_counter() - start))
        with self.lock:
            self._drain()
            tree = self.tree(holding.layout.info)
            parent, added = holding.pages[-1] if holding.pages else tree.root, 0
            for index, draft in enumerate(tree.drafts(holding.pages, tokens), first):
                if parent.is_removed:  # deleted since the lookup
                    break
                draft.parent = parent
                page = tree.adopt(draft)
                if page is draft:
                    added += 1
                    self.memory.hold(page, holding.frames[index])
                    if holding.columns and self.device is not None:
                        self.device.hold(page, holding.columns[index])
                        page.column_pins += 1
                        holding.pinned_columns.append(page)
                page.pins += 1
                holding.pages.append(page)
                parent = page
            touch(holding.pages)
        if added:
            self.on_new()
        self.observe("append_tokens_time_ms", 1000 * (time.perf_counter() - start))
        return added

    def to_device(self, holding: Holding) -> bool:
        self.check()
        device = self.device
        if device is None or device.pages.layout.info != holding.layout.info:
            raise ValueError("the store has no device pages of this CacheInfo: give it some")
        with self.lock:
            self._drain()
            if holding.columns:
                return True
            pinned = [page for page in holding.pages if page.column is not None]
            for page in pinned:
                page.column_pins += 1
            new = device.take(len(holding.frames) - len(pinned))
            if new is None:
                for page in pinned:
                    page.column_pins -= 1
                return False
            has_column = set(pinned)
            known = [page if page in has_column else None for page in holding.pages]
            known += [None] * (len(holding.frames) - len(known))
            columns = [new.pop() if page is None else page.column for page in known]
            holding.columns = [column for column in columns if column is not None]
        for index, page in enumerate(holding.pages):
            if page not in has_column:
                device.pages.write(holding.columns[index], holding.frames[index])
        with self.lock:
            for index, page in enumerate(holding.pages):
                if page.column is None:
                    device.hold(page, holding.columns[index])
                    page.column_pins += 1
                    pinned.append(page)
            holding.pinned_columns = pinned
        return True

    def release(self, holding: Holding) -> None:
        with self.lock:
            if self.device is not None:
                self.device.give_back(holding.own_columns())
            for page in holding.pinned_columns:
                page.column_pins -= 1
            self.memory.give_back(holding.own_frames())
            self.unpin(holding.pages)

    def release_later(self, holding: Holding) -> None:
        self._returned.append(holding)

    def _drain(self) -> None:
        """Release what handles that were dropped have held."""
        while self._returned:
            self.release(self._returned.popleft())

    def close(self) -> None:
        """All that was used is written down, and the directory is free."""
        with self.saving:
            self.is_closed = True
            if self._readers is not None:
                self._readers.shutdown()
            if self.disk is not None:
                try:
                    self.bury()
                    if self.config.writes:
                        self.disk.use([page for page in self._used if page.place is not None])
                finally:
                    self.disk.close()

    def abandon(self) -> None:
        """In a forked child."""
        if self.disk is not None:
            self.disk.abandon()


def _may_leave_the_disk(page: Page, following: int) -> bool:
    return not following and not page.pins and page.place is not None


def until(pages: Sequence[Page], is_good: Callable[[Page], bool]) -> list[Page]:
    """The pages before the first that is not."""
    for count, page in enumerate(pages):
        if not is_good(page):
            return list(pages[:count])
    return list(pages)
