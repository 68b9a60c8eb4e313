"""Writes ik_vectors.h and ik_rows.json: rows of ik_llama.cpp's types and what that program makes of
them.

python make_ik_vectors.py LIBGGML.so   # that program's shared library, which prints itself

ik_vectors.h: a block of random bits a type and the fp32 bits of its weights, by the library's
dequantisers. ik_rows.json: rows that the library quantised, and the CRC-32 of their weights.
IQ6_K's dequantiser computes a polynomial that its products do not use: weights are those of the
products, which one-hot activations tell.
"""

import base64
import ctypes
import json
import sys
import zlib
from pathlib import Path

import numpy as np
from make_test_vectors import HEAD, lines

from ktk.experts.formats.base import NUMPY_FLOATS, Format
from ktk.experts.formats.ik import BLOCK, ROWS
from ktk.experts.formats.ik_decode import decode

ROW_WEIGHTS = 2 * BLOCK  # of ik_rows.json


class InitParams(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


class Library:
    """libggml.so of ik_llama.cpp."""

    def __init__(self, path: str) -> None:
        self._c = ctypes.CDLL(path)
        self._c.ggml_init.argtypes, self._c.ggml_init.restype = [InitParams], ctypes.c_void_p
        self._c.ggml_init(InitParams(1 << 20, None, False))  # fills its table of halves
        self._c.ggml_quantize_chunk.restype = ctypes.c_size_t

    def quantised(self, fmt: Format, w: np.ndarray) -> np.ndarray:
        """float32 (rows, in_features) as uint8 (rows, row bytes)."""
        rows, columns = w.shape
        out = np.zeros((rows, fmt.row_bytes(columns)), np.uint8)
        sizes = [ctypes.c_int64(n) for n in (0, rows, columns)]
        at = ctypes.c_void_p(w.ctypes.data), ctypes.c_void_p(out.ctypes.data)
        assert self._c.ggml_quantize_chunk(fmt.number, *at, *sizes, None) == out.size
        return out

    def dequantised(self, fmt: Format, row: np.ndarray) -> np.ndarray:
        """A row, uint8 (row bytes,), as float32 (in_features,)."""
        out = np.empty((len(row) - fmt.row_head) // fmt.block_bytes * BLOCK, np.float32)
        function = getattr(self._c, f"dequantize_row_{fmt.name.lower()}")
        at = ctypes.c_void_p(row.ctypes.data), ctypes.c_void_p(out.ctypes.data)
        function(*at, ctypes.c_int64(out.size))
        return out

    def multiplied(self, fmt: Format, row: np.ndarray) -> np.ndarray:
        """The same by products with one-hot activations."""
        count = (len(row) - fmt.row_head) // fmt.block_bytes * BLOCK
        out, codes = np.empty(count, np.float32), np.zeros(2 * count + 1024, np.uint8)
        dot = getattr(self._c, f"vec_dot_{fmt.name.lower()}_q8_k")
        nothing = ctypes.c_size_t(0)
        for i, one in enumerate(np.eye(count, dtype=np.float32)):
            at = ctypes.c_void_p(codes.ctypes.data)
            self._c.quantize_row_q8_K(ctypes.c_void_p(one.ctypes.data), at, ctypes.c_int64(count))
            result = ctypes.c_void_p(out.ctypes.data + 4 * i)
            weights = ctypes.c_void_p(row.ctypes.data)
            dot(ctypes.c_int(count), result, nothing, weights, nothing, at, nothing, 1)
        return out

    def weights(self, fmt: Format, row: np.ndarray) -> np.ndarray:
        """What the program multiplies by, float32 (in_features,); asserts that ktk agrees."""
        found = decode(fmt, row)
        if fmt.name == "IQ6_K":
            np.testing.assert_allclose(found, self.multiplied(fmt, row), rtol=1e-6)
            return found
        want = self.dequantised(fmt, row)
        np.testing.assert_array_equal(found, want, fmt.name)
        return want


def random_row(fmt: Format, rng: np.random.Generator) -> np.ndarray:
    """One block of random bits, its scale 0.004 to 0.03 in size."""
    row = rng.integers(0, 256, fmt.row_bytes(BLOCK), dtype=np.uint8)
    scale = np.array([rng.choice([-1.0, 1.0]) * rng.uniform(0.004, 0.03)])
    raw = scale.astype(NUMPY_FLOATS[fmt.row_scale or "f16"]).view(np.uint8)
    row[: len(raw)] = raw
    return row


def main() -> None:
    library, rng = Library(sys.argv[1]), np.random.default_rng(0)
    text: list[str] = []
    out = text.append
    out(HEAD.replace("make_test_vectors.py with `gguf` (PyPI)", "make_ik_vectors.py"))
    for fmt in ROWS:
        row = random_row(fmt, rng)
        bits = library.weights(fmt, row).view(np.uint32)
        out(f"static const uint8_t BLOCKS_{fmt.name}[] = {{\n")
        out(lines([f"0x{byte:02x}" for byte in row], 100) + "};\n")
        out(f"static const uint32_t WEIGHTS_{fmt.name}[] = {{\n")
        out(lines([f"0x{value:08x}" for value in bits], 100) + "};\n")
    out("static const vector IK_VECTORS[] = {\n")
    for fmt in ROWS:
        head = {"": 2, "f16": 2, "f32": 4}[fmt.row_scale]
        pairs = ", ".join(f"{{{at}, 0xff}}" for at in range(head))
        size = f"sizeof WEIGHTS_{fmt.name} / 4"
        name = f'"{fmt.name}", BLOCKS_{fmt.name}, WEIGHTS_{fmt.name}'
        out(f"    {{{name},\n     {size}, {{{pairs}}}}},\n")
    out("};\n/* clang-format on */\n")
    Path("ik_vectors.h").write_text("".join(text))
    w = rng.standard_t(4, (1, ROW_WEIGHTS)).astype(np.float32) * 0.02
    rows = {}
    for fmt in ROWS:
        row = library.quantised(fmt, w)[0]
        crc = zlib.crc32((library.weights(fmt, row) + 0.0).tobytes())  # without -0.0
        rows[fmt.name] = {"row": base64.b64encode(row.tobytes()).decode(), "crc32": crc}
    Path("ik_rows.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
