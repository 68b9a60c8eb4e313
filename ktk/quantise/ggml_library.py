"""The quantisers of llama.cpp or ik_llama.cpp, from its shared library: what ``ktk eval --ggml``
compares with.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from ktk.experts.formats import block_format
from ktk.paths import user_path

F = np.float32
# llama.cpp's, ik_llama.cpp's.
FILES = ("libggml-base.so", "libggml.so")


class InitParams(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class GgmlLibrary:
    """ggml_quantize_chunk of llama.cpp's libggml-base.so, or ik_llama.cpp's libggml.so, in
    ``folder``.

    Raises ValueError if neither is there.
    """

    def __init__(self, folder: Path) -> None:
        paths = [path for name in FILES if (path := user_path(folder) / name).is_file()]
        if not paths:
            raise ValueError(
                f"{folder}: must be the folder of llama.cpp's libggml-base.so or ik_llama.cpp's "
                "libggml.so"
            )
        library = ctypes.CDLL(str(paths[0].resolve()))
        # The first context fills the library's table of halves.
        library.ggml_init.argtypes, library.ggml_init.restype = [InitParams], ctypes.c_void_p
        library.ggml_free.argtypes = [ctypes.c_void_p]
        library.ggml_free(library.ggml_init(InitParams(1 << 16, None, False)))
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
        fmt = block_format(type)
        rows, columns = w.shape
        w = np.ascontiguousarray(w, F)
        out = np.zeros((rows, fmt.row_bytes(columns)), np.uint8)
        if importance is None and self._requires(fmt.number):
            importance = np.ones(columns, F)
        weights = None if importance is None else np.ascontiguousarray(importance, F)
        written = self._chunk(
            fmt.number,
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
