"""llama.cpp's own quantisers, from its shared library: what ``ktk eval --ggml`` compares with."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np

from ktk.paths import user_path

F = np.float32


class GgmlLibrary:
    """ggml_quantize_chunk of libggml-base.so in ``folder``.

    Raises ValueError if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        path = user_path(folder) / "libggml-base.so"
        if not path.is_file():
            raise ValueError(f"{folder}: must be the folder of llama.cpp's libggml-base.so")
        library = ctypes.CDLL(str(path.resolve()))
        self._chunk, self._requires = (
            library.ggml_quantize_chunk,
            library.ggml_quantize_requires_imatrix,
        )
        self._chunk.restype, self._requires.restype = ctypes.c_size_t, ctypes.c_bool
        self._chunk.argtypes = [
            ctypes.c_int,
            *[ctypes.c_void_p] * 2,
            *[ctypes.c_int64] * 3,
            ctypes.c_void_p,
        ]
        self._requires.argtypes = [ctypes.c_int]

    def quantise(
        self, type: str, w: np.ndarray, importance: np.ndarray | None = None
    ) -> np.ndarray:
        """float32 (rows, in_features) as uint8 (rows, row bytes).

        importance : float32 (in_features,), an importance matrix's row; None: all weights alike,
        which types that insist on an importance matrix get as ones.
        """
        number = gguf.GGMLQuantizationType[type]
        block, size = gguf.GGML_QUANT_SIZES[number]
        rows, columns = w.shape
        if columns % block:
            raise ValueError(f"in_features={columns}: {type} needs a multiple of {block}")
        w = np.ascontiguousarray(w, F)
        out = np.empty((rows, columns // block * size), np.uint8)
        if importance is None and self._requires(int(number)):
            importance = np.ones(columns, F)
        weights = None if importance is None else np.ascontiguousarray(importance, F)
        written = self._chunk(
            int(number),
            w.ctypes.data,
            out.ctypes.data,
            0,
            rows,
            columns,
            None if weights is None else weights.ctypes.data,
        )
        if written != out.size:
            raise ValueError(f"ggml wrote {written} bytes of {type}: must be {out.size}")
        return out
