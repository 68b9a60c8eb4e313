"""The store against a dict: whatever is done in whatever order, what it finds is what was kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ktk.kv.prefix.device import TorchPages
from ktk.kv.prefix.handle import Handle
from ktk.kv.prefix.store import PrefixStore
from make import kv_store as kv
from make.kv_store import PAGE

INFOS = [kv.info(), kv.info("other", layers=12, kv_dtype="bfloat16")]  # 1 element a page, and 2
# Few different tokens and pages, so that texts share their beginnings.
texts = st.lists(st.integers(0, 1), max_size=6).map(
    lambda pages: np.repeat(np.array(pages, np.uint32), PAGE)
)
lengths = st.integers(0, PAGE - 1)
infos = st.sampled_from(INFOS)


class Against(RuleBasedStateMachine):
    """kept : (info, text) of every prefix that the store must have while nothing is evicted;
    saved : those that are on disk. Without limits, so that nothing is.
    """

    is_limited = False

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp())
        self.kept: set[tuple[str, bytes]] = set()
        self.saved: set[tuple[str, bytes]] = set()
        self.handles: list[tuple[Handle, np.ndarray]] = []
        self.open()

    def open(self) -> None:
        limits = {"memory_pool_size": 14 * kv.ELEMENT, "disk_limit": 12 * kv.ELEMENT}
        config = kv.config(self.path, evict_count=2, **(limits if self.is_limited else {}))
        self.store = PrefixStore(config, TorchPages(INFOS[0], PAGE, 8))

    def prefixes(self, info: kv.CacheInfo, ids: np.ndarray) -> list[tuple[str, bytes]]:
        ends = range(PAGE, len(ids) + 1, PAGE)
        return [(info.model_name, ids[:end].tobytes()) for end in ends]

    def expected(self, info: kv.CacheInfo, ids: np.ndarray, of: set[tuple[str, bytes]]) -> int:
        matched = [prefix in of for prefix in self.prefixes(info, ids)]
        return PAGE * (matched.index(False) if False in matched else len(matched))

    def check(self, length: int, info: kv.CacheInfo, ids: np.ndarray, on_disk: bool) -> None:
        # Of little memory pages go to the disk before anybody saves them.
        is_saved = on_disk and not self.is_limited
        most = self.expected(info, ids, self.saved if is_saved else self.kept)
        assert length <= most if self.is_limited else length == most

    @rule(info=infos, ids=texts)
    def insert(self, info: kv.CacheInfo, ids: np.ndarray) -> None:
        try:
            kv.insert(self.store, info, ids)
        except OSError:
            assert self.is_limited
        self.saved |= self.kept | set(self.prefixes(info, ids))
        self.kept |= self.saved

    @rule(info=infos, ids=texts)
    def read(self, info: kv.CacheInfo, ids: np.ndarray) -> None:
        self.check(kv.read(self.store, info, ids), info, ids, True)

    @rule(info=infos, ids=texts, more=lengths, on_device=st.booleans())
    def look_up(self, info: kv.CacheInfo, ids: np.ndarray, more: int, on_device: bool) -> None:
        ids = np.concatenate([ids, np.zeros(more, np.uint32)])
        on_device = on_device and info is INFOS[0]
        look = self.store.lookup_to_device if on_device else self.store.lookup
        handle = look(info, ids)
        if handle is None:
            assert self.is_limited or on_device
            return
        self.check(kv.assert_handle(info, ids, handle), info, ids, False)
        self.handles.append((handle, ids))

    @rule(info=infos, ids=texts)
    def generate(self, info: kv.CacheInfo, ids: np.ndarray) -> None:
        handle = self.store.lookup(info, ids)
        if handle is None:
            assert self.is_limited
            return
        handle.release()
        kv.generate(self.store, info, ids)
        self.kept |= set(self.prefixes(info, ids))

    @rule(info=infos, ids=texts)
    def delete(self, info: kv.CacheInfo, ids: np.ndarray) -> None:
        """Where the text parts from others on, and all that continues it."""
        self.store.delete(info, ids)
        at = self.expected(info, ids, self.kept) // PAGE
        page_bytes = 4 * PAGE

        def followed_by(prefix: bytes) -> set[bytes]:
            size = len(prefix) + page_bytes
            return {
                text
                for name, text in self.kept
                if name == info.model_name and len(text) == size and text.startswith(prefix)
            }

        whole = ids.tobytes()
        while at > 1 and len(followed_by(whole[: (at - 1) * page_bytes])) == 1:
            at -= 1
        if not at or self.is_limited:
            return
        top = whole[: at * page_bytes]
        for have in (self.kept, self.saved):
            have -= {p for p in have if p[0] == info.model_name and p[1].startswith(top)}

    @rule()
    def save(self) -> None:
        self.store.save()
        self.saved |= self.kept

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.handles) - 1))
        handle, _ = self.handles.pop(index)
        handle.release()

    @rule()
    def reopen(self) -> None:
        self.let_go()
        self.store.close()
        self.saved |= self.kept
        self.open()

    def let_go(self) -> None:
        for handle, _ in self.handles:
            handle.release()
        self.handles.clear()

    @invariant()
    def pages_are_counted(self) -> None:
        if not self.handles:
            assert kv.is_consistent(self.store)
        assert self.store.tiers.memory.used_bytes <= self.store.config.memory_pool_size
        if self.is_limited:
            size = (self.path / "pages.kvc").stat().st_size
            assert size <= (self.store.config.disk_limit or 0)

    @invariant()
    def handles_keep_their_pages(self) -> None:
        for handle, ids in self.handles:
            info = INFOS[handle.info.model_name == "other"]
            kv.assert_handle(info, ids, handle)

    def teardown(self) -> None:
        self.let_go()
        self.store.close()
        shutil.rmtree(self.path)


class AgainstLimited(Against):
    """Memory and disk are small: it may find less, never more, and never anything else."""

    is_limited = True


EXAMPLES = int(os.environ.get("EXAMPLES", 12))
TestUnlimited = Against.TestCase
TestLimited = AgainstLimited.TestCase
TestUnlimited.settings = TestLimited.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=25, deadline=None, derandomize=True
)
