"""The texts of docs/accuracy.md: docstrings.txt and bible.txt to measure on, mixed.txt to calibrate
on.

    apt-get download bible-kjv bible-kjv-text python3.11-doc debian-handbook anarchism
    for deb in *.deb; do dpkg -x $deb unpacked; done
    python bench/accuracy_texts.py unpacked FOLDER

docstrings.txt are Python 3.11's docstrings (ktk.quantise.texts), bible.txt the King James Bible, a
verse a line. mixed.txt is neither: pieces of Python's manual and of English prose (Debian's
handbook, the Anarchist FAQ) in turn.
"""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from ktk.quantise.texts import stdlib_text

PIECE = 10_000  # characters
EVERY = 8  # of those pieces one is taken: 2 MB together


def plain(page: Path) -> str:
    """The text of a page of HTML, a paragraph a line."""
    body = page.read_text(encoding="utf-8", errors="ignore")
    body = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", "", body)
    body = re.sub(r"\s+", " ", body)
    body = re.sub(r"</(p|h\d|li|tr|pre|div)>|<br ?/?>", "\n", body)
    lines = html.unescape(re.sub(r"<[^>]*>", "", body)).splitlines()
    return "\n".join(line.strip() for line in lines if line.strip())


def pieces(texts: Iterable[str]) -> list[str]:
    whole = "\n\n".join(texts)
    return [whole[at : at + PIECE] for at in range(0, len(whole), EVERY * PIECE)]


def bible(unpacked: Path) -> str:
    """A verse a line, without its number."""
    program = [str(unpacked / "usr/bin/bible"), "-f", "-p", f"{unpacked / 'usr/lib'}/"]
    printed = subprocess.run(
        [*program, "gen1:1-rev22:21"], stdin=subprocess.DEVNULL, capture_output=True, check=True
    ).stdout.decode("latin-1")
    return re.sub(r"(?m)^\w+:\d+ ", "", printed)


def mixed(unpacked: Path) -> str:
    docs = unpacked / "usr/share/doc"
    manual = sorted((docs / "python3.11/html/_sources").rglob("*.rst.txt"))
    handbook = sorted((docs / "debian-handbook/html/en-US").glob("*.html"))
    prose = [*handbook, *sorted((docs / "anarchism/html").glob("sec*.html"))]
    found = pieces(p.read_text(encoding="utf-8") for p in manual), pieces(map(plain, prose))
    return "".join(piece for pair in zip(*found, strict=False) for piece in pair)


def main() -> None:
    unpacked, output = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    output.mkdir(exist_ok=True)
    texts = {"docstrings": stdlib_text(), "bible": bible(unpacked), "mixed": mixed(unpacked)}
    for name, text in texts.items():
        (output / f"{name}.txt").write_text(text, encoding="utf-8")


main()
