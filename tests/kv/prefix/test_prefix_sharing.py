"""Threads and processes that share a store, or may not."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from ktk.errors import EngineError
from ktk.kv.prefix import tree
from ktk.kv.prefix.device import TorchPages
from ktk.kv.prefix.disk import PAGES
from ktk.kv.prefix.store import PrefixStore
from make import kv_store as kv
from make.children import run_python
from make.kv_store import ELEMENT, PAGE

RNG = np.random.default_rng(3)
INFO = kv.info()


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
