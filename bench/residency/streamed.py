"""Experts read while they run, beside the disk's own rate and all experts in memory.

    python bench/residency/streamed.py DIRECTORY [--layers 4] [--tokens 96]

Writes a packed directory of layers of Qwen3-30B-A3B's shape, int4, once (1.4 GB for 4 layers), and
runs tokens with the routing of a made-up trace, layer by layer, nothing between. The disk's rate is
that of random reads of one expert at a time by the same reader and as many threads, measured just
before each row. ``bound`` is the larger of the misses' bytes over that rate and the time with all
experts in memory.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ktk.checkpoint.packed import layer_path, write_layer
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights
from ktk.machine.memory import aligned_buffer
from ktk.ops.moe import MoE
from ktk.ops.streamed import StreamedMoE
from ktk.placement.residency.pools import PoolOptions
from ktk.placement.residency.reader import PackedReader
from ktk.placement.residency.slots import Slots
from ktk.placement.residency.synthetic import Synthetic, synthetic_trace
from ktk.placement.store import ExpertStore
from ktk.quantise.pack import pack_experts

SPEC = MoESpec(128, 2048, 768, "int4", 128)
TOP_K, NUM_READERS = 8, 4


def write(directory: Path, num_layers: int) -> None:
    """Layers of one expert 128 times: the disk does not know."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    one = MoESpec(1, SPEC.hidden_size, SPEC.intermediate_size, "int4", 128)

    def read(_: int) -> ExpertWeights:
        up = [rng.standard_normal((768, 2048), np.float32) / 45 for _ in range(2)]
        return ExpertWeights(up[0], up[1], rng.standard_normal((2048, 768), np.float32) / 28)

    span = np.asarray(pack_experts(one, read, 2).spans)[0]
    for layer in range(num_layers):
        if not layer_path(directory, layer).exists():
            write_layer(directory, SPEC, layer, [span] * SPEC.num_experts)


def disk_rate(directory: Path, num_layers: int, reads: int = 128) -> float:
    """Bytes a second of random experts, several at a time."""
    reader, size = PackedReader(directory, range(num_layers)), SPEC.layout.expert_bytes
    buffers = [aligned_buffer(size) for _ in range(NUM_READERS)]
    rng = np.random.default_rng(1)
    keys = rng.integers(0, num_layers * SPEC.num_experts, reads).tolist()

    def run(thread: int) -> None:
        for key in keys[thread::NUM_READERS]:
            reader.read(*divmod(key, SPEC.num_experts), buffers[thread])

    with ThreadPoolExecutor(NUM_READERS) as pool:
        begin = time.perf_counter()
        list(pool.map(run, range(NUM_READERS)))
        rate = reads * size / (time.perf_counter() - begin)
    reader.close()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--policy", default="least-stale")
    a = parser.parse_args()
    write(a.directory, a.layers)
    trace = synthetic_trace(Synthetic(a.layers, SPEC.num_experts, TOP_K, a.tokens))
    total, size = a.layers * SPEC.num_experts, SPEC.layout.expert_bytes
    x = np.random.default_rng(2).standard_normal((1, SPEC.hidden_size)).astype(np.float32)
    half = len(trace.layers) // 2  # the first half fills the slots

    def seconds(layers: list[StreamedMoE] | list[MoE], rows: range) -> float:
        begin = time.perf_counter()
        for row in rows:
            ids, weights = trace.expert_ids[row : row + 1], trace.weights[row : row + 1]
            layers[int(trace.layers[row])](x, ids, weights)
        return time.perf_counter() - begin

    resident = 0.0
    print("| in memory | hits | disk MB/s | ms a token | bound | over it |\n|--:|" + "--:|" * 5)
    for share in (1.0, 0.75, 0.5, 0.25):
        rate = disk_rate(a.directory, a.layers)
        reader = PackedReader(a.directory, range(a.layers))
        stores = [ExpertStore.absent(spec) for spec in reader.specs]
        slots = Slots(stores, reader, PoolOptions(int(share * total), a.policy), TOP_K, NUM_READERS)
        moes = [MoE(store) for store in stores]
        layers = [StreamedMoE(moe, slots, i) for i, moe in enumerate(moes)]
        if share == 1.0:
            for layer in range(a.layers):
                slots.pin(layer, range(SPEC.num_experts))
            seconds(layers, range(half))
            plain = min(seconds(moes, range(half, 2 * half)) for _ in range(3))
            resident = min(seconds(layers, range(half, 2 * half)) for _ in range(3))
            print(f"| all, plain MoE | | | {2e3 * plain / a.tokens:.2f} | | |")
        seconds(layers, range(half))
        before = slots.counters()
        took = resident if share == 1.0 else seconds(layers, range(half, 2 * half))
        after = slots.counters()
        bound = max((after.reads - before.reads) * size / rate, resident)
        hits, uses = after.hits - before.hits, after.uses - before.uses
        print(
            f"| {share:.0%} | {hits / uses if uses else 1:.1%} | {rate / 1e6:.0f} "
            f"| {2e3 * took / a.tokens:.2f} | {2e3 * bound / a.tokens:.2f} | {took / bound:.2f} |",
            flush=True,
        )
        slots.close()


if __name__ == "__main__":
    main()
