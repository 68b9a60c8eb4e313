"""A GGUF file of a whole model: beside the experts all other tensors, as llama.cpp wants them.

Of architectures that a row of ``ktk.models.whole`` describes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ktk.checkpoint.safetensors import Checkpoint
from ktk.convert.recipe import Recipe
from ktk.convert.sinks.base import Report
from ktk.convert.sinks.gguf import GgufSink
from ktk.convert.sinks.gguf_header import FileTensor, architecture_of, placed
from ktk.convert.sinks.gguf_rows import FALLBACK, encode_rows, is_whole, row_bytes
from ktk.convert.sinks.gguf_tokenizer import tokenizer_metadata
from ktk.convert.sources import HuggingFaceSource
from ktk.convert.window import in_order
from ktk.errors import CheckpointError
from ktk.experts.formats.floats import to_f32
from ktk.experts.spec import MoESpec
from ktk.models.arch import BY_MODEL_TYPE
from ktk.models.config import Config
from ktk.models.prediction import predicts
from ktk.models.whole.rows import Tensor, WholeModel

CHUNK_WEIGHTS = 4 << 20  # quantised at a time
FLOAT_DTYPES = ("F32", "F16", "BF16")
Rows = tuple[int, int] | None


@dataclass(frozen=True)
class OtherTensor(FileTensor):
    """A tensor that is no expert's.

    source : its name in the directory. piece : which of those that ``row`` splits it into.
    """

    source: str
    row: Tensor
    piece: int


class WholeGgufSink(GgufSink):
    """A file that GGUF programs load as a model.

    whole_type : of the other tensors that ``recipe`` says nothing of.
    """

    def __init__(
        self,
        source: HuggingFaceSource,
        output: Path,
        specs: dict[int, MoESpec],
        type_of: Callable[[int, str], str],
        provenance: dict[str, Any] | None,
        whole_type: str,
        recipe: Recipe | None = None,
    ) -> None:
        self.checkpoint, self.fields = source.checkpoint, source.checkpoint.config
        model = _described(self.checkpoint)
        planned = list(_plan(self.checkpoint, model, source.expert_tensors, whole_type, recipe))
        vocab_size = int(self.fields["vocab_size"])
        super().__init__(
            source,
            output,
            specs,
            type_of,
            provenance,
            others=planned,
            metadata={**model.written(self.fields), "vocab_size": vocab_size},
            keys=tokenizer_metadata(source.place, vocab_size),
            notes=(),
        )
        self.others, self.missing_bytes = placed(planned, self.missing_bytes)
        self.other_bytes = sum(t.num_bytes for t in self.others)
        sources = {t.source for t in self.others}
        self.other_input_bytes = sum(self.checkpoint.tensors[name].nbytes for name in sources)

    def write_others(self, threads: int, report: Report) -> None:
        """Quantise them, some rows at a time."""
        parts = [(tensor, self._parts(tensor)) for tensor in self.others]
        jobs = [(tensor, rows) for tensor, cuts in parts for rows in cuts]
        with contextlib.closing(in_order(self._encoded, jobs, threads)) as encoded:
            for tensor, cuts in parts:
                for rows in cuts:
                    first = 0 if rows is None else rows[0]
                    row = row_bytes(tensor.type, tensor.shape[-1])
                    self.write_at(next(encoded), tensor.offset + first * row)
                if cuts:
                    source = self.checkpoint.tensors[tensor.source]
                    # A share of the source where several tensors are made of it.
                    report("other tensors", source.nbytes // len(tensor.row.pieces))

    def _parts(self, tensor: OtherTensor) -> list[Rows]:
        """The source's rows, start to stop, encoded at a time; [None] if it goes as a whole."""
        shape = self.checkpoint.tensors[tensor.source].shape
        if tensor.row.split is not None or len(shape) != 2:
            return [None]
        step = max(1, CHUNK_WEIGHTS // shape[1])
        return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]

    def _encoded(self, part: tuple[OtherTensor, Rows]) -> np.ndarray:
        """One of a tensor's parts, as the file holds it. Raises CheckpointError."""
        tensor, rows = part
        try:
            values = self.checkpoint.read(tensor.source, rows)
            if values.dtype == np.float16:
                values = values.astype(np.float32)
            if tensor.row.split is not None:
                values = tensor.row.split(to_f32(values), self.fields)[tensor.piece]
            return encode_rows(values.reshape(-1, tensor.shape[-1]), tensor.type)
        except ValueError as error:
            raise CheckpointError(f"{self.checkpoint.path}: {tensor.source}: {error}") from None


def _described(checkpoint: Checkpoint) -> WholeModel:
    """The row of the model; CheckpointError if there is none."""
    model_type = checkpoint.config.get("model_type")
    rows = {name: row.whole for name, row in BY_MODEL_TYPE.items() if row.whole}
    if model_type not in rows:
        raise CheckpointError(
            f"{checkpoint.path}: model_type {model_type!r}: a whole GGUF file is written of "
            f"{', '.join(rows)}; leave --whole out for the experts alone"
        )
    return rows[model_type]


def _plan(
    checkpoint: Checkpoint,
    model: WholeModel,
    expert_tensors: set[str],
    whole_type: str,
    recipe: Recipe | None,
) -> Iterator[OtherTensor]:
    """The other tensors in the file's order. Raises CheckpointError for those without a place."""
    tensors, fields = checkpoint.tensors, checkpoint.config
    num_layers, is_tied = int(fields["num_hidden_layers"]), bool(fields.get("tie_word_embeddings"))
    used = set(expert_tensors)
    for row, layer in model.layer_tensors(num_layers):
        names = [name.format(n=layer) for name in (row.checkpoint, row.hf) if name]
        source = next((name for name in names if name in tensors), None)
        if source is None or source in used:
            continue
        used.add(source)
        if row.hf == "lm_head.weight" and is_tied:
            continue
        info = tensors[source]
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{checkpoint.path}: {source} is {info.dtype}: must be one of "
                f"{', '.join(FLOAT_DTYPES)} for a whole GGUF file"
            )
        shapes = [tuple(info.shape)]
        if row.split is not None:
            shapes = [a.shape for a in row.split(np.empty(info.shape, np.int8), fields)]
        for piece, (name, shape) in enumerate(zip(row.pieces, shapes, strict=True)):
            shape = tuple(s for s in shape if s > 1) or (1,)
            name = name.format(n=layer)
            coding = None if recipe is None else recipe.coding(name)
            type = _type(name, shape, whole_type if coding is None else coding.format.name)
            yield OtherTensor(name, type, shape, source, row, piece)
    unused = [
        name
        for name in tensors
        if name not in used and not name.endswith("inv_freq") and not predicts(name, num_layers)
    ]
    if unused:
        raise CheckpointError(
            f"{checkpoint.path}: {len(unused)} tensors have no place in a GGUF file of "
            f"{architecture_of(Config.of(checkpoint), '')[0]}: {', '.join(unused[:8])}"
        )


def _type(name: str, shape: tuple[int, ...], whole_type: str) -> str:
    """Vectors and routers stay exact; whatever is wide enough for blocks gets them."""
    if len(shape) < 2 or "ffn_gate_inp" in name:
        return "F32"
    return next((t for t in (whole_type, FALLBACK) if is_whole(t, shape[-1])), "F16")
