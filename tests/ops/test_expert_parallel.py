"""Experts over two and four processes: the bits of one, and a clear end where a rank is lost."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import pytest
import torch

from ktk.errors import EngineError
from ktk.machine import cpu
from ktk.ops.exchange import Exchange
from ktk.ops.expert_parallel import shares
from ktk.placement.parallel import Spread
from make.forked import forked
from make.parallel_rank import CASES, TIMEOUT
from make.parallel_rank import main as rank_main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cpu.best_isa() is None, reason="no compiled kernels run here"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo"),
]


def run(folder: Path, ranks: int, end: str | None = None) -> list[dict[str, str]]:
    """What each rank says of each case; the last one says nothing where it was to end."""
    environment = {"GLOO_SOCKET_IFNAME": "lo"}
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                forked(rank_main, folder, rank, ranks, end, environment=environment)
            )
            for rank in range(ranks)
        ]
        living = children[:-1] if end else children
        for child in living:
            child.wait(120)
        files = [folder / f"{rank}.json" for rank in range(len(living))]
        assert all(file.exists() for file in files), "\n".join(c.err for c in living)
        return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module", params=[2, 4])
def said(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    """Of every rank; all cases run in the same processes."""
    return run(tmp_path_factory.mktemp("ranks"), request.param)


@pytest.mark.parametrize("name", CASES)
def test_over_processes(said: list[dict[str, str]], name: str) -> None:
    of_ranks = [rank.get(name, "not run: an earlier case lost the others") for rank in said]
    wrong = "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(of_ranks) if text)
    assert not wrong, wrong


@pytest.mark.parametrize(("ranks", "end"), [(2, "left"), (4, "killed"), (4, "stopped")])
def test_a_lost_rank_is_an_error_on_all_others_in_bounded_time(
    ranks: int, end: str, tmp_path: Path
) -> None:
    begin = time.monotonic()
    assert run(tmp_path, ranks, end) == [{end: ""}] * (ranks - 1)
    assert time.monotonic() - begin < 60 + TIMEOUT


def test_without_torch_distributed_it_says_what_to_start() -> None:
    with pytest.raises(EngineError, match="torchrun"):
        Exchange()


def test_shares_are_neighbours_as_equal_as_can_be() -> None:
    assert shares(10, 4) == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]
    assert shares(2, 3) == [[0], [1], []]


def test_the_model_on_paper_counts_what_can_be_counted() -> None:
    """Two ranks of two experts, two of four chosen: 1 of 6 choices stays at home."""
    model = Spread(2, 4, 2, 100, 400)
    assert model.ranks_per_token == pytest.approx(5 / 6)
    assert model.bytes_per_token == pytest.approx(5 / 6 * 100 + 1 * 408)
    assert Spread(1, 4, 2, 100, 400).bytes_per_token == 0
    assert model.experts_read(1) == pytest.approx(1)
    assert model.experts_read(1e6) == pytest.approx(2)
    read, sent = model.seconds(1, 1e9, 1e9, 1e6, 1e-3)
    assert read == pytest.approx(model.experts_read(2)) and sent > 3e-3
