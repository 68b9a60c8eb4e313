"""Tiny GGUF files for tests: whole models by the gguf package's writer,
and raw bytes however wrong.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

HIDDEN, INTERMEDIATE, EXPERTS = 64, 32, 4
U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
FORMS = {U8: "<B", U32: "<I", F32: "<f", BOOL: "<B", U64: "<Q"}


def string(text: str | bytes, version: int = 3) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<I" if version == 1 else "<Q", len(raw)) + raw


def value(kind: int, given: Any, version: int = 3) -> bytes:
    """A value without its type; an array is (element type, [elements])."""
    if kind == STRING:
        return string(given, version)
    if kind == ARRAY:
        inner, items = given
        count = struct.pack("<I" if version == 1 else "<Q", len(items))
        return struct.pack("<I", inner) + count + b"".join(value(inner, x, version) for x in items)
    return struct.pack(FORMS[kind], given)


def key(name: str | bytes, kind: int, given: Any, version: int = 3) -> bytes:
    return string(name, version) + struct.pack("<I", kind) + value(kind, given, version)


def tensor(
    name: str | bytes, dims: list[int], kind: int = 0, offset: int = 0, version: int = 3
) -> bytes:
    """A tensor info; ``dims`` in ggml's order."""
    form = "I" if version == 1 else "Q"
    sizes = struct.pack(f"<I{len(dims)}{form}", len(dims), *dims)
    return string(name, version) + sizes + struct.pack("<IQ", kind, offset)


def raw_file(
    path: Path,
    keys: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> Path:
    """A GGUF file with any header, however wrong;
    ``counts`` are what it says of tensors and keys.
    """
    head = magic + struct.pack("<I", version)
    head += struct.pack("<II" if version == 1 else "<QQ", *(counts or (len(tensors), len(keys))))
    head += b"".join(keys) + b"".join(tensors)
    path.write_bytes(head + b"\0" * (-len(head) % alignment) + data)
    return path


def random_blocks(rng: np.random.Generator, kind: Type, *shape: int) -> tuple[np.ndarray, Type]:
    """Blocks of ``shape`` weights of any type, random bytes: (uint8 (*shape[:-1], row bytes),
    type).
    """
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return rng.integers(0, 256, (*shape[:-1], shape[-1] // block * size), np.uint8), kind


def quantised(rng: np.random.Generator, kind: Type, *shape: int) -> tuple[np.ndarray, Type]:
    """Normal weights in a type the package can quantise to."""
    return quants.quantize(rng.standard_normal(shape).astype(np.float32), kind), kind


def write_gguf(
    path: Path,
    architecture: str | None,
    tensors: dict[str, Any],
    metadata: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write arrays, or (blocks, type), under their names; metadata of str, bool, int, float and
    lists of them.

    options go to GGUFWriter; split_max_tensors=n writes parts, whose names it makes from ``path``.
    """
    writer = gguf.GGUFWriter(path, architecture or "", **options)
    if architecture is None:
        del writer.kv_data[0]["general.architecture"]
    for name, given in (metadata or {}).items():
        if isinstance(given, bool):
            writer.add_bool(name, given)
        elif isinstance(given, str):
            writer.add_string(name, given)
        elif isinstance(given, list):
            writer.add_array(name, given)
        elif isinstance(given, float):
            writer.add_float32(name, given)
        else:
            writer.add_uint32(name, given)
    for name, entry in tensors.items():
        array, kind = entry if isinstance(entry, tuple) else (entry, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sizes(architecture: str, **more: Any) -> dict[str, Any]:
    """The metadata of a tiny MoE."""
    plain = {
        "expert_count": EXPERTS,
        "expert_used_count": 2,
        "embedding_length": HIDDEN,
        "expert_feed_forward_length": INTERMEDIATE,
        "block_count": 3,
        **more,
    }
    return {f"{architecture}.{name}": given for name, given in plain.items() if given is not None}


def expert_shapes(part: str) -> tuple[int, int, int]:
    """(experts, out, in) of gate, up, down or gate_up."""
    if part == "down":
        return EXPERTS, HIDDEN, INTERMEDIATE
    return EXPERTS, INTERMEDIATE * (2 if part == "gate_up" else 1), HIDDEN


def stacked(
    rng: np.random.Generator,
    layers: tuple[int, ...],
    parts: tuple[str, ...] = ("gate", "up", "down"),
    kind: Type = Type.Q8_0,
) -> dict[str, tuple[np.ndarray, Type]]:
    """Stacked experts of some layers."""
    return {
        f"blk.{layer}.ffn_{part}_exps.weight": quantised(rng, kind, *expert_shapes(part))
        for layer in layers
        for part in parts
    }
