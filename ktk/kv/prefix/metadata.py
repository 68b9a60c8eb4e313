"""What lies where on disk, and of which tokens: a SQLite database beside the file of pages.

A row counts only with its digest, so neither a flipped bit nor a row of another store is believed.
SQLite in WAL mode: a commit costs one sync of a log, and a torn one is undone when it is opened.
The connection holds the database alone, so no shared memory is needed, on any file system.
"""

from __future__ import annotations

import contextlib
import ctypes
import sqlite3
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktk.errors import CheckpointError
from ktk.kv.prefix.config import CacheInfo
from ktk.kv.prefix.elements import Runs
from ktk.kv.prefix.hashing import digest

APPLICATION, VERSION = 0x6B746B76, 1  # "ktkv"
_TABLES = (
    "CREATE TABLE store (origin BLOB NOT NULL)",
    "CREATE TABLE info (id INTEGER PRIMARY KEY, fields TEXT NOT NULL UNIQUE)",
    "CREATE TABLE page (id INTEGER PRIMARY KEY, info INTEGER NOT NULL, parent INTEGER NOT NULL, "
    "depth INTEGER NOT NULL, hash INTEGER NOT NULL, tokens BLOB NOT NULL, runs BLOB NOT NULL, "
    "checksum BLOB NOT NULL, digest BLOB NOT NULL, used INTEGER NOT NULL)",
)
_COLUMNS = "id, info, parent, depth, hash, tokens, runs, checksum, digest, used"
_TYPES = [int, int, int, int, int, bytes, bytes, bytes, bytes, int]
_RUN = struct.Struct("<qq")


@dataclass(frozen=True)
class Row:
    """A page on disk. info, parent : ids, parent 0 for the first page. hash : of all tokens up to
    its end. checksum : of its frame. used : the later, the more recent.
    """

    id: int
    info: int
    parent: int
    depth: int
    hash: int
    tokens: bytes
    runs: Runs
    checksum: bytes
    digest: bytes
    used: int


def row_digest(chain: bytes, hash: int, runs: Runs, checksum: bytes) -> bytes:
    """Ties a page's place and checksum to the store, the CacheInfo and the tokens of its chain."""
    return digest(chain, hash.to_bytes(8, "little"), _pack(runs), checksum)


class Metadata:
    """The database of one store, its own until ``close``; one thread at a time."""

    def __init__(self, path: Path, origin: bytes) -> None:
        """origin : of the file of pages; a database without tables becomes its own.

        Raises CheckpointError if the database is not one, damaged, of another store or version.
        """
        self.path = path
        with self._as_checkpoint_error():
            self._connection = sqlite3.connect(
                path, timeout=0, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(origin)
            except BaseException:
                self._connection.close()
                raise

    def _prepare(self, origin: bytes) -> None:
        run = self._connection.execute
        run("PRAGMA trusted_schema = OFF")
        run("PRAGMA locking_mode = EXCLUSIVE")
        if not self._number("application_id") and not self._tables():
            run("PRAGMA journal_mode = WAL")
            run("PRAGMA synchronous = FULL")
            with self.transaction():
                run(f"PRAGMA application_id = {APPLICATION}")
                run(f"PRAGMA user_version = {VERSION}")
                for table in _TABLES:
                    run(table)
                run("INSERT INTO store VALUES (?)", (origin,))
            return
        if self._number("application_id") != APPLICATION:
            raise CheckpointError(f"{self.path}: a database of something else: give another path")
        if (version := self._number("user_version")) != VERSION:
            raise CheckpointError(
                f"{self.path}: version {version}, this ktk reads {VERSION}: delete the store's "
                "directory, or give another"
            )
        if self._tables() != sorted(_TABLES):
            raise CheckpointError(f"{self.path}: its tables are not those that ktk makes")
        if (found := run("PRAGMA quick_check(1)").fetchone()) != ("ok",):
            raise CheckpointError(f"{self.path}: damaged ({found[0]}): delete the store")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        if run("SELECT origin FROM store").fetchall() != [(origin,)]:
            raise CheckpointError(
                f"{self.path}: belongs to another file of pages: the store was mixed with another; "
                "put back what belongs together, or delete it"
            )

    def _number(self, pragma: str) -> int:
        return int(self._connection.execute(f"PRAGMA {pragma}").fetchone()[0])

    def _tables(self) -> list[str]:
        found = self._connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")
        return sorted(sql for (sql,) in found)

    @contextlib.contextmanager
    def _as_checkpoint_error(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if "disk is full" in str(error):
                raise OSError(28, f"{self.path}: {error}") from None
            raise CheckpointError(
                f"{self.path}: {error}; if no other process has it open, delete the store"
            ) from None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """What the block does is there after it, also after a power cut; or nothing is."""
        with self._as_checkpoint_error():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise

    def infos(self) -> dict[int, CacheInfo]:
        """Id -> CacheInfo; what is none is left out, and its pages with it."""
        found = {}
        with self._as_checkpoint_error():
            rows = self._connection.execute("SELECT id, fields FROM info").fetchall()
        for number, text in rows:
            with contextlib.suppress(ValueError):
                found[number] = CacheInfo.from_json(text)
        return found

    def rows(self) -> list[tuple[int, Row | None]]:
        """Ids and pages, parents before what follows them; None for what is no page."""
        with self._as_checkpoint_error():
            found = self._connection.execute(f"SELECT {_COLUMNS} FROM page ORDER BY depth, id")
            return [(columns[0], _row(columns)) for columns in found.fetchall()]

    def add_info(self, info: CacheInfo) -> int:
        """Its id, within a transaction."""
        text = (info.to_json(),)
        self._connection.execute("INSERT OR IGNORE INTO info (fields) VALUES (?)", text)
        (number,) = self._connection.execute("SELECT id FROM info WHERE fields = ?", text)
        return int(number[0])

    def add(self, row: Row) -> int:
        """The id that a row got (its own does not count), within a transaction."""
        columns = (row.info, row.parent, row.depth, _signed(row.hash), row.tokens)
        added = self._connection.execute(
            "INSERT INTO page (info, parent, depth, hash, tokens, runs, checksum, digest, used) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*columns, _pack(row.runs), row.checksum, row.digest, row.used),
        )
        return int(added.lastrowid or 0)

    def delete(self, ids: Iterable[int]) -> None:
        """Within a transaction."""
        self._connection.executemany("DELETE FROM page WHERE id = ?", [(i,) for i in ids])

    def use(self, used: Iterable[tuple[int, int]]) -> None:
        """Rows (when used, id), within a transaction."""
        self._connection.executemany("UPDATE page SET used = ? WHERE id = ?", list(used))

    def close(self) -> None:
        self._connection.close()

    def abandon(self) -> None:
        """In a forked child: SQLite's state is the parent's, and closing it would write."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))


def _pack(runs: Runs) -> bytes:
    return b"".join(_RUN.pack(*run) for run in runs)


def _signed(hash: int) -> int:
    return hash - (1 << 64) if hash >> 63 else hash


def _row(columns: Sequence[Any]) -> Row | None:
    """None if a column is of another type, which SQLite allows."""
    if [type(column) for column in columns] != _TYPES:
        return None
    id, info, parent, depth, hash, tokens, runs, checksum, digest, used = columns
    whole = len(runs) // _RUN.size * _RUN.size
    places = tuple(_RUN.iter_unpack(runs[:whole]))
    hash %= 1 << 64
    return Row(id, info, parent, depth, hash, tokens, places, checksum, digest, used)
