"""ktk: experts of mixture-of-experts language models on the CPU.

``ktk.MoE`` is the operator, ``ktk.KTMoEWrapper`` its KT-Kernel-compatible face,
``ktk.convert.convert`` packs a checkpoint, ``ktk.load_gguf`` opens a GGUF model, ``ktk.KtkConfig``
is for transformers' ``from_pretrained``, ``ktk.backends.report()`` says what runs here. Heavy
imports happen on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktk.experts.activation import Activation
    from ktk.experts.spec import MoESpec
    from ktk.experts.stored import StoredExperts
    from ktk.integration.kt_kernel.wrapper import KTMoEWrapper
    from ktk.integration.transformers import KtkConfig
    from ktk.ops.gguf_model import GgufModel, load_gguf
    from ktk.ops.moe import MoE

__version__ = "0.1.0"

_LAZY = {
    "Activation": "ktk.experts.activation",
    "BackendError": "ktk.errors",
    "CheckpointError": "ktk.errors",
    "EngineError": "ktk.errors",
    "GgufModel": "ktk.ops.gguf_model",
    "KTMoEWrapper": "ktk.integration.kt_kernel.wrapper",
    "KtkConfig": "ktk.integration.transformers",
    "KtkError": "ktk.errors",
    "MoE": "ktk.ops.moe",
    "MoESpec": "ktk.experts.spec",
    "StoredExperts": "ktk.experts.stored",
    "load_gguf": "ktk.ops.gguf_model",
}
_MODULES = (
    "backends",
    "convert",
    "experts",
    "machine",
    "models",
    "ops",
    "quantise",
    "reference",
    "train",
)

__all__ = [
    "Activation",
    "GgufModel",
    "KTMoEWrapper",
    "KtkConfig",
    "MoE",
    "MoESpec",
    "StoredExperts",
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
