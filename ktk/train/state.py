"""What a training run writes down so that it can go on: one file, replaced as a whole.

It holds the trained parameters, AdamW's two averages of each, and as JSON in the file's metadata
what the run is and how far it is. Randomness needs nothing: each step's follows from the seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ktk.checkpoint.packed import leftovers, replacing, write_all
from ktk.checkpoint.safetensors import SafetensorsFile
from ktk.errors import CheckpointError

FILE = "ktk-training.safetensors"
_PARTS = ("parameter", "exp_avg", "exp_avg_sq")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
VERSION = 1


@dataclass(frozen=True)
class State:
    """How far a run is.

    run : what must be the same to go on, JSON. progress : what was measured so far, JSON.
    step : steps done. tensors : of each parameter by its name its values and AdamW's averages, as
        torch calls them.
    """

    run: dict[str, Any]
    progress: dict[str, Any]
    step: int
    tensors: dict[str, dict[str, torch.Tensor]]


def write_state(directory: Path, state: State) -> None:
    """Write it; a run that is killed meanwhile leaves the one before."""
    tensors = {
        f"{part}.{name}": values.detach().cpu().contiguous()
        for name, parts in state.tensors.items()
        for part, values in parts.items()
    }
    said = {
        "version": VERSION,
        "run": state.run,
        "progress": state.progress,
        "step": state.step,
    }
    path = directory / FILE
    for old in leftovers(path):
        old.unlink(missing_ok=True)
    with replacing(path) as file:
        write_all(file, _header(tensors, {"ktk": json.dumps(said)}))
        for values in tensors.values():  # one by one: together they take as much memory again
            write_all(file, values.reshape(-1).view(torch.uint8).numpy().data)


def _header(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """Of a safetensors file that holds them in this order."""
    said: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, values in tensors.items():
        begin, end = end, end + values.nbytes
        said[name] = {
            "dtype": _NAMES[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(said).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_state(directory: Path, parameters: Mapping[str, torch.Tensor]) -> State | None:
    """What ``write_state`` wrote, of exactly these parameters; None if there is nothing.

    CheckpointError for a file that is damaged or of other parameters.
    """
    path = directory / FILE
    if not path.exists():
        return None
    file = SafetensorsFile(path)
    try:
        said = _said(file, path)
        wanted = {f"{part}.{name}" for name in parameters for part in _PARTS}
        if different := wanted ^ set(file.tensors):
            raise CheckpointError(f"{path}: is of other parameters: {sorted(different)[0]}")
        tensors = {
            name: {part: _tensor(file, f"{part}.{name}", like) for part in _PARTS}
            for name, like in parameters.items()
        }
    finally:
        file.close()
    return State(said["run"], said["progress"], said["step"], tensors)


def _said(file: SafetensorsFile, path: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.metadata["ktk"])
        if said["version"] != VERSION:
            raise CheckpointError(f"{path}: has version {said['version']}: must be {VERSION}")
        if not isinstance(said["step"], int) or said["step"] < 0:
            raise CheckpointError(f"{path}: step={said['step']!r}")
        if not isinstance(said["run"], dict) or not isinstance(said["progress"], dict):
            raise CheckpointError(f"{path}: says nothing of its run")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: is no state of a training run") from error
    found: dict[str, Any] = said
    return found


def _tensor(file: SafetensorsFile, name: str, like: torch.Tensor) -> torch.Tensor:
    info = file.tensors[name]
    dtype = _DTYPES.get(info.dtype)
    if info.shape != tuple(like.shape) or dtype != like.dtype:
        raise CheckpointError(
            f"{file.path}: {name} is {info.dtype} {info.shape}: must be {like.dtype} "
            f"{tuple(like.shape)}"
        )
    data = np.empty(info.nbytes, np.uint8)
    file.read_into(name, memoryview(data.data))
    return torch.from_numpy(data).view(dtype).reshape(info.shape)
