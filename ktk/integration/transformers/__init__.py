"""Hugging Face transformers with its experts on ktk. Importing this, or using ``ktk.KtkConfig``,
registers everything:

- ``from_pretrained(directory, quantization_config=ktk.KtkConfig(...))`` packs a float checkpoint's
  experts while it is read, one parameter of one layer at a time; ``from_pretrained(directory)``
  loads what ``ktk convert`` or ``save_pretrained`` wrote;
- ``load_model(directory)`` takes those, and checkpoints quantised as fp8, MXFP4, GPTQ or
  compressed-tensors int4;
- ``use_ktk(model, weight_format="int8")`` packs a loaded model in place;
- the experts function "ktk": ``model.set_experts_implementation("ktk")`` packs each layer's float
  experts, exactly, on its first call.

The model keeps its own modules; only what an experts module computes is replaced. Gradients pass
through the experts, whose weights are frozen. Source: transformers 5.23, integrations/moe.py and
quantizers/base.py.
"""

from __future__ import annotations

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError(
        "ktk.integration.transformers needs transformers 5.20 or newer: pip install "
        "'transformers>=5.20'"
    ) from error
if tuple(map(int, _transformers.__version__.split(".")[:2])) < (5, 20):
    raise ImportError(
        f"transformers {_transformers.__version__} is too old for ktk.integration.transformers: "
        f"must be version 5.20 or newer; pip install --upgrade transformers"
    )

from ktk.integration.transformers.activations import recognise
from ktk.integration.transformers.attention import use_attention
from ktk.integration.transformers.decoder_layers import fuse_decoder_layers
from ktk.integration.transformers.experts import NAME
from ktk.integration.transformers.forward import ktk_experts_forward
from ktk.integration.transformers.linear import replace_linears, share_linears
from ktk.integration.transformers.loading import (
    PackedModule,
    load_model,
    packed_modules,
    use_ktk,
)
from ktk.integration.transformers.names import ALL_EXPERTS_FUNCTIONS
from ktk.integration.transformers.quantizer import KtkConfig, KtkHfQuantizer

ALL_EXPERTS_FUNCTIONS.register(NAME, ktk_experts_forward)

__all__ = [
    "KtkConfig",
    "KtkHfQuantizer",
    "PackedModule",
    "fuse_decoder_layers",
    "ktk_experts_forward",
    "load_model",
    "packed_modules",
    "recognise",
    "replace_linears",
    "share_linears",
    "use_attention",
    "use_ktk",
]
