"""`ktk bench`: fractions that are right, layers that are checked, errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktk._cy import measure_module
from ktk.bench import layer as bench_layer
from ktk.bench import run as bench_run
from ktk.bench.layer import (
    Layer,
    build,
    check_memory,
    expert_bytes,
    hidden_states,
    parse_method,
    spec_of,
)
from ktk.bench.roofline import READ, Roofline, bound
from ktk.bench.run import Case, Round, build_layers, measure, report
from ktk.bench.shapes import SHAPES, Shape, routings
from ktk.cli import bench as bench_command
from make.command_line import Done
from make.forked import ktk

TINY = Shape("tiny", 64, 96, 5, 2)
needs_extension = pytest.mark.skipif(
    measure_module() is None, reason="the compiled extension is not built"
)


class FakeRoofline(Roofline):
    """Ceilings from a list: the n-th sample gives the n-th entry, bytes/s and operations/s."""

    def __init__(self, read: list[float], peak: list[float]) -> None:
        self.samples = {}
        self.buffer_bytes = 0
        self.given = {READ: list(read), "": list(peak)}

    def sample(self, names: list[str], seconds: float = 0.0) -> dict[str, float]:
        found = {name: self.given[READ if name == READ else ""].pop(0) for name in names}
        for name, value in found.items():
            self.samples.setdefault(name, []).append(value)
        return found


class FakeLayer(Layer):
    """Takes no time and is whatever a test wants."""

    method, backend, kernel, peak = "fake", "fake", "fake int8", "fake int8"
    expert_bytes, layer_bytes, bits_per_weight = 1000, 5000, 8.0

    def __init__(self, is_right: bool = True) -> None:
        self.is_right = is_right
        self.checked: list[int] = []

    def prepare(self, hidden: np.ndarray, routing: Any) -> tuple[Any, ...]:
        return (hidden, routing)

    def call(self, *arguments: Any) -> Any:
        return None

    def check(self, hidden: np.ndarray, routing: Any) -> None:
        self.checked.append(len(hidden))
        if not self.is_right:
            raise RuntimeError("differs")


# --- fractions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("touched", "operations", "expected"),
    [(100.0, 1.0, (10.0, "memory")), (1.0, 100.0, (5.0, "compute")), (10.0, 20.0, (1.0, "memory"))],
)
def test_the_bound_is_the_larger_time(
    touched: float, operations: float, expected: tuple[float, str]
) -> None:
    assert bound(touched, operations, read=10.0, peak=20.0) == expected


def case(*rounds: Round) -> Case:
    return Case(TINY, "fake", "fake int8", "fake int8", 1000, 4, list(rounds))


def test_a_fraction_uses_the_ceilings_of_its_own_round() -> None:
    # 2000 bytes a call: 1 s at 2000 B/s, then 2 s at 1000 B/s; the calls take twice that
    slow = Round([4.0, 4.0], [2.0, 2.0], (1000.0, 1000.0), (1e12, 1e12))
    found = case(Round([2.0], [2.0], (2000.0, 2000.0), (1e12, 1e12)), slow, slow)
    assert found.round_fractions == [0.5, 0.5, 0.5]
    assert found.fraction == 0.5
    assert found.seconds == 4.0
    assert found.bound == (2.0, "memory")


def test_a_disturbed_round_does_not_move_the_fraction() -> None:
    good = Round([2.0], [2.0], (2000.0, 2000.0), (1e12, 1e12))
    assert case(good, Round([60.0], [2.0], (2000.0, 2000.0), (1e12, 1e12)), good).fraction == 0.5


def test_a_round_whose_ceiling_moved_does_not_count() -> None:
    good = Round([2.0], [2.0], (2000.0, 1900.0), (1e12, 1e12))
    moved = Round([2.0], [2.0], (1000.0, 9000.0), (1e12, 1e12))
    other = Round([2.0], [2.0], (2000.0, 2000.0), (1e11, 1e12))  # not the one that sets the bound
    found = case(moved, good, moved, moved, other)
    assert found.steady_rounds == [False, True, False, False, True]
    assert found.fraction == 0.5
    assert case(moved, moved).fraction == pytest.approx(1 / 9)


def test_long_calls_get_ceilings_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_run, "SAMPLE_AGAIN", -1.0)
    roofline = FakeRoofline([1.0, 3.0, 5.0], [10.0, 30.0, 20.0])
    result = measure(TINY, [FakeLayer(), FakeLayer()], [1], rounds=1, roofline=roofline)
    assert [c.rounds[0].reads for c in result.cases] == [(1.0, 3.0), (3.0, 5.0)]
    assert [c.rounds[0].peaks for c in result.cases] == [(10.0, 30.0), (30.0, 20.0)]


def test_each_call_counts_the_experts_it_touched() -> None:
    found = case(Round([1.0, 2.0, 4.0], [1.0, 2.0, 4.0], (1000.0, 1000.0), (1e12, 1e12)))
    assert found.fraction == 1.0
    assert found.touched_experts == pytest.approx(7 / 3)


def test_many_tokens_are_bound_by_arithmetic() -> None:
    found = case(Round([1.0], [5.0], (1e12, 1e12), (TINY.operations(4) * 4.0,) * 2))
    assert found.bound == (0.25, "compute")
    assert found.to_json()["gop_per_s"] == pytest.approx(TINY.operations(4) / 1e9)


def test_a_round_keeps_the_higher_of_its_two_ceilings() -> None:
    roofline = FakeRoofline([1.0, 3.0, 5.0, 4.0], [10.0, 20.0, 40.0, 30.0])
    result = measure(TINY, [FakeLayer()], [1], rounds=2, roofline=roofline)
    assert [(r.read, r.peak) for r in result.cases[0].rounds] == [(3.0, 20.0), (5.0, 40.0)]
    assert result.ceilings["fake int8"]["samples"] == [1e-8, 2e-8, 4e-8, 3e-8]


# --- shapes, routings, layers -----------------------------------------------------------------


def test_one_token_meets_every_expert_before_any_again() -> None:
    shape = Shape("deck", 32, 32, 12, 3)
    pool = routings(shape, 1, 8, seed=0)
    for first in (0, 4):
        assert len(np.unique([r.ids for r in pool[first : first + 4]])) == 12
    assert pool[0].touched == 3


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_routings_are_distinct_experts_and_weights_that_sum_to_one(tokens: int) -> None:
    for r in routings(TINY, tokens, 5, seed=1):
        assert r.ids.shape == r.weights.shape == (tokens, 2)
        assert r.ids.dtype == np.int64 and r.weights.dtype == np.float32
        assert all(len(set(row)) == 2 for row in r.ids.tolist())
        assert np.allclose(r.weights.sum(axis=1), 1)
        assert r.touched == len(np.unique(r.ids))


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_fit_every_format(name: str) -> None:
    assert SHAPES[name].name == name
    for text in ("INT4:32", "INT4:128", "INT8", "BF16"):
        spec = spec_of(SHAPES[name], parse_method(text))
        assert 0 <= spec.layout.expert_bytes - expert_bytes(spec) < 4096


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 1, 1, 1), "hidden_size=0"), ((1, 1, 2, 3), "top_k=3: must be at most num_experts=2")],
)
def test_shapes_that_cannot_be_are_refused(sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shape("x", *sizes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("INT4", ("auto", "int4", None)),
        ("int4:128", ("auto", "int4", 128)),
        ("AVX2:INT4:64", ("AVX2", "int4", 64)),
        ("NUMPY:BF16", ("NUMPY", "bf16", None)),
        ("AMXINT4", ("AMXINT4", "int4", None)),
        ("AMXINT4:32", ("AMXINT4", "int4", 32)),
        ("auto:int8", ("auto", "int8", None)),
        ("torch", ("torch", None, None)),
    ],
)
def test_methods_are_read(text: str, expected: tuple[str, str | None, int | None]) -> None:
    found = parse_method(text)
    assert (found.text, found.backend, found.weight_format, found.group_size) == (text, *expected)
    assert found.block_type is None and not found.is_repacked


@pytest.mark.parametrize(
    "text",
    [
        "",
        "INT5",
        "INT4:x",
        "INT4:32:1",
        "AVX2",
        "AVX2:32",
        "auto",
        "AVX2:INT4:-1",
        "torch:BF16",
        "AVX2:GGUF",
        "GGUF",
    ],
)
def test_methods_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be FORMAT"):
        parse_method(text)


def test_a_group_size_the_format_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="int4 takes"):
        spec_of(TINY, parse_method("INT4:48"))


def test_layers_that_do_not_fit_are_refused_with_their_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    methods = [parse_method("INT8"), parse_method("torch")]
    check_memory(TINY, methods, 0)
    monkeypatch.setattr(bench_layer.cpu, "memory", lambda *_: (1 << 30, 1000))
    with pytest.raises(
        MemoryError, match=r"tiny.*needs .* GiB at once \(INT8 .*torch .*fewer methods"
    ):
        check_memory(TINY, methods, 0)


@pytest.mark.parametrize("text", ["INT4:32", "INT8", "NUMPY:BF16", "torch"])
def test_a_layer_agrees_with_its_reference(text: str) -> None:
    if text == "torch":
        pytest.importorskip("torch")
        if measure_module() is None:
            pytest.skip("torch's peak is unknown: the compiled extension is not built")
    made = build(TINY, parse_method(text), None)
    for tokens in (1, 2, 33):
        made.check(hidden_states(TINY, tokens), routings(TINY, tokens, 1, seed=tokens)[0])


def test_a_layer_that_computes_wrong_is_not_measured() -> None:
    made = build(TINY, parse_method("INT8"), None)
    right = made.call
    made.call = lambda *a: right(*a) * np.float32(1.001)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="differs from the reference"):
        made.check(hidden_states(TINY, 2), routings(TINY, 2, 1, seed=0)[0])
    with pytest.raises(RuntimeError, match="differs"):
        measure(TINY, [FakeLayer(False)], [1], rounds=1, roofline=FakeRoofline([1.0], [1.0]))


def test_every_number_of_tokens_is_checked() -> None:
    fake = FakeLayer()
    measure(TINY, [fake], [1, 7], rounds=1, roofline=FakeRoofline([1.0] * 4, [1.0] * 4))
    assert fake.checked == [1, 7]


# --- the whole ---------------------------------------------------------------------------------

CASE_KEYS = {
    "method": str,
    "kernel": str,
    "tokens": int,
    "calls": int,
    "median_ms": float,
    "min_ms": float,
    "max_ms": float,
    "round_ms": list,
    "touched_experts": float,
    "touched_bytes": float,
    "operations": int,
    "gb_per_s": float,
    "gop_per_s": float,
    "tokens_per_s": float,
    "peak": str,
    "bound_by": str,
    "bound_ms": float,
    "fraction": float,
    "round_fractions": list,
    "steady_rounds": list,
    "fraction_of_medians": float,
}


@needs_extension
@pytest.mark.parametrize(
    "shape", [TINY, Shape("square", 128, 128, 4, 1), Shape("all", 32, 48, 3, 3)]
)
def test_a_run_reports_every_case(shape: Shape) -> None:
    roofline = Roofline(None, buffer_bytes=8 << 20)
    methods = [parse_method(text) for text in ("INT4:32", "INT8")]
    steps: list[tuple[int, int]] = []
    layers = build_layers(shape, methods, progress=lambda d, t, w: steps.append((d, t)))
    result = measure(
        shape,
        layers,
        [1, 3],
        rounds=2,
        roofline=roofline,
        progress=lambda d, t, w: steps.append((d, t)),
    )
    assert all(0 <= done <= total for done, total in steps)
    found = json.loads(json.dumps(report([result], roofline.num_threads, 2)))
    assert {"ktk", "date", "machine", "rounds", "on_torch_threads", "results"} == set(found)
    assert {"cpu", "threads", "huge_pages"} <= set(found["machine"])
    (one,) = found["results"]
    assert [(c["tokens"], c["method"]) for c in one["cases"]] == [
        (1, "INT4:32"),
        (1, "INT8"),
        (3, "INT4:32"),
        (3, "INT8"),
    ]
    for c in one["cases"]:
        assert {name: type(c[name]) for name in CASE_KEYS} == CASE_KEYS
        assert set(c) == set(CASE_KEYS)
        assert len(c["round_ms"]) == len(c["round_fractions"]) == 2
        assert c["bound_by"] in ("memory", "compute")
        assert 0 < c["min_ms"] <= c["median_ms"] <= c["max_ms"]
    for c in one["ceilings"].values():
        assert len(c["samples"]) >= 2 * 2 * 2  # before and after, per number of tokens and round
        assert c["min"] <= c["median"] <= c["max"]


def bench(*arguments: str) -> Done:
    return ktk("bench", *arguments, seconds=120)


SMALL = (
    "--hidden",
    "64",
    "--intermediate",
    "64",
    "--experts",
    "4",
    "--top-k",
    "2",
    "--rounds",
    "1",
)


def test_a_long_run_shows_no_bar_where_stderr_is_no_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench_command, "PROGRESS_AFTER", 0)
    with bench_command.StepProgress() as progress:
        progress(1, 2, "half")
    assert capsys.readouterr().err == ""


@needs_extension
def test_the_command_prints_tables_or_json(tmp_path: Path) -> None:
    file = tmp_path / "speeds.json"
    done = bench(*SMALL, "--tokens", "1,2", "--method", "INT8", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "ceiling read" in done.stdout and "of bound" in done.stdout
    assert len(json.loads(file.read_text())["results"][0]["cases"]) == 2
    done = bench(*SMALL, "--tokens", "1", "--method", "INT8", "--json", "-")
    assert json.loads(done.stdout)["results"][0]["shape"] == "custom"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "gpt-2"], "--shape gpt-2: must be one of qwen3-30b-a3b"),
        (["--hidden", "64"], "--intermediate, --experts, --top-k missing"),
        ([*SMALL, "--shape", "kimi-k2"], "--shape given too"),
        (["--tokens", "1,x"], "--tokens x: must be whole numbers"),
        (["--tokens", ","], "--method and --tokens must not be empty"),
        (["--method", "INT5"], "method 'INT5': must be FORMAT"),
        (["--experts", "4"], "top_k=8: must be at most num_experts=4"),
        (["--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json"),
    ],
)
def test_wrong_arguments_fail_at_once_and_say_what_is_allowed(
    arguments: list[str], message: str
) -> None:
    done = bench(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("ktk: error: ")
