"""What every test begins with."""

from __future__ import annotations

import pytest

from ktk import log


@pytest.fixture(autouse=True)
def _warnings_come_again() -> None:
    """A warning that an earlier test has seen is not the last of its kind."""
    log.forget_warnings()
