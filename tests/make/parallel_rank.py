"""One rank of experts spread over processes: ``main(folder, rank, ranks, end)``.

Runs every case, writes {case: "" or what went wrong} to FOLDER/{RANK}.json. END: killed, stopped or
left: the last rank does not come to the last call, and the others say how they learn of it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ktk.bench.blocks import random_matrix
from ktk.checkpoint import write_layer
from ktk.errors import BackendError, CheckpointError, EngineError
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts, order_of
from ktk.ops.exchange import Exchange
from ktk.ops.expert_parallel import ParallelMoE, shares
from ktk.ops.moe import MoE
from ktk.placement.parallel import Spread
from ktk.placement.store import ExpertStore
from make.cases import assert_exact, pack_all, random_experts, random_hidden, random_routing

E, K, H, N = 10, 3, 100, 96
TIMEOUT = 5.0
FORMATS = ("int4", "nl4", "bf16", "fp8", "Q8_0")
CASES: dict[str, Callable[[Exchange], None]] = {}


def case(function: Callable[[Exchange], None]) -> Callable[[Exchange], None]:
    CASES[function.__name__] = function
    return function


def whole(name: str) -> StoredExperts:
    if name == "Q8_0":
        gate, up = (random_matrix(name, E, N, 128, seed) for seed in (3, 4))
        spec = MoESpec(E, 128, N, "gguf", activation_group=64)
        return StoredExperts(spec, gate, up, random_matrix(name, E, 128, N, 5))
    spec = MoESpec(E, H, N, name, has_bias=name == "int4")
    return pack_all(spec, random_experts(spec, 1))


def some(stored: StoredExperts, own: list[int]) -> StoredExperts:
    """Only these experts, the others' memory left behind."""
    order = order_of(stored.spec.num_experts, own)
    if stored.is_packed:
        kept = np.zeros((len(own), stored.data.shape[1] + 64), np.uint8)
        flat = kept.reshape(-1)
        flat = flat[-flat.ctypes.data % 64 :][: len(own) * stored.data.shape[1]]
        spans = flat.reshape(len(own), -1)
        spans[:] = stored.data[own]
        return StoredExperts.of_panels(stored.spec, spans, order)
    rows = [dataclasses.replace(m, data=m.data[own].copy()) for m in stored.matrices.values()]
    return StoredExperts(stored.spec, rows[0], rows[1], rows[2], order=order)


def parallel(name: str, exchange: Exchange, **options: Any) -> tuple[ParallelMoE, MoE]:
    stored = whole(name)
    own = shares(E, exchange.ranks)[exchange.rank]
    return ParallelMoE(some(stored, own), exchange, **options), MoE(stored)


def routed(tokens: int, seed: int, width: int = H) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (random_hidden(tokens, width, seed), *random_routing(tokens, K, E, seed))


@case
def each_format_has_the_bits_of_one_process(exchange: Exchange) -> None:
    for name in FORMATS:
        spread, alone = parallel(name, exchange)
        for tokens in (1, 5, exchange.rank * 4, 0):
            given = routed(tokens, 7 * exchange.rank + tokens, alone.spec.hidden_size)
            assert_exact(alone(*given), spread(*given))


@case
def tensors_of_every_dtype_come_back_as_such(exchange: Exchange) -> None:
    spread, alone = parallel("int4", exchange)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, ids, weights = (torch.from_numpy(a) for a in routed(6, exchange.rank))
        given = x.to(dtype), ids.int(), weights
        want, got = alone(*given), spread(*given)
        assert got.dtype == dtype and torch.equal(want.view(torch.uint8), got.view(torch.uint8))


@case
def odd_routing_is_what_it_is_in_one_process(exchange: Exchange) -> None:
    spread, alone = parallel("nl4", exchange)
    x, ids, weights = routed(9, 3 + exchange.rank)
    ids[0] = [-1, E, 2]  # outside
    ids[1] = [4, 4, 4]  # one expert thrice
    ids[2] = -1  # none
    weights[3] = [0, -1, 1e30]
    x[4, 7], x[5, 1] = np.nan, np.inf
    skip = np.arange(E) % 3 == exchange.rank % 3
    add = random_hidden(9, H, 5)
    with np.errstate(all="ignore"):
        assert_exact(alone(x, ids, weights), spread(x, ids, weights))
        want = alone(x, ids, weights, skip=skip, add=add)
        assert_exact(want, spread(x, ids, weights, skip=skip, add=add))
    given = routed(3, 1)
    nowhere = np.full_like(given[1], -1)
    assert not spread(given[0], nowhere, given[2]).any()


@case
def long_prompts_go_in_rounds(exchange: Exchange) -> None:
    spread, alone = parallel("int4", exchange, tokens_per_round=4)
    given = routed(3 + 9 * exchange.rank, exchange.rank)
    assert_exact(alone(*given), spread(*given))


@case
def the_numpy_backend_sums_likewise(exchange: Exchange) -> None:
    spread, alone = parallel("int4", exchange, method="NUMPY")
    given = routed(4, exchange.rank)
    assert_exact(alone(*given), spread(*given))


@case
def an_expert_on_several_ranks_is_taken_from_the_nearest(exchange: Exchange) -> None:
    stored = whole("int4")
    own = sorted({*shares(E, exchange.ranks)[exchange.rank], 0, 9})
    spread = ParallelMoE(some(stored, own), exchange)
    x, _, weights = routed(4, exchange.rank)
    ids = np.full(weights.shape, [0, 9, 0])
    before = exchange.bytes_sent
    assert_exact(MoE(stored)(x, ids, weights), spread(x, ids, weights))
    others = exchange.ranks - 1
    assert exchange.bytes_sent - before == others * (24 + 4)  # sizes, and that all is well


@case
def experts_move_between_ranks(exchange: Exchange) -> None:
    stored = whole("bf16")
    full = ExpertStore(stored)
    store = ExpertStore.absent(stored.spec)
    for e in shares(E, exchange.ranks)[exchange.rank]:
        store.place(e, full.copy_of(e))
    spread = ParallelMoE(store, exchange)
    given = routed(5, exchange.rank)
    want = MoE(stored)(*given)
    assert_exact(want, spread(*given))
    first, last = exchange.rank == 0, exchange.rank == exchange.ranks - 1
    if first:
        store.place(0, None)
    if last:
        store.place(0, full.copy_of(0))
    x, _, weights = given
    ids = np.zeros(weights.shape, np.int64)
    error, match = (BackendError, "experts 0") if first else (EngineError, "rank 0 could not run")
    if not last:  # which has it by now, but not in its table
        with pytest.raises(error, match=match):
            spread(x, ids, weights)
    else:
        with pytest.raises(EngineError, match="rank 0 could not run"):
            spread(x, ids, weights)
    spread.refresh()
    assert_exact(want, spread(*given))


@case
def experts_that_nobody_has_are_named(exchange: Exchange) -> None:
    own = [e for e in shares(E, exchange.ranks)[exchange.rank] if e not in (1, 8)]
    with pytest.raises(BackendError, match=f"experts 1, 8 of 10 are on none of {exchange.ranks}"):
        ParallelMoE(some(whole("int4"), own), exchange)


@case
def input_that_one_rank_refuses_ends_the_call_for_all_and_no_more(exchange: Exchange) -> None:
    spread, alone = parallel("int4", exchange)
    x, ids, weights = routed(3, exchange.rank)
    bad = exchange.ranks - 1
    if exchange.rank == bad:
        with pytest.raises(ValueError, match="hidden_states has shape"):
            spread(x[:, :7], ids, weights)
    else:
        with pytest.raises(EngineError, match=f"rank {bad} could not take part"):
            spread(x, ids, weights)
    assert_exact(alone(x, ids, weights), spread(x, ids, weights))


@case
def a_packed_directory_is_read_in_shares(exchange: Exchange) -> None:
    stored = whole("nl4")
    with tempfile.TemporaryDirectory() as path:
        write_layer(path, stored.spec, 2, stored.data)
        spread = ParallelMoE.load(path, 2, exchange)
    assert spread.moe.packed.num_stored == len(shares(E, exchange.ranks)[exchange.rank])
    given = routed(4, exchange.rank)
    assert_exact(MoE(stored)(*given), spread(*given))


@case
def a_rank_that_cannot_load_ends_it_for_all_at_once(exchange: Exchange) -> None:
    bad, begin = exchange.ranks - 1, time.monotonic()
    own, is_bad = shares(E, exchange.ranks)[exchange.rank], exchange.rank == bad

    def attempt(way: str) -> None:
        if is_bad and way == "file":
            ParallelMoE.load("no/such", 0, exchange)
        name = "nl4" if is_bad and way == "layer" else "int4"
        rounds = 0 if is_bad and way == "argument" else 4
        ParallelMoE(some(whole(name), own), exchange, tokens_per_round=rounds)

    for way, error, match in (
        ("file", CheckpointError, "no/such"),
        ("argument", ValueError, "tokens_per_round=0"),
        ("layer", EngineError, "rank 0 has another layer"),
    ):
        if not is_bad:
            reason = "has another layer" if way == "layer" else "could not load its experts"
            error, match = EngineError, f"rank {bad} {reason}"
        with pytest.raises(error, match=match):
            attempt(way)
    assert time.monotonic() - begin < 30
    each_format_has_the_bits_of_one_process(exchange)


@case
def a_forked_child_is_told_that_connections_are_its_parents(exchange: Exchange) -> None:
    child = os.fork()
    if not child:
        try:
            exchange.numbers(np.zeros((exchange.ranks, 1), np.int64))
        except EngineError as error:
            os._exit(0 if "made before fork()" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


@case
def as_many_bytes_go_as_the_model_on_paper_says(exchange: Exchange) -> None:
    spread, _ = parallel("int4", exchange)
    tokens = 400
    x, ids, weights = routed(tokens, 3 + exchange.rank)
    before = exchange.bytes_sent
    spread(x, ids, weights)
    own = np.full((exchange.ranks, 1), exchange.bytes_sent - before, np.int64)
    sent = exchange.numbers(own).mean()  # ten experts are not equally many on each of four
    model = Spread(exchange.ranks, E, K, 4 * H, 4 * spread._width)
    assert abs(sent / (tokens * model.bytes_per_token) - 1) < 0.05, (sent, model)


def last_call(exchange: Exchange, end: str) -> str:
    """How a rank learns that the last one is gone: what it hears, twice, and after what time."""
    spread, _ = parallel("int4", exchange)
    given = routed(3, exchange.rank)
    spread(*given)
    if exchange.rank == exchange.ranks - 1:
        if end == "left":
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL if end == "killed" else signal.SIGSTOP)
    heard = []
    for _ in range(2):
        begin = time.monotonic()
        with pytest.raises(EngineError, match=f"a rank of {exchange.ranks} is gone") as caught:
            spread(*given)
        heard.append(time.monotonic() - begin)
    assert "Start all ranks again" in str(caught.value)
    assert heard[0] < TIMEOUT + 3, heard
    assert heard[1] < 0.1, heard
    return ""


def main(folder: Path, rank: int, ranks: int, end: str | None) -> None:
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", limit, world_size=ranks, rank=rank)
    exchange = Exchange(timeout=TIMEOUT if end else 60)
    said = {}
    cases: dict[str, Callable[[Exchange], Any]] = CASES
    if end:
        cases = {end: lambda exchange: last_call(exchange, end)}
    for name, run in cases.items():
        try:
            run(exchange)
            said[name] = ""
        except BaseException:
            said[name] = traceback.format_exc()
        if exchange.lost and not end:
            break
    (folder / f"{rank}.json").write_text(json.dumps(said))
    if end:
        os._exit(0)  # the group cannot be taken down any more
    dist.barrier()
    dist.destroy_process_group()
