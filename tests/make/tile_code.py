"""Tile instructions as machine code, and a way to run some with chosen registers; written from the
manual's encoding tables, apart from the emulator's decoder.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterable

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
R8, R9, R10, R11, R12, R13, R14, R15 = range(8, 16)
_CALLEE_SAVED = (RBX, RBP, R12, R13, R14, R15)
# name -> (opcode, VEX.pp)
_MEMORY = {
    "ldtilecfg": (0x49, 0),
    "sttilecfg": (0x49, 1),
    "tileloaddt1": (0x4B, 1),
    "tilestored": (0x4B, 2),
    "tileloadd": (0x4B, 3),
}
_DOTS = {
    "tdpbuud": (0x5E, 0),
    "tdpbusd": (0x5E, 1),
    "tdpbsud": (0x5E, 2),
    "tdpbssd": (0x5E, 3),
    "tdpbf16ps": (0x5C, 2),
}


def vex(
    opcode: int,
    pp: int,
    modrm: bytes,
    reg: int = 0,
    index: int = 0,
    base: int = 0,
    vvvv: int = 0,
    w: int = 0,
    length: int = 0,
) -> bytes:
    """VEX.128.pp.0F38.W opcode modrm; reg, index and base lend their fourth bits."""
    high = (~reg >> 3 & 1) << 7 | (~index >> 3 & 1) << 6 | (~base >> 3 & 1) << 5
    third = w << 7 | (~vvvv & 15) << 3 | length << 2 | pp
    return bytes([0xC4, high | 2, third, opcode]) + modrm


def memory(
    name: str,
    tile: int = 0,
    *,
    base: int | None = RAX,
    index: int | None = None,
    scale: int = 1,
    disp: int = 0,
    wide: bool = False,
    **fields: int,
) -> bytes:
    """An instruction with [base + index * scale + disp]; base None = disp alone;
    wide = disp in 4 bytes.
    """
    opcode, pp = _MEMORY[name]
    b, i = (5 if base is None else base), (4 if index is None else index)
    assert i != RSP or index is None, "rsp cannot be an index"
    mod = (
        0
        if base is None
        else 2
        if wide or not -128 <= disp < 128
        else 1
        if disp or b & 7 == 5
        else 0
    )
    displacement = (
        b"" if mod == 0 and base is not None else struct.pack("<b" if mod == 1 else "<i", disp)
    )
    sib = {1: 0, 2: 1, 4: 2, 8: 3}[scale] << 6 | (i & 7) << 3 | b & 7
    modrm = bytes([mod << 6 | (tile & 7) << 3 | 4, sib]) + displacement
    return vex(opcode, pp, modrm, tile, i, b, **fields)


def dot(name: str, c: int, a: int, b: int, **fields: int) -> bytes:
    opcode, pp = _DOTS[name]
    return vex(opcode, pp, bytes([0xC0 | (c & 7) << 3 | a & 7]), reg=c, base=a, vvvv=b, **fields)


def tilezero(tile: int, **fields: int) -> bytes:
    return vex(0x49, 3, bytes([0xC0 | (tile & 7) << 3]), reg=tile, **fields)


def tilerelease(**fields: int) -> bytes:
    return vex(0x49, 0, b"\xc0", **fields)


def load(register: int, value: int) -> bytes:
    """mov register, value."""
    return bytes([0x48 | register >> 3, 0xB8 | register & 7]) + struct.pack("<Q", value % 2**64)


def on_stack(code: bytes, value: int) -> bytes:
    """``code`` with rsp at ``value``, set back afterwards through rax and r11."""
    return (
        b"\x49\x89\xe3" + load(RSP, value) + code + b"\x4c\x89\xdc"
    )  # mov r11, rsp ... mov rsp, r11


class Program:
    """Machine code made callable; keeps the callee-saved registers. Call it on any thread."""

    def __init__(self, code: bytes | Iterable[bytes]) -> None:
        body = code if isinstance(code, bytes) else b"".join(code)
        push = b"".join(bytes([0x41, 0x50 | r & 7]) for r in _CALLEE_SAVED if r > 7)
        pop = b"".join(bytes([0x41, 0x58 | r & 7]) for r in reversed(_CALLEE_SAVED) if r > 7)
        text = (
            b"\x53\x55" + push + body + pop + b"\x5d\x5b\xc3"
        )  # push rbx, rbp ... pop rbp, rbx; ret
        self.page = mmap.mmap(-1, len(text), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self.page.write(text)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.page))
        self._call = ctypes.CFUNCTYPE(None)(self.address)

    def __call__(self) -> None:
        self._call()
