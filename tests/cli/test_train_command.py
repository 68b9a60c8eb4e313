"""``ktk train``: what it writes, that a killed run goes on with the same bits, its errors."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("peft")
from ktk.cli import main
from ktk.train.state import FILE
from make.command_line import ktk
from make.forked import forked
from make.serving import make_model

FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    said = [{"prompt": f"add {at}", "completion": f" is {2 * at}"} for at in range(9)]
    path.write_text("\n".join(map(json.dumps, said)))
    return path


def arguments(model: Path, data: Path, out: Path, *more: object) -> list[str]:
    """Six steps, dropout, a state after every second one."""
    given = (
        *("train", model, "--data", data, "--out", out, "--lora", 4, "--lr", 0.01),
        *("--steps", 6, "--accumulate", 2, "--batch", 2, "--dropout", 0.1, "--save-every", 2),
    )
    return [str(a) for a in (*given, *more)]


def test_a_killed_run_goes_on_to_the_same_adapter(model: Path, data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = ktk(*arguments(model, data, whole, "--json"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    with forked(main, arguments(model, data, parts)) as child:
        child.until(lambda: "step 3 of 6" in child.err)
        child.signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert (parts / FILE).exists() and not (parts / FILES[1]).exists()
    done = ktk(*arguments(model, data, parts, "--resume"))
    assert done.returncode == 0, done.stderr
    assert "step 3 of 6" in done.stderr and "step 1 of 6" not in done.stderr
    assert "6 of 6 steps" in done.stdout and "ktk run" in done.stdout
    for name in FILES:
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    assert report["held_out_loss_after"] < report["held_out_loss_before"]
    assert report["losses"][-1] < report["losses"][0] and len(report["losses"]) == 6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--targets", "experts,mlp"), "targets 'experts,mlp': must be some of experts,attention"),
        (("--resume",), "has no state of a run"),
        (("--held-out", "0.99"), "too few to hold some out"),
        (("--plot", "loss.gif"), "must end in .png or .svg"),
    ],
)
def test_what_cannot_be_is_one_line(
    model: Path, data: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    done = ktk(*arguments(model, data, tmp_path / "out", *more))
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_wrong_line_of_the_data_is_named(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one two"}\n{"text": "one')
    done = ktk(*arguments(model, data, tmp_path / "out"))
    assert done.returncode == 1
    assert f"{data}: line 2: is not JSON" in done.stderr


def test_a_run_is_not_written_over(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / FILE).touch()
    done = ktk(*arguments(model, data, tmp_path))
    assert done.returncode == 1
    assert "has a run already: --resume goes on with it" in done.stderr


@pytest.mark.parametrize("targets", ["experts", "experts,attention"])
def test_a_model_runs_with_its_adapter(
    model: Path, data: Path, tmp_path: Path, targets: str
) -> None:
    given = arguments(model, data, tmp_path, "--targets", targets, "--steps", 2, "--lr", 0.03)
    assert ktk(*given).returncode == 0

    def text(*more: str) -> str:
        done = ktk("run", str(model), "add 5", "--raw", "-n", "8", *more)
        assert done.returncode == 0, done.stderr
        assert "slower" not in done.stderr
        return done.stdout

    assert text("--adapter", str(tmp_path)) != text()


def test_a_plot_shows_the_loss(model: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "loss.svg"
    done = ktk(*arguments(model, data, tmp_path / "out", "--steps", 2, "--plot", plot))
    assert done.returncode == 0, done.stderr
    assert "<!-- loss" in plot.read_text()
