"""The time to the first token of a long prompt: computed, with its pages in memory, on the disk.

    python bench/kv_prefix.py MODEL DIRECTORY [--tokens 2000] [--rounds 3]

DIRECTORY : empty, on the disk to be measured. Each round computes a prompt of its own, asks for it
again in memory, then by a new engine from the disk, whose page cache was dropped. Beside it, in the
same run, the disk's and memory's own speed, and an answer's time while another text is saved.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ktk.generate.engine import Engine, Limits, Reuse
from ktk.generate.open import OpenModel, open_model
from ktk.generate.sampling import Sampling
from ktk.generate.trial import start_engine
from ktk.integration.transformers.tokens import vocabulary_size
from ktk.kv.prefix.config import BLOCK
from ktk.kv.prefix.disk import PAGES
from ktk.kv.prefix.kept import KeptPages, open_store
from ktk.kv.prefix.store import PrefixStore

GREEDY = Sampling(0.0)
LIMIT = "4GiB"  # of the disk
FILE = 256 << 20  # bytes by which the disk is measured


async def first_token(engine: Engine, ids: list[int], more: int = 1) -> tuple[list[float], Reuse]:
    """When each token came, in seconds from the request."""
    told: list[Reuse] = []
    start, times = time.perf_counter(), list[float]()
    async for tokens in engine.generate(ids, GREEDY, more, told.append):
        times += [time.perf_counter() - start] * len(tokens)
    return times, told[0]


def engine_of(opened: OpenModel, store: PrefixStore, context: int) -> tuple[Engine, KeptPages]:
    engine = start_engine(opened, Limits(context))
    if not engine.keep(store, opened, "file") or engine.kept is None:
        raise SystemExit(f"no pages: {engine.why_not_native}")
    return engine, engine.kept


def settle(kept: KeptPages, texts: int) -> None:
    """Until so many texts are saved."""
    while kept.saved.texts < texts:
        time.sleep(0.01)


def drop_page_cache(path: Path) -> None:
    os.sync()
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def aligned(num_bytes: int) -> np.ndarray:
    memory = np.ones(num_bytes + BLOCK, np.uint8)
    start = -memory.ctypes.data % BLOCK
    return memory[start : start + num_bytes]


def speed(num_bytes: int, work: Callable[[], object]) -> float:
    """GB/s, the best of three."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return num_bytes / best / 1e9


def disk_speeds(directory: Path) -> tuple[float, float]:
    """(write, read) of a file past the page cache, GB/s, 4 MiB at a time, synced."""
    path, part = directory / "speed", aligned(4 << 20)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)

    def write() -> None:
        for begin in range(0, FILE, len(part)):
            os.pwrite(fd, part.data, begin)
        os.fdatasync(fd)

    def read() -> None:
        for begin in range(0, FILE, len(part)):
            os.preadv(fd, [part.data], begin)

    try:
        return speed(FILE, write), speed(FILE, read)
    finally:
        os.close(fd)
        path.unlink()


def milliseconds(times: list[float]) -> str:
    return f"{1000 * min(times):8.1f} {1000 * statistics.median(times):8.1f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    opened = open_model(given.model)
    rng, top = np.random.default_rng(1), vocabulary_size(opened.model)
    prompts = [rng.integers(100, top, given.tokens).tolist() for _ in range(given.rounds)]
    context = 2 * given.tokens
    computed, memory, disk = list[float](), list[float](), list[float]()
    with open_store(given.directory, LIMIT) as store:
        engine, kept = engine_of(opened, store, context)
        for ids in prompts:
            computed += asyncio.run(first_token(engine, ids))[0]
            times, reuse = asyncio.run(first_token(engine, ids))
            memory += times
        print(
            f"{given.tokens} tokens, {reuse.memory} of them in {kept.pool.page_bytes / 1e6:.2f} "
            "MB pages; ms: min median"
        )
        settle(kept, 2 * len(prompts))
        saved = kept.saved
        print(f"saved  {saved.num_bytes / saved.seconds / 1e9:8.2f} GB/s, {saved.pages} pages")
        asyncio.run(decode_beside(engine, kept, prompts[0]))
        engine.stop()
    loads = list[float]()
    for ids in prompts:
        drop_page_cache(given.directory / PAGES)
        with open_store(given.directory, LIMIT) as store:
            engine, kept = engine_of(opened, store, context)
            store.tiers.observe = lambda name, value: (
                loads.append(value / 1000) if name == "lookup_time_ms" else None
            )
            times, reuse = asyncio.run(first_token(engine, ids))
            disk += times
            engine.stop()
    num_bytes = reuse.disk // 64 * kept.pool.page_bytes
    print(f"loaded {num_bytes / min(loads) / 1e9:8.2f} GB/s, {reuse.disk} tokens")
    for name, times in (("computed", computed), ("memory", memory), ("disk", disk)):
        part = statistics.median(times) / statistics.median(computed)
        print(f"{name:9} {milliseconds(times)}  {100 * part:5.1f} %")
    source, target = aligned(FILE), aligned(FILE)
    wrote, read = disk_speeds(given.directory)
    copied = speed(FILE, lambda: np.copyto(target, source))
    print(f"the disk itself: {wrote:.2f} GB/s written, {read:.2f} read; memcpy {copied:.2f}")


async def decode_beside(engine: Engine, kept: KeptPages, ids: list[int]) -> None:
    """Times between an answer's tokens while a text is saved, and while none is."""
    gaps: dict[bool, list[float]] = {False: [], True: []}
    for round_ in range(3):
        for saves in (False, True):
            if saves:  # all its pages again, under another name
                other = [round_ + 5, *ids[:-1]]
                await first_token(engine, other)
            times, _ = await first_token(engine, [7, 8, 9], 40)
            gaps[saves] += list(np.diff(times))
            settle(kept, kept.saved.texts)
    for saves, name in ((False, "alone"), (True, "beside a save")):
        own = 1000 * np.array(gaps[saves])
        p99 = np.percentile(own, 99)
        print(f"decode {name:14} {np.median(own):.1f} ms a token, 99 % below {p99:.1f}")


if __name__ == "__main__":
    main()
