"""The disk tier: a directory with the file of pages, the database, and nothing else.

Pages are written before the rows that name them, and rows are deleted before their elements are
written again, each time with a sync between. So a crash at any moment leaves pages that are whole,
or none; a checksum that each read compares guards against what disks do by themselves.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ktk.errors import CheckpointError
from ktk.kv.prefix.config import CacheInfo, PageLayout
from ktk.kv.prefix.elements import ElementFile, FreeElements, Runs
from ktk.kv.prefix.hashing import checksum
from ktk.kv.prefix.metadata import Metadata, Row, row_digest
from ktk.kv.prefix.tree import Page, PrefixTree, use_after
from ktk.log import logger, warn_once

PAGES, DATABASE = "pages.kvc", "pages.sqlite"
BATCH = 32  # pages between two syncs: a crash loses those that no sync has followed
_NO_LIMIT = 1 << 40  # elements


@dataclass(frozen=True)
class Placed:
    """Where a page lies on disk from now on."""

    page: Page
    runs: Runs
    checksum: bytes
    row: int


class DiskTier:
    """One process's own directory. Reads come from any thread; all else from one at a time."""

    def __init__(self, directory: Path, element_bytes: int, limit: int | None) -> None:
        """limit : bytes of the file of pages. Raises CheckpointError, OSError; BlockingIOError if
        another store has the directory, here or in another process.
        """
        self.directory, self.element_bytes = directory, element_bytes
        self._limit = _NO_LIMIT if limit is None else limit // element_bytes
        self._free = FreeElements(self._limit, [(0, 1)])
        self._info_ids: dict[CacheInfo, int] = {}
        self._graves: list[Page] = []  # no row any more, but a reader
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            self._lock = _lock(directory)
            stack.callback(os.close, self._lock)
            path, database = directory / PAGES, directory / DATABASE
            if not path.exists():
                if database.exists():
                    raise CheckpointError(
                        f"{path}: missing, though {DATABASE} is there: delete the directory"
                    )
                ElementFile.create(path, element_bytes)
            self._elements = ElementFile(path, element_bytes)
            stack.callback(self._elements.close)
            self._metadata = Metadata(database, self._elements.origin)
            stack.callback(self._metadata.close)
            self._finalizer = weakref.finalize(self, stack.pop_all().close)

    @property
    def origin(self) -> bytes:
        """Names this store, 16 bytes."""
        return self._elements.origin

    @property
    def is_direct(self) -> bool:
        """Whether reads and writes go past the page cache."""
        return self._elements.is_direct

    @property
    def used_bytes(self) -> int:
        """Of pages and the file's head."""
        return (self._limit - self._free.count) * self.element_bytes

    @property
    def free_elements(self) -> int:
        return self._free.count

    def close(self) -> None:
        self._finalizer()

    def abandon(self) -> None:
        """In a forked child: leave all to the parent, of whose files it has only copies."""
        if self._finalizer.detach() is not None:
            self._metadata.abandon()
            self._elements.close()
            os.close(self._lock)

    def load(self, tree_of: Callable[[CacheInfo], PrefixTree]) -> list[int]:
        """Put every page into its tree, without data; returns ids of rows that tell no page.

        Those are of pages that the file or the limit has no room for, and those whose digest is
        another: what they would say of is unknown.
        """
        infos = self._metadata.infos()
        self._info_ids = {info: number for number, info in infos.items()}
        trees = {number: tree_of(info) for number, info in infos.items()}
        parents = {(number, 0): tree.root for number, tree in trees.items()}
        taken = np.zeros(min(self._elements.num_elements, self._limit), bool)
        taken[0] = True
        bad, runs, latest = list[int](), [(0, 1)], 0
        for number, row in self._metadata.rows():
            parent = None if row is None else parents.get((row.info, row.parent))
            page = None
            if row is not None and parent is not None and row.depth == parent.index + 1:
                page = _page_of(row, parent, taken)
            if row is None or page is None:
                bad.append(number)
                continue
            runs += row.runs
            parents[row.info, row.id] = page
            latest = max(latest, page.used)
        use_after(latest)
        self._free = FreeElements(self._limit, runs)
        if bad:
            logger.warning(
                "%s: %d pages are forgotten: their rows or the file are damaged, or the limit is "
                "lower than it was",
                self.directory,
                len(bad),
            )
        return bad

    def read(self, page: Page, frame: np.ndarray) -> bool:
        """Fill a frame, uint8 (frame_bytes,); False if what the disk has is not the page."""
        assert page.place is not None
        try:
            self._elements.read(page.place, frame)
            reason = "its checksum is another"
        except CheckpointError as error:
            reason = str(error)
        else:
            if checksum(frame) == page.checksum:
                return True
        warn_once(
            f"kv-page {self.directory}",
            "%s: a page is forgotten, and others as it: %s",
            self.directory,
            reason,
        )
        return False

    def write(self, pages: Sequence[tuple[Page, np.ndarray]]) -> Iterator[list[Placed]]:
        """Write pages and their frames, parents first, as far as there is room; yields those that
        are on disk to stay.

        Between two yields the caller writes down where they lie. Raises OSError, after which the
        pages not yet yielded are not there.
        """
        left = list(pages)
        while left:
            batch, taken = list[tuple[Page, np.ndarray, Runs]](), list[Runs]()
            try:
                for page, frame in left[:BATCH]:
                    runs = self._free.take(page.tree.layout.num_elements)
                    if runs is None:
                        break
                    taken.append(runs)
                    self._elements.write(runs, frame)
                    batch.append((page, frame, runs))
                placed = self._commit(batch) if batch else []
            except BaseException:
                for runs in taken:
                    self._free.give_back(runs)
                raise
            if not placed:
                return
            left = left[len(placed) :]
            yield placed

    def _commit(self, batch: Sequence[tuple[Page, np.ndarray, Runs]]) -> list[Placed]:
        sums = [checksum(frame) for _, frame, _ in batch]
        self._elements.sync()
        placed, rows, infos = list[Placed](), dict[Page, int](), dict[CacheInfo, int]()
        with self._metadata.transaction():
            for (page, _, runs), own in zip(batch, sums, strict=True):
                info, parent = page.tree.info, page.parent
                if info not in self._info_ids:
                    infos[info] = self._metadata.add_info(info)
                assert parent is not None
                row = Row(
                    0,
                    {**self._info_ids, **infos}[info],
                    rows.get(parent, parent.row),
                    page.index,
                    page.hash,
                    page.tokens,
                    runs,
                    own,
                    row_digest(page.chain, page.hash, runs, own),
                    page.used,
                )
                rows[page] = self._metadata.add(row)
                placed.append(Placed(page, runs, own, rows[page]))
        self._info_ids.update(infos)
        return placed

    def forget(self, pages: Sequence[Page], rows: Sequence[int] = ()) -> None:
        """Delete removed pages and other rows; a page that is pinned keeps its elements so long."""
        if pages or rows:
            with self._metadata.transaction():
                self._metadata.delete([*(page.row for page in pages), *rows])
        waiting = [*self._graves, *pages]
        self._graves = [page for page in waiting if page.pins]
        for page in waiting:
            if not page.pins and page.place is not None:
                self._free.give_back(page.place)
                page.place = None
        self._elements.shrink(self._free.end)

    def use(self, pages: Sequence[Page]) -> None:
        """Write down when pages were used."""
        if pages:
            with self._metadata.transaction():
                self._metadata.use((page.used, page.row) for page in pages)


def _page_of(row: Row, parent: Page, taken: np.ndarray) -> Page | None:
    """The page that a row tells of, put into the tree; None if the row or the file is damaged.

    taken : bool (elements of the file,), those of other pages; the page's own are marked.
    """
    tree = parent.tree
    layout: PageLayout = tree.layout
    if len(row.tokens) != tree.page_bytes or len(row.checksum) != 16:
        return None
    if sum(count for _, count in row.runs) != layout.num_elements:
        return None
    for first, count in row.runs:
        if first < 0 or count < 1 or first + count > len(taken):
            return None
        if taken[first : first + count].any():
            return None
    page = tree.grow(parent, row.tokens, row.hash)
    if page is None:
        return None
    if row_digest(page.chain, row.hash, row.runs, row.checksum) != row.digest:
        tree.remove(page)
        return None
    for first, count in row.runs:
        taken[first : first + count] = True
    page.place, page.checksum, page.row = row.runs, row.checksum, row.id
    page.used = row.used if 0 < row.used < 1 << 62 else 0  # no digest tells whether it is right
    return page


def _lock(directory: Path) -> int:
    """Hold a directory for this process, however it ends; returns the lock's descriptor."""
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise BlockingIOError(
            f"{directory}: another process, or another store of this one, has it open: close that, "
            "or give another path"
        ) from None
    except OSError:  # a file system without locks: SQLite's own refuses
        pass
    return fd
