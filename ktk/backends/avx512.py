"""AVX512: 512-bit kernels, with VNNI where the CPU has it."""

from __future__ import annotations

from ktk.backends.native import NativeBackend


class Avx512Backend(NativeBackend):
    name = "AVX512"
    isa_rows = ("avx512vnni", "avx512")
