"""The model that most tests of answers ask: made once."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model that ktk's own decoder layers run (``make.serving``)."""
    pytest.importorskip("transformers")
    from ktk.generate.open import open_model
    from make.serving import make_model

    return open_model(make_model(tmp_path_factory.mktemp("tiny") / "tiny-moe", is_native=True))
