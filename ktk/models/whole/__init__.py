"""Whole models between GGUF files and Hugging Face directories: one file per family, one row per architecture."""

from __future__ import annotations

from ktk.errors import CheckpointError
from ktk.models.whole.base import Source, Tensor, WholeModel
from ktk.models.whole.deepseek2 import DEEPSEEK2
from ktk.models.whole.glm4moe import GLM4_MOE
from ktk.models.whole.gpt_oss import GPT_OSS
from ktk.models.whole.granitemoe import GRANITE_MOE
from ktk.models.whole.minimax_m2 import MINIMAX_M2
from ktk.models.whole.mixtral import MIXTRAL
from ktk.models.whole.olmoe import OLMOE
from ktk.models.whole.qwen import QWEN2_MOE, QWEN3_MOE

# general.architecture -> its row; commonest first.
WHOLE_MODELS: dict[str, WholeModel] = {
    row.architecture: row
    for row in (
        QWEN3_MOE,
        DEEPSEEK2,
        MIXTRAL,
        GPT_OSS,
        GLM4_MOE,
        QWEN2_MOE,
        MINIMAX_M2,
        OLMOE,
        GRANITE_MOE,
    )
}


def whole_model(architecture: str, where: str) -> WholeModel:
    """The row of ``general.architecture``; CheckpointError lists the known ones."""
    if architecture not in WHOLE_MODELS:
        raise CheckpointError(
            f"{where}: architecture {architecture!r}: ktk runs whole models of {', '.join(WHOLE_MODELS)}; of others the "
            "experts alone (ktk.load_gguf), or with the rest from a Hugging Face directory (load_model(directory, gguf=file))"
        )
    return WHOLE_MODELS[architecture]


__all__ = ["WHOLE_MODELS", "Source", "Tensor", "WholeModel", "whole_model"]
