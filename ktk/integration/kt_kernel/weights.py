"""The weights of KTMoEWrapper: from tensors, packed and ordinary directories, GGUF files."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ktk import backends
from ktk.checkpoint import Checkpoint, is_gguf, list_layers, write_layer
from ktk.checkpoint.packed import layer_path, read_layer
from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.experts.dequantise import expert_weights
from ktk.experts.formats import GGUF, get_format
from ktk.experts.rotation import Rotation
from ktk.experts.spec import MoESpec
from ktk.experts.stored import CodedExpert, ExpertWeights, StoredExperts
from ktk.integration.kt_kernel.residency import Residency
from ktk.log import logger
from ktk.models import find_experts
from ktk.models.experts import own_group
from ktk.ops.gguf_model import open_experts
from ktk.ops.inputs import as_weights, is_bf16, to_numpy
from ktk.ops.moe import MoE, expert_reader
from ktk.ops.requantise import packed_format
from ktk.ops.streamed import AnyMoE, StreamedMoE
from ktk.ops.streamed_layers import StreamedLayers
from ktk.placement.residency.gguf_reader import GgufReader
from ktk.placement.residency.reader import FilesReader, PackedReader
from ktk.quantise.pack import pack_experts

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_BIASES = ("gate_bias", "up_bias", "down_bias")


@dataclass(frozen=True)
class LayerWeights:
    """What a wrapper asks of its layer's weights, and how they are had.

    Shapes are the whole layer's. weight_format, group_size, activation_group, rotation,
    activation : None takes what the weights record, then the default. residency : None: all experts
    are loaded.
    """

    layer_idx: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    method: str
    weight_format: str | None
    group_size: int | None
    activation_group: int | None
    rotation: Rotation | None
    activation: Activation | None
    weight_path: Path | None
    cpu_save: bool
    residency: Residency | None = None

    def check(self) -> None:
        """Refuse a format that cannot run now rather than after the long part.

        Raises as ``select``.
        """
        if self.weight_format is not None:
            backends.select(self.method, self.spec())

    def load(
        self, physical_to_logical_map: Any, num_threads: int, keep: np.ndarray | None
    ) -> StoredExperts | StreamedMoE:
        """The layer from ``weight_path``, slot p with the weights of logical expert map[p].

        keep : bool (num_experts,), slots to load; None: all.
        """
        order = self.order(physical_to_logical_map)
        path = self.weight_path
        if path is None:
            raise ValueError(
                "weight_path is None: name a directory at construction, or call "
                "load_weights_from_tensors()"
            )
        if self.residency is not None:
            if (reason := self._why_not_streamed(path, order)) is None:
                return self._streamed(path, self.residency, num_threads)
            if self.residency.is_asked:
                raise ValueError(f"max_resident_experts={self.residency.most}: {reason}")
            logger.warning("layer %d: all experts are loaded: %s", self.layer_idx, reason)
        if is_gguf(path):
            return self._from_gguf(path, order, num_threads, keep)
        if layer_path(path, self.layer_idx).exists():
            read = read_layer(path, self.layer_idx, experts=_wanted(order, keep))
            spec = self._check_packed(read.spec, path)
            packed = StoredExperts.of_panels(spec, read.data, read.order)
        else:
            packed = self._quantise_checkpoint(path, num_threads, _wanted(order, keep))
        return _arranged(packed, order, keep)

    def _why_not_streamed(self, path: Path, order: np.ndarray | None) -> str | None:
        if order is not None:
            return (
                "physical_to_logical_map puts experts elsewhere, and they are read where they lie; "
                "leave one of them out"
            )
        if not is_gguf(path) and not layer_path(path, self.layer_idx).exists():
            return (
                f"{path} holds no packed layer {self.layer_idx}: run `ktk convert` on it first, or "
                "leave it out"
            )
        return None

    def _streamed(self, path: Path, residency: Residency, num_threads: int) -> StreamedMoE:
        """The layer, none of its experts in memory yet."""
        numbers = (self.layer_idx,)
        reader: FilesReader
        if is_gguf(path):
            experts = open_experts(path)
            spec = experts.spec(self.layer_idx)
            self._check_shapes(dataclasses.asdict(spec), f"{path}, layer {self.layer_idx},")
            reader = GgufReader(experts, numbers)
        else:
            reader = PackedReader(path, numbers)
            spec = self._check_packed(reader.specs[0], path)
        source = f"{path}, layer {self.layer_idx},"
        layers = StreamedLayers(
            reader,
            numbers,
            residency.memory(),
            residency.top_k,
            activations={self.layer_idx: self.agreed_activation(spec.activation, source)},
            method=self.method,
            num_threads=num_threads,
            where=path,
        )
        return layers[self.layer_idx]

    def from_tensors(
        self,
        given: dict[str, Any],
        physical_to_logical_map: Any,
        num_threads: int,
        keep: np.ndarray | None,
    ) -> StoredExperts:
        """Packed experts. given : gate_proj, up_proj, down_proj and the biases, in this order."""
        self.order(physical_to_logical_map)
        if self.residency is not None and self.residency.is_asked:
            raise ValueError(
                "max_resident_experts: experts from tensors are all in memory: leave it out, or "
                "name a packed directory or a GGUF file as weight_path"
            )
        biases = [name for name in _BIASES if given[name] is not None]
        if biases and len(biases) < 3:
            raise ValueError(f"only {', '.join(biases)} given: give all three biases or none")
        e, i, h = self.num_experts, self.intermediate_size, self.hidden_size
        shapes = ((e, i, h), (e, i, h), (e, h, i), (e, i), (e, i), (e, h))
        for (name, x), shape in zip(given.items(), shapes, strict=True):
            if x is None and name in _BIASES:
                continue
            array = to_numpy(x, name)
            if array.shape != shape:
                raise ValueError(f"{name} has shape {tuple(array.shape)}: must be {shape}")
            as_weights(x[:0], name)  # dtype

        spec = self.spec(has_bias=bool(biases))
        backends.select(self.method, spec)
        return self._packed(spec, expert_reader(given), num_threads, keep)

    def from_reader(
        self,
        read: Callable[[int], CodedExpert],
        physical_to_logical_map: Any,
        num_threads: int,
        keep: np.ndarray | None,
    ) -> StoredExperts:
        """Packed experts, those of the checkpoint's own codes as they are where the format fits."""
        self.order(physical_to_logical_map)
        spec = self.spec()
        backends.select(self.method, spec)
        return self._packed(spec, read, num_threads, keep)

    def _packed(
        self,
        spec: MoESpec,
        read: Callable[[int], ExpertWeights | CodedExpert],
        num_threads: int,
        keep: np.ndarray | None,
    ) -> StoredExperts:
        packed = pack_experts(spec, read, num_threads, _wanted(None, keep))
        self._save(packed)
        return packed

    def operator(
        self, experts: StoredExperts | StreamedMoE, num_threads: int, repack: bool | None
    ) -> AnyMoE:
        """What runs them. repack : of blocks, as ``MoE`` takes it."""
        if isinstance(experts, StreamedMoE):
            return experts
        repack = None if experts.is_packed else repack
        return MoE(experts, method=self.method, num_threads=num_threads, repack=repack)

    def spec(self, **fields: Any) -> MoESpec:
        """The spec the constructor asked for; ``fields`` come from the weights."""
        fields = {"activation": self.activation or Activation(), **fields}
        return MoESpec(
            self.num_experts,
            self.hidden_size,
            self.intermediate_size,
            self.weight_format or "int4",
            self.group_size,
            self.activation_group,
            rotation=self.rotation,
            **fields,
        )

    def order(self, physical_to_logical_map: Any) -> np.ndarray | None:
        """The checked map, int64 (num_experts,); None if it is the identity."""
        if physical_to_logical_map is None:
            return None
        order = to_numpy(physical_to_logical_map, "physical_to_logical_map")
        if order.dtype != np.int64 or is_bf16(physical_to_logical_map):
            raise TypeError(f"physical_to_logical_map has dtype {order.dtype}: must be int64")
        if order.shape != (self.num_experts,):
            raise ValueError(
                f"physical_to_logical_map has shape {tuple(order.shape)}: must be "
                f"({self.num_experts},)"
            )
        if order.min() < 0 or order.max() >= self.num_experts:
            raise ValueError(
                f"physical_to_logical_map goes from {order.min()} to {order.max()}: "
                f"must stay in 0..{self.num_experts - 1}"
            )
        return None if np.array_equal(order, np.arange(self.num_experts)) else order

    def _check_shapes(self, fields: dict[str, Any], source: str) -> None:
        for name, own in (
            ("num_experts", self.num_experts),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
        ):
            if fields[name] != own:
                raise ValueError(
                    f"{source} has {name}={fields[name]}, the wrapper was made for {own}"
                )

    def _check_packed(self, spec: MoESpec, path: Path) -> MoESpec:
        """The file's spec with this wrapper's activation_group; ValueError if they do not fit."""
        source = f"{path}, layer {self.layer_idx},"
        self._check_shapes(dataclasses.asdict(spec), source)
        if self.weight_format not in (None, spec.weight_format):
            raise ValueError(
                f"{source} holds {spec.weight_format} weights, the wrapper "
                f"(method={self.method!r}) asks for {self.weight_format}: use method='auto', or "
                "convert again"
            )
        if self.group_size not in (None, spec.group_size):
            raise ValueError(
                f"{source} has group_size={spec.group_size}, the wrapper asks for {self.group_size}"
            )
        if self.rotation is not None and self.rotation != spec.turns:
            raise ValueError(
                f"{source} has rotation={list(spec.turns)}, the wrapper asks for "
                f"{list(self.rotation)}: leave it out, or convert again"
            )
        group = self.activation_group
        return dataclasses.replace(
            spec,
            activation=self.agreed_activation(spec.activation, source),
            activation_group=spec.activation_group if group is None else group,
        )

    def agreed_activation(self, recorded: Activation, source: str) -> Activation:
        """What to run where weights record one activation and swiglu_limit / swiglu_alpha ask for
        another.

        Plain SiLU is what a checkpoint records that says nothing: the arguments win. A recorded
        swigluoai with the same limit and alpha wins over KT-Kernel's form of it, which clamps the
        gate from below too.
        """
        asked = self.activation
        if asked is None or dataclasses.replace(asked, gate_min=-math.inf) == recorded:
            return recorded
        if asked != recorded and recorded != Activation():
            raise ValueError(
                f"{source} records {recorded}, swiglu_limit and swiglu_alpha ask for {asked}: "
                f"leave them 0 to take what is recorded"
            )
        return asked

    def _from_gguf(
        self,
        path: Path,
        order: np.ndarray | None,
        num_threads: int,
        keep: np.ndarray | None,
    ) -> StoredExperts:
        """The layer of a GGUF file, with this wrapper's activation: its blocks,
        or packed as the wrapper asks.
        """
        blocks = open_experts(path).experts(self.layer_idx)
        source = f"{path}, layer {self.layer_idx},"
        self._check_shapes(dataclasses.asdict(blocks.spec), source)
        activation = self.agreed_activation(blocks.spec.activation, source)
        spec = dataclasses.replace(blocks.spec, activation=activation)
        blocks = dataclasses.replace(blocks, spec=spec, order=order)
        weight_format = self.weight_format or packed_format(self.method, blocks) or GGUF.name
        activation_group = self.activation_group
        if activation_group is None and not get_format(weight_format).is_packed:
            activation_group = spec.activation_group  # of the layer's types
        spec = dataclasses.replace(
            spec,
            weight_format=weight_format,
            group_size=self.group_size,
            activation_group=activation_group,
            rotation=self.rotation,
        )
        if not spec.is_packed:
            return _arranged(dataclasses.replace(blocks, spec=spec), None, keep)
        backends.select(self.method, spec)  # refuse before the long part
        return pack_experts(spec, partial(expert_weights, blocks), num_threads, _wanted(None, keep))

    def _quantise_checkpoint(
        self, path: Path, num_threads: int, wanted: list[int] | None
    ) -> StoredExperts:
        """The layer of an ordinary directory, in logical order; written beside it with cpu_save."""
        layer = self.layer_idx
        with contextlib.ExitStack() as stack:
            try:
                experts = find_experts(stack.enter_context(Checkpoint.open(path)))
                if layer not in experts.layers:
                    raise CheckpointError(
                        f"{path}: no experts in layer {layer}, but in {experts.layers}"
                    )
            except CheckpointError as error:
                if not path.is_dir() or not list_layers(path):
                    raise
                raise CheckpointError(
                    f"{path}: its packed layers are {list_layers(path)}, layer {layer} is not "
                    f"among them; nor can it be quantised: {error}"
                ) from error
            fields = experts.spec_fields(layer)
            self._check_shapes(fields, f"{path}, layer {layer},")
            spec = self._as_coded(experts.panel_format).spec(
                has_gate=fields["has_gate"],
                has_bias=fields["has_bias"],
                activation=self.agreed_activation(fields["activation"], str(path)),
            )
            backends.select(self.method, spec)
            packed = pack_experts(spec, partial(experts.read_stored, layer), num_threads, wanted)
        self._save(packed)
        return packed

    def _as_coded(self, found: tuple[str, int] | None) -> LayerWeights:
        """With the format and the group size of a checkpoint's codes, where none is asked for."""
        if found is None:
            return self
        weight_format = self.weight_format or found[0]
        group = own_group(weight_format, found) if self.group_size is None else self.group_size
        return dataclasses.replace(self, weight_format=weight_format, group_size=group)

    def _save(self, packed: StoredExperts) -> None:
        if self.cpu_save and self.weight_path is not None:
            self.weight_path.mkdir(parents=True, exist_ok=True)
            write_layer(self.weight_path, packed.spec, self.layer_idx, packed.data)


def _wanted(order: np.ndarray | None, keep: np.ndarray | None) -> list[int] | None:
    """The experts whose weights the kept slots take, ascending; None: all."""
    if keep is None:
        return None
    slots = np.flatnonzero(keep)
    return np.unique(slots if order is None else order[slots]).tolist()


def _arranged(
    stored: StoredExperts, order: np.ndarray | None, keep: np.ndarray | None
) -> StoredExperts:
    """Slot p takes expert order[p], and slots that are not kept take none."""
    if order is None and keep is None:
        return stored
    places = np.arange(stored.spec.num_experts) if stored.order is None else stored.order
    places = places if order is None else places[order]
    places = places if keep is None else np.where(keep, places, -1)
    return dataclasses.replace(stored, order=np.ascontiguousarray(places))
