"""Whose pages a text finds: collisions, deletion, tensors, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ktk.kv.prefix import hashing, tree
from ktk.kv.prefix.config import StoreConfig
from ktk.kv.prefix.device import TorchPages
from ktk.kv.prefix.disk import PAGES
from ktk.kv.prefix.store import PrefixStore
from ktk.kv.sizes import TokenShape
from make import kv_store as kv
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
