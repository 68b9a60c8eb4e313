"""The AMX tile unit in NumPy: eight tiles, their configuration, loads, stores and dot products.

The oracle of the tile emulator (``ktk/_cy/emulator``): same results, same fault names. Rules that
make a program fault on silicon, and a few stricter ones, are ``TileFault``; the state stays as it
was then.
Source: Intel SDM vol. 1, chapter 18; vol. 2, the tile instructions.
"""

from __future__ import annotations

import numpy as np

from ktk.experts.fma import fma
from ktk.experts.formats.floats import bf16_to_f32, f32_to_bf16

NUM_TILES, MAX_ROWS, MAX_COLSB = 8, 16, 64
DOT_K = 32  # k of one tdpbf16ps
F = np.float32
# (first source is signed, second is signed)
DOTS = {
    "tdpbssd": (True, True),
    "tdpbsud": (True, False),
    "tdpbusd": (False, True),
    "tdpbuud": (False, False),
}


class TileFault(Exception):
    """A broken rule; its text is the rule's name."""


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise TileFault(name)


def configuration(rows: list[int], colsb: list[int]) -> np.ndarray:
    """The 64 bytes ldtilecfg takes: uint8 (64,), palette 1.

    rows, colsb : up to eight each, 0 = tile unused.
    """
    config = np.zeros(64, np.uint8)
    config[0] = 1
    config[16 : 16 + 2 * len(colsb)].view("<u2")[:] = colsb
    config[48 : 48 + len(rows)] = rows
    return config


def _flush(x: np.ndarray) -> np.ndarray:
    """Denormals to zero of their sign."""
    return np.where(np.abs(x) < np.finfo(F).tiny, np.copysign(F(0), x), x).astype(F)


def _bf16(tile: np.ndarray) -> np.ndarray:
    """uint8 (rows, colsb) -> float32 (rows, colsb / 4, 2), denormals flushed."""
    bits = tile.view("<u2").astype(np.uint32) << np.uint32(16)
    return _flush(bits.view(F)).reshape(len(tile), -1, 2)


class Tiles:
    """One thread's tile state.

    data : one uint8 (rows, colsb) array a tile, empty until configured.
    """

    def __init__(self) -> None:
        self.tilerelease()

    def tilerelease(self) -> None:
        self.is_configured = False
        self.data = [np.zeros((0, 0), np.uint8) for _ in range(NUM_TILES)]

    def ldtilecfg(self, config: np.ndarray) -> None:
        """config : uint8 (64,)."""
        rows, colsb = config[48:56], config[16:32].view("<u2")
        _require(config[0] <= 1, "config_palette")
        _require(config[1] == 0, "config_start_row")
        reserved = (config[2:16], config[32:48], config[56:64])
        _require(not any(part.any() for part in reserved), "config_reserved")
        _require(bool(config[0]) or not config[16:].any(), "config_reserved")
        for r, c in zip(rows, colsb, strict=True):
            _require(r <= MAX_ROWS, "config_rows")
            _require(c <= MAX_COLSB, "config_colsb")
            _require((r == 0) == (c == 0), "config_half_a_tile")
        self.is_configured = bool(config[0])
        self.data = [np.zeros((int(r), int(c)), np.uint8) for r, c in zip(rows, colsb, strict=True)]

    def sttilecfg(self) -> np.ndarray:
        """uint8 (64,); zeros while unconfigured."""
        if not self.is_configured:
            return np.zeros(64, np.uint8)
        return configuration([len(t) for t in self.data], [t.shape[1] for t in self.data])

    def _tile(self, n: int) -> np.ndarray:
        _require(n < NUM_TILES, "tile_number")
        _require(self.is_configured, "tiles_unconfigured")
        _require(len(self.data[n]) > 0, "tile_without_shape")
        return self.data[n]

    def _moved(self, n: int) -> np.ndarray:
        tile = self._tile(n)
        # As Bochs 3.0, which is #UD here; the page of TILELOADD does not say it.
        _require(tile.shape[1] % 4 == 0, "tile_dwords")
        return tile

    def tilezero(self, n: int) -> None:
        self._tile(n)[:] = 0

    def tileloadd(self, n: int, memory: np.ndarray, start: int, stride: int) -> None:
        """Row r from memory[start + r * stride:]; memory : uint8 (bytes,)."""
        tile = self._moved(n)
        for r in range(len(tile)):
            tile[r] = memory[start + r * stride : start + r * stride + tile.shape[1]]

    tileloaddt1 = tileloadd  # the same but for a hint to the caches

    def tilestored(self, n: int, memory: np.ndarray, start: int, stride: int) -> None:
        tile = self._moved(n)
        _require(len(tile) == 1 or abs(stride) >= tile.shape[1], "store_rows_overlap")
        for r in range(len(tile)):
            memory[start + r * stride : start + r * stride + tile.shape[1]] = tile[r]

    def dot(self, name: str, c: int, a: int, b: int) -> None:
        """Tile c += tile a @ tile b, by the instruction ``name``: one of DOTS, or tdpbf16ps."""
        _require(max(a, b, c) < NUM_TILES, "tile_number")
        _require(self.is_configured, "tiles_unconfigured")
        _require(len({a, b, c}) == 3, "dot_same_tile")
        result, left, right = (self._tile(n) for n in (c, a, b))
        _require(not any(t.shape[1] % 4 for t in (result, left, right)), "tile_dwords")
        _require(len(result) == len(left), "dot_rows")
        _require(left.shape[1] // 4 == len(right), "dot_k")
        _require(result.shape[1] == right.shape[1], "dot_columns")
        if name == "tdpbf16ps":
            result[:] = _add_dots(result.view(F), _bf16(left), _bf16(right)).view(np.uint8)
            return
        a_signed, b_signed = DOTS[name]
        x = left.view(np.int8 if a_signed else np.uint8).astype(np.int64)  # (rows, 4 * k)
        w = right.view(np.int8 if b_signed else np.uint8).astype(np.int64)  # (k, 4 * columns)
        w = (
            w.reshape(len(right), -1, 4).transpose(0, 2, 1).reshape(x.shape[1], -1)
        )  # (4 * k, columns)
        total = result.view("<i4").astype(np.int64) + x @ w
        result[:] = total.astype(np.int32).view(np.uint8)  # wraps


def _add_dots(result: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What tdpbf16ps makes of a tile: float32 (rows, columns) + (rows, k, 2) by (k, columns, 2).

    Even and odd k apart by fma in order of k, then both together, then onto the result.
    """
    parts = np.zeros((len(x), w.shape[1], 2), F)
    with np.errstate(all="ignore"):
        for k in range(len(w)):
            parts = _flush(fma(x[:, k, None, :], w[None, k], parts))
        both = _flush(parts[..., 0] + parts[..., 1])
        return _flush(_flush(result) + both)


def linear_bf16(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """float32 (rows, out) = x (rows, in), rounded to bf16, @ weights (out, in).T, by tdpbf16ps.

    One instruction for each 32 k in order, from +0, whatever the number of rows. weights : float32
    that are values of bf16.
    """
    pad = ((0, 0), (0, -x.shape[1] % DOT_K))
    a = _flush(bf16_to_f32(f32_to_bf16(np.pad(x, pad)))).reshape(len(x), -1, 2)
    w = _flush(np.pad(weights, pad)).reshape(len(weights), -1, 2).transpose(1, 0, 2)
    y = np.zeros((len(x), len(weights)), F)
    for k in range(0, len(w), DOT_K // 2):
        y = _add_dots(y, a[:, k : k + DOT_K // 2], w[k : k + DOT_K // 2])
    return y
