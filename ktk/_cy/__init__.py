"""The compiled part: ``native`` wraps the C kernels; absent where there was no compiler.

``tile_emulator`` runs AMX instructions in tests; nothing loads it unless KTK_TILE says so.
"""

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


@cache
def emulate_tiles() -> Any:
    """The tile emulator, installed; OSError, or ValueError where it cannot be."""
    try:
        emulator: Any = importlib.import_module("ktk._cy.tile_emulator")
    except ImportError:
        raise ValueError("KTK_TILE=emulated: the tile emulator is not built") from None
    emulator.install()
    return emulator
