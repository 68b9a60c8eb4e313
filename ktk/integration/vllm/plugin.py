"""The entry point of ``vllm.general_plugins``: each of vLLM's processes calls ``register``."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ktk.checkpoint.packed import QUANT_METHOD
from ktk.integration.vllm.experts import KtkExpertsMethod
from ktk.integration.vllm.options import Options


class KtkQuantization(QuantizationConfig):
    """``quantization="ktk"``: routed experts by ktk, all else as vLLM runs it unquantised.

    said : a model's quantization_config, {} if it has none.
    """

    def __init__(self, said: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.said = said or {}
        self.directory: str | None = None

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # of a GPU: it needs none

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> KtkQuantization:
        return cls(config)

    def maybe_update_config(self, model_name: str, *_: Any, **__: Any) -> None:
        self.directory = model_name

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if not isinstance(layer, RoutedExperts):
            return None
        extra = get_current_vllm_config().additional_config
        over = extra.get(QUANT_METHOD) if isinstance(extra, dict) else None
        return KtkExpertsMethod(layer, Options.of(self.said, over), self.directory)


def register() -> None:
    """Make ``--quantization ktk`` known to vLLM; again does no harm."""
    register_quantization_config(QUANT_METHOD)(KtkQuantization)
