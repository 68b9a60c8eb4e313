"""Imports point one way (ARCHITECTURE.md), and ``import ktk`` is quick and quiet."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import ktk

PACKAGE = Path(ktk.__file__).parent
# From the bottom up: a module may import its own layer and those below.
LAYERS = (
    ("errors", "env", "log", "paths"),
    ("_cy",),
    ("machine",),
    ("experts",),
    ("checkpoint",),
    ("models",),
    ("reference",),
    ("quantise",),
    ("placement",),
    ("backends",),
    ("ops",),
    ("bench",),
    ("integration",),
    ("generate",),
    ("convert",),
    ("evaluate",),
    ("demo",),
    ("server",),
    ("cli", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports_of(path: Path) -> set[str]:
    """ktk modules that a file imports, those under TYPE_CHECKING left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
        ):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            deep = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(deep if node.module == "ktk" else {node.module})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name for name in found if name.startswith("ktk.")}


def test_imports_point_one_way() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue  # the package's own lazy table names everything
        assert own in LEVEL, f"{own} stands in no layer of this test"
        for name in imports_of(path):
            target = name.split(".")[1]
            if target.startswith("__"):
                continue  # ktk.__version__
            if LEVEL[target] > LEVEL[own]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, wrong


def test_the_direction_check_sees_an_import_that_points_up(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from ktk.cli import main\n    from ktk import ops\n")
    assert imports_of(file) == {"ktk.cli", "ktk.ops"}


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    return done.stdout


def test_import_ktk_is_quick_quiet_and_light() -> None:
    code = "import time; t = time.perf_counter(); import ktk; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.3
    heavy = [
        "torch",
        "numba",
        "llvmlite",
        "transformers",
        "cpuinfo",
        "gguf",
        "safetensors",
        "rich",
        "typer",
    ]
    assert run(f"import sys, ktk; print([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_importing_everything_but_the_command_line_prints_nothing() -> None:
    assert (
        run(
            "import ktk, ktk.ops.moe, ktk.integration.kt_kernel.wrapper, ktk.convert, ktk.backends; ktk.backends.report()"
        )
        == ""
    )
