"""AVX2: 256-bit kernels for every x86-64 CPU since 2013."""

from __future__ import annotations

from ktk.backends.native import NativeBackend


class Avx2Backend(NativeBackend):
    name = "AVX2"
    isa_rows = ("avx2",)
