"""Write constraints.txt: the newest release of everything ktk, its tests and its build need, direct
and transitive (`make lock`).

pip resolves, without installing anything, for this interpreter and platform. torch keeps the
version that constraints.txt has, or gets the one of --torch: indexes differ in which of its
releases they have a CPU build of. A build's local tag (+cpu) and the packages of its CUDA builds
are left out, so that one file serves every build.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from requirements import CONSTRAINTS, all_required, name_of, pinned

OF_CUDA = re.compile(r"nvidia-|cuda-|triton$")


def resolve(requirements: list[str]) -> dict[str, str]:
    """Package -> version of what pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = ["install", "--dry-run", "--ignore-installed", "-qq", "--report", str(report)]
        subprocess.run([sys.executable, "-m", "pip", *command, *requirements], check=True)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {name_of(item["name"]): item["version"].partition("+")[0] for item in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default=pinned().get("torch"), help="default: %(default)s")
    torch = parser.parse_args().torch
    asked = [r for r in all_required() if name_of(r) != "torch"]
    found = resolve([*asked, "torch" if torch is None else f"torch=={torch}"])
    lines = [
        f"# Written by `make lock` on {datetime.date.today()}, for Python "
        f"{platform.python_version()} on {platform.system()} {platform.machine()}.",
        *sorted(f"{n}=={v}" for n, v in found.items() if not OF_CUDA.match(n)),
    ]
    CONSTRAINTS.write_text("\n".join(lines) + "\n")
    print(f"{CONSTRAINTS}: {len(lines) - 1} packages")


if __name__ == "__main__":
    main()
