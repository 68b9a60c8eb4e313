"""Formats of checkpoints in turns with bf16: a token's call against the time its bytes take to be
read, and many tokens' call against bf16's.

    python bench/native_precisions.py [--experts 32] [--rounds 9] [--tokens 256] [--threads 1]
        [--formats mxfp4,fp8]

A layer of Qwen3-30B-A3B cut to some experts, random codes. Each round samples the read ceiling
before and after and calls every format, one token with as many routings as there are experts to
deal, then many tokens once. Medians over rounds, by the clock on the wall; behind them the least
of the processor's time, which other programs disturb less and which means something on one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from time import perf_counter, process_time

import numpy as np

from ktk.bench.layer import expert_bytes, hidden_states
from ktk.bench.roofline import READ, Roofline
from ktk.bench.shapes import SHAPES, routings
from ktk.experts.formats import PANELS
from ktk.experts.formats.floats import as_bits
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.machine.memory import aligned_buffer
from ktk.ops.moe import MoE

FORMATS = [f for f in PANELS.values() if not f.is_integer and (f.scales or f.name == "bf16")]


def random_layer(spec: MoESpec) -> StoredExperts:
    """Experts of small finite codes, all scales 2 ** -10."""
    size, rng = spec.layout.expert_bytes, np.random.default_rng(0)
    one = rng.integers(0, 0x38, size, dtype=np.uint8)
    for name in spec.layout.projections:
        matrix, panels = spec.layout.matrix(name), spec.layout.panels(one, name)
        if matrix.scale_bytes:
            scale = as_bits(np.full(1, 2.0**-6, np.float32), matrix.scale_dtype)
            panels[:, : matrix.scales_end] = np.tile(
                scale.view(np.uint8), matrix.scales_end // scale.nbytes
            )
        if matrix.format.has_tensor_scale:
            tensor = np.array([2.0**-4], np.float32).view(np.uint8)
            panels[:, matrix.scales_end : matrix.scales_end + 4] = tensor
    spans = aligned_buffer(spec.num_experts * size).reshape(-1, size)
    spans[:] = one
    return StoredExperts.of_panels(spec, spans)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--formats", default=",".join(f.name for f in FORMATS))
    asked = parser.parse_args()
    names = {*asked.formats.split(","), "bf16"}
    shape = dataclasses.replace(SHAPES["qwen3-30b-a3b"], num_experts=asked.experts)
    sizes = shape.num_experts, shape.hidden_size, shape.intermediate_size
    moes = {
        f.name: MoE(random_layer(MoESpec(*sizes, f.name)), num_threads=asked.threads)
        for f in FORMATS
        if f.name in names
    }
    one, many = hidden_states(shape, 1), hidden_states(shape, asked.tokens)
    deals = routings(shape, 1, shape.num_experts // shape.top_k * 3, 1)
    batch = routings(shape, asked.tokens, 1, 2)[0]
    roof, reads = Roofline(asked.threads), []
    fractions: dict[str, list[float]] = {name: [] for name in moes}
    decode: dict[str, list[float]] = {name: [] for name in moes}
    prefill: dict[str, list[float]] = {name: [] for name in moes}
    least = {name: [float("inf"), float("inf")] for name in moes}
    for moe in moes.values():  # warm
        moe(many, batch.ids, batch.weights)
    for _ in range(asked.rounds):
        for name, moe in moes.items():
            before = roof.sample([READ])[READ]
            seconds = []
            for routing in deals:
                begin, used = perf_counter(), process_time()
                moe(one, routing.ids, routing.weights)
                least[name][0] = min(least[name][0], process_time() - used)
                seconds.append(perf_counter() - begin)
            read = max(before, roof.sample([READ])[READ])
            begin, used = perf_counter(), process_time()
            moe(many, batch.ids, batch.weights)
            least[name][1] = min(least[name][1], process_time() - used)
            prefill[name].append(perf_counter() - begin)
            decode[name].append(statistics.median(seconds))
            touched = shape.top_k * expert_bytes(moe.spec)
            fractions[name].append(touched / read / decode[name][-1])
            reads.append(read)
    print(
        f"read {statistics.median(reads) / 1e9:.1f} GB/s ({min(reads) / 1e9:.1f} - "
        f"{max(reads) / 1e9:.1f}), {roof.num_threads} threads, {moes['bf16'].kernel}"
    )
    for name, moe in moes.items():
        ratios = [a / b for a, b in zip(prefill[name], prefill["bf16"], strict=True)]
        bits = expert_bytes(moe.spec) * 8 / moe.spec.num_weights
        ms, part = 1e3 * statistics.median(decode[name]), statistics.median(fractions[name])
        long, ratio = 1e3 * statistics.median(prefill[name]), statistics.median(ratios)
        rate = shape.top_k * expert_bytes(moe.spec) / least[name][0] / 1e9
        used = least[name][1] / least["bf16"][1]
        print(
            f"| {name} | {bits:.2f} | {ms:.3f} ({part:.2f}) | {long:.1f} ({ratio:.2f}) | "
            f"{rate:.1f} | {used:.2f} |"
        )


if __name__ == "__main__":
    main()
