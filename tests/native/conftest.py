"""The emulator of tiles, for the files that try its faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from make.tile_machine import machine


@pytest.fixture
def emulator() -> Iterator[Any]:
    """Recording faults. Skips on the CPU's own tiles, whose faults end the process."""
    found = machine()
    if found is None:
        pytest.skip("the CPU's own tiles are under test: their faults end the process")
    found.record_faults(True)
    yield found
    found.take_fault()
    found.record_faults(False)
