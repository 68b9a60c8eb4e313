"""Hugging Face transformers with its experts on ktk. Importing this registers everything:

- the experts function "ktk": ``model.set_experts_implementation("ktk")`` packs each layer's float experts,
  exactly, on its first call;
- ``use_ktk(model, weight_format="int8")`` packs all layers now and frees the float weights;
- ``AutoModelForCausalLM.from_pretrained(directory)`` loads what ``ktk convert`` wrote.

The model keeps its own modules; only what an experts module computes is replaced. Inference only.
Source: transformers 5.23, integrations/moe.py and quantizers/base.py.
"""

from __future__ import annotations

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError(
        "ktk.integration.transformers needs transformers 5.20 or newer: pip install 'transformers>=5.20'"
    ) from error
if tuple(map(int, _transformers.__version__.split(".")[:2])) < (5, 20):
    raise ImportError(
        f"transformers {_transformers.__version__} is too old for ktk.integration.transformers: "
        f"must be version 5.20 or newer; pip install --upgrade transformers"
    )

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ktk.integration.transformers.activations import recognise
from ktk.integration.transformers.experts import ktk_experts_forward
from ktk.integration.transformers.loading import (
    KtkConfig,
    KtkHfQuantizer,
    PackedModule,
    load_model,
    use_ktk,
)

ALL_EXPERTS_FUNCTIONS.register("ktk", ktk_experts_forward)

__all__ = [
    "KtkConfig",
    "KtkHfQuantizer",
    "PackedModule",
    "ktk_experts_forward",
    "load_model",
    "recognise",
    "use_ktk",
]
