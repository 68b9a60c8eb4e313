"""``ktk place``: masks by every strategy, and traces simulated, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", minversion="5")

from ktk.cli.place_views import heat_lines
from ktk.placement.masks.files import read_masks, write_statistics
from ktk.placement.masks.grid import ExpertGrid
from ktk.placement.masks.published import TOKENS_PER_SECOND
from ktk.placement.masks.simulate import SIMULATED
from ktk.placement.masks.strategies import STRATEGIES, Known, place
from ktk.placement.masks.workload import Workload, served_trace
from ktk.placement.residency.capacity import parse_bytes
from make.cases import assert_exact
from make.command_line import Done, ktk
from make.transformers_cases import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a dense layer, and its statistics beside it."""
    path = tmp_path_factory.mktemp("model")
    made = make_model("deepseek_v3")
    made.save_pretrained(path)
    config = made.config
    shape = (1, config.num_hidden_layers, config.n_routed_experts)
    counts = np.random.default_rng(0).integers(1, 100, shape)
    write_statistics(path / "stats.pt", counts)
    return path


def grid_of(model: Path) -> ExpertGrid:
    config = json.loads((model / "config.json").read_text())
    layers = config["num_hidden_layers"]
    moe_layers = tuple(range(config["first_k_dense_replace"], layers))
    return ExpertGrid(layers, config["n_routed_experts"], moe_layers)


def report(*arguments: object) -> dict[str, Any]:
    done = ktk("place", *map(str, arguments), "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "optimal"])
def test_masks_of_each_strategy_are_written(strategy: str, model: Path, tmp_path: Path) -> None:
    grid, stats = grid_of(model), model / "stats.pt"
    found = report(
        model, "--stats", stats, "--strategy", strategy, "--gpu-ratio", 0.5, "-o", tmp_path / "m.pt"
    )
    counts = np.asarray(read_counts(stats))
    want = place(grid, strategy, grid.total // 2, Known(counts))
    assert_exact(want, read_masks(tmp_path / "m.pt"))
    assert found["moe_layers"] == list(grid.moe_layers)
    assert found["gpu_experts"] == grid.total // 2 == found["room"]
    assert found["gpu_experts_of_layers"] == want[grid.rows].sum(axis=1).tolist()
    uses = counts[grid.rows]
    assert found["covered"] == pytest.approx((uses * want[grid.rows]).sum() / uses.sum())
    assert [row["strategy"] for row in found["strategies"]] == list(STRATEGIES)[:4]


def read_counts(path: Path) -> np.ndarray:
    from ktk.placement.masks.files import read_statistics

    return read_statistics(path)


def test_optimal_is_the_shortest_step_of_all(model: Path) -> None:
    found = report(
        model,
        "--stats",
        model / "stats.pt",
        "--strategy",
        "optimal",
        "--gpu-ratio",
        0.7,
        "--cpu-bandwidth",
        1,
        "--gpu-bandwidth",
        1.5,
        "--transfer",
        3,
    )
    seconds = {row["strategy"]: row["step_seconds"] for row in found["strategies"]}
    assert set(seconds) == set(STRATEGIES)
    assert min(seconds, key=lambda name: seconds[name]) == "optimal"
    assert found["costs"]["transfer"] == pytest.approx(3e-6)


def test_room_by_experts_of_a_layer_and_by_bytes(model: Path) -> None:
    grid = grid_of(model)
    by_layer = report(model, "--gpu-experts", 2)
    assert by_layer["strategy"] == "uniform"
    assert by_layer["gpu_experts_of_layers"] == [2] * len(grid.moe_layers)
    by_bytes = report(model, "--gpu-memory", f"{3 * by_layer['expert_bytes']}B")
    assert by_bytes["gpu_experts"] == 3
    assert by_bytes["gpu_bytes"] == 3 * by_layer["expert_bytes"]


def test_tables_show_what_the_json_says(model: Path) -> None:
    arguments = ("place", str(model), "--stats", str(model / "stats.pt"), "--gpu-ratio", "0.5")
    done = ktk(*arguments)
    assert done.returncode == 0, done.stderr
    for row in json.loads(ktk(*arguments, "--json").stdout)["strategies"]:
        line = next(x for x in done.stdout.splitlines() if x.startswith(row["strategy"]))
        assert f"{row['covered']:.1%}" in line
    assert "frequency <" in done.stdout
    for layer in grid_of(model).moe_layers:
        assert f"layer {layer} " in done.stdout


def test_the_heat_map_tells_where_experts_are_and_how_much_they_are_used() -> None:
    grid = ExpertGrid(2, 8, (1,))
    masks = grid.masks(np.array([[True, False] * 4]))
    counts = np.array([[0] * 8, [16, 16, 9, 9, 4, 4, 0, 0]])
    assert heat_lines(grid, masks, counts, 80) == [("layer 1", "█*▓+▒:░.")]
    wide = ExpertGrid(1, 40, (0,))
    held = np.arange(40)[None] < 20
    ((_, row),) = heat_lines(wide, held, None, 30)
    assert row == "█" * 10 + "*" * 10  # two experts a character


def test_a_made_up_trace_and_one_of_a_file_are_simulated(tmp_path: Path) -> None:
    path = tmp_path / "served.trace"
    served_trace(Workload(num_layers=3, num_experts=16, top_k=2, requests=16, answer=20)).save(path)
    found = report("--simulate", path)
    assert [(r["ratio"], r["strategy"]) for r in found["rows"]] == [
        (n / 10, name) for n in range(11) for name in SIMULATED
    ]
    measured = {r["ratio"]: r["published"] for r in found["rows"] if r["strategy"] == "random"}
    assert measured == {ratio: row[0] for ratio, row in TOKENS_PER_SECOND.items()}
    assert 0 < found["pairs_ordered_as_published"] <= found["pairs_published"]
    one = ktk("place", "--simulate", str(path), "--gpu-ratio", "0.25", "--speeds", "10", "20")
    assert one.returncode == 0, one.stderr
    assert "25%" in one.stdout and "50%" not in one.stdout
    assert "10 and 20 tokens/s" in one.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "name a model"),
        (("MODEL",), "say how much room"),
        (("MODEL", "--gpu-ratio", "0.1", "--gpu-experts", "1"), "say how much room"),
        (("MODEL", "--gpu-ratio", "1.1"), "must be 0..1"),
        (("MODEL", "--gpu-experts", "-1"), "must be 0.."),
        (("MODEL", "--gpu-experts", "999"), "which is all of a layer"),
        (("MODEL", "--gpu-memory", "8"), "must be bytes"),
        (("MODEL", "--gpu-memory", "muchB"), "bytes as 8GiB"),
        (("MODEL", "--gpu-ratio", "0.1", "--strategy", "best"), "must be one of uniform"),
        (("MODEL", "--gpu-ratio", "0.1", "--strategy", "frequency"), "needs statistics"),
        (("MODEL", "--gpu-ratio", "0.1", "--strategy", "optimal"), "needs --gpu-bandwidth"),
        (("MODEL", "--gpu-ratio", "0.1", "--stats", "none.pt"), "none.pt: no such file"),
        (("MODEL", "--gpu-ratio", "0.1", "--stats", "OTHER"), "the model has"),
        (("MODEL", "--gpu-ratio", "0.1", "--plot", "heat.txt"), "must end in .png or .svg"),
        (("MODEL", "--simulate", "made-up"), "leave out the model"),
        (("--simulate", "none.trace"), "none.trace"),
        (("--simulate", "made-up", "--speeds", "5", "4"), "must be above 0"),
        (("no-such-model", "--gpu-ratio", "0.1"), "no such file or directory"),
    ],
)
def test_what_is_refused_is_one_line(
    arguments: tuple[str, ...], says: str, model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.pt"
    write_statistics(other, np.ones((1, 2, 3), np.int64))
    named = {"MODEL": str(model), "OTHER": str(other)}
    done: Done = ktk("place", *(named.get(word, word) for word in arguments))
    assert done.returncode == 1
    assert says in done.stderr and done.stderr.count("\n") == 1


def test_sizes_in_words() -> None:
    assert parse_bytes("8GiB") == 8 << 30
    assert parse_bytes("500 MB") == 500_000_000


def test_a_picture_is_drawn(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for arguments in ([], ["--stats", str(model / "stats.pt")]):
        for name in ("heat.png", "heat.svg"):
            target = tmp_path / name
            done = ktk("place", str(model), "--gpu-ratio", "0.5", "--plot", str(target), *arguments)
            assert done.returncode == 0, done.stderr
            assert target.stat().st_size > 1000
            target.unlink()
