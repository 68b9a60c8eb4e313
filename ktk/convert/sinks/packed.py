"""A packed directory: a file for each layer's experts, shards of other tensors, the small files.

Order of writing: the state file, the layers' files, the shards, their index, the small files,
config.json. Each appears under its final name complete (temporary name, fsync, rename), so a file
that is there is finished, and a directory with config.json is. Nothing written depends on time,
threads or how often the work was interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ktk import __version__
from ktk.checkpoint import packed
from ktk.checkpoint.packed import STATE_FILE, replacing, write_all
from ktk.checkpoint.safetensors import SafetensorsFile, open_regular, read_into
from ktk.convert.resume import claimed
from ktk.convert.sinks.base import Pieces, Report, Sink
from ktk.convert.sources import CHUNK_BYTES, SIDE_DIRECTORIES, Source
from ktk.errors import CheckpointError
from ktk.experts.formats import PANELS
from ktk.experts.layout import LAYOUT_VERSION
from ktk.experts.spec import MoESpec
from ktk.experts.stored import CodedExpert, ExpertWeights, StoredExperts
from ktk.machine.memory import aligned_buffer
from ktk.models.plain import PlainTensor
from ktk.quantise.feedback import Encode, lay_expert, packed_encoder
from ktk.quantise.pack import pack_expert

SHARD_BYTES = 4 << 30  # of the tensors that are not experts'


class PackedSink(Sink):
    """What ``ktk.MoE.load`` reads, and of a Hugging Face directory a model that loads alone.

    fingerprint : the source's. provenance : of a calibration, recipe : its text; or None.
    """

    can_resume = True

    def __init__(
        self,
        source: Source,
        output: Path,
        specs: dict[int, MoESpec],
        fingerprint: list[dict[str, Any]],
        provenance: dict[str, Any] | None,
        recipe: str | None = None,
    ) -> None:
        self.source, self.specs = source, specs
        self.output = self.folder = _outside(source.place, output)
        self.notes = source.notes
        coding = packed.coding_of(*specs.values())
        names = dict.fromkeys(spec.weight_format for spec in specs.values())
        self.coding = {**coding, "weight_format": "+".join(sorted(names, key=list(PANELS).index))}
        self.state = _state(fingerprint, coding, provenance, recipe)
        self.config = source.config()
        self.config["quantization_config"] = _described(source, specs, coding, provenance)
        plain = source.plain_tensors()
        self.shards = _cut(plain or [])
        self._loads_alone = plain is not None
        self.expert_bytes = sum(map(self._layer_bytes, specs))
        self.other_bytes = self.other_input_bytes = sum(map(_num_bytes, self.shards))
        self._missing_shards: list[int] = []
        self._free: deque[np.ndarray] = deque()

    @contextlib.contextmanager
    def open(self, resume: bool) -> Iterator[None]:
        with claimed(self.output, self.state, resume, SIDE_DIRECTORIES):
            self.missing = tuple(layer for layer in self.specs if not self._has_layer(layer))
            self._missing_shards = [i for i in range(len(self.shards)) if not self._has_shard(i)]
            shards = sum(_num_bytes(self.shards[i]) for i in self._missing_shards)
            self.missing_bytes = sum(map(self._layer_bytes, self.missing)) + shards
            self.reused_others = self.other_bytes - shards
            yield

    def begin(self) -> None:
        if not (self.output / STATE_FILE).exists():
            _write_json(self.output / STATE_FILE, self.state)
        if self.missing or self._missing_shards:  # config.json says "finished"
            (self.output / "config.json").unlink(missing_ok=True)

    def encoder(self, layer: int) -> Encode:
        return packed_encoder(self.specs[layer])

    def encode(self, layer: int, weights: ExpertWeights | CodedExpert) -> Pieces:
        span = self._span(layer)
        pack_expert(self.specs[layer], weights, span)
        return [span]

    def encode_rounded(
        self, layer: int, weights: ExpertWeights, rounded: dict[str, np.ndarray]
    ) -> Pieces:
        span = self._span(layer)
        lay_expert(self.specs[layer], weights, rounded, span)
        return [span]

    def write_layer(self, layer: int, experts: Iterator[Pieces]) -> None:
        def spans() -> Iterator[np.ndarray]:
            for (span,) in experts:
                yield span
                self._free.append(span)

        packed.write_layer(self.output, self.specs[layer], layer, spans())

    def read_layer(self, layer: int) -> StoredExperts:
        return packed.read_layer(self.output, layer)

    def write_others(self, threads: int, report: Report) -> None:
        for index in self._missing_shards:
            name, tensors = self._shard_name(index), self.shards[index]
            with replacing(self.output / name) as file:
                write_all(file, _shard_header(tensors))
                for tensor in tensors:
                    for piece in self.source.pieces(tensor):
                        write_all(file, piece)
                        report(name, len(piece))
        if self._loads_alone:
            _write_json(self.output / "model.safetensors.index.json", self._index())
        for relative in self.source.side_files():
            _copy(self.source.place / relative, self.output / relative)

    def finish(self) -> None:
        _write_json(self.output / "config.json", self.config)

    def _span(self, layer: int) -> np.ndarray:
        """Memory for an expert, one that is written already if there is one: no new pages."""
        size = self.specs[layer].layout.expert_bytes
        try:
            span = self._free.popleft()
        except IndexError:
            return aligned_buffer(size)
        return span if len(span) == size else aligned_buffer(size)

    def _layer_bytes(self, layer: int) -> int:
        spec = self.specs[layer]
        return spec.num_experts * spec.layout.expert_bytes

    def _has_layer(self, layer: int) -> bool:
        if packed.layer_path(self.output, layer).is_symlink():
            return False
        try:
            return packed.read_spec(self.output, layer) == self.specs[layer]
        except CheckpointError:
            return False

    def _shard_name(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{len(self.shards):05d}.safetensors"

    def _has_shard(self, index: int) -> bool:
        path = self.output / self._shard_name(index)
        if path.is_symlink():
            return False
        try:
            file = SafetensorsFile(path)
        except CheckpointError:
            return False
        file.close()
        have = {name: (info.dtype, info.shape) for name, info in file.tensors.items()}
        return have == {t.name: (t.dtype, t.shape) for t in self.shards[index]}

    def _index(self) -> dict[str, Any]:
        placed = {t.name: self._shard_name(i) for i, shard in enumerate(self.shards) for t in shard}
        metadata = {"total_size": self.other_bytes}
        return {"metadata": metadata, "weight_map": dict(sorted(placed.items()))}


def _outside(place: Path, output: Path) -> Path:
    """The output directory; ValueError if it lies in the source."""
    inside, outside = output.resolve(), place.resolve()
    if inside == outside or outside in inside.parents:
        raise ValueError(
            f"output {output} lies in the input {place}: give a directory outside of it"
        )
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output}: exists and is not a directory")
    return output


def _state(
    fingerprint: list[dict[str, Any]],
    coding: dict[str, Any],
    provenance: dict[str, Any] | None,
    recipe: str | None,
) -> dict[str, Any]:
    """What tells this job from another."""
    rest = {key: value for key, value in coding.items() if key != "weight_format"}
    return {
        "ktk_version": __version__,
        "layout_version": LAYOUT_VERSION,
        "quant_method": coding["weight_format"],
        **rest,
        **({} if recipe is None else {"recipe": recipe}),
        "calibration": provenance,
        "source": fingerprint,
    }


def _described(
    source: Source,
    specs: dict[int, MoESpec],
    coding: dict[str, Any],
    provenance: dict[str, Any] | None,
) -> dict[str, Any]:
    """quantization_config."""
    said = {
        "quant_method": packed.QUANT_METHOD,
        **coding,
        "layout_version": LAYOUT_VERSION,
        "layers": list(specs),
        "family": source.family,
        "source_dtype": source.source_dtype,
    }
    return said if provenance is None else {**said, "calibration": provenance}


def _num_bytes(shard: list[PlainTensor]) -> int:
    return sum(tensor.nbytes for tensor in shard)


def _cut(tensors: list[PlainTensor]) -> list[list[PlainTensor]]:
    """Tensors in order, cut into shards of at most SHARD_BYTES; a bigger tensor has its own."""
    shards: list[list[PlainTensor]] = []
    size = SHARD_BYTES + 1
    for tensor in tensors:
        if size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    # Widest items first, as the official writer orders them: all are aligned to their dtype.
    return [sorted(shard, key=lambda t: -t.itemsize) for shard in shards]


def _shard_header(tensors: list[PlainTensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        header[t.name] = {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [offset, offset + t.nbytes],
        }
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    length = -(-len(text) // 8) * 8
    return length.to_bytes(8, "little") + text.ljust(length)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    fd, size = open_regular(source)
    try:
        with replacing(target) as file:
            for offset in range(0, size, CHUNK_BYTES):
                piece = bytearray(min(CHUNK_BYTES, size - offset))
                read_into(fd, memoryview(piece), offset, str(source))
                write_all(file, memoryview(piece))
    finally:
        os.close(fd)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=True) + "\n"
    with replacing(path) as file:
        write_all(file, text.encode("utf-8", "surrogatepass"))
