"""A text to compare models on that every Python brings: the docstrings of its standard library."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from ktk.paths import user_path

# Prose-rich modules; the order is part of the text.
MODULES = (
    "argparse",
    "asyncio.streams",
    "asyncio.tasks",
    "calendar",
    "cmd",
    "codecs",
    "collections",
    "configparser",
    "contextlib",
    "csv",
    "dataclasses",
    "difflib",
    "doctest",
    "enum",
    "fractions",
    "functools",
    "gettext",
    "heapq",
    "http.client",
    "imaplib",
    "inspect",
    "ipaddress",
    "json",
    "locale",
    "logging",
    "mailbox",
    "optparse",
    "pdb",
    "pickletools",
    "pprint",
    "random",
    "shutil",
    "smtplib",
    "statistics",
    "string",
    "subprocess",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "traceback",
    "typing",
    "unittest.case",
    "urllib.parse",
    "uuid",
    "weakref",
)


def stdlib_text() -> str:
    """Docstrings of the modules above, their public classes and functions, in source order.

    Read from the source files, since live modules get patched: the same on every machine with the
    same Python.
    """
    return "\n\n".join(part for name in MODULES for part in _docstrings(name))


def _docstrings(name: str) -> Iterator[str]:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return
    tree = ast.parse(Path(spec.origin).read_bytes())
    yield f"{name}: {ast.get_docstring(tree) or ''}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            docstring = ast.get_docstring(node)
            if docstring:
                yield f"{node.name}: {docstring}"


def read_text(path: Path) -> str:
    """A text file. Raises ValueError, with its name, unless it is there and UTF-8."""
    try:
        return user_path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: must be a UTF-8 text file") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8: must be a UTF-8 text file"
        ) from error


def windows(token_ids: list[int], num_windows: int, length: int) -> list[list[int]]:
    """``num_windows`` windows of ``length`` tokens, evenly spread over the text and not
    overlapping.

    Fewer if the text is short. Raises ValueError if it does not fill one window.
    """
    available = len(token_ids) // length
    if available == 0:
        raise ValueError(f"the text has {len(token_ids)} tokens: must have at least {length}")
    count = min(num_windows, available)
    starts = [(available * i // count) * length for i in range(count)]
    return [token_ids[s : s + length] for s in starts]
