"""A layer's experts over 1 to 64 machines: the model on paper beside a simulation.

    python bench/expert_nodes.py [--shape qwen3-30b-a3b] [--tokens 1 16] [--skew 0 1]

On paper (``ktk.placement.parallel.Spread``) experts are chosen alike and all nodes have the same to
do. The simulation draws each token's experts, seeded, evenly or the more often the lower their
number (--skew: the exponent of a Zipf law, over experts in a random order), and counts what
``ParallelMoE`` does: hidden states that go out, once for each other node of a token, pairs, outputs
that come back, distinct experts that each node reads. A step takes as long as its slowest node:
reads, then the larger of what it sends and what it gets. ``bench/expert_parallel.py`` measures 2
and 4 processes of one machine.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from ktk.bench.shapes import SHAPES, Shape
from ktk.placement.parallel import Spread

PAIR = 8  # bytes: which expert, and of which token
HEADINGS = (
    *("nodes", "tokens of each", "skew", "kB a token", "on paper", "experts read", "on paper"),
    *("of the slowest", "ms a layer", "on paper", "bound by"),
)
ALL_EXPERTS = {"deepseek-v3": 256}  # the shape's own are cut to what fits one machine


@dataclass(frozen=True)
class Step:
    """read : experts of the node that has most to read, on average over steps, and of a mean node.
    bytes_per_token : sent, of a layer. seconds : of the slowest node.
    """

    read_most: float
    read_mean: float
    bytes_per_token: float
    seconds: float


def drawn(
    rng: np.random.Generator, tokens: int, experts: int, top_k: int, skew: float
) -> np.ndarray:
    """int64 (tokens, top_k): distinct experts, without replacement by weight (Efraimidis and
    Spirakis, Weighted random sampling with a reservoir, 2006).
    """
    weight = rng.permutation(np.arange(1, experts + 1.0) ** -skew)
    keys = np.log(rng.random((tokens, experts))) / weight
    return np.argsort(-keys, axis=1)[:, :top_k]


def simulate(
    model: Spread,
    tokens: int,
    skew: float,
    expert_bytes: float,
    rates: tuple[float, float, float],
    steps: int,
    seed: int,
) -> Step:
    """Steps of ``tokens`` of each node. rates : as in ``Spread.seconds``."""
    rng = np.random.default_rng(seed)
    memory, network, latency = rates
    share = model.num_experts // model.ranks
    found = []
    for _ in range(steps):
        ids = drawn(rng, tokens * model.ranks, model.num_experts, model.top_k, skew)
        home = np.repeat(np.arange(model.ranks), tokens)
        used = np.zeros(model.num_experts, bool)
        used[ids] = True
        read = used.reshape(model.ranks, share).sum(axis=1)
        nodes = ids // share  # (tokens of all, top_k): where each pair runs
        pairs = np.zeros((model.ranks, model.ranks))  # [from, to]
        np.add.at(pairs, (np.repeat(home, model.top_k), nodes.ravel()), 1)
        goes = np.zeros((len(ids), model.ranks), bool)
        goes[np.arange(len(ids))[:, None], nodes] = True
        states = np.zeros((model.ranks, model.ranks))
        np.add.at(states, home, goes)
        out = states * model.hidden_bytes + pairs * PAIR + pairs.T * model.output_bytes
        np.fill_diagonal(out, 0)
        wire = np.maximum(out.sum(axis=0), out.sum(axis=1)) / network
        waits = 3 * latency if model.ranks > 1 else 0.0
        seconds = (read * expert_bytes / memory).max() + wire.max() + waits
        found.append((read.max(), read.mean(), out.sum() / len(ids), seconds))
    return Step(*np.mean(found, axis=0))


def table(shape: Shape, given: argparse.Namespace) -> None:
    experts = ALL_EXPERTS.get(shape.name, shape.num_experts)
    expert_bytes = shape.num_weights * given.bits / 8
    rates = (given.memory * 1e9, given.network * 1e9 / 8, given.latency * 1e-6)
    print(f"{shape.name}, {experts} experts of {expert_bytes / 1e6:.1f} MB")
    print(f"| {' | '.join(HEADINGS)} |")
    print("|---" * len(HEADINGS) + "|")
    for nodes in given.nodes:
        model = Spread(nodes, experts, shape.top_k, 2 * shape.hidden_size, 4 * shape.hidden_size)
        for tokens in given.tokens:
            read, exchange = model.seconds(tokens, expert_bytes, *rates)
            bound = "network" if exchange > read else "memory"
            for skew in given.skew:
                step = simulate(model, tokens, skew, expert_bytes, rates, given.steps, given.seed)
                paper = model.experts_read(tokens * nodes)
                print(
                    f"| {nodes} | {tokens} | {skew:g} | {step.bytes_per_token / 1e3:.1f} | "
                    f"{model.bytes_per_token / 1e3:.1f} | {step.read_mean:.2f} | {paper:.2f} | "
                    f"{step.read_most:.2f} | {step.seconds * 1e3:.2f} | "
                    f"{(read + exchange) * 1e3:.2f} | {bound} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", default=["qwen3-30b-a3b", "deepseek-v3"])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--skew", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--bits", type=float, default=4.5, help="per weight")
    parser.add_argument("--memory", type=float, default=200, help="GB/s of a node")
    parser.add_argument("--network", type=float, default=25, help="Gbit/s of a node, each way")
    parser.add_argument("--latency", type=float, default=50, help="microseconds of an exchange")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    for name in given.shape:
        table(SHAPES[name], given)


if __name__ == "__main__":
    main()
