"""Prompts of a model whose experts come from the disk, beside the disk's sequential rate and the
same model in memory.

    python bench/residency/prompts.py DIR [--share 25] [--tokens 512 2048] [--rounds 2]

DIR is that of ``whole_model.py``. Each model runs in a process of its own, as ``ktk run`` runs it;
a prompt before those that are timed fills the slots. ``disk`` is the time of the bytes read at the
rate of the experts in the order of the file, four at a time, measured just before. The bound is the
larger of that and the time of the model in memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from streamed import NUM_READERS, SPEC
from whole_model import VOCAB, write_model

from ktk.machine.memory import aligned_buffer
from ktk.placement.residency.reader import PackedReader


def sequential_rate(directory: Path, num_layers: int, reads: int = 512) -> float:
    """Bytes a second of experts one behind the other, several at a time."""
    reader, size = PackedReader(directory, range(num_layers)), SPEC.layout.expert_bytes
    buffers = [aligned_buffer(size) for _ in range(NUM_READERS)]

    def run(thread: int) -> None:
        for key in range(thread, reads, NUM_READERS):
            reader.read(*divmod(key, SPEC.num_experts), buffers[thread])

    with ThreadPoolExecutor(NUM_READERS) as pool:
        list(pool.map(run, range(NUM_READERS)))  # fresh memory is slow
        begin = time.perf_counter()
        list(pool.map(run, range(NUM_READERS)))
        rate = reads * size / (time.perf_counter() - begin)
    reader.close()
    return rate


def measure(directory: Path, share: int, lengths: list[int]) -> list[dict[str, Any]]:
    """Of each prompt seconds, and the bytes read; share : per cent, 0: all are loaded."""
    from ktk.integration.transformers import KtkConfig, load_model
    from ktk.integration.transformers.sequence import CachedSequence
    from ktk.integration.transformers.streaming import expert_slots

    options = {"expert_memory": f"{share}%"} if share else {}
    model = load_model(directory, quantization_config=KtkConfig(linear="file"), **options).eval()
    slots, rng, found = expert_slots(model), np.random.default_rng(0), []
    for length in (128, *lengths):
        ids = rng.integers(3, VOCAB, length).tolist()
        before = slots.counters().read_bytes if slots else 0
        begin = time.perf_counter()
        CachedSequence(model).generate(ids, 1, lambda _: 5, lambda _: False, lambda: False)
        seconds = time.perf_counter() - begin
        read = slots.counters().read_bytes - before if slots else 0
        found.append({"seconds": seconds, "read": read})
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--share", type=int, default=25)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.measure is not None:
        print(json.dumps(measure(a.directory, a.measure, a.tokens)))
        return
    if not (a.directory / "config.json").exists():
        a.directory.mkdir(parents=True, exist_ok=True)
        write_model(a.directory, a.layers)
    runs: dict[int, list[list[dict[str, Any]]]] = {0: [], a.share: []}
    rates = []
    for _ in range(a.rounds):
        for share, found in runs.items():
            rates.append(sequential_rate(a.directory, a.layers))
            sizes = ["--tokens", *map(str, a.tokens), "--measure", str(share)]
            command = [sys.executable, __file__, str(a.directory), *sizes]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    rate = statistics.median(rates)
    print(f"disk: {rate / 1e9:.2f} GB/s in order ({min(rates) / 1e9:.2f} - {max(rates) / 1e9:.2f})")
    print(f"| prompt | in memory, s | {a.share} %, s | GB read | disk, s | over the bound |")
    print("|--:|--:|--:|--:|--:|--:|")
    for i, length in enumerate(a.tokens):
        whole, some = (min(run[i]["seconds"] for run in runs[share]) for share in (0, a.share))
        read = statistics.median(run[i]["read"] for run in runs[a.share])
        over = some / max(whole, read / rate)
        print(
            f"| {length} | {whole:.2f} | {some:.2f} | {read / 1e9:.2f} | {read / rate:.2f} "
            f"| {over:.2f} |"
        )


if __name__ == "__main__":
    main()
