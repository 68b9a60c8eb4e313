"""Table of ISA levels: what each is compiled with, and from which sources.

Read by setup.py without importing ktk. A level takes from the one below what its own sources do not
give it (``kernels/kernels.c``). A new one is a row here, one there, and its features in
``ktk.machine.cpu.ISA_LEVELS``.
"""

from __future__ import annotations

from typing import NamedTuple

KERNELS, BLOCKS = "ktk/_cy/kernels", "vendor/llamafile"


class IsaRow(NamedTuple):
    """sources : of ktk._cy.native. measure : of ktk._cy.measure,
    the ceilings that `ktk bench` measures.
    """

    name: str
    flags: tuple[str, ...]
    sources: tuple[str, ...]
    measure: tuple[str, ...] = (f"{KERNELS}/roof.c",)


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (
    *_AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mprefer-vector-width=512",
)
_VNNI = (*_AVX512, "-mavx512vnni")
_OF_BLOCKS = f"{BLOCKS}/kernels.c"
_ALL = (
    *(
        f"{KERNELS}/{name}.c"
        for name in ("attend", "gemm", "products_f32", "products_i16", "quantise", "rows")
    ),
    _OF_BLOCKS,
)

# VNNI has no use for them: AVX-512's serve.
_CODED = f"{KERNELS}/gemm_coded.c"

# Slowest first.
ISA_ROWS = (
    IsaRow("avx2", _AVX2, (*_ALL, _CODED)),
    IsaRow("avx512", _AVX512, (*_ALL, _CODED)),
    IsaRow("avx512vnni", _VNNI, _ALL),
    IsaRow("avx512bf16", (*_VNNI, "-mavx512bf16"), (_OF_BLOCKS,), ()),
    IsaRow("amx", (*_VNNI, "-mamx-tile", "-mamx-int8"), (f"{KERNELS}/gemm_amx.c",)),
    # No vectors of its own: the tile emulator runs it on any CPU that these tests run on.
    IsaRow("amxbf16", _AVX2, (f"{KERNELS}/gemm_amx_bf16.c",), ()),
)

# Compiled once, with baseline flags: they run before the CPU is known, or on any.
BASE_SOURCES = (
    *(
        f"{KERNELS}/{name}.c"
        for name in (
            "formats",
            "kernels",
            "moe",
            "moe_tasks",
            "adapters",
            "train",
            "train_adapters",
            "transposed",
            "combine",
            "row_major",
            "addresses",
            "arrivals",
            "linear",
            "decoder",
            "attention",
            "latent",
            "routing",
            "pool",
            "probe",
        )
    ),
    f"{BLOCKS}/grids.c",
)
MEASURE_BASE_SOURCES = (f"{KERNELS}/roof_run.c",)
# roof_run.c's table of rows.
BASE_FLAGS = ("-DKTK_ROWS=" + " ".join(f"ROW({row.name})" for row in ISA_ROWS if row.measure),)
INCLUDES = ("ktk/_cy/include", KERNELS, BLOCKS)
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
