"""What leaves memory and the disk for room, what stays, and what a disk that fails leaves."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import numpy as np
import pytest

from ktk.kv.prefix import disk, elements
from ktk.kv.prefix.disk import PAGES
from ktk.kv.prefix.elements import FreeElements
from ktk.kv.prefix.store import PrefixStore
from make import kv_store as kv
from make.kv_store import ELEMENT, PAGE

RNG = np.random.default_rng(3)
INFO = kv.info()


def test_memory_lets_pages_go_that_were_used_longest_ago_some_at_a_time(tmp_path: Path) -> None:
    texts = [kv.tokens(RNG, 2) for _ in range(6)]
    config = kv.config(tmp_path, memory_pool_size=10 * ELEMENT, evict_count=3)
    with PrefixStore(config) as store:
        for ids in texts[:5]:
            kv.insert(store, INFO, ids)
            kv.found(store, INFO, ids)
        kv.found(store, INFO, texts[0])
        memory = store.tiers.memory
        assert (len(memory), memory.evictions) == (10, 0)
        kv.insert(store, INFO, texts[5])
        kv.found(store, INFO, texts[5])  # two are needed, three leave
        assert (len(memory), memory.evictions) == (9, 3)
        in_memory = {page.tokens for page in store.tiers.pages() if page.data is not None}
        pages = [ids[:PAGE].tobytes() in in_memory for ids in texts]
        assert pages == [True, False, True, True, True, True]
        assert texts[2][PAGE:].tobytes() not in in_memory  # leaves go before what they follow
        assert [kv.found(store, INFO, ids) for ids in texts] == [2 * PAGE] * 6
        assert kv.is_consistent(store)


def test_pages_of_live_handles_stay_and_a_full_pool_gives_none(tmp_path: Path) -> None:
    first, second = kv.tokens(RNG, 3), kv.tokens(RNG, 3)
    with PrefixStore(kv.config(tmp_path, memory_pool_size=5 * ELEMENT)) as store:
        kv.insert(store, INFO, first)
        kv.insert(store, INFO, second)
        handle = store.lookup(INFO, first)
        assert store.lookup(INFO, second) is None
        assert kv.found(store, INFO, second[: 2 * PAGE]) == 2 * PAGE
        assert kv.assert_handle(INFO, first, handle) == 3 * PAGE
        del handle
        gc.collect()
        assert kv.found(store, INFO, second) == 3 * PAGE
        assert kv.is_consistent(store)


def test_new_pages_are_saved_when_memory_is_full_of_them(tmp_path: Path) -> None:
    texts = [kv.tokens(RNG, 3) for _ in range(4)]
    with PrefixStore(kv.config(tmp_path, memory_pool_size=4 * ELEMENT)) as store:
        for ids in texts:
            assert kv.generate(store, INFO, ids) == 3 * PAGE
        assert [kv.found(store, INFO, ids) for ids in texts] == [3 * PAGE] * 4


def test_without_a_disk_memory_forgets_leaves_first() -> None:
    texts = [kv.tokens(RNG, 3) for _ in range(4)]
    with PrefixStore(kv.config(None, memory_pool_size=8 * ELEMENT, evict_count=1)) as store:
        for ids in texts:
            kv.generate(store, INFO, ids)
            assert kv.found(store, INFO, ids) == 3 * PAGE
        left = {page.tokens for page in store.tiers.pages()}
        own = [[text[i : i + PAGE].tobytes() in left for i in (0, 4, 8)] for text in texts]
        assert own == [[False] * 3, [True, True, False], [True] * 3, [True] * 3]
        assert store.save() == 0 and kv.is_consistent(store)
        with pytest.raises(ValueError, match="needs a path"):
            kv.insert(store, INFO, texts[0])


def test_the_disk_forgets_what_was_used_longest_ago(tmp_path: Path) -> None:
    texts = [kv.tokens(RNG, 3) for _ in range(4)]
    limit = 10 * ELEMENT  # the head, and three texts
    with PrefixStore(kv.config(tmp_path, disk_limit=limit)) as store:
        for ids in texts[:3]:
            kv.insert(store, INFO, ids)
        assert kv.found(store, INFO, texts[0]) == 3 * PAGE
    with PrefixStore(kv.config(tmp_path, disk_limit=limit)) as store:  # which it remembers
        kv.insert(store, INFO, texts[3][: 2 * PAGE])
        found = [kv.read(store, INFO, ids) // PAGE for ids in texts]
        assert found == [3, 1, 3, 2]
        assert (tmp_path / PAGES).stat().st_size == limit
        with pytest.raises(OSError, match="3 of 12 pages do not fit") as error:
            kv.insert(store, INFO, kv.tokens(RNG, 12))
        assert error.value.errno == errno.ENOSPC
        assert kv.is_consistent(store)


def test_what_never_fits_the_disk_stays_in_memory_until_that_is_full(tmp_path: Path) -> None:
    ids = kv.tokens(RNG, 6)
    config = kv.config(tmp_path, disk_limit=4 * ELEMENT, memory_pool_size=8 * ELEMENT)
    with PrefixStore(config) as store:
        kv.generate(store, INFO, ids)
        assert store.save() == 3 and store.save() == 0
        assert kv.found(store, INFO, ids) == 6 * PAGE and kv.read(store, INFO, ids) == 3 * PAGE
        other = kv.tokens(RNG, 8)
        assert kv.found(store, INFO, other) == 0
        assert kv.found(store, INFO, ids) == 3 * PAGE
        assert kv.is_consistent(store)


def test_what_follows_an_unsaved_page_is_not_saved_either(tmp_path: Path) -> None:
    ids = kv.tokens(RNG, 5)
    with PrefixStore(kv.config(tmp_path, disk_limit=5 * ELEMENT)) as store:
        other = kv.tokens(RNG, 2)
        kv.insert(store, INFO, other)
        with store.lookup(INFO, other) or kv.pytest_fails():  # it has half of the disk
            kv.generate(store, INFO, ids[: 3 * PAGE])
            assert store.save() == 2
        store.delete(INFO, other)
        kv.generate(store, INFO, ids)
        assert store.save() == 0
        assert kv.found(store, INFO, ids) == 5 * PAGE
    with PrefixStore(kv.config(tmp_path)) as store:
        assert store.load() == 2 and kv.read(store, INFO, ids) == 2 * PAGE


def test_pages_of_live_handles_stay_on_the_disk(tmp_path: Path) -> None:
    ids, other = kv.tokens(RNG, 2), kv.tokens(RNG, 2)
    with PrefixStore(kv.config(tmp_path, disk_limit=5 * ELEMENT)) as store:
        kv.insert(store, INFO, ids)
        with store.lookup(INFO, ids) or kv.pytest_fails():
            kv.insert(store, INFO, other)
            with pytest.raises(OSError, match="1 of 3 pages do not fit"):
                kv.insert(store, INFO, kv.tokens(RNG, 3))
            assert kv.read(store, INFO, ids) == 2 * PAGE and kv.read(store, INFO, other) == 0


def test_a_page_that_comes_to_memory_while_it_is_inserted_is_one_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = kv.tokens(RNG, 3)
    monkeypatch.setattr(disk, "BATCH", 1)
    with PrefixStore(kv.config(tmp_path)) as store:
        real = elements.ElementFile.sync

        def generate_meanwhile(self: elements.ElementFile) -> None:
            monkeypatch.setattr(elements.ElementFile, "sync", real)
            kv.generate(store, INFO, ids[: 2 * PAGE])
            real(self)

        monkeypatch.setattr(elements.ElementFile, "sync", generate_meanwhile)
        assert kv.insert(store, INFO, ids) == 3 * PAGE
        assert store.load() == 3 and store.save() == 0 and kv.is_consistent(store)
    with PrefixStore(kv.config(tmp_path)) as store:
        assert kv.read(store, INFO, ids) == 3 * PAGE


def test_a_full_disk_is_an_error_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, later = kv.tokens(RNG, 3), kv.tokens(RNG, 3)
    with PrefixStore(kv.config(tmp_path)) as store:
        kv.insert(store, INFO, ids)
        kv.generate(store, INFO, later)

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(elements.os, "pwrite", full)
            with pytest.raises(OSError, match="No space left"):
                store.save()
            assert kv.found(store, INFO, later) == 3 * PAGE
            assert kv.is_consistent(store)
        assert store.save() == 3
        assert kv.read(store, INFO, later) == kv.read(store, INFO, ids) == 3 * PAGE


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, info = os.pwrite, kv.info(layers=32)  # a page of three elements
    monkeypatch.setattr(elements.os, "pwrite", lambda fd, data, at: real(fd, data[:4096], at))
    ids = kv.tokens(RNG, 3)
    with PrefixStore(kv.config(tmp_path)) as store:
        kv.insert(store, info, ids)
        assert kv.read(store, info, ids) == 3 * PAGE


@pytest.mark.parametrize("is_direct", [True, False])
def test_a_file_system_without_o_direct_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_direct: bool
) -> None:
    real = os.open

    def refuse(path: object, flags: int, *rest: int, **named: int) -> int:
        if flags & os.O_DIRECT and not is_direct:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return real(path, flags, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(elements.os, "open", refuse)
    with PrefixStore(kv.config(tmp_path)) as store:
        ids = kv.tokens(RNG, 3)
        kv.insert(store, INFO, ids)
        assert kv.read(store, INFO, ids) == 3 * PAGE
        assert store.tiers.disk is not None
        if not is_direct:
            assert not store.tiers.disk.is_direct


def test_free_elements_are_taken_and_given_back_in_runs() -> None:
    free = FreeElements(10, [(0, 1), (3, 2)])
    assert (free.count, free.end) == (7, 5)
    assert free.take(3) == ((5, 3),)
    assert free.take(3) == ((1, 2), (8, 1)) and free.end == 9
    assert free.take(2) is None and free.count == 1
    free.give_back(((1, 2), (8, 1)))
    assert free.take(2) == ((1, 2),) and free.end == 8
