"""One expert into a GPU rank's buffers, of each format that goes there as it is: milliseconds,
medians. python bench/gpu_buffers.py [--threads 2]
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import numpy as np

import ktk
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.integration.kt_kernel.gpu_buffers import WeightWriter
from ktk.machine.memory import aligned_buffer

DEEPSEEK_V3 = {"hidden_size": 7168, "intermediate_size": 2048}
FORMATS = {"fp8": 8, "int4": 4, "bf16": 16}  # bits of a code
EXPERTS, ROUNDS = 4, 12


class Writer(WeightWriter):
    """A layer of random bytes."""

    layer_idx = 0

    def __init__(self, spec: MoESpec, threads: int) -> None:
        super().__init__()
        spans = aligned_buffer(EXPERTS * spec.layout.expert_bytes).reshape(EXPERTS, -1)
        spans[:] = np.random.default_rng(0).integers(0, 256, spans.shape, np.uint8)
        self._moe = ktk.MoE(StoredExperts.of_panels(spec, spans), num_threads=threads)

    @property
    def moe(self) -> ktk.MoE:
        return self._moe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    for name, bits in FORMATS.items():
        spec = MoESpec(EXPERTS, **DEEPSEEK_V3, weight_format=name)
        writer = Writer(spec, threads)
        weights = spec.hidden_size * spec.intermediate_size
        sizes = (2 * weights * bits // 8, weights, weights * bits // 8, weights)
        buffers = [np.zeros(size, np.uint8) for size in sizes]
        pointers = [[int(b.ctypes.data)] for b in buffers]
        if name == "bf16":
            pointers[1] = pointers[3] = [0]
        taken = []
        for number in range(ROUNDS):
            begin = time.perf_counter()
            writer.submit_write_weight_scale_to_buffer(1, number % EXPERTS, *pointers)
            writer.sync_write_weight_scale_to_buffer()
            taken.append(time.perf_counter() - begin)
        rate = 3 * weights * bits / 8 / median(taken) / 1e9
        print(f"{name}: {median(taken) * 1e3:.1f} ms, {rate:.2f} GB/s, {threads} threads")


if __name__ == "__main__":
    main()
