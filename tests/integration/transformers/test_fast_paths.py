"""Each fast path says yes or why not: in `ktk doctor MODEL`, in the server's description,
and once in a warning.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
from ktk import backends
from ktk.convert.run import convert
from ktk.integration.transformers import linear as linear_layers
from ktk.integration.transformers.fast_paths import FastPath, memory_paths
from ktk.ops import linear
from make.command_line import ktk
from make.serving import make_model

if linear.why_not() is not None:
    pytest.skip(str(linear.why_not()), allow_module_level=True)

NAMES = ["fused decode", "batching", "AMX", "repacked", "huge pages"]


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_layers, "SMALLEST", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("fast") / "tiny-moe")


def tried(model: Path, *options: str) -> dict[str, dict[str, Any]]:
    done = ktk("doctor", str(model), "--json", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["fast_paths"]
    assert [path["name"] for path in found] == NAMES
    assert all(path["taken"] == (path["reason"] is None) for path in found)
    return {path["name"]: path for path in found}


def test_doctor_tries_a_model_and_says_yes_or_why_not(model: Path) -> None:
    found = tried(model, "--linear", "int8")
    for name in ("fused decode", "batching", "repacked"):
        assert found[name]["taken"], found[name]
    assert found["fused decode"]["detail"] == "2 of 2 layers"
    amx = backends.backends()["AMXINT8"]
    assert found["AMX"]["reason"] == amx.why_not()
    assert "% of the experts' memory" in found["huge pages"]["detail"]


def test_what_is_lost_has_its_reason_and_one_warning(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = ktk("doctor", str(model), "--linear", "none")
    says = "model.layers.0, model.layers.1: q_proj is a Linear that torch runs"
    line = next(line for line in done.stdout.splitlines() if "fused decode" in line)
    assert line.strip().split(maxsplit=3)[2:] == ["no", f"0 of 2 layers, {says}"]
    ktk("run", str(model), "Why?", "-n", "3", "--linear", "none")
    assert [r.levelname for r in caplog.records] == ["WARNING"], "one for both"
    assert "decoded by torch, layer by layer, which is slower" in caplog.text


def test_headers_alone_try_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr("ktk.generate.open.load_model", lambda *_, **__: pytest.fail("loaded"))
    done = ktk("doctor", str(model), "--json", "--headers")
    assert done.returncode == 0 and json.loads(done.stdout)["fast_paths"] is None
    assert "fused decode" not in ktk("doctor", str(model), "--headers").stdout


def test_a_file_s_experts_are_repacked_only_when_asked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ktk.integration.transformers.gguf import load_gguf_model

    path = tmp_path / "whole.gguf"
    convert(model, path, quant_method="q8_0", whole="q8_0")

    def paths() -> dict[str, FastPath]:
        return {path.name: path for path in memory_paths(load_gguf_model(path))}

    found = paths()
    assert "KTK_REPACK=1 copies them" in str(found["repacked"].reason)
    assert "pages of the file" in str(found["huge pages"].reason)
    monkeypatch.setenv("KTK_REPACK", "1")
    assert paths()["repacked"].is_taken


def test_experts_of_a_last_resort_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ktk.experts.spec import MoESpec

    for name, backend in backends.backends().items():
        if not backend.is_last_resort:
            monkeypatch.setattr(backend, "why_not", lambda spec=None, name=name: f"no {name} today")
    for _ in range(3):
        assert backends.select("auto", MoESpec(4, 64, 32)).name == "NUMBA"
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "NUMBA runs the experts, many times slower" in caplog.text
    assert "no AVX2 today" in caplog.text


def test_nothing_is_claimed_of_a_model_without_ktk_s_experts() -> None:
    torch = pytest.importorskip("torch")
    assert [path.reason for path in memory_paths(torch.nn.Linear(2, 2))] == [
        "ktk runs no experts of it"
    ] * 3
