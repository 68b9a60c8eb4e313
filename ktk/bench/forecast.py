"""How fast a model will decode whose experts do not all fit into memory, told before it is loaded.

    seconds of a token = bytes it misses / the disk's rate + bytes it reads / memory's rate

Both rates are measured: the disk's by random reads of single experts, as many at a time as when the
model runs. Which experts miss is counted on a made-up trace of the model's shape, whose routing has
the spread of published ones (``ktk.placement.residency.synthetic``).
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ktk.bench.roofline import READ, Roofline
from ktk.machine.memory import aligned_buffer
from ktk.placement.residency.expert_memory import ExpertMemory
from ktk.placement.residency.reader import FilesReader
from ktk.placement.residency.replay import replay
from ktk.placement.residency.synthetic import Synthetic, synthetic_trace

NUM_READERS = 4  # as ``Slots`` has
MOST_USES = 100_000  # of experts in the trace: a second or two
SECONDS = 2.0  # of reads


@dataclass(frozen=True)
class Forecast:
    """hit_rate : 0 to 1. disk_rate, memory_rate : bytes/s. missed_bytes, read_bytes : of a token,
    from the disk and from memory. is_direct : whether reads went past the page cache; else the
    disk's rate may be that of memory.
    """

    hit_rate: float
    disk_rate: float
    is_direct: bool
    missed_bytes: float
    memory_rate: float
    read_bytes: float

    @property
    def tokens_per_second(self) -> float:
        disk, memory = self.missed_bytes / self.disk_rate, self.read_bytes / self.memory_rate
        return 1 / (disk + memory)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": round(self.tokens_per_second, 3)}

    def line(self) -> str:
        """``12.1 tokens/s: 76 % of uses find their expert in memory, ...``."""
        return (
            f"{self.tokens_per_second:.1f} tokens/s: {self.hit_rate:.0%} of uses find their expert "
            f"in memory on a made-up text, the others are {self.missed_bytes / 1e6:.0f} MB a token "
            f"at {self.disk_rate / 1e9:.2f} GB/s of the disk; memory is read at "
            f"{self.memory_rate / 1e9:.1f} GB/s"
        )


def forecast(
    reader: FilesReader,
    num_layers: int,
    memory: ExpertMemory,
    top_k: int,
    rest_bytes: int,
    seconds: float | None = None,
) -> Forecast:
    """Takes some seconds; at most ``seconds`` (SECONDS) of them reads.

    reader : of num_layers layers. rest_bytes : of all other weights, which every token reads.
    Raises ValueError if not even one token's experts fit, CheckpointError if one cannot be read.
    """
    stores = [reader.store(layer) for layer in range(num_layers)]
    sizes = [store.span_bytes for store in stores]
    counts = [store.spec.num_experts for store in stores]
    room = memory.room(sizes, counts, top_k)
    each = sum(sizes) / num_layers
    misses = (1 - (hits := _hit_rate(memory, room.capacity, counts, top_k))) * top_k * num_layers
    return Forecast(
        hits,
        _disk_rate(reader, sizes, counts, SECONDS if seconds is None else seconds),
        reader.is_direct,
        misses * each,
        Roofline().sample([READ])[READ],
        top_k * num_layers * each + rest_bytes,
    )


def _hit_rate(memory: ExpertMemory, capacity: int, counts: list[int], top_k: int) -> float:
    """Of the trace's second half, when the slots are full."""
    if capacity >= sum(counts):
        return 1.0
    tokens = max(16, min(256, MOST_USES // (len(counts) * top_k)))
    size = {"num_layers": len(counts), "num_experts": max(counts), "top_k": top_k}
    trace = synthetic_trace(Synthetic(**size, num_tokens=tokens))
    calls = list(trace.each_call())
    options = memory.options(capacity)
    whole = replay(trace, options, calls).total
    first = replay(trace, options, calls[: len(calls) // 2]).total
    return (whole.hits - first.hits) / (whole.uses - first.uses)


def _disk_rate(reader: FilesReader, sizes: list[int], counts: list[int], seconds: float) -> float:
    """Bytes/s of random experts, several at a time."""
    end = time.perf_counter() + seconds

    def run(seed: int) -> int:
        rng, span, done = np.random.default_rng(seed), aligned_buffer(max(sizes)), 0
        while time.perf_counter() < end:
            layer = int(rng.integers(len(sizes)))
            reader.read(layer, int(rng.integers(counts[layer])), span[: sizes[layer]])
            done += sizes[layer]
        return done

    start = time.perf_counter()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        done = sum(pool.map(run, range(NUM_READERS)))
    return done / (time.perf_counter() - start)
