"""Rows of ``bench/accuracy.py`` as a table and a plot, and llama.cpp's formats that lie below ktk's
curve.

    python bench/accuracy_plot.py bench/accuracy/docstrings.jsonl [more.jsonl ...] [--plot
    accuracy.png] [--bits 3 9]

Below the curve is a format of llama.cpp if no format written by ktk has both no more bits and no
more KL. Of several rows with one label, activation group and rotation the last counts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ktk.evaluate.frontier import draw, is_theirs, read_rows
from ktk.evaluate.run import Row


def below_the_curve(rows: list[Row], low: float, high: float) -> list[Row]:
    """llama.cpp's rows of low..high bits with less KL than every row of ktk's of no more bits."""
    own = [r for r in rows if r.label != "float" and not is_theirs(r)]
    theirs = [r for r in rows if is_theirs(r) and low <= r.bits_per_weight <= high]

    def best(bits: float) -> float:
        return min((r.distance.kl for r in own if r.bits_per_weight <= bits), default=float("inf"))

    return [r for r in theirs if r.distance.kl < best(r.bits_per_weight)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--bits", type=float, nargs=2, default=(3.0, 9.0))
    arguments = parser.parse_args()
    rows = read_rows(arguments.rows)
    coding = "experts | bits per weight | activation group | rotation"
    print(f"| {coding} | perplexity | KL | KL, 99 % | top-1 |")
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        d = r.distance
        print(
            f"| {r.label} | {r.bits_per_weight:.2f} | {r.activation_group or '-'} | "
            f"{r.rotation or '-'} | {d.perplexity:.2f} | {d.kl:.4f} | {d.kl_p99:.3f} | "
            f"{d.top1:.1%} |"
        )
    below = [f"{r.label} ({r.distance.kl:.4f})" for r in below_the_curve(rows, *arguments.bits)]
    print("below ktk's curve:", ", ".join(below) or "none")
    if arguments.plot:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
