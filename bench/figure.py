"""Draws the README's figure, docs/speed.svg, from the tables of RESULTS.md.

    python bench/figure.py

Nothing is measured here. A number that RESULTS.md no longer has is an error, not a gap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
FIGURE = Path(__file__).parent.parent / "docs" / "speed.svg"

COLOURS = {"ktk": "#0b62c4", "llama.cpp": "#8c8c8c", "kt-kernel": "#c08a3e"}
CAPTION = (
    "Tokens a second, longer is faster. Two Zen 4 cores (AVX-512 VNNI, no AMX); the engines of a "
    "panel ran in the same rounds.",
    "llama.cpp of llama-cpp-python 0.3.36, kt-kernel 0.7.2, each in its fastest way. "
    "Measurements: bench/RESULTS.md.",
)
# In pixels.
WIDTH, HEAD, FOOT = 860, 28, 34
PANEL_HEIGHT, BAR, PITCH = 116, 18, 25
LABEL, ROOM = 78, 270  # of an engine's name, of the longest bar


@dataclass(frozen=True)
class Panel:
    """One group of bars: title, and tokens/s of each engine."""

    title: str
    speeds: dict[str, float]


def tables(text: str, section: str) -> Iterator[list[list[str]]]:
    """The tables under the heading that begins with ``section``: lists of rows of cells,
    head first.
    """
    body = text.split(f"\n## {section}", 1)
    if len(body) != 2:
        raise ValueError(f"{RESULTS.name} has no section {section!r}")
    rows: list[list[str]] = []
    for line in [*body[1].split("\n## ", 1)[0].splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            yield [rows[0], *rows[2:]]
            rows = []


def table(text: str, section: str, corner: str) -> dict[str, dict[str, str]]:
    """The table of a section whose first cell is ``corner``: row name -> column name -> cell."""
    for head, *rows in tables(text, section):
        if head[0] == corner:
            return {row[0]: dict(zip(head[1:], row[1:], strict=False)) for row in rows}
    raise ValueError(f"{RESULTS.name}, section {section!r}: no table of {corner!r}")


def panels(text: str) -> list[Panel]:
    """What the figure shows; where an engine ran in several ways, its fastest."""
    whole = table(text, "A whole model beside llama.cpp", "engine, 48 layers")
    layer = table(text, "Other engines in the same rounds", "method")
    rivals = {
        "ktk": ["ktk INT4:32 (4.50 bits)"],
        "llama.cpp": [name for name in layer if name.startswith("llama.cpp q4_")],
        "kt-kernel": [name for name in layer if name.startswith("kt-kernel AMXINT4")],
    }

    def of_layer(column: str, num_tokens: int) -> dict[str, float]:
        return {
            engine: max(num_tokens * 1000 / float(layer[name][column]) for name in names)
            for engine, names in rivals.items()
        }

    engines = ("ktk", "llama.cpp")
    decode = {e: 1000 / float(whole[e]["decode, ms a token"]) for e in engines}
    prefill = {e: float(whole[e]["prefill, tokens/s"]) for e in engines}
    return [
        Panel("Qwen3-30B-A3B's shape, Q4_0: decode", decode),
        Panel("One MoE layer of it, 4.5 bits: 1 token", of_layer("1 token", 1)),
        Panel("Qwen3-30B-A3B's shape, Q4_0: prompt of 512", prefill),
        Panel("One MoE layer of it, 4.5 bits: 1024 tokens", of_layer("1024", 1024)),
    ]


def number(value: float) -> str:
    return f"{value:,.1f}" if value < 20 else f"{value:,.0f}"


def draw(shown: list[Panel]) -> str:
    """Two columns of panels as SVG, each with a scale of its own that begins at 0."""
    height = HEAD + PANEL_HEIGHT * ((len(shown) + 1) // 2) + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="Helvetica, Arial, sans-serif" '
        'font-size="13" fill="#222222">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for index, panel in enumerate(shown):
        left, top = 20 + index % 2 * WIDTH // 2, HEAD + index // 2 * PANEL_HEIGHT
        parts.append(f'<text x="{left}" y="{top}" font-weight="bold">{escape(panel.title)}</text>')
        longest = max(panel.speeds.values())
        for row, (engine, speed) in enumerate(panel.speeds.items()):
            y, length = top + 11 + row * PITCH, ROOM * speed / longest
            parts += [
                f'<text x="{left + LABEL - 8}" y="{y + 13}" text-anchor="end">{engine}</text>',
                f'<rect x="{left + LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" '
                f'fill="{COLOURS[engine]}"/>',
                f'<text x="{left + LABEL + length + 6:.1f}" y="{y + 13}">{number(speed)}</text>',
            ]
    for row, line in enumerate(CAPTION):
        y = height - 28 + 17 * row
        parts.append(f'<text x="20" y="{y}" font-size="12">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    FIGURE.write_text(draw(panels(RESULTS.read_text())))
    print(FIGURE)
