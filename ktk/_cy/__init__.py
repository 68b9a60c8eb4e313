"""The compiled parts, absent where there was no compiler: ``native`` wraps the C kernels,
``measure`` the ceilings' loops.

``tile_emulator`` runs AMX instructions in tests; nothing loads it unless KTK_TILE says so.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any


@cache
def _extension(name: str) -> Any:
    try:
        return importlib.import_module(f"ktk._cy.{name}")
    except ImportError:
        return None


def native_module() -> Any:
    """The kernels' extension, or None where it was not built."""
    return _extension("native")


def measure_module() -> Any:
    """The extension that measures the machine's ceilings, or None where it was not built."""
    return _extension("measure")


def tiles_are_emulated() -> bool:
    """Whether emulate_tiles has installed the emulator:
    from then on nobody may ask for the CPU's own tiles.
    """
    return emulate_tiles.cache_info().currsize > 0


@cache
def emulate_tiles() -> Any:
    """The tile emulator, installed; OSError, or ValueError where it cannot be."""
    try:
        emulator: Any = importlib.import_module("ktk._cy.tile_emulator")
    except ImportError:
        raise ValueError("KTK_TILE=emulated: the tile emulator is not built") from None
    emulator.install()
    return emulator
