"""Tiny random models with towers beside a language model with experts,
written to disk with a tokenizer; for tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from make.serving import SEED, make_tokenizer

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
EYES: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 32,
}
# model_type -> (fields of its text config, fields of its vision config, its own)
WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl_moe": (
        {"num_experts": 8, "rope_parameters": {**ROTARY, "mrope_section": [4, 2, 2]}},
        {**EYES, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        {},
    ),
    "glm4v_moe": (
        {
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "rope_parameters": {**ROTARY, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
        },
        {**EYES, "image_size": 16},
        {},
    ),
    "qwen3_5_moe": (
        {
            **LINEAR,
            "num_experts": 8,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": {
                **ROTARY,
                "mrope_section": [1, 1, 0],
                "partial_rotary_factor": 0.25,
            },
        },
        {**EYES, "num_position_embeddings": 16},
        {},
    ),
    "gemma4": (
        {
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "hidden_size_per_layer_input": 0,
            "global_head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 64,
            "vocab_size_per_layer_input": 384,
        },
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 16,
            "num_key_value_heads": 2,
            "patch_size": 4,
        },
        {"audio_config": None},
    ),
    "llava": (
        {"model_type": "qwen3_moe", "num_experts": 8, "rope_parameters": ROTARY},
        CLIP,
        {},
    ),
}


def make_config(kind: str, vocab_size: int = 384, end: int = 2) -> Any:
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    text, vision, own = WRAPPERS[kind]
    written = {**TEXT, "vocab_size": vocab_size, "eos_token_id": end, **text}
    made: Any = CONFIG_MAPPING[kind]
    return made(text_config=written, vision_config=vision, tie_word_embeddings=False, **own)


def make_wrapper(kind: str, directory: Path, dtype: str = "float32") -> Path:
    """The whole model, written by transformers as a checkpoint of the family is."""
    import torch
    from transformers import AutoModelForMultimodalLM

    tokenizer = make_tokenizer()
    config = make_config(kind, len(tokenizer), tokenizer.eos_token_id)
    torch.manual_seed(SEED)
    model = AutoModelForMultimodalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.15)
            weight.copy_(weight.bfloat16())  # bf16 and fp32 models then hold the same numbers
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
