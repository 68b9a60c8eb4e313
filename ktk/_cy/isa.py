"""Table of ISA rows: each compiles the same kernel sources once, with its own flags.

Read by setup.py without importing ktk. A new row is one line here and its features in ``ktk.machine.cpu.ISA_LEVELS``.
"""

from __future__ import annotations

from typing import NamedTuple


class IsaRow(NamedTuple):
    name: str
    flags: tuple[str, ...]
    sources: tuple[str, ...] = ()  # besides ROW_SOURCES


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (
    *_AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mprefer-vector-width=512",
)

# Slowest first.
ISA_ROWS = (
    IsaRow("avx2", _AVX2),
    IsaRow("avx512", _AVX512),
    IsaRow("avx512vnni", (*_AVX512, "-mavx512vnni")),
    IsaRow("amx", (*_AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8"), ("gemm_amx.c",)),
)

# ISAs of the kernels over GGUF blocks, slowest first; compiled once per row: BLOCKS_SOURCES in BLOCKS.
BLOCKS = "vendor/llamafile"
BLOCKS_ROWS = (
    *ISA_ROWS[:3],
    IsaRow("avx512bf16", (*_AVX512, "-mavx512vnni", "-mavx512bf16", "-DLF_OTHERS=avx512vnni")),
)
BLOCKS_SOURCES = ("kernels.c",)
BLOCKS_BASE_SOURCES = ("llamafile.c",)

# Compiled once per row.
ROW_SOURCES = ("attention.c", "gemm.c", "quantise.c", "rows.c")
# Compiled once, with baseline flags: they run before the CPU is known, or on any.
BASE_SOURCES = ("matrix.c", "moe.c", "linear.c", "decoder.c", "routing.c", "pool.c", "probe.c")
# The same two for ktk._cy.measure, the ceilings that `ktk bench` measures.
MEASURE_ROW_SOURCES = ("roof.c",)
MEASURE_BASE_SOURCES = ("roof_run.c",)
BASE_FLAGS = (
    "-DKTK_ROWS=" + " ".join(f"ROW({row.name})" for row in ISA_ROWS),
    "-DLF_ROWS=" + " ".join(f"ROW({row.name})" for row in BLOCKS_ROWS),
)
# -ffp-contract=off: FMA only where written. No -ffast-math: sums keep their stated order.
COMMON_FLAGS = (
    "-std=c11",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-lto",
    "-g0",
    "-Wall",
    "-Wextra",
)
