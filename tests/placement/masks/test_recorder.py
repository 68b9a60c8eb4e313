"""Recording passes: counts, records, what is left out, and other threads that start and dump."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ktk.placement.masks.files import read_statistics
from ktk.placement.masks.grid import ExpertGrid
from ktk.placement.masks.recorder import MODES, ExpertRecorder
from make.cases import assert_exact

GRID = ExpertGrid(3, 4, (1, 2))


def record(recorder: ExpertRecorder) -> None:
    """A prompt of two tokens, then a token whose experts a native call leaves."""
    recorder.begin_pass()
    recorder.note(0, np.array([[0, 1], [1, 3]]))
    recorder.note(1, np.array([[2, -1], [2, 9]]))  # two are no experts
    recorder.end_pass()
    recorder.begin_pass()
    recorder.chosen[:] = [[3, 0], [1, 2]]
    recorder.end_pass()
    recorder.begin_pass()
    recorder.chosen[0] = [3, 2]  # the other layer's call is Python's
    recorder.note(1, np.array([[0, 3]]))
    recorder.end_pass()


WANT = np.array([[0, 0, 0, 0], [2, 2, 1, 3], [1, 1, 3, 1]])


@pytest.mark.parametrize("mode", MODES)
def test_counts_of_each_mode(mode: str, tmp_path: Path) -> None:
    recorder = ExpertRecorder(GRID, 2, mode)
    recorder.start()
    record(recorder)
    assert recorder.num_passes == 3
    assert_exact(WANT, recorder.counts())
    path = recorder.dump(tmp_path)
    assert_exact(WANT.astype(np.float64), read_statistics(path))
    assert recorder.num_passes == 0
    assert recorder.counts().sum() == 0
    assert recorder.is_recording
    with pytest.raises(ValueError, match="nothing was recorded"):
        recorder.dump(tmp_path)


def test_records_of_passes_and_tokens(tmp_path: Path) -> None:
    recorder = ExpertRecorder(GRID, 2, "per_token")
    recorder.start()
    record(recorder)
    records = torch.load(recorder.dump(tmp_path), weights_only=True)["records"]
    assert [r["forward_pass_id"] for r in records] == [0, 1, 2]
    assert records[0]["topk_ids_of_layer"].tolist() == [
        [[-1, -1], [-1, -1]],
        [[0, 1], [1, 3]],
        [[2, -1], [2, -1]],
    ]
    assert records[1]["topk_ids_of_layer"].tolist() == [[[-1, -1]], [[3, 0]], [[1, 2]]]
    assert records[2]["topk_ids_of_layer"].tolist() == [[[-1, -1]], [[3, 2]], [[0, 3]]]
    assert records[0]["global_physical_count"].tolist() == [
        [0, 0, 0, 0],
        [1, 2, 0, 1],
        [0, 0, 2, 0],
    ]


def test_nothing_is_counted_before_the_start_nor_after_the_stop() -> None:
    recorder = ExpertRecorder(GRID, 2)
    record(recorder)
    assert recorder.num_passes == 0
    recorder.start()
    record(recorder)
    recorder.stop()
    record(recorder)
    assert_exact(WANT, recorder.counts())
    recorder.start()
    assert recorder.counts().sum() == 0


def test_a_pass_without_a_beginning_is_not_counted() -> None:
    recorder = ExpertRecorder(GRID, 2)
    recorder.start()
    recorder.note(0, np.array([[0, 1]]))
    recorder.end_pass()
    assert recorder.num_passes == 0
    recorder.begin_pass()
    recorder.note(0, np.array([[0, 1]]))
    recorder.begin_pass()  # the one before it failed
    recorder.note(0, np.array([[2, 3]]))
    recorder.end_pass()
    assert recorder.counts()[1].tolist() == [0, 0, 1, 1]


def test_starting_twice_or_stopping_nothing_warns(caplog: pytest.LogCaptureFixture) -> None:
    recorder = ExpertRecorder(GRID, 2)
    with caplog.at_level(logging.WARNING, logger="ktk"):
        recorder.stop()
        recorder.start()
        recorder.start()
    assert [r.message.split(":")[0] for r in caplog.records] == [
        "no experts are being recorded",
        "experts are being recorded already",
    ]


def test_dumps_of_another_thread_lose_no_pass_and_count_none_twice(tmp_path: Path) -> None:
    recorder = ExpertRecorder(GRID, 2)
    recorder.start()
    done = threading.Event()

    def run() -> None:
        for _ in range(400):
            record(recorder)
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    total = np.zeros(GRID.shape)
    while not done.is_set():
        if recorder.num_passes:
            total += read_statistics(recorder.dump(tmp_path))
    thread.join()
    total += recorder.counts()
    assert_exact(400.0 * WANT, total)


@pytest.mark.parametrize(("top_k", "mode"), [(0, "stat"), (5, "stat"), (2, "per_layer")])
def test_what_is_refused(top_k: int, mode: str) -> None:
    with pytest.raises(ValueError, match=r"must be 1\.\.4|must be one of stat"):
        ExpertRecorder(GRID, top_k, mode)
