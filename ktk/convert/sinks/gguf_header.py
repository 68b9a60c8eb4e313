"""The head of a GGUF file: what it says of the model, and where each tensor lies."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ktk.convert.sinks.gguf_rows import row_bytes
from ktk.errors import CheckpointError
from ktk.experts.formats import BLOCKS
from ktk.experts.spec import MoESpec
from ktk.models import Config, Experts
from ktk.models.arch import BY_MODEL_TYPE
from ktk.models.config import INTERMEDIATE_KEYS, NUM_LAYERS_KEYS

ALIGNMENT = 32  # of tensors, the GGUF format's default
# File types that gguf 0.18, the oldest supported, has no name of.
_NEWER_FILE_TYPES = {"MOSTLY_MXFP4_MOE": 38}


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a file. type : as ggml calls it. shape : the last axis is the one of rows.

    offset : of its first byte in the file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int = field(default=0, kw_only=True)

    @property
    def num_bytes(self) -> int:
        rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        return rows * row_bytes(self.type, self.shape[-1])


T = TypeVar("T", bound=FileTensor)


def placed(tensors: Iterable[T], at: int) -> tuple[list[T], int]:
    """The tensors with their offsets, one behind the other from byte ``at``, and where they end."""
    found = []
    for tensor in tensors:
        found.append(dataclasses.replace(tensor, offset=at))
        at += _aligned(tensor.num_bytes)
    return found, at


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _file_type(name: str) -> int:
    """The number that a GGUF file states for the type most of it has."""
    import gguf

    known = gguf.LlamaFileType.__members__
    return int(known[name]) if name in known else _NEWER_FILE_TYPES[name]


def architecture_of(config: Config, family: str) -> tuple[str, bool]:
    """general.architecture, and whether GGUF has it; else it is the model_type, or the family."""
    named = config.model_types[::-1]  # outermost first
    for model_type in named:
        row = BY_MODEL_TYPE.get(model_type)
        if row is not None and row.gguf is not None:
            return row.gguf.name, True
    return (named[0] if named else family), False


def header(
    architecture: str,
    name: str,
    experts_type: str,
    keys: Mapping[str, Any],
    tensors: Iterable[FileTensor],
) -> bytes:
    """Everything before the first tensor's data, the tensors lying one behind the other, aligned.

    name : the model's. keys : key-values beside those of every file.
    """
    import gguf

    with tempfile.TemporaryDirectory(prefix="ktk-") as folder:
        path = Path(folder) / "header"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(_file_type(BLOCKS[experts_type].file_type))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add: dict[type, Callable[[str, Any], None]] = {
            bool: writer.add_bool,
            float: writer.add_float32,
            int: writer.add_uint32,
            str: writer.add_string,
            list: writer.add_array,
        }
        for key, value in keys.items():
            add[type(value)](key, value)
        for t in tensors:
            number = gguf.GGMLQuantizationType[t.type]
            writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.num_bytes, number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        written = path.read_bytes()
    return written.ljust(_aligned(len(written)), b"\0")


def experts_metadata(
    config: Config, experts: Experts, specs: Mapping[int, MoESpec]
) -> dict[str, Any]:
    """What GGUF programs want to know of the experts, as far as the config says it.

    By key after the architecture.
    """
    spec = next(iter(specs.values()))
    dense = config.size(("intermediate_size", *INTERMEDIATE_KEYS), experts.layers[0])
    counted = {
        "block_count": config.size(NUM_LAYERS_KEYS) or max(specs) + 1,
        "embedding_length": config.size(("hidden_size",)) or spec.hidden_size,
        "feed_forward_length": dense,
        "expert_count": spec.num_experts,
        "expert_feed_forward_length": spec.intermediate_size,
        "expert_shared_count": _count(config, "n_shared_experts"),
        "expert_group_count": _count(config, "n_group"),
        "expert_group_used_count": _count(config, "topk_group"),
        "leading_dense_block_count": _count(config, "first_k_dense_replace"),
    }
    values: dict[str, Any] = {key: value for key, value in counted.items() if value is not None}
    if values["embedding_length"] != spec.hidden_size:
        values["moe_latent_size"] = spec.hidden_size
    with contextlib.suppress(CheckpointError):  # the experts' weights do not depend on it
        values["expert_used_count"] = experts.num_experts_per_tok
    norm = config.get(("norm_topk_prob",))[1]
    if isinstance(norm, bool):
        values["expert_weights_norm"] = norm
    if config.get(("routed_scaling_factor",))[0]:
        values["expert_weights_scale"] = config.number("routed_scaling_factor", 1.0)
    gating = {"softmax": 1, "sigmoid": 2}.get(str(config.get(("scoring_func", "score_func"))[1]))
    if gating is not None:
        values["expert_gating_func"] = gating
    return values


def _count(config: Config, key: str) -> int | None:
    """A count that may be 0; None where the config has no such int."""
    value = config.get((key,))[1]
    return value if type(value) is int and 0 <= value < 1 << 31 else None
