"""Where weights come from: safetensors checkpoints, read as hostile bytes, and ktk's packed directories."""

from __future__ import annotations

from ktk.checkpoint.packed import PackedConfig, list_layers, read_config, read_layer, write_layer
from ktk.checkpoint.safetensors import Checkpoint, TensorInfo

__all__ = [
    "Checkpoint",
    "PackedConfig",
    "TensorInfo",
    "list_layers",
    "read_config",
    "read_layer",
    "write_layer",
]
