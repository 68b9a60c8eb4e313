"""What the emulator names and steps over: configurations, shapes, encodings and addresses that
silicon would refuse or leave undefined.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ktk.reference.tiles import DOTS, TileFault, Tiles, configuration
from make import tile_code as tc
from make.cases import assert_exact
from make.tile_machine import (
    address,
    all_tiles,
    at,
    configure,
    is_emulated,
    load_random,
    needs,
    random_bytes,
    run,
    store_all,
)


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
