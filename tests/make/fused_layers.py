"""Random models whose decoder layers one native call decodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, DynamicCache

from ktk.integration.transformers import linear as linear_layers
from ktk.integration.transformers.decoder_layers import FusedForward
from ktk.integration.transformers.experts import find_experts
from ktk.integration.transformers.linear import replace_linears
from ktk.integration.transformers.names import CACHE
from ktk.integration.transformers.packing import pack_module
from make.families import SMALL, small_config

PROMPT, NEW = 9, 24


WINDOW = 16  # of sliding attention: passed while decoding


# What each of them has that others lack.
FUSED = {
    "qwen3_moe": "norms of heads",
    "qwen2_moe": "biases, scaled shared experts",
    "mixtral": "a sliding window",
    "olmoe": "norms of all heads",
    "glm4_moe": "partly rotated heads, sigmoid scores, correction, shared experts",
    "dots1": "shared experts, sigmoid scores",
    "gpt_oss": "sinks, a window in every other layer, biases everywhere, eager attention's masks",
    "minimax_m2": "norms of all heads, sigmoid scores",
    "ernie4_5_moe": "neighbours rotated, a correction in a module of its own",
    "granitemoe": "its router's own kind of softmax",
    "hy_v3": "sigmoid scores",
    "flex_olmo": "norms after attention and experts",
    "deepseek_v2": "latent attention, angles as complex numbers",
    "deepseek_v3": "latent attention, neighbours rotated and put apart, groups",
}


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_layers, "SMALLEST", 1)
    sizes = {
        "head_dim": 16,
        "hidden_size": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "qk_head_dim": 32,
        "v_head_dim": 16,
    }
    for name, value in sizes.items():
        monkeypatch.setitem(SMALL, name, value)


def make(
    kind: str, dtype: torch.dtype = torch.float32, packs_linears: bool = True, **changes: Any
) -> Any:
    """A random model whose experts and linear layers hold the same weights as ktk's panels."""
    config = small_config(kind)
    if getattr(config, "sliding_window", None):
        config.sliding_window = WINDOW
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.15)
            elif "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
            else:
                weight.normal_(0, 0.3)
    model = model.to(dtype)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "ktk"
    exact = "fp32" if dtype is torch.float32 else "bf16"
    for _, experts in find_experts(model):
        pack_module(experts, exact)
    if packs_linears:
        replace_linears(model, exact)
    return model


@torch.no_grad()
def decode(model: Any, num_tokens: int = NEW) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the logits they came from, float32 (num_tokens, vocabulary)."""
    ids = torch.randint(3, 64, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    tokens, logits = [], []
    for _ in range(num_tokens):
        out = model(ids, **{CACHE: cache}, use_cache=True)
        logits.append(out.logits[:, -1].float())
        ids = out.logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    assert cache.get_seq_length() == PROMPT + num_tokens - 1
    return tokens, torch.cat(logits)


def fused(model: Any) -> list[FusedForward]:
    layers = model.get_decoder().layers
    return [f for layer in layers if isinstance(f := layer.forward, FusedForward)]
