"""An adapter added to the float checkpoint of its model: a checkpoint of the same names, dtypes and
files, one file of it in memory at a time. W + scaling * B A is computed in float32 and rounded
once.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from ktk.checkpoint.packed import replacing, write_all
from ktk.checkpoint.safetensors import Checkpoint
from ktk.errors import CheckpointError
from ktk.models.arch import families_of
from ktk.models.families import Fused, PerExpert
from ktk.paths import user_path
from ktk.train.adapter import Adapter

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class _Place:
    """Where a part of the adapter goes. expert : None: of all, stacked. is_transposed : a stacked
    tensor has (in_features, out_features).
    """

    module: str
    projection: str  # gate, up, down, gate_up or linear
    expert: int | None = None
    is_interleaved: bool = False
    is_transposed: bool = False


def merge(
    adapter: Adapter,
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    on_file: Callable[[str], None] = lambda name: None,
) -> Path:
    """Write the model of the float checkpoint ``base`` with the adapter added to its weights.

    output : a directory, new or empty. on_file : is told each file before it is written.
    Returns the directory. Raises CheckpointError, before anything is written, for a base that is
    packed, quantised or another model's; FileExistsError if ``output`` is not empty.
    """
    source, target = user_path(base), user_path(output)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target}: is not empty: give a new directory")
    with Checkpoint.open(source) as checkpoint:
        places = _places(checkpoint, adapter)
        target.mkdir(parents=True, exist_ok=True)
        by_file: dict[Path, list[str]] = {}
        for name, info in checkpoint.tensors.items():
            by_file.setdefault(Path(info.file), []).append(name)
        for file, names in by_file.items():
            on_file(file.name)
            data = _merged(checkpoint, names, adapter, places)
            with replacing(target / file.name) as out:
                write_all(out, data)
        others = [f for f in source.iterdir() if f.is_file() and f.suffix != ".safetensors"]
        for other in sorted(others, key=lambda f: f.name == "config.json"):  # it comes last
            shutil.copyfile(other, target / other.name)
    return target


def _places(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, _Place]:
    """Tensors that change. CheckpointError unless every part of the adapter has its own."""
    config = checkpoint.config
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{checkpoint.path}: is packed or quantised: give the float checkpoint it was made of "
            "with --base"
        )
    layers = {int(m[1]): name for name in adapter.experts if (m := _LAYER.search(name))}
    families = families_of(str(config.get("model_type", "")))
    places = {}
    for name in checkpoint.tensors:
        module = name.removesuffix(".weight")
        if module in adapter.linears and module != name:
            places[name] = _Place(module, "linear")
        elif (found := _expert_place(name, layers, families)) is not None:
            places[name] = found
    places |= _transposed(checkpoint, adapter, places)
    wanted = set(_wanted(adapter))
    missing = wanted - {part for place in places.values() for part in _parts(place, adapter)}
    if missing:
        module, projection, expert = sorted(missing, key=str)[0]
        which = f" of expert {expert}" if expert is not None else ""
        raise CheckpointError(
            f"{checkpoint.path}: has no weight of {module}, {projection}{which}: it is another "
            "model's, or names its tensors as ktk does not know"
        )
    for name, place in places.items():
        if any(part in wanted for part in _parts(place, adapter)):
            dtype = checkpoint.info(name).dtype
            if dtype not in _DTYPES:
                raise CheckpointError(f"{checkpoint.path}: {name} is {dtype}: must be a float")
    return places


def _expert_place(name: str, layers: dict[int, str], families: list[Any]) -> _Place | None:
    for family in families:
        match = family.pattern().fullmatch(name)
        if match is None or int(match["layer"]) not in layers:
            continue
        module = layers[int(match["layer"])]
        if isinstance(family, PerExpert) and match["suffix"] == "weight":
            (projection,) = (p for p, part in family.parts.items() if part == match["part"])
            return _Place(module, projection, int(match["expert"]))
        if isinstance(family, Fused) and family.parts[match["part"]] in ("gate_up", "down"):
            return _Place(module, family.parts[match["part"]], None, family.is_interleaved)
    return None


def _transposed(
    checkpoint: Checkpoint, adapter: Adapter, places: dict[str, _Place]
) -> dict[str, _Place]:
    """Those of stacked tensors whose matrices lie the other way round, which a layer's two shapes
    tell together.
    """
    stacked: dict[str, dict[str, str]] = {}
    for name, place in places.items():
        if place.expert is None and place.projection != "linear":
            stacked.setdefault(place.module, {})[place.projection] = name
    found: dict[str, _Place] = {}
    for module, names in stacked.items():
        hidden, intermediate = _sizes(adapter.experts[module])
        lying = {"gate_up": (hidden, 2 * intermediate), "down": (intermediate, hidden)}
        shapes = {p: checkpoint.info(name).shape[1:] for p, name in names.items()}
        if all(tuple(shape) == lying[p] for p, shape in shapes.items()):
            found |= {n: replace(places[n], is_transposed=True) for n in names.values()}
    return found


def _sizes(matrices: dict[str, torch.Tensor]) -> tuple[int, int]:
    """hidden_size and intermediate_size."""
    first = next(name.removesuffix("_a") for name in matrices if name.endswith("_a"))
    columns, rows = matrices[f"{first}_a"].shape[2], matrices[f"{first}_b"].shape[1]
    return (rows, columns) if first == "down" else (columns, rows)


def _wanted(adapter: Adapter) -> Iterator[tuple[str, str, int | None]]:
    for module in adapter.linears:
        yield module, "linear", None
    for module, matrices in adapter.experts.items():
        for name, matrix in matrices.items():
            if name.endswith("_a"):
                for expert in range(len(matrix)):
                    yield module, name.removesuffix("_a"), expert


def _parts(place: _Place, adapter: Adapter) -> Iterator[tuple[str, str, int | None]]:
    """What of the adapter a tensor takes, if it has adapters."""
    if place.projection == "linear" or place.expert is not None:
        yield place.module, place.projection, place.expert
        return
    matrices = adapter.experts[place.module]
    for projection in ("gate", "up") if place.projection == "gate_up" else ("down",):
        for expert in range(len(matrices.get(f"{projection}_a", ()))):
            yield place.module, projection, expert


def _merged(
    checkpoint: Checkpoint, names: list[str], adapter: Adapter, places: dict[str, _Place]
) -> bytes:
    """A file of these tensors."""
    tensors = {}
    for name in names:
        weight = _tensor(checkpoint, name)
        if name in places:
            _add(weight, adapter, places[name], f"{checkpoint.path}: {name}")
        tensors[name] = weight
    return save(tensors, {"format": "pt"})


def _tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    values = checkpoint.read(name)
    is_bf16 = checkpoint.info(name).dtype == "BF16"
    tensor = torch.from_numpy(np.array(values))
    return tensor.view(torch.bfloat16) if is_bf16 else tensor


def _add(weight: torch.Tensor, adapter: Adapter, place: _Place, where: str) -> None:
    """The adapter's part onto a tensor, in place."""
    if place.projection == "linear":
        _add_to(weight, adapter.linear_delta(place.module), where)
        return
    matrices = adapter.experts[place.module]
    if place.expert is not None:
        if f"{place.projection}_a" in matrices:
            delta = adapter.delta(place.module, place.projection, place.expert)
            _add_to(weight, delta, where)
        return
    for _, projection, expert in _parts(place, adapter):
        assert expert is not None
        delta = adapter.delta(place.module, projection, expert)
        matrix = weight[expert].T if place.is_transposed else weight[expert]
        if place.projection == "gate_up":
            half, rows = ("gate", "up").index(projection), len(delta)
            own = slice(half, None, 2) if place.is_interleaved else slice(half * rows, None)
            matrix = matrix[own][:rows]
        _add_to(matrix, delta, where)


def _add_to(weight: torch.Tensor, delta: torch.Tensor, where: str) -> None:
    if weight.shape != delta.shape:
        raise CheckpointError(
            f"{where}: the adapter is of a weight {tuple(delta.shape)}, not {tuple(weight.shape)}"
        )
    weight.copy_(weight.float() + delta)
