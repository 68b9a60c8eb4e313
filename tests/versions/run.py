"""Run the integration tests with the oldest and the newest packages that pyproject.toml allows:
python tests/versions/run.py (`make test-versions`)

A wheel of this tree is built as anybody's `pip install .` builds it, and installed into throw-away
environments, one after another:

    oldest  every lower bound in pyproject.toml of what runs: NumPy, torch, Numba, ...
    LINES   constraints.txt, but the last release of transformers before it renamed something
    newest  whatever pip takes today

Prints a Markdown table: bench/RESULTS.md holds the last one. Where pip finds a CUDA build of torch
only, an environment takes several GB.
Exit code: 1 if a test failed or an environment could not be made.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from requirements import ROOT, lowest, name_of, pinned, required

EXTRAS = ("transformers", "serve", "train")
SHOWN = ("transformers", "torch", "numpy", "numba", "llvmlite")
# What stands on these packages; the kernels and formats beneath do not.
TESTS = (
    "integration/transformers/test_*.py",
    "generate/test_*.py",
    "server/test_*.py",
    "models/test_gguf_whole_models.py",
    "models/test_gguf_linears.py",
    "models/test_gguf_foreign_models.py",
    "models/test_gguf_tokenizers.py",
    "models/test_quantised_checkpoints.py",
    "demo/test_demo_parts.py",
    "evaluate/test_eval.py",
    "quantise/test_*.py",
    "ops/test_moe.py",
    "train/test_*.py",
)
LINES = {"transformers 5.23": "transformers==5.23.0"}  # 5.24 renamed the cache


@dataclass
class Environment:
    """What pip is asked for beside ktk and the tools of its tests, and by which file it is held."""

    name: str
    requirements: list[str]
    constraints: list[str]


def environments() -> list[Environment]:
    oldest = [lowest(r) for r in required(*EXTRAS)]
    lines = []
    for name, pin in LINES.items():
        held = {**pinned(), name_of(pin): pin.partition("==")[2]}
        lines.append(Environment(name, [], [f"{n}=={v}" for n, v in held.items()]))
    return [Environment("oldest", oldest, []), *lines, Environment("newest", [], [])]


@dataclass
class Result:
    name: str
    versions: dict[str, str]
    passed: int = 0
    skipped: int = 0
    failed: tuple[str, ...] = ()
    error: str = ""

    def row(self) -> str:
        said = (
            self.error or f"{self.passed} passed, {self.skipped} skipped, {len(self.failed)} failed"
        )
        shown = [self.versions.get(name, "") for name in SHOWN]
        return f"| {' | '.join([self.name, self.versions.get('python', ''), *shown, said])} |"


def build_wheel(folder: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)],
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def run(environment: Environment, wheel: Path, tests: list[str], folder: Path) -> Result:
    """Make an environment in a folder, or bring the one that is there up to date, run the tests
    in it, and say how it went.
    """
    python, held = folder / "bin" / "python", folder / "constraints.txt"
    was_there = python.exists()
    if not was_there:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    held.write_text("\n".join(environment.constraints))
    install = [str(python), "-m", "pip", "install", "-q", "-c", str(held)]
    wanted = [f"{wheel}[{','.join((*EXTRAS, 'plot', 'dev'))}]", *environment.requirements]
    error = pip_error([*install, *wanted])
    if was_there and not error:  # another build of ktk has the same version
        error = pip_error([*install, "--no-deps", "--force-reinstall", str(wheel)])
    if error:
        shutil.rmtree(folder)  # or it would be taken for one that is ready
        return Result(environment.name, {}, error=error)
    versions = installed_versions(python)
    report, work = folder / "report.xml", folder / "work"
    report.unlink(missing_ok=True)
    work.mkdir(exist_ok=True)
    # From another folder, so that `import ktk` there, and in what tests start, finds the wheel.
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    tested = subprocess.run(
        [
            str(python),
            "-m",
            "pytest",
            "-c",
            str(ROOT / "pyproject.toml"),
            f"--junitxml={report}",
            *tests,
        ],
        check=False,
        cwd=work,
        env=variables,
    )
    if tested.returncode not in (0, 1) or not report.is_file():
        return Result(environment.name, versions, error=f"pytest ended with {tested.returncode}")
    return counted(environment.name, versions, report)


def pip_error(command: list[str]) -> str:
    """What a pip command that failed said first, all of it printed; "" if it did not."""
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if not done.returncode:
        return ""
    print(done.stdout, file=sys.stderr)
    errors = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
    return f"pip: {' '.join(errors[:1])}"


def counted(name: str, versions: dict[str, str], report: Path) -> Result:
    """A pytest run's result from its JUnit report."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    kinds = {case: {child.tag for child in case} for case in cases}
    failed = [c for c, tags in kinds.items() if tags & {"failure", "error"}]
    skipped = [c for c, tags in kinds.items() if "skipped" in tags]
    names = tuple(f"{c.get('classname')}::{c.get('name')}" for c in failed)
    return Result(name, versions, len(cases) - len(failed) - len(skipped), len(skipped), names)


def installed_versions(python: Path) -> dict[str, str]:
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format", "json"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = {name_of(item["name"]): item["version"] for item in json.loads(listed.stdout)}
    return {**found, "python": platform.python_version()}


def test_files() -> list[str]:
    found = [path for pattern in TESTS for path in sorted((ROOT / "tests").glob(pattern))]
    return [str(path) for path in found]


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def main() -> int:
    known = {e.name: e for e in environments()}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=known, default=list(known))
    parser.add_argument(
        "--keep",
        type=Path,
        help="leave the environments in this folder, and bring those that are there up to date",
    )
    parser.add_argument("--wheel", type=Path, help="of ktk, instead of one built of this tree")
    parser.add_argument(
        "tests",
        nargs="*",
        type=os.path.abspath,
        help="test files; default: what stands on the packages",
    )
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="ktk-versions-")) if options.keep is None else options.keep
    results = []
    try:
        base.mkdir(parents=True, exist_ok=True)
        wheel = options.wheel or build_wheel(Path(tempfile.mkdtemp(dir=base)))
        for name in options.only:
            folder = base / name.replace(" ", "-")
            print(f"--- {name}", flush=True)
            results.append(run(known[name], wheel, options.tests or test_files(), folder))
            if options.keep is None:
                shutil.rmtree(folder)
    finally:
        if options.keep is None:
            shutil.rmtree(base)
    print(f"{datetime.date.today()}, {cpu_name()}, {os.cpu_count()} CPUs\n")
    print(f"| environment | python | {' | '.join(SHOWN)} | tests |")
    print("|---" * (len(SHOWN) + 3) + "|")
    for result in results:
        print(result.row())
    for result in results:
        for test in result.failed:
            print(f"{result.name}: {test}", file=sys.stderr)
    return int(any(result.failed or result.error for result in results))


if __name__ == "__main__":
    sys.exit(main())
