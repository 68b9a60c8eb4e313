"""How router logits become weights, by a GGUF file and its architecture."""

from __future__ import annotations

from dataclasses import dataclass

from ktk.models.gguf.architecture import GgufArchitecture
from ktk.models.gguf.config import GgufConfig

# {arch}.expert_gating_func
GATING = {1: "softmax", 2: "sigmoid", 3: "softmax_of_top_k", 4: "sqrt_softplus"}


@dataclass(frozen=True)
class Routing:
    """How a caller turns router logits into topk_weights; None where neither file nor architecture
    says.

    expert_gating_func : "softmax", "sigmoid", "softmax_of_top_k" or "sqrt_softplus".
    expert_weights_norm : the chosen weights are divided by their sum. expert_weights_scale : then
        multiplied by it.
    weighs_input : the weights multiply the experts' *input* (Llama 4): call MoE with rows
        multiplied beforehand, one for each token and slot, and topk_weights of 1. Weighting the
        output gives other numbers.
    """

    expert_gating_func: str | None
    expert_weights_norm: bool | None = None
    expert_weights_scale: float | None = None
    expert_group_count: int | None = None
    expert_group_used_count: int | None = None
    weighs_input: bool = False


def find_routing(config: GgufConfig, implied: GgufArchitecture) -> Routing:
    """A file's routing. Raises CheckpointError."""
    code = config.number("expert_gating_func")
    if code is not None and code != 0 and code not in GATING:
        raise config.error(f"{config.key('expert_gating_func')} is {code}: ktk knows {GATING}")
    norm = config.entry("expert_weights_norm")
    return Routing(
        GATING[int(code)] if code else implied.gating,
        implied.is_normalised if norm is None else norm,
        config.number("expert_weights_scale") or None,
        config.size("expert_group_count"),
        config.size("expert_group_used_count"),
        implied.weighs_input,
    )
