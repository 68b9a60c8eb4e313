"""What a store is told: where it lies, how large its tiers are, and whose keys and values a page
holds.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from ktk.kv.sizes import TokenShape

# Bytes of a number; names as torch and NumPy have them.
KV_DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
ELEMENT_BYTES = 64 << 10  # half of one is lost at a page's end: 1 % of a page of 3 MB
BLOCK = 4096  # O_DIRECT: offsets, sizes and addresses are multiples
TOKEN_BYTES = 4  # tokens are stored and hashed as uint32, little-endian


@dataclass(frozen=True)
class CacheInfo:
    """Whose keys and values these are. Pages of one are never those of another.

    model_name : names the weights. quant_type : the weights' format. kv_dtype : a row of KV_DTYPES.
    shape : what a token has in each layer. Raises ValueError.
    """

    model_name: str
    quant_type: str
    kv_dtype: str
    shape: TokenShape

    def __post_init__(self) -> None:
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype={self.kv_dtype!r}: must be one of {', '.join(KV_DTYPES)}")
        for name in ("model_name", "quant_type"):
            if not isinstance(value := getattr(self, name), str) or not value.isprintable():
                raise ValueError(f"{name}={value!r}: must be printable text")
        for name, value in asdict(self.shape).items():
            least = 0 if name == "value_width" else 1
            if type(value) is not int or not least <= value < 2**31:
                raise ValueError(f"shape.{name}={value!r}: must be a number from {least} on")

    def to_json(self) -> str:
        """One text for one CacheInfo."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> CacheInfo:
        """Raises ValueError unless it is what ``to_json`` writes."""
        said: Any = json.loads(text)
        try:
            info = cls(**{**said, "shape": TokenShape(**said["shape"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{text[:200]}: no CacheInfo: {error}") from None
        if info.to_json() != text:
            raise ValueError(f"{text[:200]}: not as ktk writes it")
        return info


@dataclass(frozen=True)
class PageLayout:
    """How a page lies in memory and on disk: layer by layer its keys, then its values.

    Keys are (page_tokens, num_heads, key_width) of kv_dtype, values likewise. frame_bytes : with
    zeros up to a whole number of elements.
    """

    info: CacheInfo
    page_tokens: int
    element_bytes: int

    @property
    def part_bytes(self) -> tuple[int, int]:
        """Of one layer's keys, and of its values."""
        shape = self.info.shape
        row = self.page_tokens * shape.num_heads * KV_DTYPES[self.info.kv_dtype]
        return row * shape.key_width, row * shape.value_width

    @property
    def page_bytes(self) -> int:
        return self.info.shape.num_layers * sum(self.part_bytes)

    @property
    def num_elements(self) -> int:
        return -(-self.page_bytes // self.element_bytes)

    @property
    def frame_bytes(self) -> int:
        return self.num_elements * self.element_bytes

    def part(self, frame: np.ndarray, layer: int, is_key: bool) -> np.ndarray:
        """A layer's keys or values in a frame: a view, uint8 (page_tokens, bytes of a token)."""
        keys, values = self.part_bytes
        begin = layer * (keys + values) + (0 if is_key else keys)
        end = begin + (keys if is_key else values)
        return frame[begin:end].reshape(self.page_tokens, (end - begin) // self.page_tokens)

    def parts(self, frame: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each layer its keys and values, as ``part`` gives them."""
        layers = range(self.info.shape.num_layers)
        return [(self.part(frame, i, True), self.part(frame, i, False)) for i in layers]

    def new_frame(self) -> np.ndarray:
        """Memory for a page, uint8 (frame_bytes,), aligned for O_DIRECT; zeros behind the page,
        before them anything.
        """
        memory = np.empty(self.frame_bytes + BLOCK, np.uint8)
        start = -memory.ctypes.data % BLOCK
        frame = memory[start : start + self.frame_bytes]
        frame[self.page_bytes :] = 0
        return frame


@dataclass(frozen=True)
class StoreConfig:
    """How a store is made. Raises ValueError.

    path : its directory, made if need be; None: memory only. disk_limit : bytes that pages may take
    on disk, None: what the disk has. num_token_per_page : tokens. memory_pool_size : bytes of pages
    in memory. evict_count : pages that leave memory at a time when it is full. flush_seconds : new
    pages are saved so long after they came, None: only by save().
    """

    path: str | os.PathLike[str] | None = None
    load_from_disk: bool = True
    save_to_disk: bool = True
    num_token_per_page: int = 256
    memory_pool_size: int = 10_000_000_000
    evict_count: int = 20
    disk_limit: int | None = None
    element_bytes: int = ELEMENT_BYTES
    flush_seconds: float | None = None

    def __post_init__(self) -> None:
        least = {"num_token_per_page": 1, "memory_pool_size": 0, "evict_count": 1}
        for name in (f.name for f in fields(self) if f.name in least):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least[name]:
                raise ValueError(f"{name}={value!r}: must be a number from {least[name]} on")
        if self.element_bytes < BLOCK or self.element_bytes % BLOCK:
            raise ValueError(
                f"element_bytes={self.element_bytes}: must be a multiple of {BLOCK}, for O_DIRECT"
            )
        if self.disk_limit is not None and self.disk_limit < 2 * self.element_bytes:
            raise ValueError(
                f"disk_limit={self.disk_limit}: must be at least {2 * self.element_bytes}, the "
                "file's head and one element"
            )
        if self.flush_seconds is not None and self.flush_seconds < 0:
            raise ValueError(f"flush_seconds={self.flush_seconds}: must not be negative")
        if self.path is None and self.flush_seconds is not None:
            raise ValueError("flush_seconds without path: there is no disk to save to")

    @property
    def writes(self) -> bool:
        """Whether pages go to a disk."""
        return self.path is not None and self.save_to_disk
