"""``ktk residency``: traces made and replayed from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ktk import cli
from ktk.placement.residency.capacity import parse_capacity
from ktk.placement.residency.policies import POLICIES
from ktk.placement.residency.trace import read_trace

SIZES = ("--layers", "4", "--experts", "16", "--top-k", "3", "--tokens", "60")


def ktk(*arguments: object) -> Result:
    words = ["residency", *map(str, arguments)]
    return CliRunner().invoke(cli.app(), words, env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "made.trace"
    done = ktk("generate", "-o", path, *SIZES)
    assert done.exit_code == 0, done.output
    assert "60 tokens, 4 layers of 16 experts, 3 a token" in done.stdout
    return path


def test_generate_writes_what_its_options_say(trace: Path, tmp_path: Path) -> None:
    found = read_trace(trace)
    assert (found.num_layers, found.num_experts, found.top_k) == (4, 16, 3)
    again = tmp_path / "again"
    ktk("generate", "-o", again, *SIZES)
    assert (read_trace(again).expert_ids == found.expert_ids).all()
    ktk("generate", "-o", again, *SIZES, "--seed", 1)
    assert (read_trace(again).expert_ids != found.expert_ids).any()


def test_replay_tells_every_policy_and_the_bound(trace: Path) -> None:
    done = ktk("replay", trace, "-c", "25%", "-c", 40, "--json")
    report = json.loads(done.stdout)
    assert [(r["policy"], r["capacity"]) for r in report["rows"]] == [
        (name, capacity) for capacity in (16, 40) for name in POLICIES
    ]
    for row in report["rows"]:
        bound = next(
            r
            for r in report["rows"]
            if r["policy"] == "belady" and r["capacity"] == row["capacity"]
        )
        assert 0 < row["hit_rate"] <= bound["hit_rate"]
        assert row["hit_rate"] == row["hits"] / (row["hits"] + row["misses"])
        assert len(row["layer_hit_rates"]) == 4
    table = ktk("replay", trace, "-c", "25%", "-c", 40).stdout
    for row in report["rows"]:
        line = next(x for x in table.splitlines() if x.split()[:1] == [row["policy"]])
        assert f"{row['hit_rate']:.1%}" in line.split()


def test_pools_parameters_and_bytes_reach_the_replay(trace: Path) -> None:
    def hits(*options: object) -> list[int]:
        done = ktk("replay", trace, "-c", 24, *options, "--json")
        assert done.exit_code == 0, done.output
        return [row["hits"] for row in json.loads(done.stdout)["rows"]]

    one = hits("-p", "2q")
    assert len(one) == 2  # and the bound
    assert hits("-p", "TWOQ") == one
    assert hits("-p", "2q", "--parameters", '{"a1_share": 0.75}')[0] != one[0]
    assert hits("-p", "2q", "--per-layer") != one
    assert hits("-p", "2q", "--min-per-layer", 5) != one
    assert hits("-p", "2q", "--min-per-layer", 5)[1] == one[1]
    done = ktk("replay", trace, "-c", "24 MB", "--expert-bytes", 1_000_000, "-p", "2q", "--json")
    row = json.loads(done.stdout)["rows"][0]
    assert (row["capacity"], row["capacity_bytes"], row["hits"]) == (24, 24_000_000, one[0])


REFUSED = {
    "room": (("-c", "11"), "must be at least 12"),
    "bytes": (("-c", "1GiB"), "the experts' size is unknown"),
    "policy": (("-p", "mru"), "must be one of lru"),
    "parameters": (("--parameters", "{}"), "name it with --policy"),
    "json": (("-p", "lru", "--parameters", "{"), "--parameters: "),
    "object": (("-p", "lru", "--parameters", "3"), "must be an object"),
    "unknown": (("-p", "lru", "--parameters", '{"x": 1}'), "x is unknown"),
    "plot": (("--plot", "a.pdf"), r"must end in \.png or \.svg"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_replayed_is_refused(case: str, trace: Path) -> None:
    options, message = REFUSED[case]
    done = ktk("replay", trace, *options)
    assert done.exit_code != 0
    with pytest.raises(ValueError, match=message):
        raise done.exception or AssertionError(done.output)


def test_a_plot_has_a_line_for_each_policy(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "hits.svg"
    assert ktk("replay", trace, "--plot", path).exit_code == 0
    text = path.read_text()
    for name in POLICIES:
        assert f"<!-- {name} -->" in text


CAPACITIES = {
    "48": 48,
    " 25% ": 50,
    "12.5%": 25,
    "100%": 200,
    "300": 200,
    "1MiB": 104,
    "1 MB": 100,
    "0.5mb": 50,
    "20000B": 2,
    "1TB": 200,
}


@pytest.mark.parametrize("text", CAPACITIES)
def test_capacities_are_read(text: str) -> None:
    assert parse_capacity(text, 200, 10_000) == CAPACITIES[text]


@pytest.mark.parametrize("text", ["", "-1", "1.5", "8 XB", "many", "%", "1e3", "5%%"])
def test_other_capacities_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="capacity"):
        parse_capacity(text, 200, 10_000)
