"""``ktk doctor --plan``: what is proposed fits, and nothing better does."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

pytest.importorskip("transformers")

from ktk import cli
from ktk.bench import roofline
from ktk.cli import serve
from ktk.generate import describe, plan
from ktk.generate.describe import OVERHEAD
from ktk.generate.plan import REQUESTS, best, ways
from make.serving import make_model

RATE = 20e9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("plan") / "tiny-moe")


def with_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(describe.cpu, "memory", lambda *_: (1 << 40, num_bytes))


def test_where_all_fits_the_whole_context_is_proposed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 64 << 30)
    found = ways(str(model), RATE)
    assert [way.description.weight_format for way in found] == list(plan.FORMATS)
    chosen = best(found)
    assert chosen is not None and chosen.weight_format == "int8"
    assert (chosen.context, chosen.requests) == (32768, 16)
    own = chosen.description
    bytes_of_a_token = own.rest_bytes + own.expert_bytes * 2 / 8
    assert chosen.tokens_per_second == pytest.approx(RATE / bytes_of_a_token, rel=0.01)


@pytest.mark.parametrize("kib", [0, 50, 3000, 20_000, 200_000])
def test_what_is_proposed_fits_and_no_longer_context_does(
    model: Path, monkeypatch: pytest.MonkeyPatch, kib: int
) -> None:
    """kib : for keys and values, beside the int8 way's weights."""
    with_free(monkeypatch, 64 << 30)
    own = ways(str(model), RATE)[1].description
    token_bytes = own.kv_bytes // own.context
    room = kib << 10
    with_free(monkeypatch, int((own.expert_bytes + own.rest_bytes + OVERHEAD + room) / 0.9) + 8)
    way = ways(str(model), RATE)[1]
    fitting = room // token_bytes
    if fitting < 1024:
        assert not way.fits and way.context == way.requests == 0
        return
    assert way.fits and way.kv_bytes == way.context * way.requests * token_bytes <= room + 64
    longer = [n for n in (*plan.CONTEXTS, 32768) if way.context < n <= 32768]
    most = REQUESTS if way.requests >= REQUESTS else 1
    assert all(length * most > fitting for length in longer)
    assert way.requests == 16 or (way.requests + 1) * way.context > fitting
    (asked,) = [w for w in ways(str(model), RATE, context=1500) if w.weight_format == "int8"]
    assert asked.context == 1500


def test_a_directory_larger_than_memory_gets_expert_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 64 << 30)
    found = ways(str(model), RATE)[1].description
    large: dict[str, Any] = {"expert_bytes": 40 << 30, "available_bytes": 16 << 30}
    monkeypatch.setattr(
        plan, "describe_model", lambda *_, **__: replace(found, kind="packed", **large)
    )
    (way,) = ways("somewhere", RATE)
    assert way.fits and 8 << 30 < way.expert_memory < 16 << 30
    assert way.tokens_per_second is None
    assert f"--expert-memory {way.expert_memory >> 20}MiB" in way.command()
    monkeypatch.setattr(
        plan, "describe_model", lambda *_, **__: replace(found, kind="float", **large)
    )
    assert best(ways("somewhere", RATE)) is None


def test_the_command_is_one_that_ktk_serve_takes(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Measured:
        """As Roofline, which takes a second."""

        def sample(self, names: list[str]) -> dict[str, float]:
            return dict.fromkeys(names, RATE)

    monkeypatch.setattr(roofline, "Roofline", Measured)
    shown = CliRunner().invoke(cli.app(), ["doctor", str(model), "--plan", "--json"])
    assert shown.exit_code == 0, shown.output
    report = json.loads(shown.stdout)
    words = shlex.split(report["command"])
    assert words[:3] == ["ktk", "serve", str(model)]
    parsed = typer.main.get_command(serve_only()).make_context("serve", words[2:])
    assert parsed.params["weight_format"] == "int8" and parsed.params["kv_cache"] > 0
    assert parsed.params["context"] == report["ways"][1]["context"]
    table = CliRunner().invoke(cli.app(), ["doctor", str(model), "--plan"]).stdout
    assert "int8" in table and "ktk serve" in table
    refused = CliRunner().invoke(cli.app(), ["doctor", "--plan"])
    assert isinstance(refused.exception, ValueError) and "for a model" in str(refused.exception)


def serve_only() -> typer.Typer:
    application = typer.Typer()
    application.command()(serve.command)
    return application
