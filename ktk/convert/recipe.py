"""Recipes: which format each tensor gets, by regular expressions over names of GGUF files.

A line is PATTERN = FORMAT, as in

    # the first pattern that is found in a name counts
    blk\\.[0-3]\\.ffn_down_exps = nl4:16
    ffn_(gate|up)_exps = nl3

and names are those that a GGUF file has, ``blk.7.ffn_down_exps.weight``, whatever is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ktk.experts.formats import Format
from ktk.experts.formats.parse import parse
from ktk.paths import user_path
from ktk.quantise.texts import read_text


def projections_of(has_gate: bool) -> tuple[str, ...]:
    return ("gate", "up", "down") if has_gate else ("up", "down")


def experts_name(layer: int, projection: str) -> str:
    """The name of a layer's gate, up or down projections of all experts."""
    return f"blk.{layer}.ffn_{projection}_exps.weight"


@dataclass(frozen=True)
class Coding:
    """A format. group_size : of panels, None: the format's default."""

    format: Format
    group_size: int | None = None

    @classmethod
    def parse(cls, text: str) -> Coding:
        """``nl4``, ``nl4:32``, ``Q4_K``; ValueError lists what there is."""
        asked = parse(text, {})
        if asked.format is None or asked.by != "ktk" or asked.is_repacked:
            raise ValueError(f"{text!r}: must name a format alone, as nl4, int4:64 or Q4_K")
        return cls(asked.format, asked.group_size)

    def __str__(self) -> str:
        name = self.format.name.lower()
        return name if self.group_size is None else f"{name}:{self.group_size}"


def one_coding(layer: int, codings: Mapping[str, Coding]) -> Coding:
    """Of a layer in panels; ValueError where its matrices differ."""
    if len(set(codings.values())) > 1:
        said = ", ".join(f"{name} {found}" for name, found in codings.items())
        raise ValueError(
            f"layer {layer} would have {said}: a packed directory has one format for all of a "
            "layer's matrices; name one, or write a .gguf file"
        )
    return codings["up"]


@dataclass(frozen=True)
class Recipe:
    """Rules in their order. path : where they came from, for messages."""

    rules: tuple[tuple[re.Pattern[str], Coding], ...]
    path: str = "recipe"

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Raises ValueError, with the line, for what is no recipe."""
        return cls.parse(read_text(user_path(path)), str(path))

    @classmethod
    def parse(cls, text: str, path: str = "recipe") -> Recipe:
        """Of a file's text; as ``read``."""
        rules = []
        for number, line in enumerate(text.splitlines(), 1):
            said = re.sub(r"(^|\s)#.*", "", line).strip()
            if not said:
                continue
            pattern, equals, name = said.rpartition("=")
            try:
                if not equals or not pattern.strip():
                    raise ValueError("must be PATTERN = FORMAT")
                rules.append((re.compile(pattern.strip()), Coding.parse(name.strip())))
            except (ValueError, re.error) as error:
                raise ValueError(f"{path}: line {number}: {said!r}: {error}") from None
        if not rules:
            raise ValueError(f"{path}: has no rule; a line is PATTERN = FORMAT")
        return cls(tuple(rules), path)

    @classmethod
    def of_experts(cls, chosen: Mapping[tuple[int, str], Coding]) -> Recipe:
        """Of codings by layer and projection: a rule for all layers with the same one."""
        layers: dict[tuple[str, Coding], list[int]] = {}
        for (layer, projection), coding in sorted(chosen.items()):
            layers.setdefault((projection, coding), []).append(layer)
        rules = []
        for (projection, coding), found in layers.items():
            numbers = "|".join(map(str, found))
            rules.append((re.compile(rf"^blk\.({numbers})\.ffn_{projection}_exps"), coding))
        return cls(tuple(rules))

    def coding(self, name: str) -> Coding | None:
        """Of the first pattern that is found in a name, None if none is."""
        return next((coding for pattern, coding in self.rules if pattern.search(name)), None)

    def of_layer(self, layer: int, has_gate: bool) -> dict[str, Coding]:
        """Of one layer's matrices, by projection. ValueError for one that no pattern is in."""
        names = {name: experts_name(layer, name) for name in projections_of(has_gate)}
        found = {projection: self.coding(name) for projection, name in names.items()}
        for projection, coding in found.items():
            if coding is None:
                raise ValueError(f"{self.path}: no pattern is in {names[projection]}: add one")
        return {projection: coding for projection, coding in found.items() if coding is not None}

    def __str__(self) -> str:
        """As ``parse`` reads it."""
        return "".join(f"{pattern.pattern} = {coding}\n" for pattern, coding in self.rules)

    @property
    def is_packed(self) -> bool:
        """Whether all of it lies in panels."""
        return all(coding.format.is_packed for _, coding in self.rules)

    def check_used(self, names: Iterable[str]) -> None:
        """ValueError for a pattern that is found in none of the names: a slip of the pen."""
        known = list(names)
        for pattern, _ in self.rules:
            if not any(map(pattern.search, known)):
                raise ValueError(
                    f"{self.path}: {pattern.pattern!r} is in no name of what is written, as "
                    f"{', '.join(known[:3])}"
                )
