"""What a rotation costs: a layer with it and without, on the same panels, in turns.

    python bench/rotation.py [--format int8] [--shape qwen3-30b-a3b] [--tokens 1,64] [--rounds 5]

Every variant runs the same bytes, whose sizes a rotation does not change where it divides the
shape: what differs is the work on activations alone. Times are the least of the processor's for
this process on one thread, which other programs disturb less than the clock on the wall. Beside a
call's own time stands the share of it by columns: rotated less plain time of a call of 1,024 tokens
without experts, which rounds x alone, for each of hidden_size + top_k * intermediate_size columns.
"""

from __future__ import annotations

import argparse
import dataclasses
from time import process_time

import numpy as np

from ktk.bench.layer import hidden_states, random_expert
from ktk.bench.shapes import SHAPES, Routing, routings
from ktk.experts.formats import PANELS
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.machine.memory import aligned_buffer
from ktk.ops.moe import MoE
from ktk.quantise.pack import pack_experts
from ktk.reference.moe import ExactExperts

WIDTHS = (0, 64, 256)
POOL = 16  # routings of each number of tokens
COLUMN_TOKENS = 1024


def checked(moe: MoE, two: StoredExperts, hidden: np.ndarray, routing: Routing) -> None:
    """RuntimeError unless two tokens have the reference's bits; experts are two that alternate."""
    ids, weights = routing.ids[:2], routing.weights[:2]
    want = ExactExperts(two).forward(hidden[:2], ids % 2, weights)
    if not np.array_equal(want, moe(hidden[:2], ids, weights)):
        raise RuntimeError(f"{moe.spec.turns} on {moe.kernel} differs from the reference")


def least_seconds(
    moes: dict[int, MoE], hidden: np.ndarray, pool: list[Routing], rounds: int
) -> dict[int, float]:
    """The least seconds of one processor that a call takes, by rotation."""
    least = dict.fromkeys(moes, float("inf"))
    for i in range(rounds):
        ids, weights, _ = pool[i % len(pool)]
        for width, moe in moes.items():
            begin = process_time()
            moe(hidden, ids, weights)
            least[width] = min(least[width], process_time() - begin)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", default="int8", choices=[*PANELS])
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=[*SHAPES])
    parser.add_argument("--tokens", default="1,4,16,64,256,1024")
    parser.add_argument("--activation-groups", default="64,256")
    parser.add_argument("--rounds", type=int, default=5, help="Of the longest calls.")
    given = parser.parse_args()
    shape = SHAPES[given.shape]
    first = MoESpec(2, shape.hidden_size, shape.intermediate_size, given.format, rotation=0)
    two = pack_experts(first, lambda e: random_expert(shape, e))
    data = aligned_buffer(shape.num_experts * first.layout.expert_bytes)
    data = data.reshape(shape.num_experts, -1)
    for e in range(2):
        data[e::2] = two.data[e]
    for group in map(int, given.activation_groups.split(",")):
        moes: dict[int, MoE] = {}
        for width in WIDTHS:
            spec = dataclasses.replace(first, activation_group=group, rotation=width)
            whole = dataclasses.replace(spec, num_experts=shape.num_experts)
            moes[width] = MoE(StoredExperts.of_panels(whole, data), num_threads=1)
            pair = StoredExperts.of_panels(spec, two.data)
            checked(moes[width], pair, hidden_states(shape, 2), routings(shape, 2, 1, 0)[0])
        print(f"{shape}; {moes[0].kernel}; activation groups of {group}; one thread")
        many = routings(shape, COLUMN_TOKENS, 1, 2)[0]
        nobody = [Routing(np.full_like(many.ids, -1), many.weights, 0)]
        of_x = least_seconds(moes, hidden_states(shape, COLUMN_TOKENS), nobody, 8 * given.rounds)
        columns = shape.hidden_size + shape.top_k * shape.intermediate_size
        more = {w: (of_x[w] - of_x[0]) / COLUMN_TOKENS / shape.hidden_size for w in WIDTHS[1:]}
        print("; ".join(f"{w}: {1e9 * more[w]:.2f} ns a column" for w in more))
        for num_tokens in map(int, given.tokens.split(",")):
            hidden, pool = hidden_states(shape, num_tokens), routings(shape, num_tokens, POOL, 2)
            rounds = max(given.rounds, min(400, given.rounds * 64 // num_tokens))
            least = least_seconds(moes, hidden, pool, rounds)
            print(f"{num_tokens:5d} tokens {1e3 * least[0]:9.3f} ms", end="")
            for w in WIDTHS[1:]:
                share = more[w] * columns * num_tokens / least[0]
                print(f"; {w}: {least[w] / least[0]:.3f}, by columns {share:.2%}", end="")
            print(flush=True)


if __name__ == "__main__":
    main()
