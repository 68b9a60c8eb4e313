"""What a lookup gives: pages of a text that stay in memory until the handle is released, and room
for those to come.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np

from ktk.kv.prefix.config import TOKEN_BYTES, CacheInfo, PageLayout
from ktk.kv.prefix.tree import MatchStatus, Page, token_bytes


class Holding:
    """What a handle holds. pages : of the tree, pinned. frames : of all its pages, those of
    ``pages`` first, unless a page got into the tree by another handle, too. columns : likewise.
    """

    def __init__(self, layout: PageLayout, pages: list[Page], frames: list[np.ndarray]) -> None:
        self.layout, self.pages, self.frames = layout, pages, frames
        self.columns: list[int] = []
        self.pinned_columns: list[Page] = []

    def own_frames(self) -> list[np.ndarray]:
        """Frames that are no page's."""
        of_pages = {id(page.data) for page in self.pages}
        return [frame for frame in self.frames if id(frame) not in of_pages]

    def own_columns(self) -> list[int]:
        """Columns that are no page's."""
        of_pages = {page.column for page in self.pinned_columns}
        return [column for column in self.columns if column not in of_pages]


class HandleStore(ABC):
    """What a handle asks of its store."""

    @abstractmethod
    def append(self, holding: Holding, tokens: bytes) -> int:
        """Make pages of the tokens' whole pages that are none yet; how many."""

    @abstractmethod
    def to_device(self, holding: Holding) -> bool:
        """Copy the pages to the device, with room for those to come."""

    @abstractmethod
    def release(self, holding: Holding) -> None:
        """Unpin all."""

    @abstractmethod
    def release_later(self, holding: Holding) -> None:
        """The same, by the next call; from wherever Python collects garbage."""


class Handle:
    """A text's stored beginning. Release it, by ``release``, ``with`` or by dropping it."""

    def __init__(self, store: HandleStore, holding: Holding, status: list[MatchStatus]) -> None:
        self._store, self._holding = store, holding
        self._status = status
        self._matched = len(holding.pages)
        self._finalizer = weakref.finalize(self, store.release_later, holding)

    @property
    def info(self) -> CacheInfo:
        """Whose pages these are."""
        return self._holding.layout.info

    def matched_length(self) -> int:
        """Tokens of whole pages that were found."""
        return self._matched * self._holding.layout.page_tokens

    def matched_status(self) -> list[MatchStatus]:
        """Of each page of the text that was looked up, and of the tokens left."""
        return self._status

    def handle_data(self, is_key_cache: bool) -> list[list[np.ndarray]]:
        """[layer][page] -> a layer's keys or values of a page: views, uint8 (page_tokens, bytes of
        a token).

        The first matched_length tokens' pages are to be read only; the others, up to
        estimated_length, are the caller's to write, until ``append_tokens`` tells their tokens.
        Views are not to be used once the handle is released.
        """
        layout, frames = self._holding.layout, self._frames()
        return [
            [layout.part(frame, layer, is_key_cache) for frame in frames]
            for layer in range(layout.info.shape.num_layers)
        ]

    def append_tokens(self, ids: Any) -> int:
        """Keep the pages of tokens that were generated; returns how many tokens more are kept.

        ids : all tokens of the text so far whose keys and values are in the pages, on the device if
        the handle is there; an incomplete last page waits for the next call. Raises ValueError if
        they are not a continuation, or more than estimated_length.
        """
        tokens, frames = token_bytes(ids), self._frames()
        layout = self._holding.layout
        known = b"".join(page.tokens for page in self._holding.pages)
        if not tokens.startswith(known):
            raise ValueError(
                f"ids: must begin with the {len(self._holding.pages) * layout.page_tokens} tokens "
                "whose pages the handle has"
            )
        length, room = len(tokens) // TOKEN_BYTES, len(frames) * layout.page_tokens
        if length > room:
            raise ValueError(
                f"ids: {length} tokens, the handle has room for {room}: look up with a larger "
                "estimated_length"
            )
        return self._store.append(self._holding, tokens) * layout.page_tokens

    def to_device(self) -> bool:
        """Copy the pages to the device, and take columns for those to come; False if it is full.

        Raises ValueError if the store has no device, or one of another CacheInfo.
        """
        self._frames()
        return self._store.to_device(self._holding)

    def to_device_async(self, call_back: Callable[[bool], None]) -> threading.Thread:
        """``to_device`` in a thread, which hands its result to ``call_back``."""
        self._frames()
        thread = threading.Thread(target=lambda: call_back(self.to_device()), name="ktk-kv-device")
        thread.start()
        return thread

    def get_device_block_idx(self) -> list[int]:
        """The pages' columns on the device, those to come among them; empty before to_device."""
        self._frames()
        return list(self._holding.columns)

    def release(self) -> None:
        """Let the pages go; a second call does nothing."""
        if self._finalizer.detach() is not None:
            self._store.release(self._holding)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _frames(self) -> list[np.ndarray]:
        if not self._finalizer.alive:
            raise ValueError("the handle was released: look up again")
        return self._holding.frames
