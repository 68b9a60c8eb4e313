"""Compile every kernel of every ISA row with warnings as errors (``make lint``); passes over a missing compiler."""

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
    jobs = [(f"kernels/{source}", isa["BASE_FLAGS"]) for source in base]
    jobs += [
        (f"kernels/{source}", (f"-DKTK_ISA={row.name}", *row.flags))
        for row in isa["ISA_ROWS"]
        for source in (*isa["ROW_SOURCES"], *isa["MEASURE_ROW_SOURCES"], *row.sources)
    ]
    blocks = HERE.parents[1] / isa["BLOCKS"]
    jobs += [(str(blocks / source), isa["BASE_FLAGS"]) for source in isa["BLOCKS_BASE_SOURCES"]]
    jobs += [
        (str(blocks / source), (f"-DKTK_ISA={row.name}", *row.flags))
        for row in isa["BLOCKS_ROWS"]
        for source in isa["BLOCKS_SOURCES"]
    ]
    if sys.platform == "linux":
        jobs.append(("emulator/tile_emulator.c", ()))
    failed = 0
    for source, flags in jobs:
        command = [*compiler, *isa["COMMON_FLAGS"], "-O1", "-Werror", "-fsyntax-only", *flags]
        command += [f"-I{folder}" for folder in (HERE / "include", HERE / "kernels", blocks)]
        command.append(str(HERE / source))
        failed += subprocess.run(command, check=False).returncode != 0
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
