"""Tiny GGUF files of experts as every family has them,
and what their metadata and architecture say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type

from ktk.experts.activation import Activation
from ktk.models.gguf.routing import Routing
from make.gguf_files import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    expert_shapes,
    quantised,
    sizes,
    stacked,
    write_gguf,
)

SILU, FUSED = Activation.silu(), ("gate_up", "down")
# id -> (architecture, projections as written, further metadata, activation, routing)
FAMILIES: dict[str, tuple[str, tuple[str, ...], dict[str, Any], Activation, Routing]] = {
    "mixtral": ("llama", ("gate", "up", "down"), {}, SILU, Routing("softmax", True)),
    "qwen2moe": ("qwen2moe", ("gate", "up", "down"), {}, SILU, Routing("softmax", False)),
    "qwen3moe": ("qwen3moe", ("gate", "up", "down"), {}, SILU, Routing("softmax", True)),
    "qwen3next": ("qwen3next", FUSED, {}, SILU, Routing("softmax", True)),
    "kimi-k2": (
        "deepseek2",
        ("gate", "up", "down"),
        {
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "expert_group_count": 1,
            "expert_group_used_count": 1,
            "leading_dense_block_count": 1,
        },
        SILU,
        Routing("sigmoid", True, 2.5, 1, 1),
    ),
    "deepseek-v2": ("deepseek2", ("gate", "up", "down"), {}, SILU, Routing("softmax", False)),
    "glm4moe": ("glm4moe", ("gate", "up", "down"), {}, SILU, Routing("sigmoid", None)),
    "gpt-oss": (
        "gpt-oss",
        ("gate", "up", "down"),
        {},
        Activation.swigluoai(),
        Routing("softmax_of_top_k", False),
    ),
    "minimax-m2": (
        "minimax-m2",
        ("gate", "up", "down"),
        {"expert_gating_func": 2},
        SILU,
        Routing("sigmoid", True),
    ),
    "llama4": (
        "llama4",
        ("gate", "up", "down"),
        {},
        SILU,
        Routing("sigmoid", False, weighs_input=True),
    ),
    "olmoe": ("olmoe", ("gate", "up", "down"), {}, SILU, Routing("softmax", False)),
    "granitemoe": ("granitemoe", ("gate", "up", "down"), {}, SILU, Routing("softmax", True)),
    "grok": ("grok", ("gate", "up", "down"), {}, Activation.gelu_tanh(), Routing("softmax", True)),
    "gemma4": ("gemma4", FUSED, {}, Activation.gelu_tanh(), Routing("softmax", True)),
    "nemotron-h": ("nemotron_h_moe", ("up", "down"), {}, Activation.relu2(), Routing(None)),
    "deepseek4": (
        "deepseek4",
        ("gate", "up", "down"),
        {"swiglu_clamp_exp": [0.0, 10.0, 10.0]},
        Activation.silu(10.0),
        Routing(None),
    ),
}


def family_file(path: Path, family: str, layers: tuple[int, ...] = (1, 2)) -> tuple[Path, dict]:
    """A tiny model of a family, its first layer dense; and the tensors in it."""
    architecture, parts, more, _, _ = FAMILIES[family]
    rng = np.random.default_rng(3)
    tensors: dict[str, Any] = stacked(rng, layers, parts)
    tensors["blk.0.ffn_gate.weight"] = rng.standard_normal((INTERMEDIATE, HIDDEN), np.float32)
    tensors["blk.1.ffn_gate_inp.weight"] = rng.standard_normal((EXPERTS, HIDDEN), np.float32)
    tensors["blk.1.ffn_gate_shexp.weight"] = rng.standard_normal((INTERMEDIATE, HIDDEN), np.float32)
    return write_gguf(path, architecture, tensors, sizes(architecture, **more)), tensors


def singles(rng: np.random.Generator, order: str) -> dict[str, Any]:
    """Mixtral's old names; ``order`` tells how the tensors lie."""
    names = [
        f"blk.0.ffn_{part}.{e}.weight" for e in range(EXPERTS) for part in ("gate", "up", "down")
    ]
    if order == "uneven":
        names = [names[i] for i in np.random.default_rng(5).permutation(len(names))]
    elif order == "descending":
        names.reverse()
    return {
        name: quantised(rng, Type.Q8_0, *expert_shapes(name.split("_")[1].split(".")[0])[1:])
        for name in names
    }
