"""kvc2's own list of tests: what a store is expected to do, in memory, on disk and on a device."""

from __future__ import annotations

import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from ktk.kv.prefix.device import TorchPages
from ktk.kv.prefix.hashing import SEED, prefix_hashes
from ktk.kv.prefix.memory import MemoryTier
from ktk.kv.prefix.store import PrefixStore
from ktk.kv.prefix.tree import MatchStatus
from make import kv_store as kv
from make.children import run_python
from make.kv_store import PAGE

RNG = np.random.default_rng(17)
INFO = kv.info()


@pytest.fixture
def store(tmp_path: Path) -> PrefixStore:
    return PrefixStore(kv.config(tmp_path / "kv"))


def test_raw_read_gives_what_raw_insert_wrote(store: PrefixStore) -> None:
    ids = kv.tokens(RNG, 10)
    assert kv.insert(store, INFO, ids) == 10 * PAGE == kv.read(store, INFO, ids)


def test_a_prefix_of_three_of_ten_pages(store: PrefixStore) -> None:
    ids = kv.tokens(RNG, 10)
    kv.insert(store, INFO, ids)
    assert kv.read(store, INFO, ids[: 3 * PAGE]) == 3 * PAGE


def test_a_common_prefix_and_two_and_a_half_other_pages(store: PrefixStore) -> None:
    ids = kv.tokens(RNG, 10)
    kv.insert(store, INFO, ids)
    other = np.concatenate([ids[: 3 * PAGE], kv.tokens(RNG, 2.5)])
    assert kv.read(store, INFO, other) == 3 * PAGE


def test_an_unrelated_text_matches_nothing(store: PrefixStore) -> None:
    kv.insert(store, INFO, kv.tokens(RNG, 10))
    assert kv.read(store, INFO, kv.tokens(RNG, 10)) == 0


def test_five_pages_then_five_more_then_seven_read(store: PrefixStore) -> None:
    ids = kv.tokens(RNG, 10)
    assert kv.insert(store, INFO, ids[: 5 * PAGE]) == 5 * PAGE
    assert kv.insert(store, INFO, ids) == 10 * PAGE
    assert kv.read(store, INFO, ids[: 7 * PAGE]) == 7 * PAGE
    assert store.load() == 10


def test_lookup_brings_pages_from_the_disk_and_back_again(store: PrefixStore) -> None:
    ids = kv.tokens(RNG, 10)
    kv.insert(store, INFO, ids)
    assert [kv.found(store, INFO, ids) for _ in range(2)] == [10 * PAGE] * 2
    assert kv.found(store, INFO, ids[: 4 * PAGE + 1]) == 4 * PAGE
    assert kv.found(store, INFO, kv.tokens(RNG, 3)) == 0


def test_ten_threads_look_up_texts_with_common_beginnings(store: PrefixStore) -> None:
    begin = kv.tokens(RNG, 5)
    texts = [np.concatenate([begin, kv.tokens(RNG, 5)]) for _ in range(10)]
    for text in texts:
        kv.insert(store, INFO, text)
    lengths = []

    def look(text: np.ndarray) -> None:
        for _ in range(5):
            lengths.append(kv.found(store, INFO, text))

    threads = [threading.Thread(target=look, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [10 * PAGE] * 50
    assert store.tiers.memory.used_bytes == 55 * kv.ELEMENT


def test_pages_on_the_device_leave_when_it_is_full(tmp_path: Path) -> None:
    device = TorchPages(INFO, PAGE, 12)
    with PrefixStore(kv.config(tmp_path), device) as store:
        first, second = kv.tokens(RNG, 10), kv.tokens(RNG, 10)
        for ids in (first, second):
            kv.insert(store, INFO, ids)
        for ids in (first, second, first):
            with store.lookup_to_device(INFO, ids) or kv.pytest_fails() as handle:
                assert_device(device, ids, handle.get_device_block_idx())
                assert store.lookup_to_device(INFO, kv.tokens(RNG, 10)) is None  # 10 are in use
        assert store.tiers.device is not None
        assert store.tiers.device.free == 0  # pages stay until others come


def assert_device(device: TorchPages, ids: np.ndarray, columns: list[int]) -> None:
    keys, values = device.get_kvcache()
    for tensor, is_key in ((keys[0], True), (values[0], False)):
        for layer, pages in enumerate(kv.blocks(INFO, ids, is_key)):
            for page, column in zip(pages, columns, strict=True):
                own = tensor[layer, column].contiguous().view(torch.uint8).numpy()
                assert (own.reshape(PAGE, -1) == page).all()


def test_an_async_lookup_calls_back(tmp_path: Path) -> None:
    device = TorchPages(INFO, PAGE, 12)
    with PrefixStore(kv.config(tmp_path), device) as store:
        ids = kv.tokens(RNG, 3)
        kv.insert(store, INFO, ids)
        results: list = []
        store.lookup_to_device_async(INFO, ids, 5 * PAGE, results.append).join()
        (handle,) = results
        assert kv.assert_handle(INFO, ids, handle) == 3 * PAGE
        assert len(set(handle.get_device_block_idx())) == 5
        handle.release()
        other = kv.info("other")
        store.lookup_to_device_async(other, ids, 0, results.append).join()
        assert isinstance(results[1], ValueError)
        with store.lookup(INFO, ids) or kv.pytest_fails() as handle:
            handle.to_device_async(results.append).join()
        assert results[2] is True


@pytest.mark.parametrize("is_on_device", [False, True])
def test_appended_tokens_are_found(tmp_path: Path, is_on_device: bool) -> None:
    device = TorchPages(INFO, PAGE, 12)
    with PrefixStore(kv.config(tmp_path), device) as store:
        ids = kv.tokens(RNG, 5.5)
        kv.insert(store, INFO, ids[: 2 * PAGE])
        look = store.lookup_to_device if is_on_device else store.lookup
        with look(INFO, ids[: 3 * PAGE], len(ids)) or kv.pytest_fails() as handle:
            assert handle.matched_length() == 2 * PAGE
            fill(device if is_on_device else None, handle, ids, 2)
            assert handle.append_tokens(ids[: 4 * PAGE + 1]) == 2 * PAGE
            assert handle.append_tokens(ids[: 4 * PAGE + 2]) == 0
            assert kv.found(store, INFO, ids) == 4 * PAGE
            assert handle.append_tokens(ids) == PAGE
        assert kv.found(store, INFO, ids) == 5 * PAGE


def fill(device: TorchPages | None, handle: kv.Handle, ids: np.ndarray, first: int) -> None:
    """Write a text's pages from ``first`` on, on the device or in memory."""
    for is_key in (True, False):
        for layer, pages in enumerate(kv.blocks(INFO, ids, is_key)):
            for index in range(first, len(pages)):
                if device is None:
                    handle.handle_data(is_key)[layer][index][:] = pages[index]
                    continue
                tensor = device.keys if is_key else device.values
                column = handle.get_device_block_idx()[index]
                page = torch.from_numpy(pages[index].reshape(-1)).view(torch.float16)
                tensor[layer, column] = page.view(tensor.shape[2:])


def test_what_is_flushed_is_found_by_a_new_process(tmp_path: Path) -> None:
    ids = np.arange(6 * PAGE, dtype=np.uint32)
    with PrefixStore(kv.config(tmp_path)) as store:
        assert kv.generate(store, INFO, ids) == 6 * PAGE
        assert store.save() == 6 and store.save() == 0
    code = """
        import sys
        from pathlib import Path
        import numpy as np
        from ktk.kv.prefix.store import PrefixStore
        from make import kv_store as kv
        ids = np.arange(6 * kv.PAGE, dtype=np.uint32)
        with PrefixStore(kv.config(Path(sys.argv[1]))) as store:
            print(store.load(), kv.found(store, kv.info(), ids))
        """
    assert run_python(code, str(tmp_path)).split() == ["6", str(6 * PAGE)]


def test_the_pool_gives_no_more_than_it_has() -> None:
    layout = PrefixStore(kv.config(None)).tiers.tree(INFO).layout
    pool = MemoryTier(3 * layout.frame_bytes, 20, False)
    frames = pool.take(layout, 2)
    assert frames is not None and pool.take(layout, 2) is None
    assert all(frame.ctypes.data % 4096 == 0 and len(frame) == kv.ELEMENT for frame in frames)
    pool.give_back(frames)
    assert pool.used_bytes == 0 and pool.take(layout, 3) is not None


def test_hashes_are_cumulative_xxh64_of_uint32() -> None:
    ids = kv.tokens(RNG, 3.5)
    whole = ids.astype("<u4").tobytes()
    ends = [4 * PAGE, 8 * PAGE, 12 * PAGE]
    expected = [xxhash.xxh64_intdigest(whole[:end], SEED) for end in ends]
    assert list(prefix_hashes(whole, 4 * PAGE)) == expected
    assert struct.unpack("<I", whole[:4])[0] == ids[0]


def test_status_tells_of_every_page(store: PrefixStore) -> None:
    exact, partial = MatchStatus.EXACT, MatchStatus.PARTIAL
    not_exact, not_partial = MatchStatus.NOT_MATCH_EXACT, MatchStatus.NOT_MATCH_PARTIAL
    ids, other = kv.tokens(RNG, 3), kv.tokens(RNG, 1.5)
    kv.insert(store, INFO, ids)
    for text, wanted in (
        (ids, [exact] * 3),
        (ids[: 2 * PAGE + 1], [exact, exact, partial]),
        (ids[:1], [partial]),
        (np.concatenate([ids, other]), [exact] * 3 + [not_exact, not_partial]),
        (np.concatenate([ids[:PAGE], other]), [exact, not_exact, not_partial]),
        (ids[:0], []),
    ):
        with store.lookup(INFO, text) or kv.pytest_fails() as handle:
            assert handle.matched_status() == wanted
