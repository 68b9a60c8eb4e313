"""Which models decide what they compute by the name of their attention implementation, read from
their classes' source.

Under another name such a model may compute something else without a word: DeepSeek V3.2 masks what
its index did not choose under "eager" and "sdpa" alone, and its attention is dense under every
other name. That shows only in contexts longer than its index, thousands of tokens, where no trial
looks.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch

from ktk.integration.transformers import names as hf


def decides_by_name(model: torch.nn.Module, own: str, other: str) -> str | None:
    """A class among a model's modules whose code goes two ways under the names own and other; None
    if there is none.

    Code that cannot be read counts as code that does. What ran when a module was made does not
    count.
    """
    for kind in {type(module): None for module in model.modules()}:
        for base in kind.__mro__:
            inside = base.__module__.split(".")
            if inside[0] in ("torch", "builtins", "abc", "ktk"):
                continue
            if inside[0] == "transformers" and inside[1] != "models":
                # it passes the name on, to functions and masks that are registered under it
                continue
            if _decides(base.__module__, base.__name__, own, other):
                return kind.__name__
    return None


@functools.cache
def _decides(module: str, name: str, own: str, other: str) -> bool:
    """Whether a class at the top of a Python module, or a function there that it calls,
    goes two ways.
    """
    found = _definitions(module)
    if name not in found:
        return True
    seen, waiting = {name}, [name]
    while waiting:
        parts = list(_run_later(found[waiting.pop()]))
        if _goes_two_ways(parts, own, other):
            return True
        used = {part.id for part in parts if isinstance(part, ast.Name)} - seen
        functions = {n for n in used if isinstance(found.get(n), ast.FunctionDef)}
        seen |= functions
        waiting += functions
    return False


@functools.cache
def _definitions(module: str) -> dict[str, ast.AST]:
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError, SyntaxError):  # made at run time
        return {}
    kinds = ast.ClassDef | ast.FunctionDef
    return {node.name: node for node in ast.walk(tree) if isinstance(node, kinds)}


def _run_later(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a definition, constructors left out."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef) or child.name != "__init__":
            yield from _run_later(child)


def _goes_two_ways(parts: list[ast.AST], own: str, other: str) -> bool:
    passed: set[int] = set()  # uses of the name that no decision hangs on
    for part in parts:
        if isinstance(part, ast.Call):
            called = part.func
            if isinstance(called, ast.Name) and called.id == hf.IMPLEMENTATION_QUESTION:
                return True
            if isinstance(called, ast.Attribute) and called.attr == hf.IMPLEMENTATION_PASSED:
                passed |= {id(argument) for argument in part.args}
        elif isinstance(part, ast.Subscript):
            passed.add(id(part.slice))
        elif isinstance(part, ast.Compare) and _is_alike(part, own, other):
            passed.add(id(part.left))
    return any(
        isinstance(part, ast.Attribute)
        and part.attr in hf.IMPLEMENTATION_NAMES
        and id(part) not in passed
        for part in parts
    )


def _is_alike(part: ast.Compare, own: str, other: str) -> bool:
    """Whether a comparison of the name with constants comes out alike for both."""
    try:
        given: Any = ast.literal_eval(part.comparators[0])
    except ValueError:
        return False
    if len(part.ops) != 1:
        return False
    if isinstance(part.ops[0], ast.Eq | ast.NotEq):
        return (own == given) == (other == given)
    if isinstance(part.ops[0], ast.In | ast.NotIn):
        return (own in given) == (other in given)
    return False
