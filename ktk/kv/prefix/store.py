"""The store as callers have it: kvc2's operations under kvc2's names."""

from __future__ import annotations

import errno
import threading
import time
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch

from ktk import fork
from ktk.kv.prefix.blocks import LayerData, checked
from ktk.kv.prefix.config import TOKEN_BYTES, CacheInfo, StoreConfig
from ktk.kv.prefix.device import DevicePages
from ktk.kv.prefix.disk import BATCH
from ktk.kv.prefix.flush import Flusher
from ktk.kv.prefix.handle import Handle
from ktk.kv.prefix.tiers import Tiers
from ktk.kv.prefix.tree import Page, token_bytes

INSERT_BYTES = 64 << 20  # of frames that one insertion fills before they are written

_open: weakref.WeakSet[Tiers] = weakref.WeakSet()


@dataclass(frozen=True)
class Usage:
    """pages : known, in all; own_pages : of one CacheInfo. elements : of pages on the disk, and
    disk_bytes : of their file, at most limit_bytes. path : of the store's directory.
    """

    pages: int
    own_pages: int
    elements: int
    disk_bytes: int
    limit_bytes: int | None
    path: str | None


class PrefixStore:
    """Keys and values of texts seen before. Safe to use from several threads, not after a fork.

    config : see StoreConfig. device : pages for lookup_to_device. Raises ValueError;
    CheckpointError if the directory holds something else or is damaged beyond use; BlockingIOError
    if another store has it open; OSError.
    """

    def __init__(self, config: StoreConfig, device: DevicePages | None = None) -> None:
        if device is not None and device.layout.page_tokens != config.num_token_per_page:
            raise ValueError(
                f"device: pages of {device.layout.page_tokens} tokens, num_token_per_page="
                f"{config.num_token_per_page}: must be the same"
            )
        self.config = config
        self._tiers = Tiers(config, device)
        self._is_loaded = False
        self._flusher: Flusher | None = None
        try:
            pages = self.load()
            if pages and not config.load_from_disk:
                raise ValueError(
                    f"load_from_disk=False, and {config.path} has {pages} pages: give an empty "
                    "directory"
                )
        except BaseException:
            self._tiers.close()
            raise
        if config.writes and config.flush_seconds is not None:
            self._flusher = Flusher(self.save, config.flush_seconds)
            self._tiers.on_new = self._flusher.wake
        _open.add(self._tiers)

    @property
    def tiers(self) -> Tiers:
        """What metrics look at."""
        return self._tiers

    def load(self) -> int:
        """Read what the disk has, unless that is done; returns the number of pages known.

        Making a store does it.
        """
        tiers = self._tiers
        tiers.check()
        with tiers.saving, tiers.lock:
            if tiers.disk is not None and not self._is_loaded:
                bad = tiers.disk.load(tiers.tree)
                if self.config.writes:
                    tiers.disk.forget([], bad)
            self._is_loaded = True
            return sum(map(len, tiers.trees.values()))

    def save(self) -> int:
        """Write all pages that the disk does not have yet; they are there to stay when it returns.

        Returns how many were written. Where disk_limit leaves no room, pages used longest ago are
        forgotten; what still does not fit stays in memory only. Raises OSError, CheckpointError.
        """
        tiers = self._tiers
        tiers.check()
        if not self.config.writes:
            return 0
        start = time.perf_counter()
        with tiers.saving:
            with tiers.lock:
                new = sorted(tiers.memory.dirty(), key=lambda page: page.index)
                for page in new:
                    page.pins += 1
                items = [(page, page.data) for page in new if page.data is not None]
                items = _after_their_parents(items)
            try:
                written = tiers.write(items)
                with tiers.lock:
                    for page in new:
                        page.is_volatile = page.place is None
            finally:
                with tiers.lock:
                    tiers.unpin(new)
        if new:
            self._observe("cpu_flush_back_time_ms", start)
        return written

    def raw_insert(
        self, info: CacheInfo, ids: Any, k_cache: LayerData, v_cache: LayerData = ()
    ) -> int:
        """Write a text's whole pages to the disk, those that are not there yet.

        ids : tokens (length,). k_cache, v_cache : [layer][page] -> (page_tokens, num_heads, width)
        of kv_dtype or as bytes, C-contiguous arrays or CPU tensors. Returns how many tokens of the
        text are on the disk, to stay. Raises ValueError; OSError if the disk or disk_limit has no
        room.
        """
        tokens = token_bytes(ids)
        page_tokens = self.config.num_token_per_page
        whole = len(tokens) // (page_tokens * TOKEN_BYTES)
        with self._tiers.lock:
            layout = self._tiers.tree(info).layout
        blocks = checked(layout, k_cache, v_cache, whole)

        def fill(index: int, frame: np.ndarray) -> bool:
            for parts, views in zip(layout.parts(frame), blocks[index], strict=True):
                for part, view in zip(parts, views, strict=True):
                    part.reshape(-1)[:] = view
            return True

        inserted = self.insert_pages(info, ids, fill)
        if inserted < whole * page_tokens:
            raise OSError(
                errno.ENOSPC,
                f"{self.config.path}: {whole - inserted // page_tokens} of {whole} pages do not "
                f"fit into disk_limit={self.config.disk_limit}: give more",
            )
        return inserted

    def insert_pages(
        self, info: CacheInfo, ids: Any, fill: Callable[[int, np.ndarray], bool]
    ) -> int:
        """``raw_insert`` of pages that are made when they are written, some at a time.

        fill : (index of a page, its frame, uint8 (frame_bytes,)) -> whether it could be filled; a
        page that could not, and those behind it, are left out. Returns how many tokens of the text
        are on the disk, to stay: fewer where disk_limit has no room. Raises ValueError,
        CheckpointError; OSError if the disk has no room.
        """
        tiers, tokens, start = self._tiers, token_bytes(ids), time.perf_counter()
        tiers.check()
        if not self.config.writes:
            raise ValueError("writing to the disk needs a path and save_to_disk")
        with tiers.lock:
            tree = tiers.tree(info)
        at_once = max(1, min(BATCH, INSERT_BYTES // tree.layout.frame_bytes))
        with tiers.saving:
            self.save()
            while True:
                with tiers.lock:
                    matched = tiers.match(tree, tokens, on_disk=True)
                    drafts = tree.drafts(matched, tokens)[:at_once]
                try:
                    items = list[tuple[Page, np.ndarray]]()
                    for index, draft in enumerate(drafts, len(matched)):
                        frame = tree.layout.new_frame()
                        if not fill(index, frame):
                            break
                        items.append((draft, frame))
                    written = tiers.write(items) if items else 0
                finally:
                    with tiers.lock:
                        tiers.unpin(matched)
                if written < at_once:
                    self._observe("raw_insert_time_ms", start)
                    return (len(matched) + written) * tree.layout.page_tokens

    def usage(self, info: CacheInfo) -> Usage:
        """What the store holds now."""
        tiers = self._tiers
        with tiers.lock:
            pages = {key: len(tree) for key, tree in tiers.trees.items()}
        used = 0 if tiers.disk is None else tiers.disk.used_bytes
        elements = max(0, used // self.config.element_bytes - 1)  # without the file's head
        limit = self.config.disk_limit
        path = None if self.config.path is None else str(self.config.path)
        return Usage(sum(pages.values()), pages.get(info, 0), elements, used, limit, path)

    def stored_length(self, info: CacheInfo, ids: Any) -> int:
        """Tokens of whole pages that a text begins with and that are stored. Reads nothing."""
        tiers, tokens = self._tiers, token_bytes(ids)
        tiers.check()
        page_tokens = self.config.num_token_per_page
        with tiers.lock:
            matched = len(tiers.tree(info).match(tokens)) * page_tokens
        self._observe_match(matched, len(tokens) // TOKEN_BYTES)
        return matched

    def read_pages(
        self, info: CacheInfo, ids: Any, first: int = 0
    ) -> Generator[np.ndarray, None, None]:
        """Frames of a text's stored pages from page ``first`` on, some read ahead, in order.

        Each is uint8 (frame_bytes,), to be read only, and until the next is asked for. Past memory,
        except what lies there. Ends before a page that is not as it was written, which is
        forgotten.
        """
        tiers, tokens, start = self._tiers, token_bytes(ids), time.perf_counter()
        tiers.check()
        with tiers.lock:
            pages = tiers.match(tiers.tree(info), tokens)
        try:
            yield from tiers.read_ahead(pages[first:])
        finally:
            with tiers.lock:
                tiers.unpin(pages)
            self._observe("lookup_time_ms", start)

    def raw_read(
        self, info: CacheInfo, ids: Any, k_cache: LayerData, v_cache: LayerData = ()
    ) -> int:
        """Read a text's stored pages from the disk, past memory; returns the tokens matched.

        ids, k_cache, v_cache : as in ``raw_insert``; pages of that many tokens are written to the
        caches. Raises ValueError.
        """
        tiers, tokens = self._tiers, token_bytes(ids)
        tiers.check()
        with tiers.lock:
            tree = tiers.tree(info)
            pages = tiers.match(tree, tokens, on_disk=True)
        count = 0
        try:
            blocks = checked(tree.layout, k_cache, v_cache, len(pages))
            frame = tree.layout.new_frame()
            for page, own in zip(pages, blocks, strict=True):
                if tiers.disk is None or not tiers.disk.read(page, frame):
                    with tiers.lock:
                        tiers.doom(page)
                    break
                for parts, views in zip(tree.layout.parts(frame), own, strict=True):
                    for part, view in zip(parts, views, strict=True):
                        view[:] = part.reshape(-1)
                count += 1
        finally:
            with tiers.lock:
                tiers.unpin(pages)
        return count * tree.layout.page_tokens

    def lookup(self, info: CacheInfo, ids: Any, estimated_length: int = 0) -> Handle | None:
        """Find a text's stored beginning and bring it to memory.

        ids : tokens (length,). estimated_length : tokens that the text may grow to; the handle has
        room for their pages. Returns None if memory is full of pages that are in use; a handle of
        matched_length 0 if nothing is found.
        """
        tiers, tokens, start = self._tiers, token_bytes(ids), time.perf_counter()
        tiers.check()
        page_tokens = self.config.num_token_per_page
        length = len(tokens) // TOKEN_BYTES
        count = -(-max(estimated_length, length) // page_tokens)
        handle = tiers.acquire(info, tokens, count)
        if handle is None and self.config.writes:
            self.save()  # what is saved may leave memory
            handle = tiers.acquire(info, tokens, count)
        if handle is not None:
            self._observe("lookup_time_ms", start)
            self._observe_match(handle.matched_length(), length)
        return handle

    def lookup_to_device(
        self, info: CacheInfo, ids: Any, estimated_length: int = 0
    ) -> Handle | None:
        """``lookup``, and its pages on the device; None if memory or the device is full."""
        handle = self.lookup(info, ids, estimated_length)
        if handle is None:
            return None
        try:
            if handle.to_device():
                return handle
        except BaseException:
            handle.release()
            raise
        handle.release()
        return None

    def lookup_to_device_async(
        self,
        info: CacheInfo,
        ids: Any,
        estimated_length: int,
        call_back: Callable[[Handle | Exception | None], None],
    ) -> threading.Thread:
        """``lookup_to_device`` in a thread, which hands its result, or what it raised, to
        ``call_back``.
        """
        self._tiers.check()

        def run() -> None:
            found: Handle | Exception | None
            try:
                found = self.lookup_to_device(info, ids, estimated_length)
            except Exception as error:
                found = error
            call_back(found)

        thread = threading.Thread(target=run, name="ktk-kv-lookup")
        thread.start()
        return thread

    def get_kvcache(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The device's keys and values, as ``DevicePages.get_kvcache``. Raises ValueError."""
        if self._tiers.device is None:
            raise ValueError("the store has no device pages: give it some")
        return self._tiers.device.pages.get_kvcache()

    def delete(self, info: CacheInfo, ids: Any = None) -> int:
        """Forget a text: its stored pages from where it parts from all others on, and whatever
        continues it. ids : tokens (length,); None: all of ``info``.

        It is found no longer, also after a crash, when this returns; live handles keep their pages.
        Returns the number of pages. Raises ValueError, OSError, CheckpointError.
        """
        tiers = self._tiers
        tiers.check()
        with tiers.saving:
            with tiers.lock:
                tree = tiers.tree(info)
                if ids is None:
                    tops = list(tree.root.children)
                else:
                    tops = _tops(tree.match(token_bytes(ids)))
                gone = [page for top in tops for page in tiers.doom(top)]
            tiers.bury()
        return len(gone)

    def close(self) -> None:
        """Save, and leave the directory to others. Without effect in a forked child, or again."""
        tiers = self._tiers
        if tiers.is_closed or not tiers.is_own:
            return
        if self._flusher is not None:
            self._flusher.stop()
        try:
            self.save()
        finally:
            tiers.close()

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _observe_match(self, matched: int, length: int) -> None:
        page_tokens = self.config.num_token_per_page
        whole = length // page_tokens * page_tokens
        self._tiers.observe("lookup_prefixmatch_length", matched)
        self._tiers.observe("matched_length_percentage", 100 * matched / whole if whole else 0)

    def _observe(self, name: str, start: float) -> None:
        self._tiers.observe(name, 1000 * (time.perf_counter() - start))


def _after_their_parents(items: list[tuple[Page, np.ndarray]]) -> list[tuple[Page, np.ndarray]]:
    """Those whose parents are on the disk or among them. items : by index."""
    found = dict[Page, np.ndarray]()
    for page, frame in items:
        parent = page.parent
        assert parent is not None
        if parent.index < 0 or parent.place is not None or parent in found:
            found[page] = frame
    return list(found.items())


def _tops(pages: list[Page]) -> list[Page]:
    """Of a text's pages the first that leads to no other text."""
    top = pages[-1:]
    while top and (parent := top[0].parent) is not None and len(parent.children) == 1:
        if parent.index < 0:
            break
        top = [parent]
    return top


@fork.in_child
def _abandon() -> None:
    for tiers in _open:
        tiers.abandon()
