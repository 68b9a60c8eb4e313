"""Files of statistics and masks: SGLang's layouts, and bytes that nobody should trust."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ktk.errors import CheckpointError
from ktk.placement.masks.files import (
    DIRECTORY,
    read_masks,
    read_statistics,
    recorder_directory,
    recorder_path,
    write_masks,
    write_records,
    write_statistics,
)
from make.cases import assert_exact

COUNTS = np.arange(24).reshape(2, 3, 4)


def saved(path: Path, stored: Any) -> Path:
    torch.save(stored, path)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "stats.pt"


def test_statistics_are_the_sum_over_steps(path: Path) -> None:
    write_statistics(path, COUNTS)
    assert_exact(COUNTS.sum(axis=0).astype(np.float64), read_statistics(path))
    stored = torch.load(path, weights_only=True)
    assert list(stored) == ["rank", "logical_count", "average_utilization_rate_over_window"]
    assert stored["logical_count"].shape == (2, 3, 4)


@pytest.mark.parametrize(
    "stored",
    [
        {"logical_count": torch.from_numpy(COUNTS).int(), "rank": 0},
        torch.from_numpy(COUNTS),
        torch.from_numpy(COUNTS).sum(0).float(),
        torch.from_numpy(COUNTS).bfloat16(),
    ],
)
def test_every_layout_of_statistics_is_read(path: Path, stored: Any) -> None:
    assert_exact(COUNTS.sum(axis=0).astype(np.float64), read_statistics(saved(path, stored)))


def test_records_are_added_up_and_physical_experts_are_logical_ones(path: Path) -> None:
    records = [{"forward_pass_id": n, "global_physical_count": COUNTS[n]} for n in range(2)]
    write_records(path, records, (3, 4))
    assert_exact(COUNTS.sum(axis=0).astype(np.float64), read_statistics(path))
    stored = torch.load(path, weights_only=True)
    stored["last_physical_to_logical_map"] = torch.tensor([[1, 0, 2, 2]] * 3)
    first = COUNTS.sum(axis=0)
    want = np.stack([first[:, 1], first[:, 0], first[:, 2] + first[:, 3], 0 * first[:, 0]], axis=1)
    assert_exact(want.astype(np.float64), read_statistics(saved(path, stored)))


def test_masks_come_back(path: Path) -> None:
    masks = COUNTS[0] % 2 == 0
    write_masks(path, masks)
    assert_exact(masks, read_masks(path))
    assert list(torch.load(path, weights_only=True)) == ["gpu_expert_masks"]
    assert_exact(masks, read_masks(saved(path, torch.from_numpy(masks))))


class Runs:
    """Would run when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("it was run",)


def hostile() -> dict[str, bytes]:
    return {
        "empty": b"",
        "text": b"no file of torch",
        "zip without anything": b"PK\x05\x06" + bytes(18),
        "cut": b"PK\x03\x04" + bytes(100),
        "pickle that runs": pickle.dumps(Runs()),
        "pickle of numbers": pickle.dumps([1, 2]),
        "tar": b"ustar" * 200,
        "deep": b"\x80\x02" + b"]" * 100000 + b".",
        "long string": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b".",
    }


@pytest.mark.parametrize("name", hostile())
@pytest.mark.parametrize("read", [read_statistics, read_masks])
def test_other_bytes_are_clear_errors(path: Path, name: str, read: Any) -> None:
    path.write_bytes(hostile()[name])
    with pytest.raises(CheckpointError, match="stats.pt"):
        read(path)


def test_a_file_cut_anywhere_is_a_clear_error(path: Path) -> None:
    write_statistics(path, COUNTS)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="stats.pt"):
            read_statistics(path)


def test_a_byte_turned_over_is_read_or_a_clear_error(path: Path) -> None:
    write_statistics(path, COUNTS)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 150):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            counts = read_statistics(path)
        except CheckpointError:
            continue
        assert counts.ndim == 2 and (counts >= 0).all()


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({"counts": torch.ones(1, 2, 3)}, "must have logical_count or records, has counts"),
        ({}, "has nothing"),
        ({"logical_count": [1, 2]}, "is a list: must be a tensor"),
        ({"logical_count": None}, "is a NoneType"),
        ({"logical_count": torch.ones(3)}, "must be (steps, num_layers, num_experts)"),
        ({"logical_count": torch.ones(0, 3, 4)}, "must be (steps"),
        ({"logical_count": -torch.ones(1, 3, 4)}, "none negative"),
        ({"logical_count": torch.full((1, 3, 4), float("nan"))}, "must be finite"),
        (
            {"logical_count": torch.ones(1, 2, 2, dtype=torch.complex64)},
            "must be integers or floats",
        ),
        ({"logical_count": torch.ones(2, 3, 4).to_sparse()}, "must be a dense tensor"),
        (
            {"logical_count": torch.ones(1).expand(1 << 12, 1 << 12, 1 << 12)},
            "more than the file's",
        ),
        ({"records": 3}, "must be a list of records"),
        ({"records": [3]}, "must be a list of records"),
        ({"records": []}, "nothing was recorded"),
        ({"records": [{}]}, "is a NoneType"),
        ({"records": [{"global_physical_count": torch.ones(2)}]}, "the same in every record"),
        (7, "is a int"),
    ],
)
def test_statistics_that_are_none(path: Path, stored: Any, says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_statistics(saved(path, stored))
    assert says in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "experts", [torch.ones(3, 4), torch.full((3, 4), 9), torch.ones(2, 4).int()]
)
def test_a_map_of_experts_that_does_not_fit(path: Path, experts: torch.Tensor) -> None:
    record = {"global_physical_count": torch.from_numpy(COUNTS[0])}
    stored = {"records": [record], "last_physical_to_logical_map": experts}
    with pytest.raises(CheckpointError, match="last_physical_to_logical_map"):
        read_statistics(saved(path, stored))


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({"masks": torch.ones(2, 3).bool()}, "must have gpu_expert_masks, has masks"),
        ({"gpu_expert_masks": torch.ones(2, 3)}, "must be bool"),
        ({"gpu_expert_masks": torch.ones(6).bool()}, "must be bool"),
        (torch.ones(1).bool().expand(1 << 16, 1 << 16), "more than the file's"),
    ],
)
def test_masks_that_are_none(path: Path, stored: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_masks(saved(path, stored))


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_statistics(tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        read_masks(tmp_path)


def test_recorders_write_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DIRECTORY, raising=False)
    assert recorder_directory() == Path("/tmp")
    monkeypatch.setenv(DIRECTORY, "/somewhere/else")
    assert recorder_directory() == Path("/somewhere/else")
    names = [recorder_path(Path("d")).name, recorder_path(Path("d"), rank=0).name]
    assert names[0].startswith("expert_distribution_recorder_")
    assert names[1].endswith("_0.pt")
    assert recorder_path(Path("d"), "gpu").name.startswith("gpu_expert_distribution_")
