"""config.json as transformers takes it: what ktk's own tables do not know of a model type,
its config class checks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from ktk.errors import CheckpointError
from ktk.integration.transformers.names import ROPE_INIT_FUNCTIONS
from ktk.models import check_directory
from ktk.paths import user_path


def model_config(path: str | os.PathLike[str]) -> Any:
    """The config of a model's directory.

    Raises CheckpointError, which names the file, for anything that keeps it from being one.
    """
    directory = user_path(path)
    fields = check_directory(directory)
    where = directory / "config.json"
    try:
        config = AutoConfig.from_pretrained(directory)
    except Exception as error:  # whatever the classes make of the file
        raise CheckpointError(
            f"{where}: transformers takes no such {fields.get('model_type')!r}: {error}"
        ) from error
    if fields.get("model_type") in CONFIG_MAPPING:  # code of a model's own may know others
        for kind in rope_types(config.get_text_config(decoder=True)):
            known = ("default", *ROPE_INIT_FUNCTIONS)
            if kind not in known:
                raise CheckpointError(
                    f"{where}: rope_type={kind!r}: must be one of {', '.join(known)}"
                )
    return config


def checked_fields(directory: Path) -> dict[str, Any]:
    """config.json as it is, checked by transformers too if it knows the model type.

    Raises CheckpointError.
    """
    fields = check_directory(directory)
    if fields.get("model_type") in CONFIG_MAPPING:
        model_config(directory)
    return fields


def rope_types(config: Any) -> Iterator[str]:
    """Of a config, or of its types of layers."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    for part in nested or [rope]:
        yield part.get("rope_type") or part.get("type") or "default"
