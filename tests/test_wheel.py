"""The wheel: what is in it, and that it runs where there is no compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import ktk
from ktk._cy import native_module
from ktk._cy.isa import ISA_ROWS
from ktk.experts.spec import MoESpec
from ktk.machine import cpu
from make import ROOT
from make.cases import pack_all, random_experts

pytestmark = pytest.mark.slow

EXTENSIONS = {f"ktk/_cy/{name}.abi3.so" for name in ("native", "measure", "tile_emulator")}
TRY = """
import json, sys
import torch
import ktk
from ktk.machine import cpu
from ktk._cy import native_module
from ktk.experts.spec import MoESpec
sys.path.append(sys.argv[1])
from make.cases import pack_all, random_experts
spec = MoESpec(4, 64, 96, "int8")
moe = ktk.MoE(pack_all(spec, random_experts(spec, 1)))
x = torch.linspace(-1, 1, 20 * 64).reshape(20, 64)
out = moe.forward(x, torch.arange(20)[:, None] % 4, torch.ones(20, 1))
found = ktk.__file__, native_module().__file__, cpu.best_isa(), moe.backend, out.tolist()
print(json.dumps(found))
"""


def run(command: list[str | Path], **options: object) -> str:
    done = subprocess.run(  # type: ignore[call-overload]
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built here, without a network; objects that a build has left in build/objects are taken as
    they are.
    """
    pytest.importorskip("Cython", reason="Cython is not installed: pip install -e '.[dev]'")
    pytest.importorskip("setuptools", minversion="77")
    if native_module() is None or sys.platform != "linux" or not shutil.which("cc"):
        pytest.skip("no extension is built here")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", out]
    command += ["build", "--build-base", out / "build"]
    command += ["bdist_wheel", "--bdist-dir", out / "bdist", "--dist-dir", out]
    run(command, cwd=ROOT)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, which finds its dependencies where this one has
    them; its bin/.
    """
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "-q"]
    run([*pip, "--no-index", "--no-deps", wheel])
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def without_compiler(folder: Path) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PATH", "CC")}
    return keep | {"PATH": str(folder)}


def test_the_wheel_is_of_the_limited_api(wheel: Path) -> None:
    assert "-cp311-abi3-linux_x86_64" in wheel.name


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name for name in names if ".dist-info/" not in name}
    source = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ktk").rglob("*.py")}
    page = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "ktk/server/page").glob("[!_]*.*")
    }
    assert packed == source | EXTENSIONS | page | {"ktk/py.typed"}


def test_the_wheel_runs_in_a_bare_environment_on_the_best_row(bare: Path, tmp_path: Path) -> None:
    printed = run(
        [bare / "python", "-c", TRY, ROOT / "tests"], cwd=tmp_path, env=without_compiler(tmp_path)
    )
    package, extension, row, backend, out = json.loads(printed.splitlines()[-1])
    assert package.startswith(str(bare.parent))
    assert extension.startswith(str(bare.parent))
    features = cpu.detect()
    assert row == [r.name for r in ISA_ROWS if not cpu.missing(r.name, features)][-1]
    spec = MoESpec(4, 64, 96, "int8")
    moe = ktk.MoE(pack_all(spec, random_experts(spec, 1)))
    assert backend == moe.backend
    x = torch.linspace(-1, 1, 20 * 64).reshape(20, 64)
    want = moe.forward(x, torch.arange(20)[:, None] % 4, torch.ones(20, 1))
    assert torch.equal(want, torch.tensor(out))


def test_doctor_of_the_wheel_finds_the_extension(bare: Path, tmp_path: Path) -> None:
    printed = run([bare / "ktk", "doctor", "--json"], cwd=tmp_path, env=without_compiler(tmp_path))
    found = json.loads(printed)
    assert found["extension"]["built"]
    assert any(b["runs"] and b["name"] not in ("NUMPY", "NUMBA") for b in found["backends"])
