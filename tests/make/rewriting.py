"""A GGUF file written once more, with other metadata or tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ktk.checkpoint.gguf import GgufCheckpoint
from make import gguf_files


def rewritten(
    file: Path, out: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], **options: Any
) -> Path:
    """The file once more, after ``change`` of its metadata and {tensor: (array, type)}."""
    source = GgufCheckpoint.open(file)
    metadata = {k: source.metadata[k] for k in source.metadata if k != "general.architecture"}
    tensors: dict[str, Any] = {}
    for name, tensor in source.tensors.items():
        kind = gguf.GGMLQuantizationType[tensor.type]
        raw = np.array(source.blocks(name))
        tensors[name] = (raw.view(np.float32) if tensor.type == "F32" else raw, kind)
    change(metadata, tensors)
    architecture = metadata.pop("architecture", source.metadata["general.architecture"])
    return gguf_files.write_gguf(out, architecture, tensors, metadata, **options)
