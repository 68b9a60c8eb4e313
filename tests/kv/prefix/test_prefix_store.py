"""Collisions, limits, pins, eviction, deletion, sharing between threads and processes, refusals."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ktk.errors import EngineError
from ktk.kv.prefix import disk, elements, hashing, tree
from ktk.kv.prefix.config import CacheInfo, StoreConfig
from ktk.kv.prefix.device import TorchPages
from ktk.kv.prefix.disk import PAGES
from ktk.kv.prefix.elements import FreeElements
from ktk.kv.prefix.store import PrefixStore
from ktk.kv.sizes import TokenShape
from make import kv_store as kv
from make.children import run_python
from make.kv_store import ELEMENT, PAGE

RNG = np.random.default_rng(3)
INFO = kv.info()


@pytest.mark.parametrize("bits", [0, 1, 2])
def test_texts_whose_hashes_collide_keep_their_own_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    real = hashing.prefix_hashes

    def few(tokens: bytes, page_bytes: int):
        return (value % (1 << bits) for value in real(tokens, page_bytes))

    monkeypatch.setattr(tree, "prefix_hashes", few)
    texts = [kv.text(5, number) for number in range(24)]
    with PrefixStore(kv.config(tmp_path)) as store:
        for ids in texts[::2]:
            kv.insert(store, INFO, ids)
            kv.generate(store, INFO, ids[PAGE:])
        assert kv.found(store, INFO, kv.tokens(RNG, 5)) == 0
    with PrefixStore(kv.config(tmp_path)) as store:
        for number, ids in enumerate(texts):
            whole = len(ids) // PAGE * PAGE
            assert kv.read(store, INFO, ids) == (min(whole, 2 * PAGE) if number % 2 else whole)
        assert kv.found(store, INFO, kv.tokens(RNG, 5)) == 0


def test_another_model_format_dtype_or_shape_shares_nothing(tmp_path: Path) -> None:
    ids = kv.tokens(RNG, 3)
    others = [
        kv.info("other"),
        kv.info(quant_type="int8"),
        kv.info(kv_dtype="bfloat16"),
        kv.info(layers=3),
        kv.info(shape=TokenShape(2, 2, 4, 8)),
    ]
    with PrefixStore(kv.config(tmp_path)) as store:
        kv.insert(store, INFO, ids)
        assert [kv.found(store, other, ids) for other in others] == [0] * 5
        for other in others:
            kv.insert(store, other, ids)
    with PrefixStore(kv.config(tmp_path)) as store:
        assert [kv.read(store, each, ids) for each in (INFO, *others)] == [3 * PAGE] * 6


def test_a_store_in_use_is_refused_and_free_again_after_its_process(tmp_path: Path) -> None:
    ids = np.arange(2 * PAGE, dtype=np.uint32)
    code = """
        import sys
        from pathlib import Path
        import numpy as np
        from ktk.kv.prefix.store import PrefixStore
        from make import kv_store as kv
        try:
            store = PrefixStore(kv.config(Path(sys.argv[1])))
        except BlockingIOError as error:
            print(error)
        else:
            kv.insert(store, kv.info(), np.arange(2 * kv.PAGE, dtype=np.uint32))
        """
    assert run_python(code, str(tmp_path)) == ""  # it ended without close
    with PrefixStore(kv.config(tmp_path)) as store:
        said = run_python(code, str(tmp_path))
        assert f"{tmp_path}: another process, or another store of this one, has it open" in said
        with pytest.raises(BlockingIOError, match="has it open"):
            PrefixStore(kv.config(tmp_path))
        assert kv.read(store, kv.info(), ids) == 2 * PAGE


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


def test_deletion_forgets_a_text_from_where_it_parts_from_others(tmp_path: Path) -> None:
    begin, own, other = kv.tokens(RNG, 2), kv.tokens(RNG, 2), kv.tokens(RNG, 2)
    mine, yours = np.concatenate([begin, own]), np.concatenate([begin, other])
    with PrefixStore(kv.config(tmp_path)) as store:
        kv.insert(store, INFO, mine)
        kv.generate(store, INFO, yours)
        handle = store.lookup(INFO, mine)
        assert store.delete(INFO, mine) == 2
        assert kv.found(store, INFO, mine) == 2 * PAGE
        assert kv.assert_handle(INFO, mine, handle) == 4 * PAGE  # it keeps what it has
        assert handle is not None and handle.append_tokens(mine) == 0  # and does not bring it back
        assert kv.found(store, INFO, mine) == 2 * PAGE
        handle.release()
        assert store.delete(INFO, kv.tokens(RNG, 2)) == 0
    with PrefixStore(kv.config(tmp_path)) as store:
        assert [kv.read(store, INFO, ids) for ids in (mine, yours)] == [2 * PAGE, 4 * PAGE]
        assert store.delete(INFO) == 4 == store.load() + 4
        assert (tmp_path / PAGES).stat().st_size == ELEMENT  # the head
        assert kv.is_consistent(store)


def test_a_deleted_page_keeps_its_elements_while_it_is_read(tmp_path: Path) -> None:
    ids, other = kv.tokens(RNG, 3), kv.tokens(RNG, 3)
    with PrefixStore(kv.config(tmp_path)) as store:
        kv.insert(store, INFO, ids)
        with store.lookup(INFO, ids) or kv.pytest_fails():
            store.delete(INFO, ids)
            kv.insert(store, INFO, other)
            assert (tmp_path / PAGES).stat().st_size == 7 * ELEMENT
        kv.insert(store, INFO, ids)  # in the places that are free again, and behind
        assert kv.read(store, INFO, ids) == kv.read(store, INFO, other) == 3 * PAGE
        assert kv.is_consistent(store)


def test_threads_that_do_everything_find_only_what_is_right(tmp_path: Path) -> None:
    limits = {"memory_pool_size": 60 * ELEMENT, "disk_limit": 50 * ELEMENT, "evict_count": 3}
    errors: list[BaseException] = []
    device = TorchPages(INFO, PAGE, 30)
    with PrefixStore(kv.config(tmp_path, flush_seconds=0.001, **limits), device) as store:

        def work(seed: int) -> None:
            chance = np.random.default_rng(seed)
            try:
                for _ in range(60):
                    ids = kv.text(1, int(chance.integers(24)))
                    match int(chance.integers(6)):
                        case 0:
                            with contextlib.suppress(OSError):
                                kv.insert(store, INFO, ids)
                        case 1:
                            kv.read(store, INFO, ids)
                        case 2:
                            store.delete(INFO, ids)
                        case 3:
                            if handle := store.lookup_to_device(INFO, ids):
                                kv.assert_handle(INFO, ids, handle)
                                handle.release()
                        case _:
                            kv.generate(store, INFO, ids)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        store.save()
        assert kv.is_consistent(store)
        assert (tmp_path / PAGES).stat().st_size <= 50 * ELEMENT


def test_threads_that_want_the_same_page_read_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = kv.tokens(RNG, 4)
    with PrefixStore(kv.config(tmp_path)) as store:
        kv.insert(store, INFO, ids)
        tier = store.tiers.disk
        assert tier is not None
        real, reads, barrier = tier.read, [], threading.Barrier(6)

        def slow(page: tree.Page, frame: np.ndarray) -> bool:
            reads.append(page)
            threading.Event().wait(0.05)
            return real(page, frame)

        monkeypatch.setattr(tier, "read", slow)

        def look() -> None:
            barrier.wait()
            lengths.append(kv.found(store, INFO, ids))

        lengths: list[int] = []
        threads = [threading.Thread(target=look) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert lengths == [4 * PAGE] * 6 and len(reads) == len(set(reads)) == 4


def test_new_pages_are_saved_after_a_while_by_themselves(tmp_path: Path) -> None:
    ids = kv.tokens(RNG, 3)
    saved = threading.Event()
    store = PrefixStore(kv.config(tmp_path, flush_seconds=0.01))
    store.tiers.observe = lambda name, _: saved.set() if name.startswith("cpu_") else None
    kv.generate(store, INFO, ids)
    assert saved.wait(30)
    assert kv.read(store, INFO, ids) == 3 * PAGE
    store.close()
    store.close()
    with pytest.raises(ValueError, match="the KV store is closed"):
        store.lookup(INFO, ids)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_is_refused_and_leaves_the_store_alone(tmp_path: Path) -> None:
    ids, later = kv.tokens(RNG, 3), kv.tokens(RNG, 3)
    with PrefixStore(kv.config(tmp_path)) as store:
        kv.insert(store, INFO, ids)
        child = os.fork()
        if child == 0:
            try:
                with contextlib.suppress(EngineError):
                    store.lookup(INFO, ids)
                    os._exit(2)
                store.close()
                del store
                gc.collect()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        kv.insert(store, INFO, later)
        with pytest.raises(BlockingIOError):
            PrefixStore(kv.config(tmp_path))
    with PrefixStore(kv.config(tmp_path)) as store:
        assert kv.read(store, INFO, ids) == kv.read(store, INFO, later) == 3 * PAGE


def test_one_of_two_handles_that_make_the_same_page_keeps_it(tmp_path: Path) -> None:
    ids = kv.tokens(RNG, 2)
    with PrefixStore(kv.config(tmp_path), TorchPages(INFO, PAGE, 9)) as store:
        first = store.lookup_to_device(INFO, ids) or kv.pytest_fails()
        second = store.lookup(INFO, ids) or kv.pytest_fails()
        for handle, kept in ((second, 2), (first, 0)):
            for is_key in (True, False):
                for own, right in zip(
                    handle.handle_data(is_key), kv.blocks(INFO, ids, is_key), strict=True
                ):
                    for page in range(2):
                        own[page][:] = right[page]
            assert handle.append_tokens(ids) == kept * PAGE
        first.release()
        first.release()
        second.release()
        assert kv.found(store, INFO, ids) == 2 * PAGE and kv.is_consistent(store)
        assert store.tiers.device is not None and store.tiers.device.free == 9
        with pytest.raises(ValueError, match="released"):
            first.handle_data(True)


def test_blocks_may_be_tensors_of_the_pages_dtype(tmp_path: Path) -> None:
    info = kv.info(kv_dtype="bfloat16", shape=TokenShape(2, 1, 8, 0))  # a latent: no values
    keys = torch.randn(2, 3, PAGE, 1, 8).bfloat16()
    got = torch.zeros_like(keys)
    with PrefixStore(kv.config(tmp_path)) as store:
        ids = kv.tokens(RNG, 3)
        store.raw_insert(info, ids, keys)
        assert store.raw_read(info, ids, got) == 3 * PAGE
        assert torch.equal(keys, got)
        for wrong, message in (
            (keys[:1], "must have 2 layers of at least 3 pages"),
            (keys.float(), "128 bytes: must be 64"),
            (keys.transpose(2, 4), "must be contiguous"),
            ([[b"x"] * 3] * 2, "must be a C-contiguous array or tensor"),
        ):
            with pytest.raises(ValueError, match=message):
                store.raw_insert(info, kv.tokens(RNG, 3), wrong)
        assert kv.is_consistent(store)


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"num_token_per_page": 0}, "num_token_per_page=0"),
        ({"evict_count": 0}, "evict_count=0"),
        ({"element_bytes": 1000}, "multiple of 4096"),
        ({"disk_limit": 4096}, "must be at least 131072"),
        ({"flush_seconds": -1.0}, "must not be negative"),
        ({"path": None, "flush_seconds": 1.0}, "no disk to save to"),
    ):
        with pytest.raises(ValueError, match=message):
            StoreConfig(**{"path": tmp_path, **changes})
    for changes, message in (
        ({"kv_dtype": "int4"}, "must be one of float32"),
        ({"quant_type": "a\n"}, "printable"),
        ({"shape": TokenShape(0, 1, 1, 1)}, "shape.num_layers=0"),
    ):
        with pytest.raises(ValueError, match=message):
            kv.info(**changes)
    with PrefixStore(StoreConfig()) as store:
        for ids, message in (([-1], "must be 0 to"), ([0.5], "whole numbers"), ([[1]], "whole")):
            with pytest.raises(ValueError, match=message):
                store.lookup(INFO, ids)
        handle = store.lookup(INFO, [1, 2]) or kv.pytest_fails()
        with pytest.raises(ValueError, match="room for 256"):
            handle.append_tokens(range(257))
        with pytest.raises(ValueError, match="no device pages"):
            handle.to_device()
        with pytest.raises(ValueError, match="no device pages"):
            store.get_kvcache()
    with pytest.raises(ValueError, match="must be the same"):
        PrefixStore(StoreConfig(), TorchPages(INFO, PAGE, 1))


def test_a_store_that_is_not_to_be_read_or_not_to_be_written(tmp_path: Path) -> None:
    ids = kv.tokens(RNG, 2)
    with PrefixStore(kv.config(tmp_path, load_from_disk=False)) as store:
        kv.insert(store, INFO, ids)
    with pytest.raises(ValueError, match="has 2 pages: give an empty"):
        PrefixStore(kv.config(tmp_path, load_from_disk=False))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with PrefixStore(kv.config(tmp_path, save_to_disk=False)) as store:
        assert kv.found(store, INFO, ids) == 2 * PAGE
        kv.generate(store, INFO, kv.tokens(RNG, 2))
        assert store.save() == 0
        with pytest.raises(ValueError, match="save_to_disk"):
            kv.insert(store, INFO, ids)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_free_elements_are_taken_and_given_back_in_runs() -> None:
    free = FreeElements(10, [(0, 1), (3, 2)])
    assert (free.count, free.end) == (7, 5)
    assert free.take(3) == ((5, 3),)
    assert free.take(3) == ((1, 2), (8, 1)) and free.end == 9
    assert free.take(2) is None and free.count == 1
    free.give_back(((1, 2), (8, 1)))
    assert free.take(2) == ((1, 2),) and free.end == 8
    assert CacheInfo.from_json(INFO.to_json()) == INFO
