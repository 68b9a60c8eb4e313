"""Damaged, truncated, mixed and foreign files: an error that says so, or a miss; never other keys
than those of the text asked for.
"""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from ktk.errors import CheckpointError
from ktk.kv.prefix import disk
from ktk.kv.prefix.disk import DATABASE, PAGES
from ktk.kv.prefix.metadata import row_digest
from ktk.kv.prefix.store import PrefixStore
from make import kv_store as kv
from make.kv_store import ELEMENT, PAGE

INFO = kv.info()
TEXTS = [kv.text(7, number) for number in range(8)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed store of some texts."""
    path = tmp_path_factory.mktemp("whole")
    with PrefixStore(kv.config(path)) as store:
        for ids in TEXTS:
            kv.insert(store, INFO, ids)
    assert sorted(file.name for file in path.iterdir()) == [PAGES, DATABASE]
    return path


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "kv")


def lengths(path: Path, **changes: object) -> list[int]:
    """Tokens found of each text, by lookup and then by raw_read; what they give is compared."""
    with PrefixStore(kv.config(path, **changes)) as store:
        found = [kv.found(store, INFO, ids) for ids in TEXTS]
        again = [kv.read(store, INFO, ids) for ids in TEXTS]
        assert all(second <= first for first, second in zip(found, again, strict=True))
        for ids in TEXTS:  # what is gone can be written again
            assert kv.insert(store, INFO, ids) == len(ids) // PAGE * PAGE
        assert kv.is_consistent(store)
    return found


WHOLE = [len(ids) // PAGE * PAGE for ids in TEXTS]


def test_an_untouched_copy_has_all(copied: Path) -> None:
    assert lengths(copied) == WHOLE


def test_any_flipped_bit_of_the_pages_is_an_error_or_a_miss(copied: Path) -> None:
    data = (copied / PAGES).read_bytes()
    rng = np.random.default_rng(1)
    errors = misses = 0
    inside = rng.integers(0, len(data), 30).tolist()
    for at in [0, 8, 12, 16, 40, ELEMENT, len(data) - 1, *inside]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        (copied / PAGES).write_bytes(damaged)
        try:
            misses += lengths(copied) != WHOLE
        except CheckpointError:
            errors += 1
    assert errors >= 4 and misses >= 20


def test_any_flipped_bit_of_the_database_is_an_error_or_a_miss(whole: Path, tmp_path: Path) -> None:
    data = (whole / DATABASE).read_bytes()
    rng = np.random.default_rng(2)
    errors = misses = 0
    inside = rng.integers(0, len(data), 50).tolist()
    for number, at in enumerate([0, 18, 60, 68, 100, 103, *inside]):  # SQLite's head, and anywhere
        path = shutil.copytree(whole, tmp_path / str(number))
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        (path / DATABASE).write_bytes(damaged)
        try:
            misses += lengths(path) != WHOLE
        except CheckpointError:
            errors += 1
    assert errors and misses


@pytest.mark.parametrize("name", [PAGES, DATABASE])
def test_a_truncated_file_is_an_error_or_a_miss(whole: Path, tmp_path: Path, name: str) -> None:
    size = (whole / name).stat().st_size
    outcomes = set()
    for keep in [0, 1, 100, 4095, 4096, *range(5000, size, max(1, size // 12)), size - 1]:
        path = shutil.copytree(whole, tmp_path / str(keep))
        with open(path / name, "r+b") as file:
            file.truncate(keep)
        try:
            outcomes.add("whole" if lengths(path) == WHOLE else "miss")
        except CheckpointError:
            outcomes.add("error")
    assert "error" in outcomes
    assert outcomes <= {"error", "miss"} or name == DATABASE  # a byte cut may have been a zero


@pytest.mark.parametrize("name", [PAGES, DATABASE])
def test_a_file_of_another_store_is_refused(whole: Path, tmp_path: Path, name: str) -> None:
    mine, other = shutil.copytree(whole, tmp_path / "mine"), tmp_path / "other"
    with PrefixStore(kv.config(other)) as store:
        for ids in TEXTS:  # the same pages in the same places
            kv.insert(store, INFO, ids)
    shutil.copy(other / name, mine / name)
    with pytest.raises(CheckpointError, match="belongs to another file of pages"):
        lengths(mine)


def test_swapped_elements_and_swapped_rows_are_misses(copied: Path) -> None:
    data = bytearray((copied / PAGES).read_bytes())
    one, two = slice(ELEMENT, 2 * ELEMENT), slice(2 * ELEMENT, 3 * ELEMENT)
    data[one], data[two] = data[two], data[one]
    (copied / PAGES).write_bytes(data)
    assert lengths(copied)[0] == 0
    last = "(SELECT {} FROM page ORDER BY id DESC LIMIT 1)"
    changes = {name: last.format(name) for name in ("tokens", "runs", "checksum", "hash")}
    for column, value in {**changes, "parent": last.format("id"), "info": "2"}.items():
        with sqlite3.connect(copied / DATABASE) as connection:
            connection.execute("INSERT OR IGNORE INTO info VALUES (2, ?)", (other_info(),))
            connection.execute(
                f"UPDATE page SET {column} = {value} WHERE id = (SELECT min(id) FROM page)"
            )
        connection.close()
        assert lengths(copied) != WHOLE, column
        with PrefixStore(kv.config(copied)) as store:
            assert kv.found(store, kv.info("other"), TEXTS[0]) == 0


def other_info() -> str:
    return kv.info("other").to_json()


def test_rows_that_lie_about_places_and_types_are_misses(copied: Path) -> None:
    lies = [
        ("runs", (5).to_bytes(8, "little") + (2**62).to_bytes(8, "little")),
        ("runs", b""),
        ("runs", (-1).to_bytes(8, "little", signed=True) + (1).to_bytes(8, "little")),
        ("tokens", b"short"),
        ("tokens", "text"),
        ("depth", 7),
        ("parent", 2**40),
        ("hash", -1),
        ("checksum", b""),
        ("used", "never"),
    ]
    for column, lie in lies:
        with sqlite3.connect(copied / DATABASE) as connection:
            first = "(SELECT min(id) FROM page)"
            connection.execute(f"UPDATE page SET {column} = ? WHERE id = {first}", (lie,))
        connection.close()
        assert lengths(copied) != WHOLE, column


def test_a_row_that_claims_elements_of_another_is_a_miss(copied: Path) -> None:
    """Though its digest is right: who reads one would get what the other is given later."""
    with PrefixStore(kv.config(copied)) as store:
        (page, *_) = store.tiers.tree(INFO).root.children
        of_child = b"\1" * 4 * PAGE
        child = store.tiers.tree(INFO).drafts([page], page.tokens + of_child)[0]
        assert page.place is not None
        row = row_digest(child.chain, child.hash, page.place, page.checksum)
        hash_ = child.hash - (child.hash >> 63 << 64)
        values = (page.row, 1, hash_, of_child, page.row, page.row, row)
        parent = page.tokens
    with sqlite3.connect(copied / DATABASE) as connection:
        connection.execute(
            "INSERT INTO page (info, parent, depth, hash, tokens, runs, checksum, digest, used) "
            "VALUES (1, ?, ?, ?, ?, (SELECT runs FROM page WHERE id = ?), "
            "(SELECT checksum FROM page WHERE id = ?), ?, 0)",
            values,
        )
    connection.close()
    with PrefixStore(kv.config(copied)) as store:
        with store.lookup(INFO, np.frombuffer(parent + of_child, "<u4")) or kv.pytest_fails() as h:
            assert h.matched_length() == PAGE
        assert kv.is_consistent(store)


def test_a_strange_age_only_changes_who_leaves_first(copied: Path) -> None:
    with sqlite3.connect(copied / DATABASE) as connection:
        connection.execute("UPDATE page SET used = ?", (2**63 - 1,))
    connection.close()
    assert lengths(copied) == WHOLE


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("PRAGMA application_id = 1", "something else"),
        ("PRAGMA user_version = 2", "version 2, this ktk reads 1"),
        ("CREATE TABLE more (id)", "tables are not those"),
        ("CREATE TRIGGER t AFTER INSERT ON page BEGIN DELETE FROM page; END", "tables are not"),
        ("DELETE FROM store", "belongs to another"),
        ("DROP TABLE page", "tables are not"),
    ],
)
def test_a_foreign_database_is_refused(copied: Path, statement: str, message: str) -> None:
    with sqlite3.connect(copied / DATABASE) as connection:
        connection.execute(statement)
    connection.close()
    with pytest.raises(CheckpointError, match=message):
        lengths(copied)


def test_other_versions_and_files_of_pages_are_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="elements of 4096 bytes, element_bytes=8192"):
        lengths(copied, element_bytes=2 * ELEMENT)
    (copied / DATABASE).write_text("no database")
    with pytest.raises(CheckpointError, match="not a database"):
        lengths(copied)
    (copied / PAGES).write_bytes(b"GGUF" * 2048)
    with pytest.raises(CheckpointError, match="no file of KV pages"):
        lengths(copied)
    (copied / PAGES).unlink()
    with pytest.raises(CheckpointError, match="missing, though pages.sqlite is there"):
        lengths(copied)


def test_a_store_whose_database_never_came_begins_anew(copied: Path) -> None:
    """As a crash between the two files leaves it."""
    (copied / DATABASE).unlink()
    assert lengths(copied) == [0] * len(TEXTS)
    assert lengths(copied) == WHOLE


def test_a_lower_limit_forgets_what_lies_beyond_it(copied: Path) -> None:
    limit = 12 * ELEMENT
    with PrefixStore(kv.config(copied, disk_limit=limit)) as store:
        found = [kv.found(store, INFO, ids) for ids in TEXTS]
        assert kv.is_consistent(store)
    assert 0 < sum(found) < sum(WHOLE)
    assert (copied / disk.PAGES).stat().st_size <= limit
