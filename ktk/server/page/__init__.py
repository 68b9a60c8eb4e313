"""The page at /: one document, which loads nothing from anywhere.

Its parts lie beside this file; `{{name}}` in page.html stands for the file of that name.
"""

from __future__ import annotations

import re
from importlib.resources import files

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src "
    "'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def document() -> str:
    """The page's HTML, its style and scripts in it."""
    parts = files(__name__)

    def read(name: str) -> str:
        return parts.joinpath(name).read_text(encoding="utf-8")

    return re.sub(r"\{\{([\w.]+)\}\}", lambda found: "\n" + read(found[1]), read("page.html"))
