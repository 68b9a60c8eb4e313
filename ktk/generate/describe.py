"""What a path holds, told from its headers alone: what it is, what will run it,
what memory that takes against what there is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ktk import backends
from ktk.checkpoint import is_gguf
from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.checkpoint.packed import QUANT_METHOD, layer_path, read_config
from ktk.checkpoint.safetensors import Checkpoint
from ktk.errors import CheckpointError, KtkError
from ktk.experts.spec import MoESpec
from ktk.integration.choices import check_linear
from ktk.kv.dtypes import KV_DTYPES, check_kv_dtype
from ktk.kv.sizes import TokenShape, context_tokens, gguf_number
from ktk.machine import cpu
from ktk.models import find_experts, find_num_layers
from ktk.models.arch import WHOLE_MODELS
from ktk.models.config import TOP_K_KEYS
from ktk.models.find import find_gguf_experts
from ktk.models.gguf.experts import GgufExperts
from ktk.models.prediction import gguf_predicts, predicts
from ktk.models.whole.source import Source
from ktk.ops.decoder import row_width
from ktk.paths import user_path
from ktk.placement.residency.expert_memory import ExpertMemory

# What Python, torch and transformers take, and what one forward pass of a few hundred tokens needs
# besides weights.
OVERHEAD = 700 << 20
TOKEN_EMBEDDING = "token_embd.weight"  # which every whole GGUF model has
AUTO_FORMATS = ("int8", "nl4")  # of float experts, the most exact first: the first one that fits
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ModelDescription:
    """What a path holds and what running it takes; sizes in bytes.

    kind : "packed", "float", "quantised" or "gguf". kernel : what runs the experts, "" where
        nothing does: see reason.
    expert_bytes : of experts as they will run; of a GGUF file they are mapped, so they need not
    fit. rest_bytes : of all else, in ``dtype`` but for linear_bytes of it: dense linear layers that
    run as a GGUF file's blocks, which every token reads. kv_bytes : of a KV cache of ``context``
    tokens. moe_layers : indices of the layers with experts. reason : why it cannot run, or None.
    warning : what will be slow, or None. resident_experts : that have room in memory, of all
    layers, and resident_bytes of it; 0: all are loaded. kv_dtype : of the KV cache, where that is
    not ``dtype``.
    """

    path: str
    kind: str
    architecture: str
    num_layers: int
    num_moe_layers: int
    num_experts: int
    num_experts_per_tok: int
    weight_format: str
    bits_per_weight: float
    backend: str
    kernel: str
    dtype: str
    max_context: int
    context: int
    expert_bytes: int
    rest_bytes: int
    kv_bytes: int
    available_bytes: int
    total_bytes: int
    linear_bytes: int = 0
    moe_layers: tuple[int, ...] = ()
    reason: str | None = None
    warning: str | None = None
    resident_experts: int = 0
    resident_bytes: int = 0
    kv_dtype: str | None = None

    @property
    def needed_bytes(self) -> int:
        """Memory that must be there: mapped experts do not count."""
        experts = 0 if self.kind == "gguf" else self.expert_bytes
        if self.resident_experts:
            experts = self.resident_bytes
        return experts + self.rest_bytes + self.kv_bytes + OVERHEAD

    @property
    def fits(self) -> bool:
        return self.available_bytes == 0 or self.needed_bytes <= self.available_bytes

    def memory_refusal(self) -> str | None:
        """Why the model does not fit into memory, with the figures; None if it does."""
        if self.fits:
            return None
        experts = self.resident_bytes if self.resident_experts else self.expert_bytes
        return (
            f"{self.path} needs {size(self.needed_bytes)} of memory (experts "
            f"{size(experts)} {self.weight_format}, other weights "
            f"{size(self.rest_bytes)}, KV cache of {self.context} tokens {size(self.kv_bytes)}, "
            f"working memory {size(OVERHEAD)}), and {size(self.available_bytes)} of "
            f"{size(self.total_bytes)} are free"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "overhead_bytes": OVERHEAD,
            "needed_bytes": self.needed_bytes,
            "fits": self.fits,
        }


def size(num_bytes: float) -> str:
    """``3.2 GB``, ``81 MB``: as people read it."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


@dataclass(frozen=True)
class _Cache:
    """What is asked of the KV cache; None: the default."""

    context: int | None
    dtype: str | None

    def num_bytes(self, shape: TokenShape, dtype: str, tokens: int) -> int:
        if self.dtype is None:
            return shape.num_bytes(DTYPE_BYTES[dtype], tokens)
        kept = KV_DTYPES[self.dtype]
        return shape.num_bytes(kept.itemsize, tokens, row_width(0, kept))


def describe_model(
    path: str | os.PathLike[str],
    method: str = "auto",
    weight_format: str | None = None,
    dtype: str | None = None,
    context: int | None = None,
    linear: str = "file",
    expert_memory: ExpertMemory | None = None,
    kv_dtype: str | None = None,
) -> ModelDescription:
    """What a model is and needs, from its headers alone.

    path : a Hugging Face directory, one that ``ktk convert`` wrote, or a GGUF model's file, part or
        directory.
    weight_format : of float experts: a name of ``ktk.experts.formats.PANELS``; None or "auto" takes
    int8 if it fits into memory, else nl4. dtype : "bfloat16", "float16" or "float32" for
    everything but the experts; None keeps the checkpoint's.
    context : tokens of KV cache; None: the model's longest, at most 8192. linear, expert_memory :
    as in ``open_model``. kv_dtype : of the KV cache, a row of ``KV_DTYPES``; None: ``dtype``.
    Raises CheckpointError, ValueError.
    """
    check_kv_dtype(kv_dtype)
    check_linear(linear)
    cache = _Cache(context, kv_dtype)
    backends.check_method(method)
    if dtype is not None and dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPE_BYTES)}")
    what = (
        "a model is a Hugging Face directory, a directory written by `ktk convert`, or a .gguf file"
    )
    if not os.fspath(path):  # Path("") is the current directory
        raise CheckpointError(f"the model's path is empty; {what}")
    where = user_path(path)
    if not where.exists():
        raise CheckpointError(f"{path}: no such file or directory; {what}")
    weight_format = None if weight_format == "auto" else weight_format
    if is_gguf(where):
        if weight_format is not None:
            raise ValueError(
                f"weight_format={weight_format!r}: a GGUF model's experts run in the types the "
                f"file has; leave it out, or convert: ktk convert --input-path {path} --output "
                f"DIR --quant-method {weight_format}"
            )
        return _describe_gguf(where, method, dtype or "bfloat16", cache, linear, expert_memory)
    if not where.is_dir():
        raise CheckpointError(f"{path}: must be a directory with a config.json, or a .gguf file")
    if not (where / "config.json").exists():
        raise CheckpointError(f"{path}: has no config.json; {what}")
    from ktk.integration.transformers.model_config import checked_fields

    config = checked_fields(where)
    quantised = config.get("quantization_config")
    if isinstance(quantised, dict) and quantised.get("quant_method") == QUANT_METHOD:
        if weight_format is not None:
            raise ValueError(
                f"weight_format={weight_format!r}: the experts of {path} are packed already; "
                "leave it out"
            )
        return _describe_packed(where, config, method, dtype, cache, expert_memory)
    if expert_memory is not None:
        raise ValueError(
            f"expert memory {expert_memory.limit}: the experts of {path} are packed while they are "
            f"loaded, all of them: run `ktk convert --input-path {path} --output DIR` once, and "
            "open DIR"
        )
    kind = "quantised" if quantised else "float"
    if weight_format is not None:
        return _describe_float(where, kind, config, method, weight_format, dtype, cache)
    from_method = backends.method_format(method)
    formats = (from_method,) if from_method else AUTO_FORMATS
    for name in formats:
        found = _describe_float(where, kind, config, method, name, dtype, cache)
        if found.fits:
            break
    return found


def _describe_packed(
    path: Path,
    config: dict[str, Any],
    method: str,
    dtype: str | None,
    cache: _Cache,
    expert_memory: ExpertMemory | None,
) -> ModelDescription:
    specs = read_config(path).specs
    num_bytes = sum(layer_path(path, layer).stat().st_size for layer in specs)
    with Checkpoint.open(path) as checkpoint:
        rest = _rest_bytes(checkpoint, set(), _dtype(config, dtype))
    found = _describe(path, "packed", config, specs, method, num_bytes, rest, dtype, cache)
    sizes = [spec.layout.expert_bytes for spec in specs.values()]
    return _limited(found, expert_memory, sizes, [spec.num_experts for spec in specs.values()])


def _limited(
    found: ModelDescription,
    expert_memory: ExpertMemory | None,
    expert_bytes: list[int],
    num_experts: list[int],
) -> ModelDescription:
    """With room for some experts only. expert_bytes, num_experts : of each layer."""
    if expert_memory is None:
        return found
    if not found.num_experts_per_tok:
        raise CheckpointError(f"{found.path}: does not say how many experts one token uses")
    room = expert_memory.room(expert_bytes, num_experts, found.num_experts_per_tok)
    return replace(found, resident_experts=room.capacity, resident_bytes=room.num_bytes)


def _describe_float(
    path: Path,
    kind: str,
    config: dict[str, Any],
    method: str,
    weight_format: str,
    dtype: str | None,
    cache: _Cache,
) -> ModelDescription:
    with Checkpoint.open(path) as checkpoint:
        experts = find_experts(checkpoint)
        specs = {
            layer: MoESpec(**experts.spec_fields(layer), weight_format=weight_format)
            for layer in experts.layers
        }
        taken = set().union(*(experts.tensor_names(layer) for layer in experts.layers))
        rest = _rest_bytes(checkpoint, taken, _dtype(config, dtype))
    num_bytes = sum(spec.num_experts * spec.layout.expert_bytes for spec in specs.values())
    return _describe(path, kind, config, specs, method, num_bytes, rest, dtype, cache)


def _rest_bytes(checkpoint: Checkpoint, taken: set[str], dtype: str) -> int:
    """Bytes of all tensors that a model loads but the taken ones and packed experts,
    once they are in ``dtype``.
    """
    count, num_layers = 0, find_num_layers(checkpoint)
    for name, info in checkpoint.tensors.items():
        is_expert = name in taken or info.file.name.startswith("ktk-experts-")
        if not is_expert and not predicts(name, num_layers):
            count += math.prod(info.shape)
    return count * DTYPE_BYTES[dtype]


def _describe(
    path: Path,
    kind: str,
    config: dict[str, Any],
    specs: Mapping[int, MoESpec],
    method: str,
    expert_bytes: int,
    rest_bytes: int,
    dtype: str | None,
    cache: _Cache,
) -> ModelDescription:
    from ktk.integration.transformers.multimodal import run_on_text

    text = _text_config(config)
    dtype = _dtype(config, dtype)
    spec = next(iter(specs.values()))
    total, available = cpu.memory()
    longest = int(text.get("max_position_embeddings") or 0)
    tokens = context_tokens(longest, cache.context)
    bits = 8 * expert_bytes / sum(s.num_weights * s.num_experts for s in specs.values())
    backend, kernel, reason = _selected(method, spec)
    unknown, left_out = run_on_text(path, config)
    reason = reason or unknown
    rest_bytes -= min(rest_bytes, left_out * DTYPE_BYTES[dtype])
    named = config.get("architectures") or config.get("model_type", "unknown")
    return ModelDescription(
        path=str(path),
        kind=kind,
        architecture=named if isinstance(named, str) else str(named[0]),
        num_layers=int(text.get("num_hidden_layers") or len(specs)),
        num_moe_layers=len(specs),
        num_experts=spec.num_experts,
        num_experts_per_tok=_top_k(text),
        weight_format=spec.weight_format,
        bits_per_weight=round(bits, 3),
        backend=backend,
        kernel=kernel,
        dtype=dtype,
        max_context=longest,
        context=tokens,
        expert_bytes=expert_bytes,
        rest_bytes=rest_bytes,
        kv_bytes=cache.num_bytes(TokenShape.of_config(text), dtype, tokens),
        kv_dtype=cache.dtype,
        available_bytes=available,
        total_bytes=total,
        moe_layers=tuple(sorted(specs)),
        reason=reason,
    )


def _describe_gguf(
    path: Path,
    method: str,
    dtype: str,
    cache: _Cache,
    linear: str,
    expert_memory: ExpertMemory | None,
) -> ModelDescription:
    checkpoint = GgufCheckpoint.open(path)
    experts = find_gguf_experts(checkpoint)
    taken = set().union(*(experts.tensor_names(layer) for layer in experts.layers))
    expert_bytes = sum(t.num_bytes for name, t in checkpoint.tensors.items() if name in taken)
    taken |= {name for name in checkpoint.tensors if gguf_predicts(name, experts.num_layers)}
    blocks_of = _gguf_linears(experts) if linear == "file" else set()
    linear_bytes = sum(checkpoint.tensors[name].num_bytes for name in blocks_of)
    taken |= blocks_of - {TOKEN_EMBEDDING}  # whose floats the embedding needs beside the blocks
    rest = sum(math.prod(t.shape) for name, t in checkpoint.tensors.items() if name not in taken)
    total, available = cpu.memory()
    metadata = checkpoint.metadata
    architecture = str(experts.architecture)
    if architecture in WHOLE_MODELS and TOKEN_EMBEDDING in checkpoint.tensors:
        WHOLE_MODELS[architecture].fields(Source(experts))  # CheckpointError for what it cannot be

    longest = gguf_number(metadata, "context_length")
    tokens, layers = context_tokens(longest, cache.context), experts.num_layers or 0
    shape = TokenShape.of_gguf(metadata, layers)
    spec = experts.spec(experts.layers[0])
    backend, kernel, reason = _selected(method, spec)
    if TOKEN_EMBEDDING not in checkpoint.tensors:
        reason = f"it holds no whole model, only experts: there is no tensor {TOKEN_EMBEDDING}"
    blocks = experts.experts(experts.layers[0])
    weights = sum(
        experts.spec(layer).num_weights * experts.spec(layer).num_experts
        for layer in experts.layers
    )
    found = ModelDescription(
        path=str(path),
        kind="gguf",
        architecture=architecture,
        num_layers=layers,
        num_moe_layers=len(experts.layers),
        num_experts=spec.num_experts,
        num_experts_per_tok=_gguf_top_k(experts),
        weight_format=f"GGUF {blocks.types}",
        bits_per_weight=round(8 * expert_bytes / weights, 3),
        backend=backend,
        kernel=f"{kernel} {blocks.types}" if kernel else "",
        dtype=dtype,
        max_context=longest,
        context=tokens,
        expert_bytes=expert_bytes,
        rest_bytes=rest * DTYPE_BYTES[dtype] + linear_bytes,
        linear_bytes=linear_bytes,
        kv_bytes=cache.num_bytes(shape, dtype, tokens),
        kv_dtype=cache.dtype,
        available_bytes=available,
        total_bytes=total,
        moe_layers=tuple(experts.layers),
        reason=reason,
    )
    if expert_memory is not None:
        many = [experts.spec(layer).num_experts for layer in experts.layers]
        sizes = [
            sum(checkpoint.tensors[name].num_bytes for name in experts.tensor_names(layer)) // of
            for layer, of in zip(experts.layers, many, strict=True)
        ]
        return _limited(found, expert_memory, sizes, many)
    if not available or found.needed_bytes + found.expert_bytes <= available:
        return found
    slow = (
        f"experts of {size(expert_bytes)} do not fit into the {size(available)} of free memory "
        "beside the rest: they are read from disk again and again, which is slow"
    )
    return ModelDescription(**{**asdict(found), "warning": slow})


def _gguf_linears(experts: GgufExperts) -> set[str]:
    """The file's tensors that ``load_gguf_model`` runs as they lie, experts left out."""
    checkpoint = experts.checkpoint
    row = WHOLE_MODELS.get(experts.architecture)
    if row is None or TOKEN_EMBEDDING not in checkpoint.tensors:
        return set()
    from ktk.integration.transformers.gguf_linears import file_linears

    found = file_linears(checkpoint, row, Source(experts).num_layers)
    return {name for _, name in found.values()}


def _gguf_top_k(experts: GgufExperts) -> int:
    try:
        return experts.num_experts_per_tok
    except KtkError:
        return 0


def _selected(method: str, spec: MoESpec) -> tuple[str, str, str | None]:
    """(backend, kernel, None), or what keeps the experts from running."""
    try:
        backend = backends.select(method, spec)
    except (KtkError, ValueError) as error:
        return "", "", str(error)
    return backend.name, backend.kernel(spec), None


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _dtype(config: dict[str, Any], dtype: str | None) -> str:
    text = _text_config(config)
    written = text.get("dtype") or text.get("torch_dtype") or config.get("dtype")
    own = str(written or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return dtype or (own if own in DTYPE_BYTES else "bfloat16")


def _top_k(text: Mapping[str, Any]) -> int:
    names = (*TOP_K_KEYS, "moe_top_k")
    return next((int(text[n]) for n in names if isinstance(text.get(n), int)), 0)
