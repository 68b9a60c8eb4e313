"""Traces: what is written is read, hostile files are refused, made-up ones are as they say."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest

from ktk.errors import CheckpointError
from ktk.placement.residency.synthetic import Synthetic, synthetic_trace
from ktk.placement.residency.trace import Trace, read_trace, spread
from make.cases import assert_exact

ARRAYS = ("layers", "calls", "tokens", "expert_ids", "weights")


def small() -> Trace:
    """Two layers; a prompt of two tokens, then one token."""
    return Trace(
        num_layers=2,
        num_experts=4,
        layers=np.array([0, 0, 1, 1, 0, 1], np.int32),
        calls=np.array([0, 0, 1, 1, 2, 3]),
        tokens=np.array([0, 1, 0, 1, 2, 2]),
        expert_ids=np.array([[0, 1], [1, 3], [2, 3], [3, -1], [0, 2], [-1, -1]], np.int32),
        weights=np.array(
            [[0.5, 0.5], [0.75, 0.25], [1, 0], [0.5, 0], [0.5, 0.5], [0, 0]], np.float32
        ),
        expert_bytes=4096,
        source="by hand",
    )


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    small().save(path)
    again = read_trace(path)
    for name in ARRAYS:
        assert_exact(getattr(small(), name), getattr(again, name))
    for name in ("num_layers", "num_experts", "expert_bytes", "source", "top_k"):
        assert getattr(again, name) == getattr(small(), name)


def test_calls_have_each_expert_once_and_the_largest_weight() -> None:
    calls = list(small().each_call())
    assert [(call.layer, call.keys) for call in calls] == [
        (0, [0, 1, 3]),
        (1, [6, 7]),
        (0, [0, 2]),
    ]
    assert calls[0].scores.tolist() == [0.5, 0.75, 0, 0.25]
    assert calls[1].scores.tolist() == [0, 0, 1, 0.5]


def test_the_first_experts_of_each_token() -> None:
    one = small().first(1)
    assert one.expert_ids.tolist() == [[0], [1], [2], [3], [0], [-1]]
    assert one.weights[1].tolist() == [0.75]
    assert one.top_k == 1
    for top_k in (0, 3):
        with pytest.raises(ValueError, match=r"must be 1\.\.2"):
            small().first(top_k)


def test_a_text_run_at_once_is_stepped_through() -> None:
    """Two layers' calls of all tokens become those of a prompt of two, then one by one."""
    options = Synthetic(2, 16, 4, num_tokens=5, prompt=5)
    whole = synthetic_trace(options)
    want = synthetic_trace(dataclasses.replace(options, prompt=2))
    got = whole.stepped(2)
    for name in ARRAYS:
        assert_exact(getattr(want, name), getattr(got, name))
    for name in ARRAYS:
        assert_exact(getattr(whole, name), getattr(want.stepped(5), name))
    with pytest.raises(ValueError, match="twice"):
        dataclasses.replace(whole, tokens=np.zeros(10, np.int64)).stepped(2)


def test_the_spread_is_that_of_a_count_by_hand() -> None:
    found = spread(small())
    # Layer 0: of (1, 3) one stands in (0, 1), of (0, 2) none in (1, 3). Layer 1: of (3) one.
    assert found.reuse == pytest.approx((1 / 4 + 1) / 2)
    assert found.top_tenth == pytest.approx((2 / 6 + 2 / 3) / 2)
    assert found.top_half == pytest.approx((4 / 6 + 1) / 2)


WRONG = {
    "dtype": ({"layers": np.zeros(6, np.int64)}, "layers is int64"),
    "rows": ({"tokens": np.zeros(5, np.int64)}, "tokens is .* 6 rows"),
    "layer": ({"layers": np.full(6, 2, np.int32)}, r"layers must be 0\.\.1"),
    "expert": ({"expert_ids": np.full((6, 2), 4, np.int32)}, r"expert_ids must be -1\.\.3"),
    "weights": ({"weights": np.full((6, 2), np.nan, np.float32)}, "finite"),
    "falling": ({"calls": np.array([0, 0, 1, 1, 3, 2])}, "must not fall"),
    "mixed": ({"calls": np.array([0, 0, 0, 1, 2, 3])}, "each must be one layer's"),
    "shapes": ({"weights": np.zeros((6, 3), np.float32)}, "must be equal"),
    "experts": ({"num_experts": 0}, "num_experts=0"),
    "huge": ({"num_experts": 1 << 40}, "must be at most"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arrays_that_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(small(), **changes)
    # The same in a file, whose writer checks nothing.
    trace, path = small(), tmp_path / "bad.npz"
    stored = {name: getattr(trace, name) for name in (*ARRAYS, "num_layers", "num_experts")}
    stored |= {"version": 1, "expert_bytes": 0, "source": "x", **changes}
    with path.open("wb") as file:
        np.savez_compressed(file, **stored)
    with pytest.raises(CheckpointError, match=rf"bad\.npz.*{message}"):
        read_trace(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(CheckpointError, match="no such file"):
        read_trace(path)
    for raw in (b"", b"PK\x03\x04", b"hello", b"\x93NUMPY\x01\x00v\x00{'descr'"):
        path.write_bytes(raw)
        with pytest.raises(CheckpointError, match="no trace that can be read"):
            read_trace(path)
    with path.open("wb") as file:
        np.savez(file, layers=np.zeros(3))
    with pytest.raises(CheckpointError, match="no trace, calls"):
        read_trace(path)
    with path.open("wb") as file:
        np.savez(
            file,
            **{name: getattr(small(), name) for name in ARRAYS},
            version=2,
            num_layers=2,
            num_experts=4,
            expert_bytes=0,
            source="",
        )
    with pytest.raises(CheckpointError, match="version 2: must be 1"):
        read_trace(path)


def test_a_file_with_any_byte_changed_is_read_or_refused(tmp_path: Path) -> None:
    path, rng = tmp_path / "x", random.Random(5)
    small().save(path)
    whole = path.read_bytes()
    refused = 0
    for _ in range(400):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw[: rng.randint(1, len(raw))] if rng.random() < 0.3 else raw)
        try:
            read_trace(path)
        except CheckpointError:
            refused += 1
    assert refused > 200


def test_the_same_seed_makes_the_same_trace_and_another_another() -> None:
    options = Synthetic(3, 16, 4, num_tokens=40, prompt=8)
    one, two = synthetic_trace(options), synthetic_trace(options)
    for name in ARRAYS:
        assert_exact(getattr(one, name), getattr(two, name))
    other = synthetic_trace(dataclasses.replace(options, seed=1))
    assert (one.expert_ids != other.expert_ids).any()


def test_a_made_up_trace_has_its_prompt_in_one_call_and_each_expert_once_a_token() -> None:
    trace = synthetic_trace(Synthetic(3, 16, 4, num_tokens=40, prompt=8))
    calls, rows = np.unique(trace.calls, return_counts=True)
    assert rows.tolist() == [8] * 3 + [1] * 96
    assert len(calls) == 99
    assert all(len(set(ids)) == 4 for ids in trace.expert_ids.tolist())
    np.testing.assert_allclose(trace.weights.sum(axis=1), 1, rtol=1e-5)


def test_the_default_reuses_as_published_traces_do() -> None:
    found = spread(synthetic_trace(Synthetic(num_layers=6)))
    assert 0.37 < found.reuse < 0.45


def test_each_option_does_what_it_says() -> None:
    base = Synthetic(4, 32, 4, num_tokens=300)
    plain = spread(synthetic_trace(base))
    changed = {
        name: spread(synthetic_trace(dataclasses.replace(base, **{name: value})))
        for name, value in {"skew": 2.0, "noise": 3.0, "persistence": 0.0}.items()
    }
    assert changed["skew"].top_tenth > plain.top_tenth + 0.1
    assert changed["noise"].reuse < plain.reuse - 0.1
    assert changed["persistence"].reuse < plain.reuse - 0.02
    still, drifting = (
        spread(synthetic_trace(dataclasses.replace(base, drift=drift, skew=0)))
        for drift in (100_000, 4)
    )
    assert still.top_half > drifting.top_half + 0.05


@pytest.mark.parametrize(
    "changes",
    [{"top_k": 129}, {"num_layers": 0}, {"prompt": 513}, {"persistence": 1.0}, {"noise": -1.0}],
    ids=str,
)
def test_options_that_make_no_trace_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Synthetic(**changes)  # type: ignore[arg-type]
