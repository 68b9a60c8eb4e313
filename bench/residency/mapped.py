"""Experts read into slots, beside the same files mapped, in memory cgroups of the same size.

    python bench/residency/mapped.py DIRECTORY --cgroup /sys/fs/cgroup/memory [--share 50]

DIRECTORY is that of ``streamed.py``. --cgroup: a memory cgroup, v1 or v2, in which this may make
another: root's. The limit is that share of all experts and 256 MiB for the process. Both run tokens
with the routing of one made-up trace, layer by layer, nothing between; the first half is not timed.
Mapped experts come by page faults, and the kernel chooses who leaves; slots are as in
``streamed.py``. In turns, each in a process of its own, the files out of the page cache before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from streamed import SPEC, TOP_K, write

from ktk.checkpoint.mapping import MappedFile
from ktk.checkpoint.packed import TENSOR, layer_path, open_layer
from ktk.experts.stored import StoredExperts
from ktk.ops.moe import MoE
from ktk.ops.streamed import StreamedMoE
from ktk.ops.streamed_layers import StreamedLayers
from ktk.placement.residency.expert_memory import ExpertMemory
from ktk.placement.residency.reader import PackedReader
from ktk.placement.residency.synthetic import Synthetic, synthetic_trace

PROCESS_BYTES = 256 << 20  # of a process beside its experts
LIMITS = ("memory.max", "memory.limit_in_bytes")  # v2, v1


def forget(directory: Path, num_layers: int) -> None:
    """No page of the files is in memory, where it would belong to another cgroup."""
    for layer in range(num_layers):
        fd = os.open(layer_path(directory, layer), os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def mapped(directory: Path, layer: int) -> MoE:
    """A layer whose experts lie where the file is mapped."""
    file, spec = open_layer(directory, layer)
    begin = file.tensors[TENSOR].begin
    size = spec.num_experts * spec.layout.expert_bytes
    spans = MappedFile(layer_path(directory, layer)).data[begin : begin + size]
    file.close()
    return MoE(StoredExperts.of_panels(spec, spans.reshape(spec.num_experts, -1)))


def measure(directory: Path, kind: str, num_layers: int, share: int, tokens: int) -> float:
    """Tokens/s."""
    numbers = range(num_layers)
    layers: list[MoE] | list[StreamedMoE]
    if kind == "mapped":
        layers = [mapped(directory, number) for number in numbers]
    else:
        memory = ExpertMemory(f"{share}%")
        streamed = StreamedLayers(PackedReader(directory, numbers), numbers, memory, TOP_K)
        layers = [streamed[number] for number in numbers]
    trace = synthetic_trace(Synthetic(num_layers, SPEC.num_experts, TOP_K, tokens))
    x = np.random.default_rng(2).standard_normal((1, SPEC.hidden_size)).astype(np.float32)
    half, begin = len(trace.layers) // 2, 0.0
    for row in range(2 * half):
        if row == half:
            begin = time.perf_counter()
        ids, weights = trace.expert_ids[row : row + 1], trace.weights[row : row + 1]
        layers[int(trace.layers[row])](x, ids, weights)
    return tokens / 2 / (time.perf_counter() - begin)


def child(parent: Path, limit: int, arguments: list[str]) -> float:
    """``measure`` in a process and a cgroup of its own."""
    group = parent / f"ktk-bench-{os.getpid()}"
    group.mkdir()
    try:
        next(group / name for name in LIMITS if (group / name).exists()).write_text(str(limit))
        command = [sys.executable, __file__, *arguments, "--cgroup", str(group)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return float(json.loads(done.stdout.splitlines()[-1]))
    finally:
        for _ in range(50):  # the kernel lets go of its pages a little later
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--cgroup", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--share", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", choices=("mapped", "slots"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.kind:
        (a.cgroup / "cgroup.procs").write_text(str(os.getpid()))
        print(json.dumps(measure(a.directory, a.kind, a.layers, a.share, a.tokens)))
        return
    write(a.directory, a.layers)
    total = a.layers * SPEC.num_experts * SPEC.layout.expert_bytes
    limit = total * a.share // 100 + PROCESS_BYTES
    print(f"limit {limit / 1e9:.2f} GB, experts {total / 1e9:.2f} GB, {a.share} % in slots")
    found: dict[str, list[float]] = {"mapped": [], "slots": []}
    sizes = [f"--layers={a.layers}", f"--share={a.share}", f"--tokens={a.tokens}"]
    for _ in range(a.rounds):
        for kind, rates in found.items():
            forget(a.directory, a.layers)
            rates.append(child(a.cgroup, limit, [str(a.directory), *sizes, f"--kind={kind}"]))
    for kind, rates in found.items():
        listed = ", ".join(f"{rate:.1f}" for rate in rates)
        print(f"{kind}: {statistics.median(rates):.1f} tokens/s ({listed})")


if __name__ == "__main__":
    main()
