"""Where the experts of a model come from when they are not float tensors of its own checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ktk import backends
from ktk.checkpoint.packed import read_config, read_layer
from ktk.checkpoint.safetensors import Checkpoint
from ktk.errors import CheckpointError
from ktk.experts.formats import GGUF
from ktk.experts.rotation import Rotation
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.models import Config, Experts, find_experts
from ktk.models.experts import own_group
from ktk.models.gguf.experts import GgufExperts
from ktk.models.plain import PlainTensor, plain_tensors
from ktk.placement.residency.gguf_reader import GgufReader
from ktk.placement.residency.reader import FilesReader, PackedReader
from ktk.quantise.pack import pack_experts


@dataclass(frozen=True)
class ExpertsSource:
    """Experts by layer. where : for messages. is_beside :
    the model's checkpoint has experts too, which stay unread. open_reader : of layers with these
    numbers, one expert at a time; None where they are not stored as they run. read_some : only the
    named ones; None where all are read or none needs to be.
    """

    where: str
    specs: dict[int, MoESpec]
    read: Callable[[int], StoredExperts]
    is_beside: bool = False
    open_reader: Callable[[Sequence[int]], FilesReader] | None = None
    read_some: Callable[[int, list[int]], StoredExperts] | None = None


class LazyTensor:
    """A tensor of a checkpoint, decoded when it is indexed:
    what transformers' loader does last of all.
    """

    def __init__(self, checkpoint: Checkpoint, tensor: PlainTensor) -> None:
        self.checkpoint, self.tensor = checkpoint, tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        values = torch.from_numpy(self.tensor.read(self.checkpoint))
        if self.tensor.dtype == "BF16":
            values = values.view(torch.bfloat16)
        part: torch.Tensor = values[index]
        return part


def layer_of(name: str) -> int:
    """The layer number in a module's name: its last number. ``model.layers.3.mlp.experts`` is 3."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    if not numbers:
        raise CheckpointError(
            f"experts module {name} has no layer number in its name: ktk cannot tell its packed "
            "file"
        )
    return int(numbers[-1])


def packed_directory(directory: Path) -> ExpertsSource:
    """What ``ktk convert`` or save_pretrained wrote. Raises CheckpointError."""
    specs = read_config(directory).specs

    def read_some(layer: int, experts: list[int]) -> StoredExperts:
        return read_layer(directory, layer, experts=experts)

    return ExpertsSource(
        str(directory),
        specs,
        partial(read_layer, directory),
        open_reader=partial(PackedReader, directory),
        read_some=read_some,
    )


def gguf_source(
    where: str | os.PathLike[str], experts: GgufExperts, is_beside: bool = False
) -> ExpertsSource:
    """The experts of a GGUF model."""
    specs = {layer: experts.spec(layer) for layer in experts.layers}
    reader = partial(GgufReader, experts)
    return ExpertsSource(os.fspath(where), specs, experts.experts, is_beside, reader)


@contextmanager
def quantised_checkpoint(
    path: Path,
    weight_format: str | None,
    group_size: int | None,
    activation_group: int | None,
    rotation: Rotation | None,
    method: str,
) -> Iterator[tuple[ExpertsSource, Mapping[str, LazyTensor]]]:
    """The experts of a checkpoint that other tools quantised, and its other tensors, decoded.

    weight_format None keeps the codes, in whatever format of panels has them, MXFP4 as GGUF blocks
    if a kernel runs them for ``method``; what no format has becomes int8. group_size None: that of
    the codes. Both are valid inside the ``with`` only.
    Raises CheckpointError, BackendError, ValueError.
    """
    with Checkpoint.open(path) as checkpoint:
        experts = find_experts(checkpoint)
        keeps_blocks = weight_format is None and experts.source_dtype == "mxfp4"
        found = experts.panel_format
        if weight_format is None:
            weight_format = backends.method_format(method) or (
                "int8" if found is None else found[0]
            )
        if group_size is None:
            group_size = own_group(weight_format, found)
        specs: dict[int, MoESpec] = {}
        for layer in experts.layers:
            fields = experts.spec_fields(layer)
            if keeps_blocks:
                spec = MoESpec(**fields, weight_format=GGUF.name, rotation=rotation)
                keeps_blocks = _runs(method, spec)
            if not keeps_blocks:
                spec = MoESpec(
                    **fields,
                    weight_format=weight_format,
                    group_size=group_size,
                    activation_group=activation_group,
                    rotation=rotation,
                )
                backends.select(method, spec)
            specs[layer] = spec

        def read(layer: int) -> StoredExperts:
            if not specs[layer].is_packed:
                blocks = experts.mxfp4_experts(layer)
                if blocks is not None:
                    return blocks
            return pack_experts(specs[layer], partial(experts.read_stored, layer))

        yield ExpertsSource(str(path), specs, read), other_tensors(checkpoint, experts)


def other_tensors(checkpoint: Checkpoint, experts: Experts) -> dict[str, LazyTensor]:
    """The tensors that are not experts', by name, valid while the checkpoint is open."""
    taken = set().union(*(experts.tensor_names(layer) for layer in experts.layers))
    return {
        tensor.name: LazyTensor(checkpoint, tensor)
        for tensor in plain_tensors(checkpoint, taken, Config.of(checkpoint))
    }


def _runs(method: str, spec: MoESpec) -> bool:
    try:
        backends.select(method, spec)
    except (backends.BackendError, ValueError):
        return False
    return True
