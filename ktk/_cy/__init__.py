"""The compiled part: ``native`` wraps the C kernels; absent where there was no compiler."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any


@cache
def native_module() -> Any:
    """The compiled extension, or None where it was not built."""
    try:
        return importlib.import_module("ktk._cy.native")
    except ImportError:
        return None
