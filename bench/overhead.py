"""What a call costs beside the kernels: microseconds, medians. python bench/overhead.py

Nothing here reads weights: every id is out of range, so the kernels have no rows.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from statistics import median

import numpy as np

import ktk
from ktk.backends import Operands
from ktk.experts.spec import MoESpec
from ktk.machine.memory import aligned_buffer

SPEC = MoESpec(128, 2048, 768, "int4", 128)


def microseconds(call: Callable[[], object], repeats: int = 3000) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - begin)
    return median(times) / 1e3


def empty_layer() -> ktk.MoE:
    size = SPEC.layout.expert_bytes
    data = aligned_buffer(SPEC.num_experts * size)  # never touched: takes no memory
    return ktk.MoE(ktk.StoredExperts.of_panels(SPEC, data.reshape(SPEC.num_experts, size)))


def main() -> None:
    moe = empty_layer()
    x, out = np.zeros((1, 2048), np.float32), np.empty((1, 2048), np.float32)
    nobody, weights = np.full((1, 8), -1), np.ones((1, 8), np.float32)
    compiled = moe.runner.experts
    rows = {
        f"compiled call, {moe.num_threads} threads, one run of the pool": microseconds(
            lambda: compiled.forward(x, nobody, weights, None, out, None)
        ),
        "MoE.forward, NumPy arrays": microseconds(lambda: moe(x, nobody, weights)),
    }
    import torch

    tensors = [torch.from_numpy(a) for a in (x, nobody, weights)]
    rows["compiled call, on torch's threads"] = microseconds(
        lambda: moe.runner.forward(Operands(x, nobody, weights, None, out))
    )
    rows["MoE.forward, torch tensors"] = microseconds(lambda: moe(*tensors))
    wrapper = ktk.KTMoEWrapper(0, 128, 8, 2048, 768, method="INT4")
    wrapper._moe = moe
    rows["KTMoEWrapper.forward"] = microseconds(lambda: wrapper.forward(*tensors))

    def submit() -> None:
        wrapper.submit_forward(*tensors)
        wrapper.sync_forward(tensors[0])

    rows["KTMoEWrapper.submit_forward + sync_forward"] = microseconds(submit)
    for name, value in rows.items():
        print(f"{value:8.1f}  {name}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10_000):
        empty_layer()(x, nobody, weights)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{grown:8d}  KiB more memory at most after 10,000 layers made, called and dropped")


if __name__ == "__main__":
    main()
