"""The machine that tile cases run on, emulated or silicon, and code that fills and reads its tiles.

Code comes as bytes (``make.tile_code``); ``keep`` lists hold alive what it points to.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np
import pytest

from ktk import env
from ktk._cy import emulate_tiles
from ktk.machine import cpu
from ktk.machine.memory import aligned_buffer
from ktk.reference.tiles import Tiles, configuration
from make import tile_code as tc

TILES_UNDER_TEST = "TILES_UNDER_TEST"  # test_tile_machines.py sets it to silicon


def machine() -> Any:
    """The emulator, installed; None in a process that tries the CPU's own tiles.

    Skips where there is neither.
    """
    if os.environ.get(TILES_UNDER_TEST) == "silicon":
        assert "amx_tile" in cpu.detect()
        return None
    if not env.tiles_are_emulated() and "amx_tile" in cpu.detect():
        pytest.skip("the CPU has tiles: test_tile_machines.py runs this on both, in two processes")
    try:
        return emulate_tiles()
    except ValueError as error:
        pytest.skip(str(error))


@cache
def is_emulated(kind: str) -> bool:
    """Whether an instruction traps: without permission for tile data,
    a CPU that has tiles may run those that touch none.
    """
    stored = aligned_buffer(64)
    code = {
        "tilerelease": tc.tilerelease(),
        "sttilecfg": at(tc.RAX, stored) + tc.memory("sttilecfg"),
    }
    before = machine().counts()[kind]
    run([code[kind]])
    return bool(machine().counts()[kind] > before)


def needs(kind: str) -> None:
    """Skip a case that shows nothing where the emulator is installed and the CPU runs ``kind``
    itself.
    """
    if machine() is not None and not is_emulated(kind):
        pytest.skip(f"{kind} does not trap on this CPU, though its tiles are not permitted")


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def random_bytes(rng: np.random.Generator, n: int) -> np.ndarray:
    """uint8 (n,), 64-byte aligned, the extremes more often than by chance."""
    out = aligned_buffer(n)
    out[:] = rng.integers(0, 256, n)
    extreme = rng.random(n) < 0.2
    out[extreme] = rng.choice(np.array([0, 127, 128, 255], np.uint8), int(extreme.sum()))
    return out


def run(code: list[bytes]) -> None:
    tc.Program(code)()


def configure(rows: list[int], colsb: list[int], keep: list[np.ndarray]) -> bytes:
    """Code that loads a configuration."""
    keep.append(configuration(rows, colsb))
    return tc.load(tc.RAX, address(keep[-1])) + tc.memory("ldtilecfg")


def at(register: int, array: np.ndarray, offset: int = 0) -> bytes:
    return tc.load(register, address(array) + offset)


def all_tiles(tiles: Tiles) -> np.ndarray:
    """Every tile's bytes, those beyond its shape as zeros: uint8 (8, 16, 64)."""
    out = np.zeros((8, 16, 64), np.uint8)
    for n, data in enumerate(tiles.data):
        out[n, : data.shape[0], : data.shape[1]] = data
    return out


def store_all(tiles: Tiles, out: np.ndarray) -> list[bytes]:
    """Code that stores every tile of whole dwords to ``out``, uint8 (8, 16, 64)."""
    code = [tc.load(tc.RCX, 64)]
    for n, data in enumerate(tiles.data):
        if len(data) and data.shape[1] % 4 == 0:
            code += [
                at(tc.RAX, out, n * 1024),
                tc.memory("tilestored", n, base=tc.RAX, index=tc.RCX),
            ]
    return code


def load_random(tiles: Tiles, rng: np.random.Generator, keep: list[np.ndarray]) -> list[bytes]:
    """Fill every tile of whole dwords from a fresh buffer, in the model and in code."""
    code = [tc.load(tc.RCX, 64)]
    for n, data in enumerate(tiles.data):
        if len(data) and data.shape[1] % 4 == 0:
            keep.append(random_bytes(rng, 1024))
            code += [at(tc.RAX, keep[-1]), tc.memory("tileloadd", n, base=tc.RAX, index=tc.RCX)]
            tiles.tileloadd(n, keep[-1], 0, 64)
    return code
