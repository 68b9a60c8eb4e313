"""Bits per weight against KL: rows read again, the frontier, and a picture of both."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ktk.evaluate.distance import Distance
from ktk.evaluate.run import Row
from ktk.paths import user_path

_DISTANCE = [f.name for f in dataclasses.fields(Distance)]


def is_theirs(row: Row) -> bool:
    """Whether llama.cpp quantised it."""
    return "llama.cpp" in row.label


def read_rows(files: Sequence[Path]) -> list[Row]:
    """Of ``ktk eval --json``, or one JSON object a line; by bits, the float model's row first.

    Of several with one label, activation group and rotation the last counts. Raises ValueError for
    a file that holds no rows.
    """
    rows: dict[tuple[str, int, int], Row] = {}
    for file in files:
        try:
            text = user_path(file).read_text(encoding="utf-8")
            for fields in _objects(text):
                found = Distance(**{name: fields.pop(name) for name in _DISTANCE})
                row = Row(distance=found, **fields)
                rows[row.label, row.activation_group, row.rotation] = row
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: holds no rows of ktk eval --json: {error!r}") from None
    return sorted(rows.values(), key=lambda r: (r.label != "float", r.bits_per_weight, r.label))


def _objects(text: str) -> list[dict[str, Any]]:
    try:
        whole = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines()]
    return list(whole["rows"]) if "rows" in whole else [whole]


def frontier(rows: Sequence[Row]) -> list[Row]:
    """By bits, those of ktk's with less KL than every other of no more bits."""
    best: list[Row] = []
    own = (r for r in rows if r.label != "float" and not is_theirs(r))
    for row in sorted(own, key=lambda r: (r.bits_per_weight, r.distance.kl)):
        if not best or row.distance.kl < best[-1].distance.kl:
            best.append(row)
    return best


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bits per weight against KL, logarithmic, one series for each who quantised, and ktk's
    frontier; .png or .svg.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    names = {
        (False, False): "ktk",
        (False, True): "ktk, calibrated",
        (True, False): "llama.cpp",
        (True, True): "llama.cpp, imatrix",
    }
    for (of_theirs, is_calibrated), name in names.items():
        found = [
            r
            for r in rows
            if r.label != "float"
            and is_theirs(r) == of_theirs
            and r.label.endswith((", calibrated", ", imatrix")) == is_calibrated
        ]
        if not found:
            continue
        x, y = [r.bits_per_weight for r in found], [r.distance.kl for r in found]
        axes.scatter(x, y, label=name, marker="x" if of_theirs else "o")
        for row in found:
            axes.annotate(
                row.label.split(",")[0],
                (row.bits_per_weight, row.distance.kl),
                fontsize=7,
                xytext=(3, 3),
                textcoords="offset points",
            )
    best = frontier(rows)
    x, y = [r.bits_per_weight for r in best], [r.distance.kl for r in best]
    axes.plot(x, y, label="ktk's frontier", color="0.6", linewidth=1, zorder=0)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("KL divergence per token (nats)")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path)
