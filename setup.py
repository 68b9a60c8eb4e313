"""Builds ktk._cy.native and ktk._cy.measure: each kernel source once per ISA row, linked into one
extension.

Beside it, on Linux, ktk._cy.tile_emulator: for tests of AMX kernels on a CPU without tiles. All of
Python's limited API, so that one wheel serves every Python from LIMITED_API on.

Without a C compiler, or on another architecture, the package installs without it: Numba and NumPy
run then.
"""

import hashlib
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
LIMITED_API = (3, 11)  # requires-python; the first with buffers
# The Cython modules: arguments are checked there, nothing is computed.
WRAPPER_FLAGS = ("-O1", "-fno-lto", "-g0", "-Wno-unused-const-variable")


def sum_of(paths):
    """A digest of the bytes of files."""
    total = hashlib.sha256()
    for path in paths:
        total.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return total.hexdigest()


def is_text(path, text):
    return path.is_file() and path.read_text() == text


class BuildKernels(build_ext):
    """build_ext that compiles the sources of all extensions side by side, longest first, and then
    links.

    Objects stay in build/ and serve again, for a wheel after an installation say, until one of what
    they are made of changes: its bytes, since Cython writes its C again, the same, once it is newer
    than that.
    """

    def build_extensions(self):
        jobs = {ext.name: self.jobs(ext) for ext in self.extensions}
        # A wheel's build comes here twice: then objects stand among them.
        depends = self.extensions[0].depends
        self.headers = sum_of(path for path in depends if not path.endswith(".o"))
        # The kernels over blocks take 20 s each, anything else at most 6.
        order = sorted(
            (job for of_one in jobs.values() for job in of_one),
            key=lambda job: not job[0].is_relative_to(ISA["BLOCKS"]),
        )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            running = {job: pool.submit(self.compile, *job) for job in order}
            self.objects = {name: [running[job] for job in of_one] for name, of_one in jobs.items()}
            super().build_extensions()

    def build_extension(self, ext):
        objects = [future.result() for future in self.objects[ext.name]]
        ext.extra_objects, ext.sources = objects, []
        ext.depends = [*ext.depends, *objects]  # or a changed source would not be linked anew
        super().build_extension(ext)

    def jobs(self, ext):
        """(source, folder, flags) of every object of an extension."""
        name = ext.name.rpartition(".")[2]
        base = ISA["COMMON_FLAGS"]
        jobs = [(CY / f"{name}.c", "", WRAPPER_FLAGS)]
        if name == "tile_emulator":
            return [*jobs, (CY / "emulator/tile_emulator.c", "emulator", base)]
        is_native = name == "native"
        sources = ISA["BASE_SOURCES" if is_native else "MEASURE_BASE_SOURCES"]
        jobs += [(Path(source), "base", (*base, *ISA["BASE_FLAGS"])) for source in sources]
        for row in ISA["ISA_ROWS"]:
            flags = (*base, f"-DKTK_ISA={row.name}", *row.flags)
            sources = row.sources if is_native else row.measure
            jobs += [(Path(source), row.name, flags) for source in sources]
        return jobs

    def compile(self, source, folder, flags):
        """The object's path, compiled unless it is there, made of the same bytes."""
        ext = self.extensions[0]
        command = repr((self.compiler.compiler_so, ext.include_dirs, ext.define_macros, flags))
        digest = hashlib.sha256(command.encode()).hexdigest()[:16]
        place = Path("build/objects", digest, folder)
        made = place / source.with_suffix(".o")
        made_of, current = made.with_suffix(".sum"), self.headers + sum_of([source])
        if self.force or not made.exists() or not is_text(made_of, current):
            made_of.unlink(missing_ok=True)
            self.compiler.compile(
                [str(source)],
                output_dir=str(place),
                include_dirs=ext.include_dirs,
                macros=ext.define_macros,
                extra_postargs=[*flags],
                debug=self.debug,
            )
            made_of.write_text(current)
        return str(made)

    def copy_extensions_to_source(self):
        """Without those of earlier builds, named for one Python,
        which Python would load before these.
        """
        for ext in self.extensions:
            for path in CY.glob(f"{ext.name.rpartition('.')[2]}.cpython-*.so"):
                path.unlink()
        super().copy_extensions_to_source()


def extensions():
    if platform.machine().lower() not in ("x86_64", "amd64") or sys.platform == "win32":
        return []
    from Cython.Build import cythonize

    includes = [*ISA["INCLUDES"], str(CY / "emulator")]
    depends = [str(path) for folder in includes for path in sorted(Path(folder).rglob("*.h"))]
    names = ["native", "measure", *(["tile_emulator"] if sys.platform == "linux" else [])]
    modules = cythonize(
        [Extension(f"ktk._cy.{name}", [str(CY / f"{name}.pyx")]) for name in names],
        language_level=3,
    )
    for module in modules:  # set here: cythonize does not keep all of it
        module.optional = True
        module.py_limited_api = True
        module.include_dirs = includes
        module.depends = [*depends, "setup.py", str(CY / "isa.py")]
        module.define_macros = [
            ("Py_LIMITED_API", f"0x{LIMITED_API[0]:02x}{LIMITED_API[1]:02x}0000")
        ]
        module.extra_link_args = ["-pthread"]
    return modules


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp{}{}".format(*LIMITED_API)}},
)
