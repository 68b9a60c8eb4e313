"""ktk: experts of mixture-of-experts language models on the CPU.

``ktk.MoE`` is the operator, ``ktk.KTMoEWrapper`` its KT-Kernel-compatible face, ``ktk.convert.convert``
packs a checkpoint, ``ktk.load_gguf`` opens a GGUF model, ``ktk.KtkConfig`` is for transformers'
``from_pretrained``, ``ktk.backends.report()`` says what runs here. Heavy imports happen on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktk.gguf_model import GgufModel, load_gguf
    from ktk.integration.transformers import KtkConfig
    from ktk.moe import MoE
    from ktk.types import Activation, MoESpec, Packed
    from ktk.wrapper import KTMoEWrapper

__version__ = "0.1.0"

_LAZY = {
    "Activation": "ktk.types",
    "BackendError": "ktk.errors",
    "CheckpointError": "ktk.errors",
    "EngineError": "ktk.errors",
    "GgufModel": "ktk.gguf_model",
    "KTMoEWrapper": "ktk.wrapper",
    "KtkConfig": "ktk.integration.transformers",
    "KtkError": "ktk.errors",
    "MoE": "ktk.moe",
    "MoESpec": "ktk.types",
    "Packed": "ktk.types",
    "load_gguf": "ktk.gguf_model",
}
_MODULES = ("backends", "convert", "cpu", "formats", "models", "reference")

__all__ = [
    "Activation",
    "GgufModel",
    "KTMoEWrapper",
    "KtkConfig",
    "MoE",
    "MoESpec",
    "Packed",
    "__version__",
    "load_gguf",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"ktk.{name}")
    raise AttributeError(f"module 'ktk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_MODULES})
