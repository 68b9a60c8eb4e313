"""One layer's forward and backward pass with LoRA on its experts, beside the machine's ceilings
and, where asked, beside what everyone has: transformers' grouped_mm over bf16 experts with peft's
target_parameters.

    python bench/training.py [--method INT8,INT4:32,BF16] [--tokens 512] [--rank 16] [--rival]
                             [--rounds 5] [--json FILE]

All are measured in turns. `forward` is the operator's own call without adapters; `trained` the one
that keeps what the backward pass needs, with adapters on gate, up and down. The bound is that of
the same operations: the forward's products at the peak of its kernels, all else, transposed
products and adapters, at the peak of fp32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ktk.bench.layer import hidden_states, parse_method, random_expert
from ktk.bench.roofline import Roofline, peak_of
from ktk.bench.shapes import SHAPES, Routing, Shape, routings
from ktk.experts.lora import ExpertLora
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.machine.memory import aligned_buffer
from ktk.ops.moe import MoE
from ktk.ops.training import backward, forward
from ktk.quantise.pack import pack_experts

Clocks = dict[str, list[float]]


def layer_of(shape: Shape, weight_format: str, group_size: int | None) -> MoE:
    """Two random experts over and over, each time in memory of their own."""
    first = MoESpec(2, shape.hidden_size, shape.intermediate_size, weight_format, group_size)
    two = pack_experts(first, lambda e: random_expert(shape, e))
    data = aligned_buffer(shape.num_experts * first.layout.expert_bytes)
    data = data.reshape(shape.num_experts, -1)
    for e in range(2):
        data[e::2] = two.data[e]
    spec = dataclasses.replace(first, num_experts=shape.num_experts)
    return MoE(StoredExperts.of_panels(spec, data))


def adapters_of(shape: Shape, rank: int) -> ExpertLora:
    spec = MoESpec(shape.num_experts, shape.hidden_size, shape.intermediate_size, "fp32")
    rng = np.random.default_rng(1)
    names = [f"{name}_{letter}" for name in ("gate", "up", "down") for letter in "ab"]
    arrays = {
        n: rng.standard_normal(ExpertLora.shape(n, spec, rank), np.float32) * np.float32(0.01)
        for n in names
    }
    return ExpertLora(**arrays, scaling=2.0)


def timed(clocks: Clocks, name: str, call: Callable[[], Any]) -> Any:
    begin = time.perf_counter()
    found = call()
    clocks.setdefault(name, []).append(time.perf_counter() - begin)
    return found


def run_ktk(
    clocks: Clocks, name: str, moe: MoE, lora: ExpertLora, x: np.ndarray, routing: Routing
) -> None:
    ids, weights = routing.ids, routing.weights
    timed(clocks, f"{name} forward", lambda: moe(x, ids, weights))
    _, saved = timed(clocks, f"{name} trained", lambda: forward(moe, x, ids, weights, lora))
    timed(clocks, f"{name} backward", lambda: backward(moe, saved, x))


class Rival:
    """bf16 experts in torch's grouped_mm, adapters by peft's target_parameters."""

    def __init__(self, shape: Shape, rank: int) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(
            hidden_size=shape.hidden_size,
            moe_intermediate_size=shape.intermediate_size,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
        )
        config._experts_implementation = "grouped_mm"
        holder = torch.nn.Module()
        holder.experts = Qwen3MoeExperts(config).to(torch.bfloat16)
        for weight in holder.experts.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        targets = ["experts.gate_up_proj", "experts.down_proj"]
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=targets)
        self.torch = torch
        self.experts = get_peft_model(holder, lora).base_model.model.experts
        self.trained = [p for p in self.experts.parameters() if p.requires_grad]

    def run(self, clocks: Clocks, x: np.ndarray, routing: Routing) -> None:
        torch = self.torch
        hidden = torch.from_numpy(x).bfloat16().requires_grad_()
        ids = torch.from_numpy(routing.ids)
        weights = torch.from_numpy(routing.weights).bfloat16()
        out = timed(clocks, "rival trained", lambda: self.experts(hidden, ids, weights))
        timed(clocks, "rival backward", lambda: out.backward(torch.ones_like(out)))
        for p in self.trained:
            p.grad = None


def bound_seconds(shape: Shape, tokens: int, rank: int, peak: float, fp32: float) -> float:
    products = shape.operations(tokens)
    sides = 3 * (shape.hidden_size + shape.intermediate_size)
    adapters = 2 * tokens * shape.top_k * rank * sides  # of the forward pass
    return products / peak + (products + 3 * adapters) / fp32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="INT8,INT4:32,BF16")
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=[*SHAPES])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rival", action="store_true", help="torch and peft, in bf16, too.")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    shape, tokens = SHAPES[given.shape], given.tokens
    methods = [parse_method(text) for text in given.method.split(",")]
    assert all(m.format is not None for m in methods)
    moes = {m.text: layer_of(shape, m.format.name, m.group_size) for m in methods}
    lora, x = adapters_of(shape, given.rank), hidden_states(shape, tokens)
    roofline = Roofline(buffer_bytes=1 << 20)
    fp32 = peak_of(next(iter(moes.values())).kernel, "fp32")
    of = {name: peak_of(moe.kernel, moe.spec.weight_format) for name, moe in moes.items()}
    rival = Rival(shape, given.rank) if given.rival else None
    clocks: Clocks = {}
    for i, routing in enumerate(routings(shape, tokens, given.rounds + 1, 2)):
        if i == 1:
            clocks.clear()  # the first round touches memory
        roofline.sample(sorted({fp32, *of.values()}), 0.2)
        for name, moe in moes.items():
            run_ktk(clocks, name, moe, lora, x, routing)
        if rival is not None:
            rival.run(clocks, x, routing)
    median = {name: statistics.median(values) for name, values in clocks.items()}
    peaks = {name: statistics.median(values) for name, values in roofline.samples.items()}
    print(f"{shape}; {tokens} tokens, rank {given.rank}; {roofline.num_threads} threads")
    print("; ".join(f"{name} {value / 1e9:.0f} GOP/s" for name, value in peaks.items()))
    names = [*moes, *(["rival"] if rival is not None else [])]
    for name in names:
        steps = {k: median.get(f"{name} {k}") for k in ("forward", "trained", "backward")}
        both = median[f"{name} trained"] + median[f"{name} backward"]
        print(f"{name:10s}", end="")
        for step, seconds in steps.items():
            if seconds is not None:
                print(f" {step} {1e3 * seconds:8.1f} ms", end="")
        print(f"; both {both / median[f'{name} trained']:.2f} of trained", end="")
        if name in moes:
            least = bound_seconds(shape, tokens, given.rank, peaks[of[name]], peaks[fp32])
            print(f", {both / median[f'{name} forward']:.2f} of forward", end="")
            print(f", bound {1e3 * least:.1f} ms ({least / both:.2f})", end="")
        print()
    if given.json:
        given.json.write_text(json.dumps({"clocks": clocks, "peaks": roofline.samples}))


if __name__ == "__main__":
    main()
