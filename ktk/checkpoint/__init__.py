"""Where weights come from: safetensors checkpoints, read as hostile bytes,
and ktk's packed directories.
"""

from __future__ import annotations

import os
from pathlib import Path

from ktk.checkpoint.packed import PackedConfig, list_layers, read_config, read_layer, write_layer
from ktk.checkpoint.safetensors import Checkpoint, TensorInfo
from ktk.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "PackedConfig",
    "TensorInfo",
    "is_gguf",
    "list_layers",
    "read_config",
    "read_layer",
    "write_layer",
]


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF model: a .gguf file, or a directory that holds such files and no
    safetensors.

    Raises CheckpointError if it cannot be looked at.
    """
    try:
        names = [name.lower() for name in os.listdir(path)] if path.is_dir() else None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None
    if names is None:
        return path.name.lower().endswith(".gguf")
    return any(name.endswith(".gguf") for name in names) and not any(
        name.endswith(".safetensors") for name in names
    )
