"""Which experts of a model a device holds, as ``KtkConfig`` asks for it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.integration.transformers.model_grid import model_grid
from ktk.ops.device_experts import accelerator, device_expert_bytes, why_not
from ktk.ops.hybrid import HybridMoE
from ktk.ops.stream_moe import BufferPool
from ktk.ops.streamed import StreamedMoE
from ktk.paths import user_path
from ktk.placement.masks.files import read_masks_or_statistics
from ktk.placement.masks.grid import ExpertGrid, num_gpu_experts
from ktk.placement.masks.strategies import STRATEGIES, Known, place
from ktk.placement.masks.updates import update_of
from ktk.placement.residency.capacity import parse_bytes

# What needs no more than the model's shape; a file's statistics are placed by frequency.
_BY_NAME = ("uniform", "front-loading", "random")


@dataclass(frozen=True)
class GpuExperts:
    """What is asked for.

    number : int, of each layer on average; float, a share of all, 0..1; str, bytes, as "8GiB"; None
    with a file of masks. placement : one of uniform, front-loading and random, or a file of masks
    or statistics. device : of torch's; None: its accelerator. is_on_cpu_too : the CPU's memory has
    the device's experts, too, as swaps, gradients and saving need it. update : of
    ``ktk.placement.masks.updates``, by name.
    """

    number: int | float | str | None
    placement: str
    device: torch.device | None
    is_on_cpu_too: bool = True
    update: str | None = None

    @classmethod
    def asked(
        cls,
        number: int | float | str | None,
        placement: str | os.PathLike[str] | None,
        device: str | torch.device | None,
        load_gpu_experts: bool,
        update: str | None,
    ) -> GpuExperts | None:
        """Checked as far as it can be without a model; None: nothing is asked for.

        ValueError and TypeError name the option of ``KtkConfig``.
        """
        if number is None and placement is None:
            if device is not None or update is not None or not load_gpu_experts:
                raise ValueError(
                    "device, load_gpu_experts and gpu_update are for gpu_experts or placement: "
                    "give one of them"
                )
            return None
        if update is not None:
            update_of(update)
            if not load_gpu_experts:
                raise ValueError(
                    f"gpu_update={update!r}: experts that leave the device run on the CPU: leave "
                    "load_gpu_experts=True"
                )
        if isinstance(number, bool) or not isinstance(number, int | float | str | None):
            raise TypeError(
                f"gpu_experts={number!r}: must be an int, of each layer; a float, of all 0..1; or "
                'bytes, as "8GiB"'
            )
        if isinstance(number, str):
            parse_bytes(number)
        elif isinstance(number, float) and not (math.isfinite(number) and 0 <= number <= 1):
            raise ValueError(f"gpu_experts={number}: a share must be 0..1; an int is of each layer")
        elif isinstance(number, int) and number < 0:
            raise ValueError(f"gpu_experts={number}: must be at least 0")
        placement = "uniform" if placement is None else str(placement)
        if placement in STRATEGIES and placement not in _BY_NAME:
            raise ValueError(
                f"placement={placement!r} needs statistics: name their file, which is placed by "
                "frequency, or one of masks that `ktk place` writes"
            )
        if placement in _BY_NAME and number is None:
            raise ValueError(f"placement={placement!r}: say how many with gpu_experts")
        found = None if device is None else _parsed(device)
        return cls(number, placement, found, bool(load_gpu_experts), update)

    def where(self) -> torch.device:
        """The device. ValueError if torch has none, or not this one."""
        if self.device is None:
            found = accelerator()
            if found is None:
                raise ValueError(
                    f"gpu_experts: torch {torch.__version__} finds no accelerator here; "
                    'device="cpu" tries it without one'
                )
            return found
        if reason := why_not(self.device):
            raise ValueError(f"device={str(self.device)!r}: {reason}")
        return self.device

    def masks(self, grid: ExpertGrid, expert_bytes: int) -> np.ndarray:
        """bool (num_layers, num_experts), dense layers True. expert_bytes : of one on the device.

        ValueError for more than there are and for a file of another model's shape, CheckpointError
        for a file that is none.
        """
        counts, path = None, user_path(self.placement)
        if self.placement not in _BY_NAME:
            if not path.is_file():
                raise ValueError(
                    f"placement={self.placement!r}: must be {', '.join(_BY_NAME)}, or a file of "
                    "masks or statistics; there is no such file"
                )
            found = read_masks_or_statistics(path)
            if found.dtype == np.bool_:
                return self._of_file(grid, path, found)
            try:
                grid.check_counts(found)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            counts = found
        if self.number is None:
            raise ValueError(f"{path} has statistics: say how many with gpu_experts")
        strategy = "frequency" if counts is not None else self.placement
        return place(grid, strategy, self._number(grid, expert_bytes), Known(counts))

    def _number(self, grid: ExpertGrid, expert_bytes: int) -> int:
        if isinstance(self.number, str):
            room = parse_bytes(self.number)
            return num_gpu_experts(grid, memory=room, expert_bytes=expert_bytes)
        if isinstance(self.number, float):
            return num_gpu_experts(grid, ratio=self.number)
        return num_gpu_experts(grid, per_layer=self.number)

    def _of_file(self, grid: ExpertGrid, path: Path, masks: np.ndarray) -> np.ndarray:
        if self.number is not None:
            raise ValueError(f"{path} says which experts: leave gpu_experts out")
        try:
            grid.check_masks(masks)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return masks


class Placement:
    """``GpuExperts`` of one model: what each layer's operator is made with.

    specs : by layer. dtype : the model's; float32 experts stay so, others are bfloat16.
    Raises as ``GpuExperts.where`` and ``masks`` do.
    """

    def __init__(
        self, asked: GpuExperts, model: Any, specs: Mapping[int, MoESpec], dtype: torch.dtype
    ) -> None:
        self.asked, self.device = asked, asked.where()
        self.dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
        grid = model_grid(model, specs, max(spec.num_experts for spec in specs.values()))
        most = max(device_expert_bytes(spec, self.dtype) for spec in specs.values())
        masks = asked.masks(grid, most)
        self._masks = {n: masks[n, : spec.num_experts].copy() for n, spec in specs.items()}
        self._pool = BufferPool()

    def left_to_cpu(self, layer: int) -> list[int] | None:
        """The experts to read for the CPU; None: all of them."""
        mask = self._masks[layer]
        if self.asked.is_on_cpu_too or not mask.any():
            return None
        kept = np.flatnonzero(~mask).tolist()
        return kept or [0]  # shapes must come from somewhere

    def held(self, layer: int) -> list[int]:
        """The device's experts."""
        return np.flatnonzero(self._masks[layer]).tolist()

    def mask(self, layer: int) -> np.ndarray:
        """bool (num_experts,): True on the device."""
        return self._masks[layer]

    def operator(
        self,
        layer: int,
        experts: StoredExperts | StreamedMoE,
        gpu_experts: StoredExperts | None,
        method: str,
    ) -> HybridMoE:
        """experts : all, or those of ``left_to_cpu``. gpu_experts : those of ``held``, if they are
        not among these. BackendError if the device has no memory.
        """
        mask = self._masks[layer]
        is_alone = gpu_experts is None and not self.asked.is_on_cpu_too
        if isinstance(experts, StoredExperts) and is_alone:
            experts, gpu_experts = experts.without(mask), experts
        return HybridMoE(
            experts,
            mask,
            device=self.device,
            dtype=self.dtype,
            gpu_experts=gpu_experts,
            update=None if self.asked.update is None else update_of(self.asked.update),
            method=method,
            pool=self._pool,
        )


def _parsed(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"device={device!r}: {first}") from None
