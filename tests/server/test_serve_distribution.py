"""Recording experts of a running server: SGLang's routes, and the file that they write."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from ktk.cli.serve import RECORDER_MODES
from ktk.placement.masks.files import DIRECTORY, read_statistics
from ktk.placement.masks.grid import ExpertGrid
from ktk.placement.masks.recorder import MODES, ExpertRecorder
from ktk.server.distribution import ROUTES
from ktk.server.watch import ExpertWatch
from make.command_line import ktk
from make.serving import Server, make_model, serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = make_model(tmp_path_factory.mktemp("serve") / "tiny-moe", is_native=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DIRECTORY, str(folder))
        mode = ("--expert-distribution-recorder-mode", "per_token")
        with serving(model, "--context", "512", *mode) as running:
            yield running
            assert running.end(signal.SIGINT) == 0


def complete(server: Server, tokens: int) -> None:
    body = {"prompt": [5, 6, 7, 8], "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    status, answer = server.request("/v1/completions", body)
    assert status == 200 and answer["usage"]["completion_tokens"] == tokens


def post(server: Server, action: str, **headers: str) -> tuple[int, str]:
    return server.request(ROUTES[action], b"", headers or None)


def test_answers_between_start_and_stop_are_recorded(server: Server, folder: Path) -> None:
    complete(server, 3)
    status, message = post(server, "dump")
    assert status == 400 and "nothing was recorded" in str(message)
    assert post(server, "start") == (200, "Start recording the expert distribution.\n")
    complete(server, 6)
    assert post(server, "stop") == (200, "Stop recording the expert distribution.\n")
    complete(server, 3)
    status, message = post(server, "dump")
    assert status == 200
    (path,) = folder.glob("*.pt")
    assert str(path) in message
    records = torch.load(path, weights_only=True)["records"]
    tokens = [record["topk_ids_of_layer"].shape[1] for record in records]
    assert tokens[0] == 4  # the prompt
    assert sum(tokens) in (4 + 5, 4 + 6)  # the last token's own pass may run before it is seen
    counts = read_statistics(path)
    top_k = records[0]["topk_ids_of_layer"].shape[2]
    of_layer = counts.sum(axis=1)
    assert set(of_layer.tolist()) <= {0.0, float(sum(tokens) * top_k)} and of_layer.any()


def test_experts_are_counted_while_somebody_looks(server: Server) -> None:
    """A recording has the model for itself, and is what is shown as long as it runs."""

    def look() -> tuple[int, int]:
        found = server.request("/v1/ktk/experts")[1]
        assert found["reason"] is None and found["layers"] == [0, 1]
        assert {len(row) for row in found["counts"]} == {8}
        return found["passes"], sum(map(sum, found["counts"]))

    complete(server, 3)
    assert look() == (0, 0)  # from now on
    complete(server, 3)
    passes, uses = look()
    assert passes >= 3 and uses in (2 * 2 * (4 + 2), 2 * 2 * (4 + 3))
    assert post(server, "start")[0] == 200
    assert look() == (0, 0)
    complete(server, 2)
    assert look()[1] > 0
    assert post(server, "stop")[0] == 200
    assert look() == (0, 0)
    assert post(server, "stop")[0] == 200  # for nothing: who looks is not disturbed for long
    look()
    complete(server, 2)
    assert look()[1] > 0


def test_a_watch_ends_when_nobody_looks_any_more() -> None:
    class Counting:
        """As ExpertStatistics."""

        def __init__(self) -> None:
            self.recorder, self.runs = ExpertRecorder(ExpertGrid(2, 4, (0, 1)), 2), 0

        def start(self) -> None:
            self.recorder.start()
            self.runs += 1

        def stop(self) -> None:
            self.recorder.stop()

    async def look() -> None:
        recording, own = Counting(), Counting()
        watch = ExpertWatch(cast(Any, recording), cast(Any, own), lease=0.05)
        for _ in range(4):
            assert watch.look()["counts"] == [[0] * 4] * 2
            await asyncio.sleep(0.03)
            assert watch.is_counting and own.recorder.is_recording
        await asyncio.sleep(0.1)
        assert not watch.is_counting and not own.recorder.is_recording and own.runs == 1
        watch.look()
        watch.release()
        assert not own.recorder.is_recording and own.runs == 2

    asyncio.run(look())
    assert ExpertWatch("no experts", None).look()["reason"] == "no experts"


def test_pages_of_other_sites_may_not_record(server: Server) -> None:
    status, message = post(server, "start", origin="https://elsewhere.example")
    assert status == 403 and "elsewhere" in str(message)
    assert server.request(ROUTES["start"])[0] == 405  # GET


def test_modes_of_the_command_line_are_the_recorders() -> None:
    assert RECORDER_MODES == MODES
    done = ktk("serve", "nowhere", "--expert-distribution-recorder-mode", "all")
    assert done.returncode != 0 and "must be one of stat" in done.stderr
