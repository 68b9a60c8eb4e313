"""The header of one GGUF file, checked as hostile bytes.

It is parsed here: ``gguf.GGUFReader`` makes NumPy objects of every token string and believes the
counts it reads. A file with the tokenizer of Qwen3 (152,000 tokens, as many merges): 6.7 s there,
0.03 s here, where arrays are stepped over and read when asked for. Types: types.py.
Source: the GGUF format description (magic, version, counts, key-values, tensor infos, aligned
data), versions 1 to 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ktk.checkpoint.gguf.cursor import U64, Cursor, Malformed
from ktk.checkpoint.gguf.types import TYPES, type_name
from ktk.checkpoint.mapping import MappedFile
from ktk.checkpoint.safetensors import shown
from ktk.errors import CheckpointError

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18  # 61 layers of 384 experts, each in tensors of its own, are 70,000
MAX_NAME = 65535  # bytes of a key or tensor name; the format's own limit for keys
MAX_DIMENSIONS = 4
MAX_NESTING = 4  # depth of arrays in arrays
MAX_NESTED = 1 << 16  # arrays in arrays of one file; models have none
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32
PART = re.compile(r"(?P<stem>.*)-(?P<part>[0-9]{5})-of-(?P<parts>[0-9]{5})\.gguf", re.DOTALL)

# GGUF value type -> NumPy dtype of one element; the two others are strings and arrays.
SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("bool"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
UINT32, STRING, ARRAY = 4, 8, 9
# What other files begin with -> what to do about it.
FOREIGN_MAGIC = {
    b"lmgg": "a GGML file from before GGUF; convert it again from the original model",
    b"fmgg": "a GGMF file from before GGUF; convert it again from the original model",
    b"tjgg": "a GGJT file from before GGUF; convert it again from the original model",
    b"vers": "perhaps a Git LFS pointer in place of the file; run git lfs pull",
    b"PK\x03\x04": "a zip archive or PyTorch file; convert it to GGUF",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: bytes ``begin`` to ``begin + num_bytes`` of ``file``.

    type : the ggml type's name, e.g. "Q4_K"; "type 77" where nothing here knows it, and num_bytes
        is 0.
    shape : row-major, the ggml dimensions reversed.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    num_bytes: int

    @property
    def is_known(self) -> bool:
        return self.type in TYPES

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of blocks."""
        return TYPES[self.type].row_bytes(self.shape[-1])


@dataclass(frozen=True, slots=True)
class Array:
    """An array in a header that has been stepped over:
    ``count`` elements of ``type`` from ``begin`` on.
    """

    type: int
    count: int
    begin: int


class Metadata(Mapping[str, Any]):
    """The key-values of a GGUF model: str, int, float, bool, and lists of them.

    Arrays (the tokenizer's have hundreds of thousands of strings) are read from the file when they
    are first asked for; ``size(key)`` tells their length without that. Asking raises
    CheckpointError for strings that are not UTF-8.
    """

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._sources: dict[str, Header] = {}

    def add(self, header: Header, skip_prefix: str) -> None:
        """Keys of one more part; what earlier parts say stays."""
        for key, value in header.values.items():
            if key not in self._values and not key.startswith(skip_prefix):
                self._values[key] = value
                self._sources[key] = header

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, Array):
            value = self._sources[key].array(key, value)
            self._values[key] = value
        return value

    def size(self, key: str) -> int | None:
        """Elements of an array; None for anything else."""
        value = self._values[key]
        if isinstance(value, Array):
            return value.count
        return len(value) if isinstance(value, list) else None

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Metadata({len(self)} keys)"


class Header:
    """One file's checked header: ``values`` (arrays as Array), ``tensors``, ``version``."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.path = file, file.path
        try:
            self._parse(file.data.data)
        except Malformed as error:
            raise CheckpointError(f"{file.path}: {error}") from None

    def _parse(self, data: memoryview) -> None:
        cursor = Cursor(data)
        if len(data) < 8:
            raise Malformed(f"byte 0: the file has {len(data)} bytes: not GGUF")
        magic = bytes(data[cursor.step(4, "the magic") : 4])
        if magic != b"GGUF":
            known = FOREIGN_MAGIC.get(magic, "is this a GGUF file?")
            raise Malformed(f"byte 0: begins with {magic!r}, a GGUF file with b'GGUF': {known}")
        version = cursor.u32("the version")
        if version and version & 0xFFFF == 0:
            raise Malformed(
                "byte 4: a big-endian file; convert it with gguf-convert-endian (gguf package), "
                "or download the little-endian one"
            )
        if version not in (1, 2, 3):
            raise Malformed(f"byte 4: version {version}: ktk reads 1, 2 and 3")
        self.version = version
        self.cursor = cursor = Cursor(data, version)
        cursor.position = 8
        width = cursor.length.size  # name, dimensions, type, offset; name, type, value:
        num_tensors = self._bounded(cursor, "number of tensors", MAX_TENSORS, 2 * width + 16)
        num_keys = self._bounded(cursor, "number of keys", MAX_KEYS, width + 5)
        self.values: dict[str, Any] = {}
        self._alignment_at = self._nested = 0
        for _ in range(num_keys):
            self._key(cursor)
        alignment = self._alignment()
        infos = [self._info(cursor) for _ in range(num_tensors)]
        start = -(-cursor.position // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for position, name, shape, number, offset in infos:
            if name in self.tensors:
                raise Malformed(f"byte {position}: tensor {shown(name)} occurs twice")
            self.tensors[name] = self._tensor(
                position, name, shape, number, offset, start, alignment
            )
        self._check_overlap()

    @staticmethod
    def _bounded(cursor: Cursor, what: str, limit: int, smallest: int) -> int:
        """A count of things of at least ``smallest`` bytes."""
        begin = cursor.position
        count = cursor.count(f"the {what}")
        if count > limit:
            raise Malformed(f"byte {begin}: {what} is {count}: at most {limit}")
        if count * smallest > cursor.size - cursor.position:
            raise Malformed(
                f"byte {begin}: {what} is {count}, each of {smallest} bytes or more: the file "
                f"ends at {cursor.size}"
            )
        return count

    def _key(self, cursor: Cursor) -> None:
        begin = cursor.position
        key = cursor.string("a key", MAX_NAME)
        where = f"key {shown(key)}"
        if key in self.values:
            raise Malformed(f"byte {begin}: {where} occurs twice")
        kind = cursor.u32(f"the type of {where}")
        if key == "general.alignment":
            self._alignment_at = cursor.position
            if kind != UINT32:
                raise Malformed(f"byte {begin}: {where} has value type {kind}: must be 4, uint32")
        if kind == STRING:
            self.values[key] = cursor.string(where)
        elif kind == ARRAY:
            self.values[key] = self._skip_array(cursor, where, 1)
        elif kind in SCALARS:
            self.values[key] = self._scalar(cursor, kind, where)
        else:
            raise Malformed(f"byte {cursor.position - 4}: {where} has unknown value type {kind}")

    @staticmethod
    def _scalar(cursor: Cursor, kind: int, where: str) -> Any:
        dtype = SCALARS[kind]
        begin = cursor.step(dtype.itemsize, where)
        if kind == 7 and cursor.data[begin] > 1:
            raise Malformed(f"byte {begin}: {where} is {cursor.data[begin]}: a bool is 0 or 1")
        return np.frombuffer(cursor.data, dtype, 1, begin)[0].item()

    def _skip_array(self, cursor: Cursor, where: str, depth: int) -> Array:
        """Step over an array, checking that all of it is there."""
        begin = cursor.position
        if depth > MAX_NESTING:
            raise Malformed(
                f"byte {begin}: {where} nests arrays more than {MAX_NESTING} deep: at most that"
            )
        kind = cursor.u32(f"the element type of {where}")
        count = cursor.count(f"the length of {where}")
        smallest = {STRING: cursor.length.size, ARRAY: 4 + cursor.length.size}.get(kind)
        if kind in SCALARS:
            smallest = SCALARS[kind].itemsize
        if smallest is None:
            raise Malformed(f"byte {begin}: {where} has unknown element type {kind}")
        if count > (cursor.end - cursor.position) // smallest:
            raise Malformed(
                f"byte {begin}: {where} has {count} elements of at least {smallest} bytes, the "
                f"{'file' if cursor.end == cursor.size else 'header'} ends at {cursor.end}: "
                "truncated or corrupt"
            )
        array = Array(kind, count, cursor.position)
        if kind == STRING:
            cursor.skip_strings(count, where)
        elif kind == ARRAY:
            self._nested += count
            if self._nested > MAX_NESTED:
                raise Malformed(f"byte {begin}: {where}: more than {MAX_NESTED} arrays in arrays")
            for _ in range(count):
                self._skip_array(cursor, where, depth + 1)
        else:
            cursor.step(count * smallest, where)
        return array

    def array(self, key: str, array: Array) -> list[Any]:
        """The elements of an array that was stepped over."""
        cursor = Cursor(self.cursor.data, self.version)
        cursor.position = array.begin
        where = f"key {shown(key)}"
        try:
            return self._elements(cursor, array, where)
        except Malformed as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    def _elements(self, cursor: Cursor, array: Array, where: str) -> list[Any]:
        if array.type == STRING:
            return [cursor.string(f"a string of {where}") for _ in range(array.count)]
        if array.type == ARRAY:
            nested: list[Any] = []
            for _ in range(array.count):
                kind = cursor.u32(where)
                inner = Array(kind, cursor.count(where), cursor.position)
                nested.append(self._elements(cursor, inner, where))
            return nested
        dtype = SCALARS[array.type]
        begin = cursor.step(array.count * dtype.itemsize, where)
        values: list[Any] = np.frombuffer(cursor.data, dtype, array.count, begin).tolist()
        return values

    def _alignment(self) -> int:
        value = self.values.get("general.alignment", DEFAULT_ALIGNMENT)
        if not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            raise Malformed(
                f"byte {self._alignment_at}: general.alignment is {value}: must be a power of two "
                f"of 1 to {MAX_ALIGNMENT}"
            )
        return int(value)

    @staticmethod
    def _info(cursor: Cursor) -> tuple[int, str, tuple[int, ...], int, int]:
        """One tensor info: (its byte position, name, row-major shape, type number,
        offset in the data).
        """
        begin = cursor.position
        name = cursor.string("a tensor's name", MAX_NAME)
        where = f"tensor {shown(name)}"
        at = cursor.position
        dimensions = cursor.u32(f"the number of dimensions of {where}")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise Malformed(
                f"byte {at}: {where} has {dimensions} dimensions: must be 1 to {MAX_DIMENSIONS}"
            )
        at = cursor.position
        shape = tuple(cursor.count(f"the shape of {where}") for _ in range(dimensions))[::-1]
        elements = 1
        for size in shape:
            elements *= size
        if elements == 0 or elements >= 1 << 63:
            raise Malformed(
                f"byte {at}: {where} has shape {shape}: must have 1 to 2**63-1 elements"
            )
        number = cursor.u32(f"the type of {where}")
        return begin, name, shape, number, cursor.number(U64, f"the offset of {where}")

    def _tensor(
        self,
        position: int,
        name: str,
        shape: tuple[int, ...],
        number: int,
        offset: int,
        start: int,
        alignment: int,
    ) -> GgufTensor:
        """Check one tensor info against the file; its data begins at ``start + offset``."""
        where, begin, size = f"byte {position}: tensor {shown(name)}", start + offset, 0
        if offset % alignment:
            raise Malformed(
                f"{where}: offset {offset} is not a multiple of the alignment, {alignment}"
            )
        kind = type_name(number)
        if kind in TYPES:
            block = TYPES[kind].weights
            if shape[-1] % block:
                raise Malformed(
                    f"{where}: rows of {shape[-1]} weights: {kind} has blocks of {block}"
                )
            size = TYPES[kind].row_bytes(shape[-1])
            for factor in shape[:-1]:
                size *= factor
        if begin + size > self.file.size or begin >= self.file.size:
            raise Malformed(
                f"{where}: bytes {begin} to {begin + size}, the file ends at {self.file.size}: "
                "truncated or corrupt"
            )
        return GgufTensor(name, kind, shape, self.path, begin, size)

    def _check_overlap(self) -> None:
        end, before = 0, ""
        for tensor in sorted(self.tensors.values(), key=lambda t: (t.begin, t.num_bytes)):
            if tensor.begin < end:
                raise Malformed(
                    f"tensor {shown(tensor.name)}: bytes {tensor.begin} to "
                    f"{tensor.begin + tensor.num_bytes} overlap tensor {shown(before)}, which "
                    f"ends at {end}"
                )
            end, before = tensor.begin + tensor.num_bytes, tensor.name

    def part(self) -> tuple[int, int]:
        """(number, count) of this part of a split, the first part being 0; (0, 1)
        for a whole model.
        """
        number, count = self.values.get("split.no"), self.values.get("split.count")
        named = PART.fullmatch(self.path.name)
        if count is None and named and 1 <= int(named["part"]) <= int(named["parts"]):
            return int(named["part"]) - 1, int(named["parts"])
        if count is None:
            return 0, 1
        if type(count) is int and count in (0, 1):
            return 0, 1
        if type(number) is not int or type(count) is not int or not 0 <= number < count < 100_000:
            raise CheckpointError(
                f"{self.path}: split.no {shown(number)} of split.count {shown(count)}: must be 0 "
                "to count - 1"
            )
        return number, count

    @property
    def is_model(self) -> bool:
        """False for what lies beside models: vision projectors, adapters, importance matrices."""
        kind = self.values.get("general.type", "model")
        return kind == "model" and self.values.get("general.architecture") != "clip"
