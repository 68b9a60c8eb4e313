"""One layer's experts over processes of this machine, beside one process that has them all:
python bench/expert_parallel.py [--ranks 2] [--tokens 1 16 128]

Each rank has one thread and --tokens tokens of its own. The one process has as many threads as
there are ranks, and all ranks' tokens. They take turns, round by round; medians.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch.distributed as dist

from ktk.bench.layer import random_expert
from ktk.bench.shapes import Shape
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts, order_of
from ktk.machine.memory import aligned_buffer
from ktk.ops.exchange import Exchange
from ktk.ops.expert_parallel import ParallelMoE, shares
from ktk.ops.moe import MoE
from ktk.quantise.pack import pack_expert

SPEC = MoESpec(128, 2048, 768, "int4")  # of Qwen3-30B-A3B
TOP_K, ROUNDS, CALLS = 8, 9, 8


def layer(own: list[int]) -> StoredExperts:
    """These experts, all alike, in memory of their own."""
    shape = Shape("", SPEC.hidden_size, SPEC.intermediate_size, SPEC.num_experts, TOP_K)
    spans = aligned_buffer(len(own) * SPEC.layout.expert_bytes).reshape(len(own), -1)
    pack_expert(SPEC, random_expert(shape), spans[0])
    spans[1:] = spans[0]
    return StoredExperts.of_panels(SPEC, spans, order_of(SPEC.num_experts, own))


def routed(tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, SPEC.num_experts)).argsort(axis=1)[:, :TOP_K].astype(np.int64)
    hidden = rng.standard_normal((tokens, SPEC.hidden_size), np.float32)
    return hidden, ids, rng.random((tokens, TOP_K), np.float32)


def milliseconds(call: Callable[..., object], tokens: int, seed: int) -> float:
    """Of a call, over CALLS with other experts each."""
    given = [routed(tokens, seed + i) for i in range(CALLS)]
    call(*given[0])
    begin = time.perf_counter()
    for arguments in given:
        call(*arguments)
    return (time.perf_counter() - begin) / CALLS * 1e3


def serve(rank: int, ranks: int, store: str) -> None:
    """A rank: a line with the number of tokens in, a line with milliseconds out."""
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{store}", limit, world_size=ranks, rank=rank)
    exchange = Exchange()
    spread = ParallelMoE(layer(shares(SPEC.num_experts, ranks)[rank]), exchange, num_threads=1)
    for line in sys.stdin:
        before = exchange.bytes_sent
        taken = milliseconds(spread, int(line), 100 * rank)
        print(taken, (exchange.bytes_sent - before) / (CALLS + 1), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        serve(given.rank, given.ranks, given.store)
        return
    alone = MoE(layer(list(range(SPEC.num_experts))), num_threads=given.ranks)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--ranks", str(given.ranks), "--store", f"{folder}/s"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(given.ranks)
        ]
        print(f"{given.ranks} ranks of a thread; one process of {given.ranks} threads")
        for tokens in given.tokens:
            one, spread, sent = [], [], 0.0
            for number in range(ROUNDS):
                one.append(milliseconds(alone, tokens * given.ranks, 7 * number))
                for rank in ranks:
                    assert rank.stdin is not None
                    print(tokens, file=rank.stdin, flush=True)
                said = [str(rank.stdout and rank.stdout.readline()).split() for rank in ranks]
                spread.append(max(float(taken) for taken, _ in said))
                sent = float(said[0][1])
            print(
                f"{tokens:4} tokens a rank: {median(spread):7.2f} ms, {sent / tokens / 1e3:.1f} kB "
                f"a token sent by rank 0; one process with all of them: {median(one):7.2f} ms"
            )
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.close()
            rank.wait(60)


if __name__ == "__main__":
    main()
