"""A layer of Qwen3-30B-A3B's shape with a share of its experts on a device.

    python bench/hybrid.py [--device cuda] [--tokens 1] [--layers 4]

Prints microseconds a call (medians, calls go round the layers, hidden states lie on the device),
and of a swap of one expert. With ``--device cpu`` both sides share the cores, and experts are
float32 there: that shows what the way costs, not what a device brings.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights, StoredExperts
from ktk.ops.device_experts import accelerator
from ktk.ops.hybrid import HybridMoE
from ktk.ops.moe import MoE
from ktk.quantise.pack import pack_experts

SPEC = MoESpec(128, 2048, 768, "int4", 128)
TOP_K = 8
Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def layer(seed: int) -> StoredExperts:
    """Random experts."""
    rng = np.random.default_rng(seed)

    def read(_: int) -> ExpertWeights:
        up = [rng.standard_normal((768, 2048), np.float32) / 45 for _ in range(2)]
        return ExpertWeights(up[0], up[1], rng.standard_normal((2048, 768), np.float32) / 28)

    return pack_experts(SPEC, read, 2)


def calls(tokens: int, device: torch.device, count: int) -> list[Call]:
    """Uniform routing: the share of experts is that of pairs."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        x = torch.randn(tokens, SPEC.hidden_size, generator=generator).bfloat16().to(device)
        order = torch.rand(tokens, SPEC.num_experts, generator=generator).argsort(dim=1)
        weights = torch.full((tokens, TOP_K), 1 / TOP_K)
        made.append((x, order[:, :TOP_K].to(device), weights.to(device)))
    return made


def microseconds(layers: list[Callable[..., torch.Tensor]], given: list[Call]) -> float:
    times = []
    for i, call in enumerate(given * 2):  # the first round warms
        begin = time.perf_counter()
        out = layers[i % len(layers)](*call)
        out.sum().item()  # waits for the device
        times.append(time.perf_counter() - begin)
    return median(times[len(given) :]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", help="default: the accelerator that torch finds, else cpu")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--calls", type=int, default=100)
    options = parser.parse_args()
    device = torch.device(options.device or accelerator() or "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    stored = [layer(seed) for seed in range(options.layers)]
    given = calls(options.tokens, device, options.calls)
    on_cpu = [MoE(experts) for experts in stored]
    plain = [lambda x, *more, moe=moe: moe(x.cpu(), *(m.cpu() for m in more)) for moe in on_cpu]
    print(
        f"{on_cpu[0].kernel}, {options.tokens} tokens, {device} {dtype}, torch {torch.__version__}"
    )
    print(f"MoE alone            {microseconds(plain, given):8.0f} us")
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        mask = np.arange(SPEC.num_experts) < share * SPEC.num_experts
        made = [HybridMoE(experts, mask, device=device, dtype=dtype) for experts in stored]
        print(f"{share:4.0%} on the device   {microseconds(made, given):8.0f} us", flush=True)
        if share != 0.5:
            continue
        swapped, times = mask.copy(), []
        for expert in range(20):
            swapped[[expert, 127 - expert]] = False, True
            begin = time.perf_counter()
            made[0].swap(swapped)
            times.append(time.perf_counter() - begin)
        print(f"     a swap of one   {median(times) * 1e6:8.0f} us")


if __name__ == "__main__":
    main()
