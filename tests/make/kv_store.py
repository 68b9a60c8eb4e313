"""Keys and values that their tokens determine, so that a test knows what a page must hold."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ktk.kv.prefix.config import CacheInfo, StoreConfig
from ktk.kv.prefix.handle import Handle
from ktk.kv.prefix.store import PrefixStore
from ktk.kv.sizes import TokenShape

PAGE = 4  # tokens
ELEMENT = 4096
Blocks = list[list[np.ndarray]]


def info(model: str = "model", layers: int = 2, **changes: Any) -> CacheInfo:
    said = {"quant_type": "int4", "kv_dtype": "float16", "shape": TokenShape(layers, 2, 8, 4)}
    return CacheInfo(model, **{**said, **changes})


def config(path: Path | None, **changes: Any) -> StoreConfig:
    said: dict[str, Any] = {
        "path": path,
        "num_token_per_page": PAGE,
        "element_bytes": ELEMENT,
        "memory_pool_size": 1 << 24,
        "disk_limit": None,
    }
    return StoreConfig(**{**said, **changes})


def tokens(rng: np.random.Generator, pages: float) -> np.ndarray:
    return rng.integers(0, 2**32, int(pages * PAGE), dtype=np.uint32)


def block(of: CacheInfo, ids: np.ndarray, layer: int, is_key: bool) -> np.ndarray:
    """What the page that ends ``ids`` holds: uint8 (PAGE, bytes of a token)."""
    shape = of.shape
    width = shape.num_heads * (shape.key_width if is_key else shape.value_width) * 2
    seed = hashlib.sha256(of.to_json().encode() + ids.tobytes() + bytes([layer, is_key]))
    rng = np.random.default_rng(int.from_bytes(seed.digest()[:8], "little"))
    return rng.integers(0, 256, (PAGE, width), dtype=np.uint8)


def blocks(of: CacheInfo, ids: np.ndarray, is_key: bool) -> Blocks:
    """[layer][page] of a text's whole pages."""
    ends = range(PAGE, len(ids) + 1, PAGE)
    return [[block(of, ids[:e], i, is_key) for e in ends] for i in range(of.shape.num_layers)]


def caches(of: CacheInfo, ids: np.ndarray) -> tuple[Blocks, Blocks]:
    return blocks(of, ids, True), blocks(of, ids, False)


def empty_caches(of: CacheInfo, pages: int) -> tuple[Blocks, Blocks]:
    found = []
    for width in (of.shape.key_width, of.shape.value_width):
        shape = (PAGE, of.shape.num_heads * width * 2)
        layers = range(of.shape.num_layers)
        found.append([[np.zeros(shape, np.uint8) for _ in range(pages)] for _ in layers])
    return found[0], found[1]


def insert(store: PrefixStore, of: CacheInfo, ids: np.ndarray) -> int:
    return store.raw_insert(of, ids, *caches(of, ids))


def read(store: PrefixStore, of: CacheInfo, ids: np.ndarray) -> int:
    """raw_read's matched tokens; what it read is checked."""
    got = empty_caches(of, len(ids) // PAGE)
    matched = store.raw_read(of, ids, *got)
    assert_pages(caches(of, ids), got, matched // PAGE)
    return matched


def assert_pages(expected: Sequence[Blocks], got: Sequence[Blocks], pages: int) -> None:
    for wanted, found in zip(expected, got, strict=True):
        for layer, (right, own) in enumerate(zip(wanted, found, strict=True)):
            for page in range(pages):
                assert (right[page] == own[page]).all(), f"layer {layer} page {page}"


def assert_handle(of: CacheInfo, ids: np.ndarray, handle: Handle | None) -> int:
    """The matched tokens of a handle whose pages are those of ``ids``."""
    assert handle is not None
    got = [handle.handle_data(is_key) for is_key in (True, False)]
    assert_pages(caches(of, ids), got, handle.matched_length() // PAGE)
    return handle.matched_length()


def found(store: PrefixStore, of: CacheInfo, ids: np.ndarray) -> int:
    """lookup's matched tokens; what it found is checked."""
    with store.lookup(of, ids) or pytest_fails() as handle:
        return assert_handle(of, ids, handle)


def pytest_fails() -> Handle:
    raise AssertionError("lookup returned None: memory is full")


def generate(store: PrefixStore, of: CacheInfo, ids: np.ndarray) -> int:
    """Look a text up, make what is missing as a model would, and keep it; the tokens kept more."""
    with store.lookup(of, ids) or pytest_fails() as handle:
        assert_handle(of, ids, handle)
        for is_key in (True, False):
            wanted = blocks(of, ids, is_key)
            for own, right in zip(handle.handle_data(is_key), wanted, strict=True):
                for page in range(handle.matched_length() // PAGE, len(right)):
                    own[page][:] = right[page]
        return handle.append_tokens(ids)


def text(seed: int, number: int) -> np.ndarray:
    """Tokens of 2 to 6 pages; texts of one ``number // 4`` begin alike."""
    begin = tokens(np.random.default_rng([seed, number // 4]), 2)
    own = np.random.default_rng([seed, number // 4, number])
    return np.concatenate([begin, tokens(own, own.integers(0, 5) + 0.5)])


def sharing(number: int) -> range:
    """Texts that begin as one does."""
    return range(number // 4 * 4, number // 4 * 4 + 4)


def is_consistent(store: PrefixStore) -> bool:
    """Whether pages, and what of memory and disk is taken, agree, with no handle alive."""
    tiers = store.tiers
    pages = list(tiers.pages())
    runs = [range(first, first + count) for p in pages for first, count in p.place or ()]
    taken = {element for run in runs for element in run}
    assert len(taken) == sum(map(len, runs)) and 0 not in taken, "elements of two pages"
    if tiers.disk is not None:
        assert tiers.disk.used_bytes == (len(taken) + 1) * store.config.element_bytes
    assert tiers.memory.used_bytes == sum(len(p.data) for p in pages if p.data is not None)
    assert not any(p.pins or p.column_pins or p.loading for p in pages), "pins are left"
    assert all(p.parent is p.tree.root or not p.parent.is_removed for p in pages if p.parent)
    return True
