"""Imports point one way (ARCHITECTURE.md), and ``import ktk`` is quick and quiet."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ktk

PACKAGE = Path(ktk.__file__).parent
# From the bottom up: a module may import its own layer and those below.
LAYERS = (
    ("errors", "env", "log", "paths", "fork"),
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
    ("kv",),
    ("integration",),
    ("train",),
    ("generate",),
    ("convert",),
    ("evaluate",),
    ("demo",),
    ("server",),
    ("cli", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# The oracles. What runs imports none; the NUMPY backend is one itself, `ktk bench` checks results.
MAY_IMPORT_REFERENCE = ("ktk.reference", "ktk.backends.numpy_ref", "ktk.bench")
# Who still takes private names, or closes a cycle: take out what is mended, add none.
STILL_TAKE_PRIVATE: set[str] = set()
STILL_CLOSE_A_CYCLE: set[tuple[str, str]] = set()

# Imports inside functions: by whom, of what (with all below it), how many at most, and why.
LAZY = (
    ("ktk._cy", "ktk._cy.tile_emulator", 1, "for tests, where it was built"),
    ("ktk.cli", "ktk", 85, "torch, numba, transformers: a mistyped option is told at once"),
    ("ktk.demo", "ktk", 10, "the same; the demo's first line comes before them"),
    ("ktk.generate", "ktk.integration", 8, "transformers: headers tell what a path holds"),
    ("ktk.backends.numba_jit", "ktk.backends._numba_kernels", 1, "numba: 0.3 s and memory"),
    ("ktk.quantise", "ktk.quantise", 4, "the same"),
    ("ktk.train", "ktk.train.peft_lora", 2, "peft: optional, ktk[train]"),
    ("ktk.integration.kt_kernel", "ktk.integration.kt_kernel.sft", 1, "torch"),
    ("ktk", "transformers", 9, "1 s and torch; quiet() must come first"),
    ("ktk", "torch", 6, "2 s; the operator takes NumPy arrays, too"),
    ("ktk", "safetensors.torch", 1, "torch"),
    ("ktk", "gguf", 5, "0.2 s, for such files only"),
    ("ktk", "rich", 40, "0.1 s; a pipe, an error and --help need no tables"),
    ("ktk", "prompt_toolkit", 1, "0.1 s, for a chat at a terminal only"),
    ("ktk", "jinja2", 1, "comes with transformers; only a failing chat template asks"),
    ("ktk", "cpuinfo", 1, "starts processes; only where the compiled probe is missing"),
    ("ktk", "peft", 1, "optional: ktk[train]"),
    ("ktk", "matplotlib", 10, "optional: ktk[plot]"),
    ("ktk", "fastapi", 1, "optional: ktk[serve]"),
    ("ktk", "uvicorn", 1, "optional: ktk[serve]"),
    ("ktk", "prometheus_client", 1, "optional: ktk[serve]"),
    ("ktk", "llguidance", 1, "optional: ktk[serve]"),
    ("ktk", "importlib.metadata", 2, "reads files: others' backends, a version"),
)
# Tables of names that import_module is given a row of.
TABLES = {"ktk", "ktk.train", "ktk._cy", "ktk.backends", "ktk.cli"}


@dataclass(frozen=True)
class Import:
    """One module that another imports; ``name`` what it takes of it, if not the whole."""

    importer: str
    imported: str
    name: str
    is_lazy: bool  # within a function


def modules_of(package: Path) -> dict[str, Path]:
    """Files of a package by the name of their module."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = file
    return found


def imports_of(module: str, file: Path, modules: dict[str, Path]) -> Iterator[Import]:
    """Every import of a file, those under TYPE_CHECKING, too."""

    def visit(node: ast.AST, is_lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, "", is_lazy)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: relative import"
            for alias in node.names:
                deep = f"{node.module}.{alias.name}"
                taken = (deep, "") if deep in modules else (node.module, alias.name)
                yield Import(module, *taken, is_lazy)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if isinstance(node.args[0], ast.Constant):
                yield Import(module, str(node.args[0].value), "", is_lazy)
            else:
                assert module in TABLES, f"{file}:{node.lineno}: imports nobody can tell what"
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, is_lazy or is_function)

    yield from visit(ast.parse(file.read_text()), False)


def imports_in(package: Path) -> list[Import]:
    modules = modules_of(package)
    return [found for name, file in modules.items() for found in imports_of(name, file, modules)]


def is_in(module: str, *packages: str) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def cycles(pairs: set[tuple[str, str]]) -> list[list[str]]:
    """A circle of imports among the files and folders, each as a whole,
    of every folder that has one.
    """
    graphs: dict[str, dict[str, set[str]]] = {}
    for importer, imported in pairs:
        a, b = importer.split("."), imported.split(".")
        same = 0
        while same < min(len(a), len(b)) and a[same] == b[same]:
            same += 1
        if same and len(a) > 1 and a != b:  # the package's own table of names is no import
            graph = graphs.setdefault(".".join(a[:same]), {})
            graph.setdefault(".".join(a[: same + 1]), set()).add(".".join(b[: same + 1]))
    found = []
    for folder in sorted(graphs):
        try:
            graphlib.TopologicalSorter(graphs[folder]).prepare()
        except graphlib.CycleError as error:
            found.append(error.args[1])
    return found


IMPORTS = imports_in(PACKAGE)
INSIDE = [found for found in IMPORTS if is_in(found.imported, "ktk")]


def test_imports_point_one_way() -> None:
    wrong = []
    for found in INSIDE:
        if found.importer == "ktk" or found.imported == "ktk":
            continue  # the package's own table names everything; it holds __version__
        own, target = (module.split(".")[1] for module in (found.importer, found.imported))
        assert own in LEVEL, f"{own} stands in no layer of this test"
        if LEVEL[target] > LEVEL[own]:
            wrong.append(f"{found.importer} imports {found.imported}")
    assert not wrong, wrong


def test_no_imports_go_round_in_a_folder() -> None:
    """Not inside functions nor for types either: what lies in a folder has an order."""
    pairs = {(found.importer, found.imported) for found in INSIDE}
    assert pairs >= STILL_CLOSE_A_CYCLE, "mended: take it out of STILL_CLOSE_A_CYCLE"
    assert cycles(pairs - STILL_CLOSE_A_CYCLE) == []


def test_production_imports_no_oracle() -> None:
    importers = {f.importer for f in INSIDE if is_in(f.imported, "ktk.reference")}
    wrong = {importer for importer in importers if not is_in(importer, *MAY_IMPORT_REFERENCE)}
    assert not wrong


def private_names(package: Path) -> set[str]:
    """What begins with _ and is taken from another module; a module _x is its own folder's."""
    wrong = set()
    modules = modules_of(package)
    for module, file in modules.items():
        own = {}
        for found in imports_of(module, file, modules):
            if not is_in(found.imported, package.name):
                continue
            own[found.name or found.imported.split(".")[-1]] = found
            folder, _, last = found.imported.rpartition(".")
            strange = last.startswith("_") and last != "_cy" and not is_in(module, folder)
            if strange or (found.name.startswith("_") and not found.name.startswith("__")):
                wrong.add(f"{module}: {found.imported}{found.name and '.'}{found.name}")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                is_private = node.attr.startswith("_") and not node.attr.startswith("__")
                if is_private and node.value.id in own:
                    wrong.add(f"{module}: {own[node.value.id].imported}.{node.attr}")
    return wrong


def test_no_private_name_is_imported() -> None:
    assert private_names(PACKAGE) == STILL_TAKE_PRIVATE


def test_imports_inside_functions_are_few_and_have_a_reason() -> None:
    """A pair of modules counts once, for the first row that it fits."""
    rows: dict[tuple[str, str], list[str]] = {row[:2]: [] for row in LAZY}
    pairs = sorted({(found.importer, found.imported) for found in IMPORTS if found.is_lazy})
    for importer, imported in pairs:
        row = next((r for r in rows if is_in(importer, r[0]) and is_in(imported, r[1])), None)
        assert row, f"{importer} imports {imported} inside a function: for what reason?"
        rows[row].append(f"{importer} imports {imported}")
    for importer, imported, most, _ in LAZY:
        pairs_found = rows[importer, imported]
        assert pairs_found, f"{importer}, {imported}: none is left, take the row out of LAZY"
        assert len(pairs_found) <= most, (
            f"{most} allowed, not these {len(pairs_found)}: {pairs_found}"
        )


def package_of(directory: Path, **files: str) -> Path:
    """A package p of the given modules: a__b="..." is p/a/b.py."""
    for name, text in files.items():
        file = (directory / "p" / name.replace("__", "/")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return directory / "p"


def test_the_checks_see_every_kind_of_import(tmp_path: Path) -> None:
    package = package_of(
        tmp_path,
        a="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.b",
        b="def f():\n    from p.c import d, _e\n    import_module('p.a')\nimport p.a\n",
        c__d="from p import a\nfrom p.c import _x\na._f\n",
        c___x="",
    )
    found = imports_in(package)
    inside = {(i.importer, i.imported, i.name, i.is_lazy) for i in found if i.imported != "typing"}
    assert inside == {
        ("p.a", "p.b", "", False),
        ("p.b", "p.c.d", "", True),
        ("p.b", "p.c", "_e", True),
        ("p.b", "p.a", "", True),
        ("p.b", "p.a", "", False),
        ("p.c.d", "p.a", "", False),
        ("p.c.d", "p.c._x", "", False),
    }
    assert private_names(package) == {"p.b: p.c._e", "p.c.d: p.a._f"}


def test_the_check_for_cycles_takes_a_folder_as_a_whole() -> None:
    assert cycles({("p.a", "p.b.c"), ("p.b.d", "p.b.c"), ("p.b.d", "p.e")}) == []
    assert cycles({("p.a", "p.b.c"), ("p.b.d", "p.a")}) in (
        [["p.a", "p.b", "p.a"]],
        [["p.b", "p.a", "p.b"]],
    )
    assert len(cycles({("p.b.c", "p.b"), ("p.b", "p.b.c")})) == 1


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
    modules = "ktk, ktk.ops.moe, ktk.integration.kt_kernel.wrapper, ktk.convert, ktk.backends"
    assert run(f"import {modules}; ktk.backends.report()") == ""
