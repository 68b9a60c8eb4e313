"""What deferred experts gain in time, beside a simulated device.

    python bench/deferral_time.py [--device 0.2 0.5 1.0] [--layers 8]

Layers of Qwen3-30B-A3B's shape through KTMoEWrapper's submit_forward and sync_forward, one token.
The device is a sleep: it takes so many milliseconds a layer for what lies before the experts, and
no core of the CPU. Prints milliseconds a layer, medians of interleaved rounds, beside the model

    max(device, c * deferred) + c * (8 - deferred),   c: the CPU's time of one expert,

a device whose layer hides the deferred experts. Sleeps take longer than asked; what they took is
measured.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

import ktk
from ktk.experts.spec import MoESpec

E, K, H, N = 128, 8, 2048, 768


def layer(index: int, deferred: int, weights: list[torch.Tensor]) -> ktk.KTMoEWrapper:
    """Random experts; all wrappers have the same ones, each its own copy."""
    made = ktk.KTMoEWrapper(
        index,
        E,
        K,
        H,
        N,
        method="INT4",
        group_size=128,
        max_deferred_experts_per_token=deferred,
    )
    made.load_weights_from_tensors(*weights)
    return made


class Step:
    """One token through all layers."""

    def __init__(self, layers: list[ktk.KTMoEWrapper]) -> None:
        self.layers = layers
        self.generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(1, H, generator=self.generator).bfloat16()

    def __call__(self, device: float) -> tuple[float, float]:
        """Seconds a layer, and those of them that the device took."""
        slept, begin = 0.0, time.perf_counter()
        for made in self.layers:
            scores = torch.rand(1, E, generator=self.generator)
            weights, ids = scores.topk(K)
            asleep = time.perf_counter()
            if device:
                time.sleep(device)
            slept += time.perf_counter() - asleep
            made.submit_forward(self.x, ids, weights)
            made.sync_forward(self.x)
        count = len(self.layers)
        return (time.perf_counter() - begin) / count, slept / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", type=float, nargs="+", default=[0.0, 0.2, 0.5, 1.0])
    parser.add_argument("--deferred", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    shapes = ((E, N, H), (E, N, H), (E, H, N))
    weights = [torch.randn(s, generator=generator) / s[2] ** 0.5 for s in shapes]
    last = options.layers - 1
    spec = MoESpec(E, H, N, "int4", 128)
    print(f"{options.layers} layers, {spec.layout.expert_bytes * E / 1e6:.0f} MB each")
    steps = {
        most: Step([layer(n, most if n < last else 0, weights) for n in range(options.layers)])
        for most in options.deferred
    }
    times: dict[tuple[float, int], list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for device in options.device:
            for most, step in steps.items():
                times.setdefault((device, most), []).append(step(device / 1e3))
    alone = median(t for t, _ in times[options.device[0], 0]) - median(
        t for _, t in times[options.device[0], 0]
    )
    one = alone / K
    print(f"the CPU's {K} experts {alone * 1e3:.2f} ms")
    print("device ms" + "".join(f"{most:>16} deferred" for most in options.deferred))
    for device in options.device:
        row, slept = "", 0.0
        for most in options.deferred:
            found = times[device, most]
            total, slept = median(t for t, _ in found), median(t for _, t in found)
            model = max(slept, one * most) + one * (K - most)
            row += f"{total * 1e3:>10.2f} (model {model * 1e3:5.2f})"
        print(f"{slept * 1e3:9.2f}{row}", flush=True)


if __name__ == "__main__":
    main()
