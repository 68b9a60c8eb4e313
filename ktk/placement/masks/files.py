"""Files of statistics and masks, as SGLang's expert distribution recorder writes them: torch's .pt.

Statistics are {rank, logical_count (steps, num_layers, num_experts), ...}, or that tensor alone;
details are {records: [{forward_pass_id, rank, gatherer_key, global_physical_count (num_layers,
num_experts), topk_ids_of_layer (num_layers, num_tokens, top_k), ...}], ...}. Masks are
{gpu_expert_masks (num_layers, num_experts)}. Reading takes such a file as hostile.
"""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ktk.errors import CheckpointError
from ktk.paths import user_path
from ktk.placement.masks.grid import check_frequency

COUNTS, RECORDS, MASKS = "logical_count", "records", "gpu_expert_masks"
_COUNTS_OF_PASS, _MAP = "global_physical_count", "last_physical_to_logical_map"
DIRECTORY = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"
_DEFAULT_DIRECTORY = "/tmp"
_MOST_RANK = 8  # dimensions: no layout has more than three


def recorder_directory() -> Path:
    """Where recorders write: SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR, else /tmp, as SGLang."""
    return user_path(os.environ.get(DIRECTORY, "").strip() or _DEFAULT_DIRECTORY)


def read_statistics(path: Path) -> np.ndarray:
    """How often each expert was used, summed over the file's steps or records: float64 (num_layers,
    num_experts).

    CheckpointError names the file and what is wrong.
    """
    path = user_path(path)
    return _statistics(path, _load(path))


def read_masks_or_statistics(path: Path) -> np.ndarray:
    """Masks, bool, if the file has some, else statistics, float64; (num_layers, num_experts).

    CheckpointError names the file and what is wrong.
    """
    path = user_path(path)
    stored = _load(path)
    is_bare = isinstance(stored, torch.Tensor) and stored.dtype == torch.bool
    has_masks = is_bare or (isinstance(stored, dict) and MASKS in stored)
    return _masks(path, stored) if has_masks else _statistics(path, stored)


def _statistics(path: Path, stored: Any) -> np.ndarray:
    if isinstance(stored, dict) and RECORDS in stored and COUNTS not in stored:
        return _of_records(path, stored)
    if isinstance(stored, dict):
        if COUNTS not in stored:
            raise CheckpointError(
                f"{path}: no statistics: must have {COUNTS} or {RECORDS}, has {_keys(stored)}"
            )
        stored = stored[COUNTS]
    counts = _array(path, COUNTS, stored)
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim != 3 or not counts.size:
        raise CheckpointError(
            f"{path}: {COUNTS} is {counts.shape}: must be (steps, num_layers, num_experts)"
        )
    summed: np.ndarray = _checked(path, counts).sum(axis=0, dtype=np.float64)
    return summed


def write_statistics(path: Path, counts: np.ndarray) -> None:
    """counts : integers (steps, num_layers, num_experts)."""
    logical = torch.from_numpy(np.ascontiguousarray(counts, np.int64))
    stored = {"rank": 0, COUNTS: logical, "average_utilization_rate_over_window": None}
    _save(path, stored)


def write_records(path: Path, records: list[dict[str, Any]], shape: tuple[int, int]) -> None:
    """records : of each forward pass; arrays become tensors. shape : (num_layers, num_experts)."""
    rows = [
        {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in record.items()}
        for record in records
    ]
    experts = torch.arange(shape[1]).repeat(shape[0], 1)  # physical ones are the logical ones
    _save(path, {RECORDS: rows, _MAP: experts})


def read_masks(path: Path) -> np.ndarray:
    """bool (num_layers, num_experts). CheckpointError names the file and what is wrong."""
    path = user_path(path)
    return _masks(path, _load(path))


def _masks(path: Path, stored: Any) -> np.ndarray:
    if isinstance(stored, dict):
        if MASKS not in stored:
            raise CheckpointError(f"{path}: no masks: must have {MASKS}, has {_keys(stored)}")
        stored = stored[MASKS]
    masks = _array(path, MASKS, stored)
    if masks.dtype != np.bool_ or masks.ndim != 2 or not masks.size:
        raise CheckpointError(
            f"{path}: {MASKS} is {masks.dtype} {masks.shape}: must be bool (num_layers, "
            "num_experts)"
        )
    return masks


def write_masks(path: Path, masks: np.ndarray) -> None:
    """masks : bool (num_layers, num_experts)."""
    _save(path, {MASKS: torch.from_numpy(np.ascontiguousarray(masks, np.bool_))})


def recorder_path(directory: Path, kind: str = "recorder", rank: int | None = None) -> Path:
    """A new name as SGLang gives: expert_distribution_recorder_{time}.pt, for details _{rank} too;
    of masks kind is "gpu" and the name gpu_expert_distribution_{time}.pt.
    """
    directory, now = user_path(directory), repr(time.time())
    if kind == "gpu":
        return directory / f"gpu_expert_distribution_{now}.pt"
    end = "" if rank is None else f"_{rank}"
    return directory / f"expert_distribution_recorder_{now}{end}.pt"


def _save(path: Path, stored: dict[str, Any]) -> None:
    path = user_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(stored, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _load(path: Path) -> Any:
    """What the file holds: only tensors and plain values, nothing that would run."""
    try:
        if not path.is_file():
            raise FileNotFoundError(2, "no such file", str(path))
        with warnings.catch_warnings():  # of old layouts: they are none of these
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # bytes that are no such file make torch raise nearly anything
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: no file of torch.save that can be read: {first}") from error


def _array(path: Path, name: str, stored: Any) -> np.ndarray:
    """A tensor's, once it is dense and no larger than its file, which strides of 0 would allow."""
    if not isinstance(stored, torch.Tensor):
        raise CheckpointError(f"{path}: {name} is a {type(stored).__name__}: must be a tensor")
    is_plain = stored.layout == torch.strided and not stored.is_quantized
    if not is_plain or stored.device.type != "cpu" or stored.ndim > _MOST_RANK:
        raise CheckpointError(f"{path}: {name} must be a dense tensor")
    if stored.numel() * stored.element_size() > path.stat().st_size:
        raise CheckpointError(
            f"{path}: {name} is {tuple(stored.shape)}: more than the file's "
            f"{path.stat().st_size} bytes hold"
        )
    if stored.dtype == torch.bfloat16:
        stored = stored.float()
    try:
        array: np.ndarray = stored.detach().resolve_neg().numpy()
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {name} is {stored.dtype}: {error}") from error
    return array


def _checked(path: Path, counts: np.ndarray) -> np.ndarray:
    try:
        check_frequency(counts)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return counts


def _of_records(path: Path, stored: dict[str, Any]) -> np.ndarray:
    records = stored[RECORDS]
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise CheckpointError(f"{path}: {RECORDS} must be a list of records")
    if not records:
        raise CheckpointError(f"{path}: {RECORDS} is empty: nothing was recorded")
    total: np.ndarray | None = None
    for record in records:
        counts = _array(path, _COUNTS_OF_PASS, record.get(_COUNTS_OF_PASS))
        if (
            counts.ndim != 2
            or not counts.size
            or (total is not None and counts.shape != total.shape)
        ):
            raise CheckpointError(
                f"{path}: {_COUNTS_OF_PASS} is {counts.shape}: must be (num_layers, num_experts), "
                "the same in every record"
            )
        _checked(path, counts)
        total = counts.astype(np.float64) if total is None else total + counts
    assert total is not None
    experts = _array(path, _MAP, stored[_MAP]) if _MAP in stored else None
    if experts is None:
        return total
    if experts.shape != total.shape or experts.dtype.kind not in "iu":
        raise CheckpointError(
            f"{path}: {_MAP} is {experts.dtype} {experts.shape}: must be integers {total.shape}"
        )
    if experts.min() < 0 or experts.max() >= total.shape[1]:
        raise CheckpointError(f"{path}: {_MAP} must be 0..{total.shape[1] - 1}")
    logical = np.zeros_like(total)
    np.add.at(logical, (np.arange(len(total))[:, None], experts), total)
    return logical


def _keys(stored: dict[Any, Any]) -> str:
    return ", ".join(map(str, list(stored)[:8])) or "nothing"
