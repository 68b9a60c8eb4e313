"""Tile instructions against the NumPy model: the emulator,
and silicon where there is some (test_tile_machines.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ktk
from ktk import backends, env
from ktk._cy import emulate_tiles
from ktk.cli import doctor
from ktk.experts.spec import MoESpec
from ktk.machine import cpu
from ktk.machine.memory import aligned_buffer
from ktk.reference.tiles import DOTS, TileFault, Tiles, configuration
from make import TESTS
from make import tile_code as tc
from make.cases import assert_exact, pack_all, random_experts

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


@pytest.fixture(scope="module", autouse=True)
def _machine() -> None:
    machine()


@pytest.fixture
def emulator() -> Iterator[Any]:
    """The emulator, recording faults."""
    found = machine()
    if found is None:
        pytest.skip("the CPU has tiles: its faults end the process")
    found.record_faults(True)
    yield found
    found.take_fault()
    found.record_faults(False)


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
    """Code that loads a configuration; ``keep`` holds its bytes alive."""
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


def test_encodings_are_those_of_the_assembler() -> None:
    """From GNU as 2.40."""
    for code, want in (
        (tc.memory("ldtilecfg", base=tc.R12), "c4c278490424"),
        (tc.tilerelease(), "c4e27849c0"),
        (tc.tilezero(5), "c4e27b49e8"),
        (tc.memory("tileloadd", 3, base=tc.RSI, index=tc.RCX), "c4e27b4b1c0e"),
        (tc.memory("tileloadd", 7, base=tc.R13, index=tc.R12, scale=4), "c4827b4b7ca500"),
        (tc.memory("tileloaddt1", 1, base=tc.R8, index=tc.R9, disp=1000), "c482794b8c08e8030000"),
        (tc.memory("tilestored", 2, base=None, index=tc.RDX, scale=8), "c4e27a4b14d500000000"),
        (tc.dot("tdpbsud", 0, 1, 2), "c4e26a5ec1"),
        (tc.dot("tdpbssd", 7, 6, 5), "c4e2535efe"),
        (tc.dot("tdpbf16ps", 3, 4, 0), "c4e27a5cdc"),
    ):
        assert code.hex() == want


shapes = st.tuples(st.integers(1, 16), st.integers(1, 16), st.integers(1, 16))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(DOTS)),
    shape=shapes,
    tiles_used=st.permutations(range(8)),
    seed=st.integers(0, 2**31),
)
def test_byte_dots_are_exact(
    name: str, shape: tuple[int, int, int], tiles_used: list[int], seed: int
) -> None:
    m, k, n = shape
    c, a, b = tiles_used[:3]
    rows, colsb = [0] * 8, [0] * 8
    rows[c], rows[a], rows[b] = m, m, k
    colsb[c], colsb[a], colsb[b] = 4 * n, 4 * k, 4 * n
    rng, keep, tiles = np.random.default_rng(seed), [], Tiles()
    tiles.ldtilecfg(configuration(rows, colsb))
    code = [configure(rows, colsb, keep), *load_random(tiles, rng, keep)]
    for _ in range(2):  # the first result is what the second adds to
        code.append(tc.dot(name, c, a, b))
        tiles.dot(name, c, a, b)
    got = np.zeros((8, 16, 64), np.uint8)
    run([*code, *store_all(tiles, got), tc.tilerelease()])
    assert_exact(all_tiles(tiles), got)


def test_sums_wrap() -> None:
    rows, colsb, keep, tiles = [1, 1, 1], [4, 4, 4], [], Tiles()
    tiles.ldtilecfg(configuration(rows, colsb))
    start = np.array([2**31 - 5], "<i4").view(np.uint8)
    ones = np.ones(4, np.uint8) * 2
    code = [configure(rows, colsb, keep)]
    for n, data in enumerate((start, ones, ones)):
        code += [at(tc.RAX, data), tc.memory("tileloadd", n)]
        tiles.tileloadd(n, data, 0, 64)
    tiles.dot("tdpbuud", 0, 1, 2)
    got = np.zeros((8, 16, 64), np.uint8)
    run([*code, tc.dot("tdpbuud", 0, 1, 2), *store_all(tiles, got), tc.tilerelease()])
    assert got[0].view("<i4")[0, 0] == -(2**31) + 11
    assert_exact(all_tiles(tiles), got)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("spread", [1, 60], ids=["ordinary", "denormals_and_overflows"])
def test_bf16_dots_are_exact(seed: int, spread: int) -> None:
    rng = np.random.default_rng(seed)
    m, k, n = (int(x) for x in rng.integers(1, 17, 3))
    rows, colsb, keep, tiles = [m, m, k], [4 * n, 4 * k, 4 * n], [], Tiles()
    tiles.ldtilecfg(configuration(rows, colsb))
    code = [configure(rows, colsb, keep), tc.load(tc.RCX, 64)]
    for tile in range(3):
        x = rng.standard_normal((16, 32 if tile else 16)) * 2.0 ** rng.integers(-spread, spread + 1)
        x = x * 2.0 ** rng.integers(-spread, spread + 1, x.shape)
        x[rng.random(x.shape) < 0.01] = np.inf if spread > 1 else 0
        wide = x.astype(np.float32)
        memory = wide.view(np.uint8) if tile == 0 else (wide.view(np.uint32) >> 16).astype("<u2")
        keep.append(np.ascontiguousarray(memory).view(np.uint8).ravel())
        code += [at(tc.RAX, keep[-1]), tc.memory("tileloadd", tile, index=tc.RCX)]
        tiles.tileloadd(tile, keep[-1], 0, 64)
    tiles.dot("tdpbf16ps", 0, 1, 2)
    got = np.zeros((8, 16, 64), np.uint8)
    run([*code, tc.dot("tdpbf16ps", 0, 1, 2), *store_all(tiles, got), tc.tilerelease()])
    want = all_tiles(tiles)
    assert_exact(want[1:], got[1:])
    assert_exact(want[0].view(np.float32), got[0].view(np.float32))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 16),
    colsb=st.integers(1, 16).map(lambda dwords: 4 * dwords),
    stride=st.sampled_from([-200, -64, 0, 1, 3, 64, 100, 256]),
    scale=st.sampled_from([1, 2, 4, 8]),
    base=st.sampled_from([r for r in range(16) if r != tc.RSP]),
    index=st.sampled_from([r for r in range(16) if r != tc.RSP]),
    disp=st.sampled_from([0, 1, -1, 127, -128, 128, -129, 3000, -3000]),
    wide=st.booleans(),
    tile=st.integers(0, 7),
    hint=st.booleans(),
)
def test_every_address_form(
    rows: int,
    colsb: int,
    stride: int,
    scale: int,
    base: int,
    index: int,
    disp: int,
    wide: bool,
    tile: int,
    hint: bool,
) -> None:
    """base + disp + row * (index * scale), in each register, forwards and backwards."""
    keep, tiles = [], Tiles()
    memory = random_bytes(np.random.default_rng(rows), 1 << 17)
    start, shape = 1 << 16, ([0] * tile + [rows], [0] * tile + [colsb])
    if base == index:  # the address is its own stride: one row is all that can be meant
        rows, shape = 1, ([0] * tile + [1], [0] * tile + [colsb])
    tiles.ldtilecfg(configuration(*shape))
    tiles.tileloadd(tile, memory, start, stride * scale)
    where = address(memory) + start - disp
    operand = {"base": base, "index": index, "scale": scale, "disp": disp, "wide": wide}
    registers = tc.load(index, stride) + tc.load(base, where)
    got = np.zeros((8, 16, 64), np.uint8)
    code = [configure(*shape, keep), registers]
    code.append(tc.memory("tileloaddt1" if hint else "tileloadd", tile, **operand))
    if rows == 1 or abs(stride * scale) >= colsb:
        want, target = memory.copy(), memory.copy()
        want[:] = target[:] = 0
        tiles.tilestored(tile, want, start, stride * scale)
        code += [tc.load(index, stride), tc.load(base, address(target) + start - disp)]
        code.append(tc.memory("tilestored", tile, **operand))
    run([*code, *store_all(tiles, got), tc.tilerelease()])
    assert_exact(all_tiles(tiles), got)
    if rows == 1 or abs(stride * scale) >= colsb:
        assert_exact(want, target)


def test_the_stack_pointer_as_base() -> None:
    """rsp needs a SIB byte of its own; the signal's frame goes below it, so the tile lies above."""
    keep, tiles = [], Tiles()
    memory = random_bytes(np.random.default_rng(1), 1 << 18)
    start = 1 << 17
    tiles.ldtilecfg(configuration([16], [64]))
    tiles.tileloadd(0, memory, start + 8, 64)
    code = tc.load(tc.RCX, 64) + tc.memory("tileloadd", 0, base=tc.RSP, index=tc.RCX, disp=8)
    got = np.zeros((8, 16, 64), np.uint8)
    run(
        [
            configure([16], [64], keep),
            tc.on_stack(code, address(memory) + start),
            *store_all(tiles, got),
            tc.tilerelease(),
        ]
    )
    assert_exact(all_tiles(tiles), got)


def test_configuration_comes_back_and_clears_the_tiles() -> None:
    needs("sttilecfg")
    needs("tilerelease")
    rows, colsb = [1, 16, 0, 7, 2, 0, 16, 3], [64, 4, 0, 36, 8, 0, 64, 12]
    keep, tiles, stored = [], Tiles(), aligned_buffer(256)
    tiles.ldtilecfg(configuration(rows, colsb))
    rng = np.random.default_rng(3)
    store = tc.memory("sttilecfg")
    run(
        [
            configure(rows, colsb, keep),
            *load_random(tiles, rng, keep),
            at(tc.RAX, stored) + store,
            configure(rows, colsb, keep),
            *store_all(tiles, cleared := np.full((8, 16, 64), 7, np.uint8)),
            tc.tilerelease(),
            at(tc.RAX, stored, 64) + store,
        ]
    )
    assert_exact(configuration(rows, colsb), stored[:64])
    assert_exact(Tiles().sttilecfg(), stored[64:128])
    for n, data in enumerate(tiles.data):
        assert not cleared[n, : len(data), : data.shape[1]].any()
        assert (cleared[n, :, data.shape[1] :] == 7).all()


def test_a_configuration_needs_no_sib() -> None:
    """ModRM alone: [rdx], [r9 + 8], [rip + 32-bit displacement]."""
    needs("sttilecfg")
    config, stored = configuration([2, 9], [12, 64]), aligned_buffer(64)
    for load in (
        at(tc.RDX, config) + tc.vex(0x49, 0, b"\x02"),
        at(tc.R9, config, -8) + tc.vex(0x49, 0, b"\x41\x08", base=tc.R9),
        tc.vex(0x49, 0, b"\x05\x02\x00\x00\x00") + b"\xeb\x40" + config.tobytes(),  # jmp over it
    ):
        stored[:] = 7
        run([load, at(tc.RAX, stored) + tc.memory("sttilecfg"), tc.tilerelease()])
        assert_exact(config, stored)


def test_tilezero_clears_one_tile() -> None:
    keep, tiles = [], Tiles()
    tiles.ldtilecfg(configuration([16] * 8, [64] * 8))
    code = [
        configure([16] * 8, [64] * 8, keep),
        *load_random(tiles, np.random.default_rng(5), keep),
    ]
    tiles.tilezero(6)
    got = np.zeros((8, 16, 64), np.uint8)
    run([*code, tc.tilezero(6), *store_all(tiles, got), tc.tilerelease()])
    assert not got[6].any()
    assert_exact(all_tiles(tiles), got)


def test_threads_have_their_own_tiles() -> None:
    """Eight threads at once, each with its own shapes and values,
    all over the same instructions.
    """
    failures: list[str] = []

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        m, k, n = 16 - number, 2 * number + 1, number + 3
        rows, colsb, keep, tiles = [m, m, k], [4 * n, 4 * k, 4 * n], [], Tiles()
        tiles.ldtilecfg(configuration(rows, colsb))
        code = [configure(rows, colsb, keep), *load_random(tiles, rng, keep)]
        for _ in range(300):
            code.append(tc.dot("tdpbusd", 0, 1, 2))
            tiles.dot("tdpbusd", 0, 1, 2)
        got = np.zeros((8, 16, 64), np.uint8)
        run([*code, *store_all(tiles, got), tc.tilerelease()])
        if not np.array_equal(all_tiles(tiles), got):
            failures.append(f"thread {number}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def bad(**bytes_at: int) -> np.ndarray:
    """A good configuration of eight full tiles with bytes changed: b17=1 sets byte 17."""
    config = configuration([16] * 8, [64] * 8)
    for name, value in bytes_at.items():
        config[int(name[1:])] = value
    return config


BAD_CONFIGURATIONS = [
    ("config_palette", bad(b0=2)),
    ("config_palette", bad(b0=255)),
    ("config_start_row", bad(b1=1)),
    *(("config_reserved", bad(**{f"b{i}": 1})) for i in (2, 15, 32, 47, 56, 63)),
    ("config_reserved", bad(b0=0)),
    ("config_rows", bad(b48=17)),
    ("config_rows", bad(b55=255)),
    ("config_colsb", bad(b16=65)),
    ("config_colsb", bad(b31=1)),
    ("config_half_a_tile", bad(b50=0)),
    ("config_half_a_tile", bad(b20=0)),
]


@pytest.mark.parametrize(("name", "config"), BAD_CONFIGURATIONS, ids=lambda v: str(v)[:24])
def test_bad_configurations_are_named(emulator: Any, name: str, config: np.ndarray) -> None:
    with pytest.raises(TileFault, match=name):
        Tiles().ldtilecfg(config)
    needs("sttilecfg")
    keep: list[np.ndarray] = []
    stored = np.full(64, 7, np.uint8)
    run(
        [
            configure([3], [20], keep),
            at(tc.RAX, config) + tc.memory("ldtilecfg"),
            at(tc.RAX, stored) + tc.memory("sttilecfg"),
            tc.tilerelease(),
        ]
    )
    assert emulator.take_fault() == name
    assert_exact(configuration([3], [20]), stored)  # the good one stands


# tiles: 0 C 5x7 dwords, 1 A 5x4, 2 B 4x7, 3 A 6x4, 4 B 5x7, 5 B 4x8, 6 A with 15 bytes a row; 7 has
# no shape
ROWS, COLSB = [5, 5, 4, 6, 5, 4, 5], [28, 16, 28, 16, 28, 32, 15]
BAD_DOTS = [
    ("dot_same_tile", 0, 0, 2),
    ("dot_same_tile", 0, 1, 0),
    ("dot_same_tile", 0, 1, 1),
    ("dot_rows", 0, 3, 2),
    ("dot_k", 0, 1, 4),
    ("dot_columns", 0, 1, 5),
    ("tile_dwords", 0, 6, 2),
    ("tile_without_shape", 0, 1, 7),
    ("tile_without_shape", 7, 1, 2),
    ("tile_number", 8, 1, 2),
    ("tile_number", 0, 9, 2),
    ("tile_number", 0, 1, 15),
]


@pytest.mark.parametrize("instruction", [*DOTS, "tdpbf16ps"])
@pytest.mark.parametrize(("name", "c", "a", "b"), BAD_DOTS)
def test_bad_dots_are_named(
    emulator: Any, instruction: str, name: str, c: int, a: int, b: int
) -> None:
    tiles, keep = Tiles(), []
    tiles.ldtilecfg(configuration(ROWS, COLSB))
    code = [configure(ROWS, COLSB, keep), *load_random(tiles, np.random.default_rng(8), keep)]
    before = all_tiles(tiles)
    with pytest.raises(TileFault, match=name):
        tiles.dot(instruction, c, a, b)
    got = np.zeros((8, 16, 64), np.uint8)
    run([*code, tc.dot(instruction, c, a, b), *store_all(tiles, got), tc.tilerelease()])
    assert emulator.take_fault() == name
    assert_exact(before, got)


NOWHERE = 1 << 62
BAD_INSTRUCTIONS = [
    ("encoding", tc.dot("tdpbsud", 0, 1, 2, w=1)),
    ("encoding", tc.dot("tdpbsud", 0, 1, 2, length=1)),
    ("encoding", tc.tilezero(0, vvvv=1)),
    ("encoding", tc.tilerelease(vvvv=1)),
    ("encoding", tc.tilerelease(w=1)),
    ("encoding", tc.memory("tileloadd", 0, index=tc.RCX, vvvv=3)),
    ("encoding", tc.memory("ldtilecfg", 1)),
    ("encoding", tc.memory("ldtilecfg", 8)),
    ("encoding", tc.memory("sttilecfg", 3)),
    ("tile_number", tc.tilezero(8)),
    ("tile_number", tc.memory("tilestored", 15, index=tc.RCX)),
    ("tile_without_shape", tc.tilezero(7)),
    ("tile_without_shape", tc.memory("tileloadd", 7, index=tc.RCX)),
    ("tile_dwords", tc.memory("tileloadd", 6, index=tc.RCX)),
    ("tile_dwords", tc.memory("tileloaddt1", 6, index=tc.RCX)),
    ("tile_dwords", tc.memory("tilestored", 6, index=tc.RCX)),
    ("address_without_sib", tc.vex(0x4B, 3, b"\x00")),
    ("address_without_sib", tc.vex(0x4B, 2, b"\x41\x08")),
    ("address_without_sib", tc.vex(0x4B, 3, b"\x05\x00\x00\x00\x00")),
    ("prefix", b"\x67" + tc.memory("tileloadd", 0, index=tc.RCX)),
    ("prefix", b"\x64" + tc.memory("ldtilecfg")),
    ("unreadable_memory", tc.load(tc.RAX, 64) + tc.memory("tileloadd", 0, index=tc.RCX)),
    ("unreadable_memory", tc.load(tc.RAX, NOWHERE) + tc.memory("tileloadd", 0, index=tc.RCX)),
    ("unreadable_memory", tc.load(tc.RCX, NOWHERE) + tc.memory("tileloadd", 0, index=tc.RCX)),
    ("unreadable_memory", tc.load(tc.RAX, 0) + tc.memory("ldtilecfg")),
    ("unwritable_memory", tc.load(tc.RAX, 64) + tc.memory("tilestored", 0, index=tc.RCX)),
    ("unwritable_memory", tc.load(tc.RAX, 64) + tc.memory("sttilecfg")),
    ("store_rows_overlap", tc.load(tc.RCX, 27) + tc.memory("tilestored", 0, index=tc.RCX)),
    ("store_rows_overlap", tc.load(tc.RCX, -27) + tc.memory("tilestored", 0, index=tc.RCX)),
    ("store_rows_overlap", tc.memory("tilestored", 0)),
]


@pytest.mark.parametrize(
    ("name", "code"), BAD_INSTRUCTIONS, ids=lambda v: v if isinstance(v, str) else v.hex()
)
def test_bad_instructions_are_named_and_stepped_over(emulator: Any, name: str, code: bytes) -> None:
    if name == "unwritable_memory":
        needs("sttilecfg")
    memory, keep, done = random_bytes(np.random.default_rng(9), 4096), [], np.zeros(1, np.int64)
    registers = tc.load(tc.RAX, address(memory) + 2048) + tc.load(tc.RCX, 64)
    mark = at(tc.RAX, done) + b"\x48\xff\x00"  # inc qword [rax]
    before = memory.copy()
    run([configure(ROWS, COLSB, keep), registers, code, mark, tc.tilerelease()])
    assert emulator.take_fault() == name
    assert emulator.take_fault() is None
    assert done[0] == 1
    assert_exact(before, memory)


@pytest.mark.parametrize(
    "code",
    [
        tc.tilezero(0),
        tc.memory("tileloadd", 0, index=tc.RCX),
        tc.memory("tilestored", 0, index=tc.RCX),
        tc.dot("tdpbssd", 0, 1, 2),
    ],
    ids=["tilezero", "tileloadd", "tilestored", "tdpbssd"],
)
def test_tiles_must_be_configured(emulator: Any, code: bytes) -> None:
    needs("tilerelease")
    memory, keep = np.zeros(4096, np.uint8), []
    registers = at(tc.RAX, memory) + tc.load(tc.RCX, 64)
    run([tc.tilerelease(), registers, code])
    assert emulator.take_fault() == "tiles_unconfigured"
    run([configure([4] * 3, [16] * 3, keep), tc.tilerelease(), registers, code])
    assert emulator.take_fault() == "tiles_unconfigured"
    palette_0 = np.zeros(64, np.uint8)
    run([configure([4] * 3, [16] * 3, keep), at(tc.RAX, palette_0) + tc.memory("ldtilecfg")])
    run([registers, code])
    assert emulator.take_fault() == "tiles_unconfigured"


def test_every_fault_but_lack_of_memory_has_a_test(emulator: Any) -> None:
    tables = (BAD_CONFIGURATIONS, BAD_DOTS, BAD_INSTRUCTIONS)
    tested = {row[0] for table in tables for row in table}
    assert set(emulator.FAULTS) == tested | {"tiles_unconfigured", "no_memory"}


def test_instructions_are_counted(emulator: Any) -> None:
    tiles, keep, traps = Tiles(), [], is_emulated("tilerelease")
    tiles.ldtilecfg(configuration(ROWS, COLSB))
    emulator.reset_counts()
    code = [configure(ROWS, COLSB, keep), *load_random(tiles, np.random.default_rng(1), keep)]
    run([*code, tc.dot("tdpbuud", 0, 1, 2), tc.dot("tdpbuud", 0, 0, 2), tc.tilerelease()])
    found = {name: n for name, n in emulator.counts().items() if n}
    released = {"tilerelease": 1} if traps else {}
    assert found == {"ldtilecfg": 1, "tileloadd": 6, "tdpbuud": 1, **released}


def script(body: str) -> subprocess.CompletedProcess[str]:
    """Run ``body`` in a fresh process after the emulator's installation."""
    code = f"""
import sys; sys.path.insert(0, {str(TESTS)!r})
import signal, ctypes, numpy as np
from make import tile_code as tc
from ktk._cy import emulate_tiles
{body}
"""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_fault_ends_the_process_and_says_its_name(emulator: Any) -> None:
    done = script("emulate_tiles(); tc.Program(tc.tilezero(0))()")
    assert done.returncode == -signal.SIGILL
    assert "ktk tile emulator: tilezero: tiles_unconfigured: no ldtilecfg" in done.stderr


def test_other_illegal_instructions_end_the_process(emulator: Any) -> None:
    done = script("emulate_tiles(); tc.Program(b'\\x0f\\x0b')()")
    assert done.returncode == -signal.SIGILL
    assert done.stderr == ""


def test_a_sent_signal_is_passed_on(emulator: Any) -> None:
    """Though a tile instruction may stand where it arrives, it is nobody's instruction."""
    done = script(
        "signal.signal(signal.SIGILL, lambda *a: print('handled'))\n"
        "emulate_tiles(); signal.raise_signal(signal.SIGILL)"
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
    done = script("emulate_tiles(); signal.raise_signal(signal.SIGILL)")
    assert done.returncode == -signal.SIGILL


def test_the_handler_that_was_there_gets_what_is_not_ours(emulator: Any) -> None:
    """A handler written in machine code steps over ud2; tile instructions around it still run, and
    so do those that a handler of another signal executes between.
    """
    done = script(
        """
libc = ctypes.CDLL(None)
# void handler(int, siginfo_t *, ucontext_t *c): c->rip += 2, which lies at byte 168; [counter]++
counter = np.zeros(1, np.int64)
# Its own code, not a Program: that would keep registers as a callee must, and so may this one.
add_2 = b"\\x48\\x83\\x82\\xa8\\x00\\x00\\x00\\x02"
skip = tc.Program(add_2 + tc.load(0, counter.ctypes.data) + b"\\x48\\xff\\x00")
class Action(ctypes.Structure):
    _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_byte * 128),
                ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p)]
SA_SIGINFO = 4
action = Action(skip.address, (ctypes.c_byte * 128)(), SA_SIGINFO, None)
assert libc.sigaction(int(signal.SIGILL), ctypes.byref(action), None) == 0
emulator = emulate_tiles()
zero, ud2 = tc.tilezero(0), b"\\x0f\\x0b"
config = np.zeros(64, np.uint8); config[[0, 16, 48]] = 1, 64, 16
start = tc.load(tc.RAX, config.ctypes.data) + tc.memory("ldtilecfg")
tc.Program([start, zero, ud2, zero, ud2, ud2, zero, tc.tilerelease()])()
assert counter[0] == 3, counter
assert emulator.counts()["tilezero"] == 3
# In a handler of another signal, on the same thread.
inner = tc.Program([start, zero, ud2])
action = Action(inner.address, (ctypes.c_byte * 128)(), SA_SIGINFO, None)
assert libc.sigaction(int(signal.SIGUSR1), ctypes.byref(action), None) == 0
signal.raise_signal(signal.SIGUSR1)
assert counter[0] == 4 and emulator.counts()["tilezero"] == 4
tc.Program(tc.tilerelease())()
print("ended")
"""
    )
    assert done.stdout == "ended\n", done.stderr


def test_ktk_tile_makes_the_features_count_as_present(monkeypatch, capsys, emulator: Any) -> None:
    tiles = {"amx_tile", "amx_int8", "amx_bf16"}
    monkeypatch.delenv("KTK_TILE", raising=False)
    if lacking := cpu.missing("avx512bf16", cpu.detect()):
        pytest.skip(f"AMX kernels also need {', '.join(lacking)}")
    assert not tiles & cpu.detect().names
    monkeypatch.setenv("KTK_TILE", "emulated")
    assert tiles <= cpu.detect().names
    assert cpu.detect().emulated == tiles
    assert not cpu.missing("amx", cpu.detect())
    assert doctor.diagnosis()["cpu"]["emulated"] == sorted(tiles)
    doctor.command()
    assert "amx_bf16 amx_int8 amx_tile (KTK_TILE: for tests" in capsys.readouterr().out
    monkeypatch.setenv("KTK_DISABLE_CPU_FEATURES", "amx_int8")
    assert cpu.detect().emulated == {"amx_tile", "amx_bf16"}
    monkeypatch.setenv("KTK_DISABLE_CPU_FEATURES", "")
    with pytest.raises(ValueError, match="KTK_TILE=emulated: the AMX kernels also need avx512vnni"):
        cpu._emulate_tiles(cpu.detect().names - {"avx512vnni"})


@pytest.mark.parametrize("method", ["AMXINT4", "AMXINT8"])
def test_emulated_amx_runs_when_named_and_never_by_auto(monkeypatch, caplog, method: str) -> None:
    found = machine()
    if found is None:
        pytest.skip("the CPU's own tiles are under test")
    monkeypatch.delenv("KTK_TILE", raising=False)
    if lacking := cpu.missing("avx512bf16", cpu.detect()):
        pytest.skip(f"AMX kernels also need {', '.join(lacking)}")
    spec = MoESpec(1, 64, 64, method.removeprefix("AMX").lower())
    packed = pack_all(spec, random_experts(spec, 1))
    x, ids, weights = torch.randn(12, 64), torch.zeros(12, 1, dtype=int), torch.ones(12, 1)
    assert ktk.MoE(packed, method=method).backend != method  # without KTK_TILE there are no tiles
    monkeypatch.setenv("KTK_TILE", "emulated")
    monkeypatch.setenv("KTK_STRICT_BACKEND", "1")
    found.reset_counts()
    auto = ktk.MoE(packed, method="auto")
    assert not auto.backend.startswith("AMX")
    want = auto.forward(x, ids, weights)
    assert not any(found.counts().values())
    named = ktk.MoE(packed, method=method)
    assert named.backend == method
    assert backends.backends()[method].kernel(spec).startswith("amx(emulated) int")
    assert torch.equal(want, named.forward(x, ids, weights))
    assert found.counts()["tdpbssd"] > 0
    monkeypatch.setenv("KTK_BACKEND", method)
    assert ktk.MoE(packed, method="auto").backend == method
