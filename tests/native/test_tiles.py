"""Tile instructions against the NumPy model: the emulator,
and silicon where there is some (test_tile_machines.py).
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktk.machine.memory import aligned_buffer
from ktk.reference.tiles import DOTS, Tiles, configuration
from make import tile_code as tc
from make.cases import assert_exact
from make.tile_machine import (
    address,
    all_tiles,
    at,
    configure,
    load_random,
    machine,
    needs,
    random_bytes,
    run,
    store_all,
)


@pytest.fixture(scope="module", autouse=True)
def _machine() -> None:
    machine()


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
