"""Builds ktk._cy.native and ktk._cy.measure: each kernel source once per ISA row, linked into one extension.

Beside it, on Linux, ktk._cy.tile_emulator: for tests of AMX kernels on a CPU without tiles.

Without a C compiler, or on another architecture, the package installs without it: Numba and NumPy run then.
"""

import os
import platform
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CY = Path("ktk/_cy")
ISA = runpy.run_path(str(CY / "isa.py"))
BLOCKS = Path(ISA["BLOCKS"])
# Extension: sources compiled once, sources compiled once per ISA row.
EXTENSIONS = {
    "native": (ISA["BASE_SOURCES"], ISA["ROW_SOURCES"]),
    "measure": (ISA["MEASURE_BASE_SOURCES"], ISA["MEASURE_ROW_SOURCES"]),
}


class BuildKernels(build_ext):
    """build_ext that compiles the ISA rows first and hands their objects to the linker."""

    def build_extension(self, ext):
        if ext.name.rpartition(".")[2] in EXTENSIONS:
            self.compile_rows(ext)
        super().build_extension(ext)

    def compile_rows(self, ext):
        build = Path(self.build_temp)
        common = {"include_dirs": ext.include_dirs, "debug": self.debug}

        def compile_row(sources, folder, flags, where=CY / "kernels"):
            return self.compiler.compile(
                [str(where / s) for s in sources],
                output_dir=str(build / folder),
                extra_postargs=[*ISA["COMMON_FLAGS"], *flags],
                **common,
            )

        base_sources, row_sources = EXTENSIONS[ext.name.rpartition(".")[2]]
        jobs = [(base_sources, "base", ISA["BASE_FLAGS"])]
        is_native = ext.name.endswith("native")
        for row in ISA["ISA_ROWS"]:
            own = row.sources if is_native else ()
            flags = [f"-DKTK_ISA={row.name}", *row.flags]
            jobs += [((source,), row.name, flags) for source in (*row_sources, *own)]
        if is_native:
            jobs.append((ISA["BLOCKS_BASE_SOURCES"], "base", ISA["BASE_FLAGS"], BLOCKS))
            for row in ISA["BLOCKS_ROWS"]:
                flags = [f"-DKTK_ISA={row.name}", *row.flags]
                jobs.append((ISA["BLOCKS_SOURCES"], row.name, flags, BLOCKS))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [
                path for paths in pool.map(lambda job: compile_row(*job), jobs) for path in paths
            ]
        ext.extra_objects = objects


def extensions():
    if platform.machine().lower() not in ("x86_64", "amd64") or sys.platform == "win32":
        return []
    from Cython.Build import cythonize

    folders = (CY / "include", CY / "kernels", BLOCKS, BLOCKS / "blocks")
    depends = [str(p) for folder in folders for p in sorted(folder.glob("*.[ch]"))]
    described = [
        Extension(
            f"ktk._cy.{name}",
            [str(CY / f"{name}.pyx")],
            include_dirs=[str(CY / "include"), str(CY / "kernels"), str(BLOCKS)],
            depends=[*depends, "setup.py", str(CY / "isa.py")],
            extra_compile_args=["-O2", "-fno-lto"],
            extra_link_args=["-pthread"],
        )
        for name in EXTENSIONS
    ]
    if sys.platform == "linux":
        emulator = Extension(
            "ktk._cy.tile_emulator",
            [str(CY / "tile_emulator.pyx"), str(CY / "emulator/tile_emulator.c")],
            include_dirs=[str(CY / "emulator")],
            depends=["setup.py", str(CY / "emulator/tile_emulator.h")],
            extra_compile_args=[f for f in ISA["COMMON_FLAGS"] if not f.startswith("-W")],
        )
        described.append(emulator)
    modules = cythonize(described, language_level=3)
    for module in modules:
        module.optional = True  # set here: cythonize does not keep it
    return modules


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
