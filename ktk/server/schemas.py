"""JSON schemas of functions' arguments, as far as formats without JSON need them."""

from __future__ import annotations

from typing import Any

_MOST = 16  # schemas within one another
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
_NAMED = ("$defs", "definitions")


def resolved(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    """A schema, or what it refers to in the root; {} (anything) where that is nowhere."""
    for _ in range(_MOST):
        if not isinstance(schema, dict):
            return {}
        if not isinstance(path := schema.get("$ref"), str):
            return schema
        rest = {name: value for name, value in schema.items() if name != "$ref"}
        found: Any = root
        for name in path.removeprefix("#").split("/")[1:]:
            found = found.get(name) if isinstance(found, dict) else None
        schema = {**found, **rest} if isinstance(found, dict) else {}
    return {}


def options(schema: Any, root: dict[str, Any], depth: int = 0) -> list[dict[str, Any]]:
    """The schemas of which a value must have one, each of one type at most."""
    own = resolved(schema, root)
    for name in ("anyOf", "oneOf"):
        if isinstance(own.get(name), list) and depth < _MOST:
            return [part for one in own[name] for part in options(one, root, depth + 1)]
    parts = own.get("allOf")
    if isinstance(parts, list) and len(parts) == 1 and depth < _MOST:
        rest = {name: value for name, value in own.items() if name != "allOf"}
        return options({**resolved(parts[0], root), **rest}, root, depth + 1)
    if isinstance(own.get("type"), list):
        return [{**own, "type": one} for one in own["type"]]
    return [own]


def values(schema: dict[str, Any]) -> list[Any] | None:
    """Those that are listed; None: no list."""
    if "const" in schema:
        return [schema["const"]]
    listed = schema.get("enum")
    return listed if isinstance(listed, list) else None


def types(schema: Any, root: dict[str, Any]) -> list[str]:
    """Of the values; []: any."""
    found: list[str] = []
    for option in options(schema, root):
        listed = values(option)
        if isinstance(kind := option.get("type"), str):
            found.append(kind)
        elif listed is not None:
            found += [_TYPES.get(type(one), "object") for one in listed]
        else:
            return []
    return list(dict.fromkeys(found))


def alone(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """A part of the root that needs no root."""
    return {**{name: root[name] for name in _NAMED if name in root}, **schema}
