"""Compile every kernel of every ISA row with warnings as errors (``make lint``);
passes over a missing compiler.
"""

from __future__ import annotations

import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    isa = runpy.run_path(str(HERE / "isa.py"))
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    if shutil.which(compiler[0]) is None or platform.machine() not in ("x86_64", "amd64"):
        print("C warnings: not checked (no compiler, or not x86-64)")
        return 0
    base = (*isa["BASE_SOURCES"], *isa["MEASURE_BASE_SOURCES"])
    jobs = [(source, isa["BASE_FLAGS"]) for source in base]
    jobs += [
        (source, (f"-DKTK_ISA={row.name}", *row.flags))
        for row in isa["ISA_ROWS"]
        for source in (*row.sources, *row.measure)
    ]
    if sys.platform == "linux":
        jobs.append(("ktk/_cy/emulator/tile_emulator.c", ()))
    root = HERE.parents[1]
    failed = 0
    for source, flags in jobs:
        command = [*compiler, *isa["COMMON_FLAGS"], "-O1", "-Werror", "-fsyntax-only", *flags]
        command += [f"-I{root / folder}" for folder in isa["INCLUDES"]]
        command.append(str(root / source))
        failed += subprocess.run(command, check=False).returncode != 0
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
