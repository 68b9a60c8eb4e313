"""A store survives a process that ends at any moment: what was reported saved is there, and
nothing that is there is wrong.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ktk.kv.prefix import disk, elements
from ktk.kv.prefix.store import PrefixStore
from make import ROOT
from make import kv_store as kv
from make.kv_store import PAGE

KILLS = int(os.environ.get("KILLS", 10))
INFO = kv.info(layers=8)  # a page of 3 KiB in an element of 4
# A process that imports everything, once, and for each line it is given becomes a child that saves
# one text after the other, tells of each, and never ends by itself.
PARENT = """
import itertools, os, sys
from pathlib import Path
import numpy as np
from ktk.kv.prefix.store import PrefixStore
from make import kv_store as kv

def say(*words):
    os.write(1, (" ".join(map(str, words)) + chr(10)).encode())  # whole, or not at all

def save_texts(path, seed, limit):
    rng = np.random.default_rng(seed)
    info = kv.info(layers=8)
    store = PrefixStore(kv.config(path, disk_limit=limit, memory_pool_size=60 * kv.ELEMENT))
    say("open")
    for number in itertools.count():
        ids = kv.text(seed, number)
        if number % 3:
            kv.generate(store, info, ids)
            store.save()
        else:
            kv.insert(store, info, ids)
        say("saved", number)
        if number % 7 == 6:
            gone = int(rng.integers(number))
            say("deleting", gone)
            store.delete(info, kv.text(seed, gone))

for line in sys.stdin:
    path, seed, limit = line.split()
    child = os.fork()
    if not child:
        try:
            save_texts(Path(path), int(seed), int(limit) or None)
        finally:
            os._exit(1)
    say("child", child)
    say("ended", os.waitpid(child, 0)[1])
"""


@pytest.fixture(scope="module")
def parent() -> Iterator[subprocess.Popen[str]]:
    found = os.pathsep.join([str(ROOT / "tests"), *(path for path in sys.path if path)])
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": found},
    ) as process:
        yield process


def kill_during_saves(
    parent: subprocess.Popen[str], path: Path, seed: int, limit: int, until: int, share: float
) -> tuple[int, set[int]]:
    """Texts that a child said it saved, and those that it may have deleted.

    until : what it tells before it is killed: that it was born, has opened the store, has saved a
    text, another, ... share : of the time that the last of these took, how long after it. So the
    kill comes amid the next one however busy the machine is.
    """
    assert parent.stdin is not None and parent.stdout is not None
    print(path, seed, limit, file=parent.stdin, flush=True)
    saved, deleted, told, last = 0, set[int](), 0, time.perf_counter()
    for line in parent.stdout:
        word, *rest = line.split()
        saved += word == "saved"
        deleted |= {int(rest[0])} if word == "deleting" else set()
        if word == "child":
            child = int(rest[0])
        if word in ("child", "open", "saved"):
            told, before, last = told + 1, last, time.perf_counter()
            if told == until:
                after = share * (last - before)
                killing = threading.Timer(after, os.kill, (child, signal.SIGKILL))
                killing.start()
        if word == "ended":
            killing.join()
            assert int(rest[0]) == signal.SIGKILL, "the child failed by itself"
            return saved, deleted
    raise AssertionError("the children's parent has ended")


@pytest.mark.parametrize("limit", [0, 40 * kv.ELEMENT], ids=["unlimited", "limited"])
def test_no_kill_leaves_a_wrong_page_or_loses_a_saved_one(
    tmp_path: Path, parent: subprocess.Popen[str], limit: int
) -> None:
    """One store for all, so each child begins with what the killed ones have left."""
    chance = random.Random(KILLS)
    saved = unsaved = 0
    for seed in range(KILLS):
        until, share = chance.randint(1, 8), chance.uniform(0.0, 1.5)
        count, deleted = kill_during_saves(parent, tmp_path, seed, limit, until, share)
        with PrefixStore(kv.config(tmp_path, disk_limit=limit or None)) as store:
            for number in range(count + 1):
                ids = kv.text(seed, number)
                length = kv.read(store, INFO, ids)  # what it reads is compared
                whole = len(ids) // PAGE * PAGE
                if number < count and not limit and not deleted & set(kv.sharing(number)):
                    assert length == whole, f"seed {seed}: text {number} was reported saved"
                unsaved += number == count and length < whole
            assert kv.is_consistent(store)
        saved += count
        assert not limit or (tmp_path / disk.PAGES).stat().st_size <= limit
    assert saved > KILLS and unsaved, "the kills hit no save"


def test_pages_are_synced_before_their_rows_and_rows_deleted_before_their_elements_are_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    with PrefixStore(kv.config(tmp_path, disk_limit=4 * kv.ELEMENT)) as store:
        tier = store.tiers.disk
        assert tier is not None
        real = {name: getattr(elements.ElementFile, name) for name in ("write", "sync")}

        def spy(name: str):
            def call(self, *arguments):
                events.append(name)
                return real[name](self, *arguments)

            return call

        for name in real:
            monkeypatch.setattr(elements.ElementFile, name, spy(name))

        def trace(statement: str) -> None:
            if statement.startswith(("INSERT INTO page", "DELETE", "COMMIT")):
                events.append(statement.split()[0])

        tier._metadata._connection.set_trace_callback(trace)
        rng = np.random.default_rng(0)
        kv.insert(store, INFO, kv.tokens(rng, 3))
        assert events == ["write"] * 3 + ["sync"] + ["INSERT"] * 3 + ["COMMIT"]
        events.clear()
        kv.insert(store, INFO, kv.tokens(rng, 1))
        assert events == ["DELETE", "COMMIT", "write", "sync", "INSERT", "COMMIT"]
