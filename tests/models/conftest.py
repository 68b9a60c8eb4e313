"""Whole models and their GGUF files, each made once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from make.whole_models import Made


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(float model, GGUF file) of a name of MODELS, experts and the rest in the given types."""
    pytest.importorskip("transformers")
    from ktk.convert.run import convert
    from make import whole_models

    models: dict[str, tuple[Any, Path]] = {}

    def make(name: str, experts: str = "f32", rest: str = "f32") -> tuple[Any, Path]:
        if name not in models:
            folder = tmp_path_factory.mktemp(name)
            models[name] = whole_models.write(folder, name), folder
        model, folder = models[name]
        file = folder / f"{experts}-{rest}.gguf"
        if not file.exists():
            convert(folder, file, quant_method=experts, whole=rest)
        return model, file

    return make
