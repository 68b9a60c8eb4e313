"""One GGUF file of a model's experts.

The header comes first and tells where every tensor will lie, so each expert's rows go to their
places as soon as they are quantised. The file appears under its name complete or not at all.

Only experts are written: the other tensors need rearrangements by architecture, and a tokenizer
beside them, before GGUF programs load the file as a model (``gguf_whole``).
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ktk import log
from ktk.checkpoint.packed import leftovers, replacing, write_all
from ktk.checkpoint.safetensors import read_into
from ktk.convert.resume import made
from ktk.convert.sinks.base import Pieces, Report, Sink
from ktk.convert.sinks.gguf_header import (
    FileTensor,
    architecture_of,
    experts_metadata,
    header,
    placed,
)
from ktk.convert.sinks.gguf_rows import FALLBACK, encode_rows, is_whole, row_bytes
from ktk.convert.sources import HuggingFaceSource
from ktk.experts.dequantise import dequantise
from ktk.experts.formats import BLOCKS
from ktk.experts.spec import MoESpec
from ktk.experts.stored import CodedExpert, ExpertWeights, StoredExperts, StoredMatrix
from ktk.quantise.feedback import Encode, Factor, calibrated

EXPERTS_ONLY = (
    "holds the experts only: the other tensors and the tokenizer stay with the Hugging Face "
    "directory"
)


@dataclass(frozen=True)
class ExpertsTensor(FileTensor):
    """One tensor of a layer's experts, all of them. projection : a field of ExpertWeights."""

    projection: str

    @property
    def expert_bytes(self) -> int:
        return self.num_bytes // self.shape[0]


class GgufSink(Sink):
    """A file that ``ktk.load_gguf`` and ``KTMoEWrapper`` read.

    type_of : of a layer's projection, a name of ``written_types``. provenance : of a calibration,
    or None. others : tensors that a subclass writes behind the experts'. metadata : more
    key-values, by key after the architecture. keys : more of them, by whole key.
    Raises ValueError for rows that are not whole blocks.
    """

    def __init__(
        self,
        source: HuggingFaceSource,
        output: Path,
        specs: dict[int, MoESpec],
        type_of: Callable[[int, str], str],
        provenance: dict[str, Any] | None,
        *,
        others: Sequence[FileTensor] = (),
        metadata: Mapping[str, Any] = MappingProxyType({}),
        keys: Mapping[str, Any] = MappingProxyType({}),
        notes: Sequence[str] = (EXPERTS_ONLY,),
    ) -> None:
        self.output, self.folder, self.specs = output, output.parent, specs
        self.type_of, self.missing = type_of, tuple(specs)
        noted = list(notes)
        plans = {layer: self._plan(layer, spec, noted) for layer, spec in specs.items()}
        config = source.model_config
        architecture, is_known = architecture_of(config, source.family)
        if not is_known:
            noted.append(
                f"general.architecture is {architecture!r}, the model_type: ktk knows no other"
            )
        if provenance is not None:
            noted.append("calibrated: " + json.dumps(provenance))
        self.notes = tuple(noted)
        said = {**experts_metadata(config, source.experts, specs), **metadata}
        activation = next(iter(specs.values())).activation
        self.header = header(
            architecture,
            source.place.resolve().name,
            _most(itertools.chain(*plans.values())),
            {
                **{f"{architecture}.{key}": value for key, value in said.items()},
                **keys,
                "ktk.activation": json.dumps(activation.to_json(), sort_keys=True),
            },
            [*itertools.chain(*plans.values()), *others],
        )
        end = len(self.header)
        self.tensors: dict[int, list[ExpertsTensor]] = {}
        for layer, plan in plans.items():
            self.tensors[layer], end = placed(plan, end)
        self.missing_bytes = end
        written = list(itertools.chain(*self.tensors.values()))
        self.expert_bytes = sum(t.num_bytes for t in written)
        types = {t.type for t in written if not t.projection.endswith("_bias")}
        weight_format = "+".join(sorted(types, key=list(BLOCKS).index))
        self.coding = {"weight_format": weight_format, "group_size": 0, "activation_group": 0}
        self._open_file = contextlib.ExitStack()

    @contextlib.contextmanager
    def open(self, resume: bool) -> Iterator[None]:
        with made(self.folder), self._open_file:
            _remove_leftovers(self.output)
            self._file = self._open_file.enter_context(replacing(self.output))
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    def begin(self) -> None:
        write_all(self._file, self.header)
        os.ftruncate(self._file.fileno(), self.missing_bytes)

    def encoder(self, layer: int) -> Encode:
        types = {t.projection: t.type for t in self.tensors[layer]}

        def encode(name: str, w: np.ndarray, factor: Factor) -> tuple[np.ndarray, np.ndarray]:
            if BLOCKS[types[name]].block > 1:
                return calibrated(w, BLOCKS[types[name]], factor)
            rows = encode_rows(w, types[name])  # floats, which round nothing worth an error
            stored = StoredMatrix.of_rows(types[name], w.shape[1], rows.view(np.uint8)[None])
            return rows, dequantise(stored, 0)

        return encode

    def encode(self, layer: int, weights: ExpertWeights | CodedExpert) -> Pieces:
        if isinstance(weights, CodedExpert):
            weights = weights.dequantised()
        return self.encode_rounded(layer, weights, {})

    def encode_rounded(
        self, layer: int, weights: ExpertWeights, rounded: dict[str, np.ndarray]
    ) -> Pieces:
        return [
            rounded[t.projection] if t.projection in rounded else _encode(t, weights)
            for t in self.tensors[layer]
        ]

    def write_layer(self, layer: int, experts: Iterator[Pieces]) -> None:
        for expert, pieces in enumerate(experts):
            for tensor, rows in zip(self.tensors[layer], pieces, strict=True):
                self.write_at(rows, tensor.offset + expert * tensor.expert_bytes)

    def read_layer(self, layer: int) -> StoredExperts:
        spec = self.specs[layer]
        matrices: dict[str, StoredMatrix] = {}
        biases: dict[str, np.ndarray] = {}
        for tensor in self.tensors[layer]:
            data = np.empty(tensor.num_bytes, np.uint8)
            read_into(self._file.fileno(), data.data, tensor.offset, str(self.output))
            if tensor.projection.endswith("_bias"):
                biases[tensor.projection] = data.view(np.float32).reshape(tensor.shape)
            else:
                rows = data.reshape(*tensor.shape[:2], -1)
                matrices[tensor.projection] = StoredMatrix.of_rows(
                    tensor.type, tensor.shape[2], rows
                )
        return StoredExperts(spec, matrices.get("gate"), matrices["up"], matrices["down"], **biases)

    def write_others(self, threads: int, report: Report) -> None:
        """There are none."""

    def finish(self) -> None:
        self._open_file.close()

    def write_at(self, rows: np.ndarray, at: int) -> None:
        """Write an array at a byte of the file."""
        span = np.ascontiguousarray(rows).data.cast("B")
        while len(span):
            written = os.pwrite(self._file.fileno(), span, at)
            span, at = span[written:], at + written

    def _plan(self, layer: int, spec: MoESpec, notes: list[str]) -> list[ExpertsTensor]:
        """One layer's tensors in the file's order; ``notes`` gets what is not as asked."""
        count, hidden, intermediate = spec.num_experts, spec.hidden_size, spec.intermediate_size
        plan = []
        for projection in ("gate", "up", "down") if spec.has_gate else ("up", "down"):
            outs, ins = (hidden, intermediate) if projection == "down" else (intermediate, hidden)
            name, type = f"blk.{layer}.ffn_{projection}_exps", self.type_of(layer, projection)
            if not is_whole(type, ins) and is_whole(FALLBACK, ins):
                note = (
                    f"{projection}: {FALLBACK}, as its rows of {ins} weights are not whole "
                    f"{type} blocks"
                )
                type = FALLBACK
                if note not in notes:
                    notes.append(note)
                    log.logger.info(note)
            try:
                row_bytes(type, ins)
            except ValueError as error:
                raise ValueError(f"{name}.weight: {error}") from None
            plan.append(ExpertsTensor(f"{name}.weight", type, (count, outs, ins), projection))
            if spec.has_bias:
                shape = (count, outs)
                plan.append(ExpertsTensor(f"{name}.bias", "F32", shape, f"{projection}_bias"))
        return plan


def _most(tensors: Iterable[ExpertsTensor]) -> str:
    """The type of the most bytes of matrices."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if not tensor.projection.endswith("_bias"):
            sizes[tensor.type] += tensor.num_bytes
    return max(sizes, key=lambda name: sizes[name])


def _remove_leftovers(output: Path) -> None:
    """Killed runs' temporary files of this output; FileExistsError if one is a live run's."""
    for path in leftovers(output):
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileExistsError(
                    f"{output}: another conversion is writing it; wait for it"
                ) from None
            except OSError:  # a file system without locks
                continue
            path.unlink()


def _encode(tensor: ExpertsTensor, weights: ExpertWeights) -> np.ndarray:
    """One expert's part of a tensor, C-contiguous."""
    values = getattr(weights, tensor.projection)
    if tensor.projection.endswith("_bias"):
        if not np.isfinite(values).all():
            raise ValueError(f"{tensor.projection} holds NaN or inf")
        return np.ascontiguousarray(values, "<f4")
    try:
        return encode_rows(values, tensor.type)
    except ValueError as error:
        raise ValueError(f"{tensor.projection}: {error}") from None
