"""--expert-memory: `ktk run`, `chat`, `serve` and `doctor` of a model larger than memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from ktk.bench import forecast as forecasts
from ktk.convert.run import convert
from ktk.generate.describe import describe_model
from ktk.generate.engine import Limits
from ktk.generate.open import open_model
from ktk.generate.trial import start_engine
from ktk.integration.transformers.fast_paths import memory_paths
from ktk.machine import cpu
from ktk.placement.residency.expert_memory import ExpertMemory
from ktk.server.app import Access, build_app
from make.command_line import ktk
from make.serving import make_model

pytestmark = pytest.mark.skipif(cpu.best_isa() is None, reason="no compiled kernels run here")
HALF = ("--expert-memory", "50%")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("memory") / "tiny-moe")


@pytest.fixture(scope="module")
def packed(model: Path) -> Path:
    convert(model, model.parent / "packed", quant_method="int8")
    return model.parent / "packed"


def text_of(done: Any) -> str:
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_run_gives_the_same_text_and_says_what_was_in_memory(packed: Path) -> None:
    ask = ("run", str(packed), "Why?", "-n", "24", "--temperature", "0")
    plain = ktk(*ask)
    assert "experts:" not in plain.stderr
    done = ktk(*ask, *HALF, "--residency-policy", "SLRU")
    assert text_of(done) == text_of(plain)
    assert "experts: room for 8 of 16 experts (" in done.stderr
    assert "policy slru, " in done.stderr and "direct I/O" in done.stderr
    # 96 of the answer, 9 of a trial before it: a batch's experts count once a layer.
    assert "of 105 uses found their expert in memory" in done.stderr.replace(",", "")


def test_runs_figures_as_json_keep_their_invariants(packed: Path) -> None:
    done = ktk("run", str(packed), "Why?", "-n", "24", "--json", *HALF)
    found = json.loads(text_of(done))["expert_memory"]
    counted = found["counters"]
    assert counted["uses"] == counted["hits"] + counted["misses"] > 0
    assert counted["misses"] == counted["cold"] + counted["in_flight"]
    assert counted["reads"] > 0
    assert counted["read_bytes"] == counted["reads"] * found["slot_bytes"]
    assert counted["reads"] - counted["evictions"] == found["resident"] <= found["capacity"] == 8
    assert (found["policy"], found["num_experts"]) == ("lrfu", 16)


def test_chat_says_how_experts_are_used(packed: Path) -> None:
    done = ktk("chat", str(packed), "-n", "8", *HALF, given="Why?\n/info\n")
    assert done.returncode == 0, done.stderr
    assert "[experts so far: " in done.stderr and "were read]" in done.stderr
    assert "room for 8 experts" in done.stdout


@pytest.mark.parametrize("command", [("run", "Why?"), ("chat",), ("serve",), ("doctor",)])
def test_what_cannot_work_is_one_line_with_the_figure_that_does(
    command: tuple[str, ...], model: Path, packed: Path
) -> None:
    name, *rest = command

    def refused(directory: Path, *options: str) -> str:
        done = ktk(name, str(directory), *rest, *options)
        assert done.returncode != 0
        return " ".join(done.stderr.split())

    assert "give at least 4, or 1MiB" in refused(packed, "--expert-memory", "3")
    assert "capacity 'much'" in refused(packed, "--expert-memory", "much")
    assert "ktk convert" in refused(model, *HALF)
    assert "must be one of" in refused(packed, *HALF, "--residency-policy", "best")
    assert "needs --expert-memory" in refused(packed, "--residency-policy", "lru").replace("│", "")


def test_the_memory_that_is_asked_for_is_that_of_the_limit(packed: Path) -> None:
    whole = describe_model(packed)
    half = describe_model(packed, expert_memory=ExpertMemory("50%"))
    assert half.resident_experts == 8
    assert half.expert_bytes == whole.expert_bytes
    span = half.resident_bytes // 8
    assert whole.needed_bytes - half.needed_bytes == whole.expert_bytes - 8 * span
    assert half.resident_bytes <= whole.expert_bytes / 2


def test_a_limit_beyond_free_memory_is_refused(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As cgroups' limits are: ``cpu.memory`` reads them."""
    need = describe_model(packed, expert_memory=ExpertMemory("25%")).needed_bytes
    monkeypatch.setattr(cpu, "memory", lambda *_: (1 << 40, need))
    assert ktk("run", str(packed), "Why?", "-n", "3", "--expert-memory", "25%").returncode == 0
    done = ktk("run", str(packed), "Why?", "-n", "3", *HALF)
    assert done.returncode == 1 and "needs" in done.stderr and "are free" in done.stderr


def test_a_server_shows_residency_and_counts_it(packed: Path) -> None:
    opened = open_model(packed, expert_memory=ExpertMemory("50%"))
    engine = start_engine(opened, Limits(context=512, running=4))
    with TestClient(build_app(opened, engine, Access())) as client:

        def metrics() -> dict[str, float]:
            families = text_string_to_metric_families(client.get("/metrics").text)
            return {s.name: s.value for f in families for s in f.samples if "expert" in s.name}

        before = metrics()
        body = {"prompt": "def add", "temperature": 0, "max_tokens": 30}
        assert client.post("/v1/completions", json=body).status_code == 200
        shown = client.get("/v1/ktk").json()["expert_memory"]
        after = metrics()
    engine.stop()
    assert after["ktk_expert_hits_total"] > before["ktk_expert_hits_total"]
    assert after["ktk_expert_reads_total"] == shown["counters"]["reads"]
    assert (
        after["ktk_expert_cold_total"] + after["ktk_expert_in_flight_total"]
        == (shown["counters"]["misses"])
    )
    assert (after["ktk_experts"], after["ktk_experts_room"]) == (16, 8)
    assert after["ktk_experts_resident"] == shown["resident"]
    assert after["ktk_expert_memory_bytes"] == 8 * shown["slot_bytes"]
    assert {path["name"]: path["taken"] for path in _paths(opened)}[
        "all experts in memory"
    ] is False


def _paths(opened: Any) -> list[dict[str, Any]]:

    return [path.to_json() for path in memory_paths(opened.model)]


def test_doctor_predicts_the_speed_from_the_disk_and_hits(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasts, "SECONDS", 0.2)

    def predicted(limit: str) -> dict[str, Any]:
        done = ktk("doctor", str(packed), "--headers", "--json", "--expert-memory", limit)
        found = json.loads(text_of(done))
        assert found["resident_experts"] > 0
        return dict(found["forecast"])

    half, whole = predicted("50%"), predicted("100%")
    assert 0.3 < half["hit_rate"] < 1 == whole["hit_rate"]
    assert whole["missed_bytes"] == 0 < half["missed_bytes"]
    assert half["read_bytes"] == whole["read_bytes"] > half["missed_bytes"]
    for found in (half, whole):
        assert 1e6 < found["disk_rate"] < 1e12 and 1e8 < found["memory_rate"] < 1e12
        disk = found["missed_bytes"] / found["disk_rate"]
        seconds = disk + found["read_bytes"] / found["memory_rate"]
        assert found["tokens_per_second"] == pytest.approx(1 / seconds, rel=1e-2)
    shown = ktk("doctor", str(packed), "--headers", *HALF).stdout
    assert "predicted" in shown and "tokens/s" in shown
    assert json.loads(ktk("doctor", str(packed), "--headers", "--json").stdout)["forecast"] is None
