"""Tiny random models and experts modules of transformers, and what their tests compare;
for tests.
"""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)
from transformers.integrations.moe import use_experts_implementation

from ktk.experts.activation import Activation
from ktk.experts.stored import ExpertWeights
from ktk.integration.transformers.experts import find_experts, handle_of, weight_names
from ktk.reference.moe import ExactExperts

SEED = 7

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "vocab_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOKENS: dict[str, Any] = {
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, Any] = {
    "qwen3_moe": Qwen3MoeConfig(
        **SHAPE,
        **TOKENS,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=2,
    ),
    "mixtral": MixtralConfig(
        **SHAPE,
        **TOKENS,
        num_key_value_heads=2,
        intermediate_size=80,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "deepseek_v3": DeepseekV3Config(
        **SHAPE,
        **TOKENS,
        num_key_value_heads=4,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    ),
    "gpt_oss": GptOssConfig(
        **SHAPE,
        **TOKENS,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}


def make_model(family: str, dtype: torch.dtype = torch.float32, **changes: object) -> Any:
    """A random two-layer model whose weights are wide enough for experts and router to matter."""
    config = copy.deepcopy(FAMILIES[family])
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.15)
            elif name.endswith("bias"):
                weight.normal_(0, 0.1)
            weight.copy_(weight.bfloat16())  # bf16 and fp32 models then hold the same numbers
    model.generation_config.eos_token_id = None
    return model.to(dtype)


def prompt() -> torch.Tensor:
    return torch.randint(3, 256, (2, 11), generator=torch.Generator().manual_seed(SEED))


@torch.no_grad()
def run(model: Any, implementation: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 logits of the prompt, and twelve greedy tokens."""
    if implementation is not None:
        model.set_experts_implementation(implementation)
    ids = prompt()
    logits = model(ids).logits.float()
    mask = torch.ones_like(ids)
    tokens = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return logits, tokens


def experts_of(model: torch.nn.Module) -> list[Any]:
    return [module for _, module in find_experts(model)]


def routing(module: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random hidden states, ids and weights for an experts module; two slots per token."""
    generator = torch.Generator().manual_seed(SEED)
    if module.down_proj.numel():
        num_experts, width = (
            module.down_proj.shape[0],
            module.down_proj.shape[2 if module.is_transposed else 1],
        )
    else:
        handle = handle_of(module)
        assert handle is not None
        spec = handle.moe.spec
        num_experts, width = spec.num_experts, spec.hidden_size
    x = torch.randn(tokens, width, generator=generator)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=generator)
    return x, ids, weights


def put_weights(module: Any, expert: int, weights: ExpertWeights) -> None:
    """Give a float experts module one expert's matrices."""
    turn = np.transpose if module.is_transposed else np.asarray
    first = weights.up
    if module.has_gate:
        assert weights.gate is not None
        both = [weights.gate, weights.up]
        first = (
            np.concatenate(both)
            if module.is_concatenated
            else np.stack(both, 1).reshape(-1, first.shape[1])
        )
    with torch.no_grad():
        getattr(module, weight_names(module)[0])[expert] = torch.from_numpy(turn(first).copy())
        module.down_proj[expert] = torch.from_numpy(turn(weights.down).copy())


def restore_dequantised(module: torch.nn.Module, experts: ExactExperts) -> None:
    """Write the packed codes' values back into a float module's parameters."""
    for e in range(experts.spec.num_experts):
        put_weights(module, e, experts.dequantised(e))


# transformers' class, its config, the activation ktk must find (None: the module's own is called)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_hidden_size": 32,
    "moe_latent_size": None,
    "post_norm_eps": 1e-6,
}
MODULES: dict[str, tuple[dict[str, Any], Activation | None]] = {
    "mixtral.MixtralExperts": ({"hidden_act": "silu"}, Activation.silu()),
    "lfm2_moe.Lfm2MoeExperts": ({}, Activation.silu()),
    "beam.BeamExperts": ({"hidden_act": "silu"}, Activation.silu()),
    "gemma4.Gemma4TextExperts": (
        {"hidden_activation": "gelu_pytorch_tanh"},
        Activation.gelu_tanh(),
    ),
    "gpt_oss.GptOssExperts": ({"swiglu_alpha": 1.702, "swiglu_limit": 7.0}, Activation.swigluoai()),
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": (
        {"swiglu_alpha": 1.5, "swiglu_limit": 3.0},
        Activation.swigluoai(1.5, 3.0),
    ),
    "minimax_m3_vl.MiniMaxM3VLExperts": (
        {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        Activation.swigluoai(),
    ),
    "deepseek_v4.DeepseekV4Experts": (
        {"hidden_act": "silu", "swiglu_limit": 2.0},
        Activation.silu(2.0),
    ),
    "glm5_next.Glm5NextTextExperts": ({"swiglu_limit": 2.0}, Activation.silu(2.0)),
    "hy_v4.HYV4Experts": ({"swiglu_limit": 10.0}, Activation.silu(10.0)),
    "nemotron_h.NemotronHExperts": ({"mlp_hidden_act": "relu2"}, Activation.relu2()),
    "muse_spark.MuseSparkExperts": ({"hidden_act": "silu"}, Activation.silu()),
    "qwen3_moe.Qwen3MoeExperts": ({"hidden_act": "gelu"}, None),
}


def make_module(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    package, _, class_name = name.partition(".")
    try:
        source = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    except ImportError:
        pytest.skip(f"this transformers has no {package}")
    config = SimpleNamespace(**SIZES, **MODULES[name][0], _experts_implementation="eager")
    module = getattr(source, class_name)(config).eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
    return module.to(dtype)


class _OddExperts(torch.nn.Module):
    """What is_concatenated=False and an activation of its own look like together."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = torch.nn.Parameter(torch.randn(4, 32, 96) * 0.3)
        self.gate_up_proj_bias = torch.nn.Parameter(torch.randn(4, 96))
        self.down_proj = torch.nn.Parameter(torch.randn(4, 48, 32) * 0.3)
        self.down_proj_bias = torch.nn.Parameter(torch.randn(4, 32))

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        return torch.tanh(gate) * up + 0.1 * gate

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for t in range(len(x)):
            for k in range(ids.shape[1]):
                e = ids[t, k]
                if e < self.num_experts:
                    h = self._apply_gate(x[t] @ self.gate_up_proj[e] + self.gate_up_proj_bias[e])
                    out[t] += weights[t, k] * (h @ self.down_proj[e] + self.down_proj_bias[e])
        return out


OddExperts = use_experts_implementation(is_transposed=True, is_concatenated=False, has_bias=True)(
    _OddExperts
)


def odd_module() -> torch.nn.Module:
    torch.manual_seed(SEED)
    return OddExperts(SimpleNamespace(_experts_implementation="eager")).eval()


def assert_near_eager(module: Any, tokens: int = 19) -> None:
    """ktk's result of an experts module is its own, up to 2e-6 of the largest."""
    x, ids, weights = routing(module, tokens)
    with torch.no_grad():
        module.config._experts_implementation = "eager"
        want = module(x * 3, ids, weights)
        module.config._experts_implementation = "ktk"
        got = module(x * 3, ids, weights)
    assert got.dtype == want.dtype
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()
