"""The documents name what is there: paths, links, variables, sub-commands, metrics, figures."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ktk
from ktk import env
from ktk.cli import COMMANDS
from ktk.experts.formats import BLOCKS, PANELS
from ktk.experts.formats.decode import IK_TYPES
from make import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench" / "RESULTS.md"])
ABOUT_THE_TREE = [d for d in DOCUMENTS if d.name not in ("RESULTS.md", "CHANGELOG.md")]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
each_about_the_tree = pytest.mark.parametrize("document", ABOUT_THE_TREE, ids=lambda d: d.name)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:ktk|bench|tests|vendor|docs)/[\w./{},*-]*)`")


def blocks(text: str, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text) if name == language]


def row_cells(line: str) -> list[str]:
    """Of a row of a table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def anchors(document: Path) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    prose = FENCE.sub("", document.read_text())
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def missing_links(document: Path, text: str) -> list[str]:
    """Internal links of ``text`` to a file or a heading that is not there."""
    missing = []
    for target in LINK.findall(FENCE.sub("", text)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    return missing


def missing_paths(text: str) -> list[str]:
    """Paths in backticks that are not there; `{a,b}` and `*` as in a shell."""
    found = []
    for path in PATH.findall(text):
        heads = [path]
        if brace := re.fullmatch(r"(.*)\{(.*)\}(.*)", path):
            heads = [brace[1] + middle + brace[3] for middle in brace[2].split(",")]
        found += [head for head in heads if not any(ROOT.glob(head.rstrip("/")))]
    return found


def test_missing_links_and_paths_are_found() -> None:
    readme = ROOT / "README.md"
    assert missing_links(readme, "[a](docs/no.md) [b](README.md#no) [c](README.md#install)") == [
        "docs/no.md",
        "README.md#no",
    ]
    assert missing_paths("`ktk/cli/{run,no}.py` and `ktk/cli/` and `ktk/*.no`") == [
        "ktk/cli/no.py",
        "ktk/*.no",
    ]


@each_document
def test_every_internal_link_leads_somewhere(document: Path) -> None:
    assert missing_links(document, document.read_text()) == []


@each_about_the_tree
def test_every_path_named_exists(document: Path) -> None:
    assert missing_paths(document.read_text()) == []


@each_about_the_tree
def test_prose_has_at_most_100_columns(document: Path) -> None:
    prose = FENCE.sub("", document.read_text()).splitlines()
    assert [line for line in prose if len(line) > 100 and not line.startswith("|")] == []


@each_document
def test_every_python_example_parses(document: Path) -> None:
    for block in blocks(document.read_text(), "python"):
        ast.parse(block)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 235


def test_the_readme_links_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert [d.name for d in (ROOT / "docs").glob("*.md") if f"docs/{d.name}" not in text] == []


def test_the_tree_names_every_folder_once() -> None:
    (tree,) = (
        b for b in blocks((ROOT / "ARCHITECTURE.md").read_text(), "") if b.startswith("ktk/")
    )
    body = tree.split("\n", 1)[1].split("vendor/")[0]
    names = [name for line in body.splitlines() for name in re.findall(r"^  (\w+)/ ", line)]
    folders = {path.name for path in (ROOT / "ktk").iterdir() if any(path.glob("*.py"))}
    assert sorted(names) == sorted(folders)


def walks() -> dict[str, list[list[str]]]:
    """ARCHITECTURE's walks: title -> the files that each step names."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    found = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        title, _, body = section.partition("\n")
        if title.startswith("Walk: "):
            assert title.removeprefix("Walk: ") not in found, f"{title} stands twice"
            steps = re.split(r"^\d+\. ", body, flags=re.MULTILINE)[1:]
            found[title.removeprefix("Walk: ")] = [PATH.findall(step) for step in steps]
    return found


def test_a_walk_enters_a_file_once() -> None:
    for title, steps in walks().items():
        files = [step[0] for step in steps]
        assert len(files) == len(set(files)) and all((ROOT / file).is_file() for file in files), (
            title
        )


def test_walks_are_short() -> None:
    lengths = {title: len(steps) for title, steps in walks().items()}
    assert lengths["wrapper.forward to the microkernel"] <= 14
    assert lengths["convert"] <= 9
    assert lengths["a served token"] <= 9


def test_the_figure_is_drawn_from_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    figure = importlib.import_module("figure")
    results = (ROOT / "bench" / "RESULTS.md").read_text()
    drawn = (ROOT / "docs" / "speed.svg").read_text()
    assert figure.draw(figure.panels(results)) == drawn, "run bench/figure.py"
    with pytest.raises(ValueError, match="no table"):
        figure.panels(results.replace("| engine, 48 layers |", "| engine |"))


def test_every_gguf_type_has_its_row() -> None:
    text = (ROOT / "docs" / "gguf.md").read_text()
    headings = "## Types", "## ik_llama.cpp's types"
    tables = [re.findall(rf"^{heading}\n\n((?:\|.*\n)+)", text, re.M) for heading in headings]
    said, theirs = (
        {cells[0]: cells[1:] for line in table.splitlines()[2:] if (cells := row_cells(line))}
        for (table,) in tables
    )
    assert set(theirs) == IK_TYPES.keys()
    assert set(said) == BLOCKS.keys() - set(theirs)
    for name, (bits, *_) in {**said, **theirs}.items():
        assert float(bits) == pytest.approx(BLOCKS[name].bits_per_weight, abs=0.0051), name
    for name, (_, block, written, *_) in said.items():
        row = BLOCKS[name]
        assert (int(block), written) == (row.block, "yes" if row.file_type else ""), name
    for name, (_, scale, fine, *_) in theirs.items():
        row = BLOCKS[name]
        assert scale == {"": "block", "f16": "row, fp16", "f32": "row, fp32"}[row.row_scale], name
        assert int(fine) == next(p.weights for p in row.planes if p.name == "multipliers"), name


def test_every_packed_format_has_its_row() -> None:
    said = (ROOT / "docs" / "packed-format.md").read_text()
    rows = re.findall(r"^\| (\w+) \| [^|]* \| [^|]* rows of ", said, re.MULTILINE)
    assert sorted(rows) == sorted(PANELS)
    assert set(PANELS) <= set(re.findall(r"\w+", (ROOT / "docs" / "formats.md").read_text()))


def test_every_environment_variable_has_its_row() -> None:
    text = (ROOT / "docs" / "environment.md").read_text()
    assert set(re.findall(r"^\| (KTK_\w+) \|", text, re.MULTILINE)) == set(env.VARIABLES)


def test_every_argument_of_the_wrapper_has_its_row() -> None:
    text = (ROOT / "docs" / "kt-kernel.md").read_text()
    rows = "".join(line for line in text.splitlines() if line.startswith("| "))
    arguments = set(inspect.signature(ktk.KTMoEWrapper).parameters)
    assert arguments <= set(re.findall(r"`(\w+)`", rows))


def test_every_sub_command_has_its_row() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    rows = re.findall(r"^\| (`ktk .*?) \|", text, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`ktk ([\w-]+)", row)}
    assert named == set(COMMANDS)


def test_every_metric_has_its_row() -> None:
    pytest.importorskip("prometheus_client")
    from ktk.generate.engine import Reuse
    from ktk.kv.pool import PagePool
    from ktk.kv.prefix.kept import Saved
    from ktk.kv.prefix.store import Usage
    from ktk.kv.swap import SwapSpace
    from ktk.placement.residency.report import Counters, ResidencyReport
    from ktk.server.metrics import Metrics

    pool = SimpleNamespace(count=8, num_full=4, num_kept=2)
    usage = Usage(2, 1, 2, 12288, None, None)
    store = SimpleNamespace(usage=lambda _: usage, tiers=SimpleNamespace())
    kept = SimpleNamespace(store=store, info=None, pool=pool, saved=Saved())
    engine = SimpleNamespace(
        running=0,
        waiting=0,
        tokens_per_second=0.0,
        cache_pages=(0, 0),
        guessed=0,
        came_true=0,
        reuse=Reuse(),
        kept=kept,
        swap=SwapSpace(PagePool(1, [], np.dtype(np.float32)), 0),
    )
    report = ResidencyReport("lru", True, 8, 4, 4096, 2, Counters())
    made = Metrics(engine, "model", lambda: report)  # type: ignore[arg-type]
    families = list(made.registry.collect())
    own = {f.name + "_total" * (f.type == "counter") for f in families if f.name.startswith("ktk_")}
    text = (ROOT / "docs" / "serving.md").read_text()
    rows = "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `ktk_"))
    assert set(re.findall(r"`(ktk_\w+)`", rows)) == own
